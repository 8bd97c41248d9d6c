# Needs Python 3.10 or newer, make and a C++ compiler. Everything else is installed into .venv.
#
#   make demo    swap fastattn into a pretrained encoder: compare, time, write out/demo.html
#   make test    the whole test suite                make bench   the quick benchmark (ARGS="...")
#   make build   rebuild what changed in csrc        make asan    native tests under the sanitizers
#   make lint    ruff, as CI runs it                 make fmt     format Python and C++
#   make size    line budgets                        make gpu     the suite on this machine's GPU
#   make gpu-audit   what compilers make of the GPU kernels (no GPU needed): registers, spills
#   make wheel   dist/*.whl: one for every CPython from 3.10 and every torch from 2.10
#   make clean   remove what was built (.venv stays) make distclean   and .venv
#
# A machine without a GPU gets the small CPU build of torch with
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
ARGS   ?=

BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
NATIVE := $(wildcard csrc/*.* csrc/cpu/* csrc/cuda/*)
CXX_FILES = $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/cpu/*.h csrc/cpu/*.cpp csrc/cpu/*.inl csrc/cuda/* \
    tests/emulator/*.h tests/emulator/*.cpp)

.PHONY: demo test bench build asan lint fmt size gpu gpu-audit wheel clean distclean help
.DELETE_ON_ERROR:

help:
	@sed -n '3,10s/^#   //p' Makefile

demo: build
	$(BIN)/python -m fastattn demo $(ARGS)

test: build
	$(BIN)/python -m pytest -q $(ARGS)

bench: build
	$(BIN)/python -m fastattn bench --quick $(ARGS)

# ---- installing: each step leaves a stamp, so a second make is quick ------------------------------

build: $(VENV)/.built

$(VENV)/.venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
	    sys.exit(0 if v >= (3, 10) else f"fastattn needs Python 3.10 or newer, $(PYTHON) is {v[0]}.{v[1]}")'
	@echo "== making $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
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
	@$(PIP) install -q -c $(VENV)/.torch "setuptools>=77" wheel ninja "pybind11>=2.13"
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
# it watches. Leaks are off because Python itself leaks; reports go past pytest's capture.
SANITIZERS = $$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)

asan: build
	FASTATTN_BUILD=asan $(BIN)/python setup.py --quiet build_ext
	FASTATTN_CPU_LIBRARY=$(CURDIR)/build/asan/_cpu.abi3.so LD_PRELOAD="$(SANITIZERS)" \
	ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(BIN)/python -m pytest -q --capture=sys -p no:cacheprovider \
	    tests/test_native.py tests/test_cpu.py tests/test_fused.py tests/test_fused_dropout.py \
	    tests/test_fused_native.py tests/test_memory.py $(ARGS)

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

# Under ten minutes on an H200: every case on the GPU backends, then speed beside torch's kernels.
gpu: build
	@$(BIN)/python -c 'import sys, torch; \
	    sys.exit(0 if torch.cuda.is_available() else "make gpu: torch " + torch.__version__ + \
	    " sees no CUDA device here, so there is nothing to run")'
	$(BIN)/python -m fastattn info
	$(BIN)/python -m pytest -q tests/test_triton.py tests/test_triton_fused.py \
	    tests/test_triton_decode.py tests/test_gpu.py
	$(BIN)/python -m fastattn verify --quick
	$(BIN)/python -m fastattn bench gpu --device cuda --minutes 4 \
	    --vs sdpa,sdpa-flash,sdpa-efficient,sdpa-cudnn,flex \
	    --json benchmarks/results/gpu.json --md benchmarks/results/gpu.md $(ARGS)

# What Triton and nvcc make of the GPU kernels: registers, spills, shared memory, instructions.
gpu-audit: build
	TRITON_INTERPRET=0 $(BIN)/python -m fastattn.benchmarks.gpu_audit $(ARGS)
	$(BIN)/python -m fastattn.benchmarks.cuda_audit $(ARGS)

# The CUDA library is in it where nvcc is found; torch may be a CPU build.
wheel: $(VENV)/.installed
	FASTATTN_BUILD=wheel $(PIP) wheel -q --no-deps --no-build-isolation -w dist .
	@ls dist/*.whl

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	rm -f fastattn/*.so fastattn/_build.json $(VENV)/.built $(VENV)/.installed
	find fastattn kernels benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)

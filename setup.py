"""Builds fastattn's native libraries. Metadata is in pyproject.toml; ninja does the compiling.

Three libraries, each optional, so that the package installs everywhere and says what it lacks:

    fastattn/_cpu.abi3.so   the CPU kernels, on LibTorch's stable ABI: one build for torch >= 2.10
    fastattn/_cuda.abi3.so  the CUDA kernels, the same way, compiled by nvcc against any torch
    fastattn/_C.*.so        pybind11: build facts, tile schedules; no tensor operators

What was built, with what, and why the rest was not, is written to fastattn/_build.json.

Environment:
    FASTATTN_BUILD  auto  what the tools allow, the default; CUDA only where torch has CUDA, since
                          nothing else can load it
                    cpu   the CPU library, or fail; never CUDA
                    cuda  the CPU and the CUDA library, or fail; any torch will do
                    wheel  the CPU library, or fail, and the CUDA library where nvcc is, but not _C,
                          which serves one CPython only: one wheel for all of them (make wheel),
                          linked against glibc 2.28 where Python has the package ziglang
                    none  pure Python
                    asan  the CPU library under the address and undefined-behaviour sanitizers, left
                          in build/asan/_cpu.abi3.so: set FASTATTN_CPU_LIBRARY to it (make asan)
                    coverage  the same with gcov's counters, in build/coverage (make coverage)
    FASTATTN_CUDA_ARCHS  nvcc architectures of the kernels that run on sm_80 and newer, default
                    "80;90a"; what is compiled for them besides is PTX for GPUs that are newer
                    still. The sm_90 kernels are always compiled for 90a, where alone they run
    CXX, CXXFLAGS, LDFLAGS, NVCC, MAX_JOBS  as everywhere. The CUDA library serves drivers from the
                    major version of NVCC's toolkit on: a wheel for others is best made with the
                    oldest (12.0 at least) for which make gpu-audit passes

Rebuild after editing C++:  python setup.py build_ext --inplace   (compiles what changed)
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # which pip leaves out

from build_tools import (  # noqa: E402
    GLIBC,
    GLIBC_LIBRARIES,
    compiler_of,
    find_cxx,
    find_ninja,
    find_nvcc,
    find_torch,
    has_cuda,
    make_old_glibc,
    nvcc_release,
)

SUBPACKAGES = (
    *("core", "backends", "fused", "nn", "models", "hf", "flash_attn", "cli", "kernels"),
    *("benchmarks", "benchmarks.measure", "benchmarks.report", "benchmarks.compile"),
    "benchmarks.demo",
)
CUDA_FLOOR = (12, 0)  # of nvcc: the first that knows 90a and cuTensorMapEncodeTiled
CUDA_ARCHS = "80;90a"
HOPPER = "90a"  # an architecture that has no successor: its instructions are nowhere else

# The last two: GCC 12's own avx512fintrin.h needs the one, which clang does not know.
WARNINGS = [
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"),
    *("-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
]
# No -march: each instruction set is a translation unit that names its own target (csrc/cpu/
# kernels.h says why), so that one library serves every CPU of the platform.
OPTIMIZE = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
# -O1 alone makes no FMA, and every instruction set rounds alike.
QUICKLY = ["-O1", "-fexpensive-optimizations", "-ffp-contract=fast"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Builds of the CPU library for tests: what compiles them, and what links them.
INSTRUMENTED = {
    "asan": ([*QUICKLY, "-g1", "-fno-omit-frame-pointer", *SANITIZE], SANITIZE[:1]),
    "coverage": ([*QUICKLY, "--coverage"], ["--coverage"]),
}
MODES = ("auto", "cpu", "cuda", "wheel", "none", *INSTRUMENTED)
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
CXX_COMMON = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Icsrc"]


@dataclass
class Library:
    """One shared library: how ninja makes it, or why it cannot be made."""

    name: str
    sources: list[str] = field(default_factory=list)  # relative to ROOT
    rule: str = "cxx"
    flags: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    flags_of: Callable[[str], list[str]] = lambda source: []  # those of one source
    stable: bool = True
    why_not: str | None = None


# ---- the plan: three libraries, each with its sources or its reason ---------------------------


class Plan:
    """What to build on this machine; `facts` is what _build.json records."""

    def __init__(self, mode: str) -> None:
        if mode not in MODES:
            raise SystemExit(f"FASTATTN_BUILD is {mode!r}; it must be one of {', '.join(MODES)}")
        self.mode = mode
        self.folder = Path("build", mode if mode in INSTRUMENTED else "native")
        self.ninja, self.nvcc = find_ninja(), find_nvcc()
        self.nvcc_release = nvcc_release(self.nvcc)
        has_zig = importlib.util.find_spec("ziglang") is not None
        self.old_glibc = self.folder / f"glibc-{GLIBC}" if mode == "wheel" and has_zig else None
        self.archs = [a for a in re.split("[; ,]+", os.environ.get("FASTATTN_CUDA_ARCHS", "")) if a]
        self.archs = self.archs or CUDA_ARCHS.split(";")
        cxx, torch = find_cxx(), find_torch()
        self.cxx, cxx_version = (["c++"], None) if isinstance(cxx, str) else cxx
        self.torch, torch_version = (None, None) if isinstance(torch, str) else torch
        common = self._why_nothing(cxx, torch)
        self.libraries = [self._cpu(common), self._cuda(common), self._module(common)]
        self.facts = {
            "mode": mode,
            "built": [lib.name for lib in self.libraries if not lib.why_not],
            "missing": {lib.name: lib.why_not for lib in self.libraries if lib.why_not},
            "compiler": cxx_version,
            "flags": shlex.join(self._tuning()),
            "torch": torch_version,
            "python": sysconfig.get_python_version(),
            "platform": sysconfig.get_platform(),
            "glibc": GLIBC if self.old_glibc else None,
            "nvcc": self.nvcc,
            "nvcc_release": ".".join(map(str, self.nvcc_release or ())) or None,
            "cuda_archs": self.archs if not self.libraries[1].why_not else [],
        }

    def _why_nothing(self, cxx, torch) -> str | None:
        if self.mode == "none":
            return "built with FASTATTN_BUILD=none"
        if not sys.platform.startswith("linux"):
            return f"native libraries are built on Linux only, not on {sys.platform}"
        if isinstance(cxx, str):
            return cxx
        if isinstance(torch, str):
            return torch
        return None if self.ninja else "ninja was not found (pip install ninja)"

    def insist(self) -> None:
        """Modes that name a library fail when it cannot be built; auto warns and goes on. Not for
        metadata and source distributions, which need no torch."""
        required = {
            "cpu": ["_cpu"], "cuda": ["_cpu", "_cuda"], "wheel": ["_cpu"],
            **{mode: ["_cpu"] for mode in INSTRUMENTED},
        }.get(self.mode, [])  # fmt: skip
        for lib in self.libraries:
            if lib.why_not and lib.name in required:
                raise SystemExit(f"FASTATTN_BUILD={self.mode} needs {lib.name}: {lib.why_not}")

    def _tuning(self) -> list[str]:
        return INSTRUMENTED[self.mode][0] if self.mode in INSTRUMENTED else OPTIMIZE

    def _torch_flags(self) -> tuple[list[str], list[str]]:
        include = self.torch / "include"
        includes = ["-isystem", str(include), "-isystem", f"{include}/torch/csrc/api/include"]
        # No rpath: torch is imported first, so its libraries are already loaded. With -z defs, a
        # symbol that no library named here has fails to link, and not to load elsewhere.
        links = [f"-L{self.torch / 'lib'}", "-Wl,-z,defs", "-Wl,--as-needed"]
        links += ["-Wl,-s"] if self.mode == "wheel" else []
        if self.old_glibc:  # before the compiler's own: the first library that has a symbol counts
            links += [f"-L{self.old_glibc}", *(f"-l:{name}" for name in GLIBC_LIBRARIES)]
        links += ["-ltorch_cpu", "-ldl"]
        return includes, links

    def _for_old_glibc(self) -> list[Path]:
        return [ROOT / "csrc/manylinux.cpp"] if self.old_glibc else []

    def _cpu(self, why_not: str | None) -> Library:
        sources = sorted(ROOT.glob("csrc/cpu/*.cpp"))
        why_not = why_not or (
            None if sources else "csrc/cpu/ops_attention.cpp is not in this source tree"
        )
        if not why_not and self.mode in INSTRUMENTED and compiler_of(self.cxx)[0] != "GCC":
            why_not = f"make {self.mode} uses GCC's runtime or gcov; set CXX=g++"
        if why_not:
            return Library("_cpu", why_not=why_not)
        includes, links = self._torch_flags()
        links = [*links, *INSTRUMENTED.get(self.mode, ([], []))[1]]
        flags = [*CXX_COMMON, *self._tuning(), *STABLE_ABI, *WARNINGS, *includes]
        sources += self._for_old_glibc()
        return Library("_cpu", relative(sources), flags=flags, links=links)

    def _cuda(self, why_not: str | None) -> Library:
        sources = sorted(ROOT.glob("csrc/cuda/*.cu"))
        if not why_not and self.mode in ("cpu", *INSTRUMENTED):
            why_not = f"built with FASTATTN_BUILD={self.mode}"
        elif not why_not and not sources:
            why_not = "this version has no CUDA kernels"
        elif not why_not and not self.nvcc:
            why_not = "nvcc was not found"
        elif not why_not and (self.nvcc_release or (0, 0)) < CUDA_FLOOR:
            found = ".".join(map(str, self.nvcc_release or ("unknown",)))
            why_not = f"nvcc is {found}; accepted is {CUDA_FLOOR[0]}.{CUDA_FLOOR[1]} or newer"
        elif not why_not and self.mode == "auto" and not has_cuda(self.torch):
            why_not = "this torch has no CUDA (FASTATTN_BUILD=cuda builds for another torch)"
        if why_not:
            return Library("_cuda", why_not=why_not)
        includes, links = self._torch_flags()
        host = ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
        flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", "-Icsrc"]
        flags = [*flags, *host, *STABLE_ABI, "-DUSE_CUDA", *includes]
        links = [link.replace("-Wl,", "--linker-options=", 1) for link in links]
        # Static, since torch's own is another for each major version of CUDA: a library that names
        # libcudart.so.13 does not load beside torch 2.10, nor in a torch without CUDA.
        links = ["-cudart", "static", *links]
        sources += self._for_old_glibc()
        return Library("_cuda", relative(sources), "nvcc", flags, links, self._gencodes)

    def _gencodes(self, source: str) -> list[str]:
        """Machine code for each architecture, and PTX of the oldest that newer GPUs can run."""
        archs = [HOPPER] if source.endswith("_sm90.cu") else self.archs
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        if portable := sorted((a for a in archs if a.isdigit()), key=int)[:1]:
            codes.append(f"-gencode=arch=compute_{portable[0]},code=compute_{portable[0]}")
        return codes

    def _module(self, why_not: str | None) -> Library:
        source = ROOT / "csrc/module.cpp"
        header = Path(sysconfig.get_paths()["include"], "Python.h")
        pybind11 = importlib.util.find_spec("pybind11")
        if not why_not and self.mode in ("wheel", *INSTRUMENTED):
            why_not = f"built with FASTATTN_BUILD={self.mode}"
        elif not why_not and not header.exists():
            why_not = f"Python's headers are not installed ({header} is missing)"
        elif not why_not and pybind11 is None:
            why_not = "pybind11 was not importable at build time"
        elif not why_not and not source.exists():
            why_not = "csrc/module.cpp is not in this source tree"
        if why_not:
            return Library("_C", why_not=why_not, stable=False)
        includes = ["-isystem", str(header.parent)]
        includes += ["-isystem", str(Path(pybind11.origin).parent / "include")]
        flags = [*CXX_COMMON, "-O2", *WARNINGS, *includes]
        return Library("_C", relative([source]), flags=flags, stable=False)

    # ---- ninja ----

    def output(self, lib: Library) -> Path:
        return ROOT / self.folder / (f"{lib.name}.abi3.so" if lib.stable else f"{lib.name}.so")

    def write_ninja(self) -> Path:
        """build.ninja, its paths relative to the source tree: a moved tree needs no rebuild."""
        extra = {name: os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS")}
        lines = [
            "ninja_required_version = 1.5",
            f"builddir = {self.folder}",
            f"cxx = {ninja_words(self.cxx)}",
            f"nvcc = {ninja_words([self.nvcc or 'nvcc'])}",
            "rule cxx",
            f"  command = $cxx -MMD -MF $out.d $flags {extra['CXXFLAGS']} -c $in -o $out",
            *("  depfile = $out.d", "  deps = gcc", "  description = C++  $in"),
            "rule nvcc",
            "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out",
            *("  depfile = $out.d", "  deps = gcc", "  description = CUDA $in"),
            "rule link_cxx",
            f"  command = $cxx -shared $in -o $out $links {extra['LDFLAGS']}",
            "  description = link $out",
            "rule link_nvcc",
            *("  command = $nvcc -shared $in -o $out $links", "  description = link $out"),
        ]
        for lib in self.wanted():
            objects = []
            for source in lib.sources:
                objects.append(f"{self.folder}/{lib.name}/{source.replace('/', '_')}.o")
                lines.append(f"build {objects[-1]}: {lib.rule} {source}")
                lines.append(f"  flags = {ninja_words([*lib.flags, *lib.flags_of(source)])}")
            output = self.output(lib).relative_to(ROOT)
            lines.append(f"build {output}: link_{lib.rule} {' '.join(objects)}")
            lines.append(f"  links = {ninja_words(lib.links)}")
        path = ROOT / self.folder / "build.ninja"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
        return path

    def wanted(self) -> list[Library]:
        return [lib for lib in self.libraries if not lib.why_not]

    def compile(self) -> None:
        if self.old_glibc:
            make_old_glibc(ROOT / self.old_glibc)
        elif self.mode == "wheel":
            print("fastattn: the wheel will need a glibc as new as this machine's, because ziglang "
                  "was not found (pip install ziglang)", file=sys.stderr)  # fmt: skip
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [self.ninja, "-f", str(self.write_ninja()), "-j", jobs]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            raise SystemExit("compiling failed, see above (FASTATTN_BUILD=none installs without)")


def ninja_words(words: list[str]) -> str:
    """Words of a command in build.ninja: quoted for the shell, and each $ doubled for ninja."""
    return shlex.join(words).replace("$", "$$")


def relative(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


# ---- setuptools -------------------------------------------------------------------------------


class BuildNative(build_ext):
    """Compiles with ninja, then puts each library where setuptools expects that extension."""

    def build_extensions(self) -> None:
        PLAN.compile()
        for lib in PLAN.wanted():
            if PLAN.mode in INSTRUMENTED:  # stays in build/, for the tests that name it
                print(f"built {PLAN.output(lib)}")
                continue
            target = Path(self.get_ext_fullpath(f"fastattn.{lib.name}"))
            target.parent.mkdir(parents=True, exist_ok=True)
            self.copy_file(str(PLAN.output(lib)), str(target))

    def run(self) -> None:
        PLAN.insist()
        super().run()
        if self.inplace and not self.editable_mode and PLAN.mode not in INSTRUMENTED:
            write_facts(ROOT / "fastattn")


class BuildPython(build_py):
    """Adds _build.json beside the Python files: in the wheel, or in the tree when editable."""

    def run(self) -> None:
        PLAN.insist()
        if PLAN.mode == "wheel":  # all that lies there is packed, that of earlier builds too
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        if PLAN.mode not in INSTRUMENTED:
            folder = ROOT if self.editable_mode else Path(self.build_lib)
            write_facts(folder / "fastattn")
        if self.editable_mode:
            show_to_checkers(Path(self.get_finalized_command("install").install_lib))

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        modules = super().find_package_modules(package, package_dir)
        return [x for x in modules if not x[1].startswith(("test_", "conftest"))]


def show_to_checkers(site: Path) -> None:
    """Gives the environment a plain path to the package: type checkers run no import hooks, which
    are all that an editable install has. Nothing else of the tree is in the folder."""
    folder = ROOT / "build/editable"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fastattn").unlink(missing_ok=True)
    (folder / "fastattn").symlink_to("../../fastattn")
    (site / "fastattn.pth").write_text(f"{folder}\n")


def write_facts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build.json").write_text(json.dumps(PLAN.facts, indent=2) + "\n")
    for name, reason in PLAN.facts["missing"].items():
        print(f"fastattn: {name} is not built: {reason}", file=sys.stderr)


def readme() -> str:
    """README.md for a page outside the repository, where a relative link would lead nowhere: the
    name of the file stays, in parentheses."""
    link = re.compile(r"\[([^]\n]+)\]\((?!\w+:)([^)#\s]+)[^)\s]*\)")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return link.sub(lambda x: x[2] if x[1] == x[2] else f"{x[1]} ({x[2]})", text)


if "$" in str(ROOT):
    raise SystemExit(f"fastattn: setuptools cannot build in {ROOT}: move it to a path without $")
if not os.access(ROOT, os.W_OK):
    raise SystemExit(
        f"fastattn: {ROOT} cannot be written, and building writes build/ and fastattn.egg-info "
        "into it: copy it to a folder of yours and install from there"
    )
PLAN = Plan(os.environ.get("FASTATTN_BUILD") or "auto")

setup(
    long_description=readme(),
    long_description_content_type="text/markdown",
    packages=["fastattn", *(f"fastattn.{name}" for name in SUBPACKAGES)],
    package_dir={"fastattn.kernels": "kernels", "fastattn.benchmarks": "benchmarks"},
    package_data={"fastattn": ["py.typed"]},
    include_package_data=False,
    ext_modules=[
        Extension(f"fastattn.{lib.name}", lib.sources, py_limited_api=lib.stable, optional=True)
        for lib in PLAN.wanted()
    ],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build": {"build_base": "build/wheel"}}
    if PLAN.mode == "wheel"
    else {},
)

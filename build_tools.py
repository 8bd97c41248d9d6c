"""What the machine has to build with: compilers, ninja, torch, nvcc, an older glibc. For setup.py.

A function that finds nothing usable gives the sentence that says why.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILERS = {"GCC": 12, "clang": 14}  # first versions with all that the kernels use
TORCH_FLOOR = (2, 10)  # first release whose stable ABI has parallel_for
GLIBC = "2.28"  # the oldest that a wheel serves, and that torch's wheels do: manylinux_2_28
GLIBC_LIBRARIES = ("libm.so.6", "libpthread.so.0", "libdl.so.2", "librt.so.1", "libc.so.6")


def first_line(command: list[str]) -> str | None:
    """First line a program prints, or None when it cannot be run."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().split("\n")[0] if run.returncode == 0 else None


def compiler_of(command: list[str]) -> tuple[str, int] | None:
    """("GCC" or "clang", major version), by what it defines; None when it cannot be run."""
    try:
        run = subprocess.run(
            [*command, "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    macros = dict(re.findall(r"#define (__clang_major__|__GNUC__) (\d+)", run.stdout))
    if "__clang_major__" in macros:  # clang defines __GNUC__ too
        return "clang", int(macros["__clang_major__"])
    return ("GCC", int(macros["__GNUC__"])) if macros else None


def find_cxx() -> tuple[list[str], str] | str:
    """(command, version line) of a C++ compiler, or the sentence that says why there is none."""
    wanted = os.environ.get("CXX")
    too_old = None
    for command in [shlex.split(wanted)] if wanted else [["g++"], ["c++"], ["clang++"]]:
        found = compiler_of(command)
        if found is None:
            continue
        name, version = found
        if version >= COMPILERS[name]:
            return command, first_line([*command, "--version"]) or f"{name} {version}"
        too_old = too_old or f"{shlex.join(command)} is {name} {version}"
    accepted = " and ".join(f"{name} {floor} or newer" for name, floor in COMPILERS.items())
    if too_old:
        return f"{too_old}; accepted are {accepted} (CXX names another)"
    if wanted:
        return f"CXX={wanted} cannot be run as a C++ compiler"
    return "no C++ compiler (g++, c++ or clang++) was found"


def find_ninja() -> str | None:
    try:
        import ninja
    except ImportError:
        return shutil.which("ninja")
    own = Path(ninja.BIN_DIR, "ninja")
    return str(own) if own.is_file() else shutil.which("ninja")


def find_torch() -> tuple[Path, str] | str:
    """(package folder, version) of torch without importing it, or why it will not do."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "torch was not importable at build time (install with --no-build-isolation)"
    version = importlib.metadata.version("torch")
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < TORCH_FLOOR:
        return f"torch {version} is older than {'.'.join(map(str, TORCH_FLOOR))}"
    return Path(spec.origin).parent, version


def has_cuda(torch: Path) -> bool:
    """Whether the torch in this package folder was built with CUDA."""
    version = (torch / "version.py").read_text()
    return re.search(r"^cuda\b[^=]*= *['\"]", version, re.MULTILINE) is not None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    for path in (os.environ.get("NVCC"), shutil.which("nvcc"), f"{home}/bin/nvcc"):
        if path and shutil.which(path):
            return path
    return None


def nvcc_release(nvcc: str | None) -> tuple[int, ...] | None:
    """(13, 0), say. A library runs with drivers from its toolkit's major version on."""
    try:
        run = subprocess.run([nvcc or "nvcc", "--version"], capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", run.stdout)
    return tuple(map(int, found.groups())) if found else None


def make_old_glibc(folder: Path) -> None:
    """Puts GLIBC's libraries into `folder`: its symbols and their versions, without code, as zig
    writes them to link with. Its compiler is not used: the C++ library that comes with it is
    another than torch's, so exceptions would not reach torch."""
    if (folder / GLIBC_LIBRARIES[-1]).exists():
        return
    with tempfile.TemporaryDirectory() as cache:
        source = Path(cache, "empty.c")
        source.touch()
        target = f"{platform.machine()}-linux-gnu.{GLIBC}"
        command = [sys.executable, "-m", "ziglang", "build-lib", "-dynamic", "-lc", source]
        # A library with nothing of zig's own in it, which would be compiled for it.
        command += ["-fno-compiler-rt", "-fno-ubsan-rt", "-target", target]
        caches = {f"ZIG_{which}_CACHE_DIR": cache for which in ("GLOBAL", "LOCAL")}
        run = subprocess.run(command, cwd=cache, env={**os.environ, **caches})
        made = next(Path(cache).glob(f"o/*/{GLIBC_LIBRARIES[-1]}"), None)
        if run.returncode or made is None:
            raise SystemExit(f"zig did not make the libraries of glibc {GLIBC}, see above")
        shutil.copytree(made.parent, folder)

"""Measures whether a change to the AVX2 kernels makes them faster: builds the kernels with and
without each change, and times all builds interleaved (tune.cpp).

    python benchmarks/ladder/tune.py forward
    python benchmarks/ladder/tune.py backward "BLOCK_KV = 96" "BLOCK_KV = 192"

Each change is a pair: text in csrc/cpu/*.inl, and its replacement. "x1.03" is 3 % faster. --quick
only tests that the program runs: one small shape, once, with unoptimised kernels."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]


def build(folder: Path, flags: list[str], change: tuple[str, str] | None) -> Path:
    """The AVX2 kernels, `change` applied, as a shared library in `folder`."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    if change:
        hits = 0
        for path in (folder / "csrc/cpu").glob("*.inl"):
            text = path.read_text()
            hits += text.count(change[0])
            path.write_text(text.replace(*change))
        if not hits:
            sys.exit(f"{change[0]!r} does not occur in csrc/cpu/*.inl")
    library = folder / "kernels.so"
    command = ["g++", "-shared", "-fPIC", *flags, str(folder / "csrc/cpu/isa_avx2.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=("forward", "backward", "jvp", "jvp_bwd", "all"))
    parser.add_argument("changes", nargs="*", metavar="OLD NEW")
    parser.add_argument("--quick", action="store_true", help="only test that it runs")
    args = parser.parse_args()
    if len(args.changes) % 2:
        parser.error("changes come in pairs: old text, new text")
    changes = list(zip(args.changes[::2], args.changes[1::2]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program = folder / "tune"
        source = str(ROOT / "benchmarks/ladder/tune.cpp")
        flags = [*FLAGS, "-O0" if args.quick else "-O3"]
        command = ["g++", *flags, "-I", str(ROOT / "csrc"), source, "-o", str(program), "-ldl"]
        subprocess.run(command, check=True)
        libraries = [f"base={build(folder / 'base', flags, None)}"]
        for n, change in enumerate(changes):
            libraries.append(f"{change[1]}={build(folder / str(n), flags, change)}")
        speed = "quick" if args.quick else "full"
        subprocess.run([str(program), args.mode, speed, *libraries], check=True)


if __name__ == "__main__":
    main()

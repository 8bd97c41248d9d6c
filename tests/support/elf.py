"""What a shared library needs and contains, from binutils."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import torch

TORCH = Path(torch.__file__).parent / "lib"


def why_not() -> str | None:
    return next((f"{x} was not found" for x in ("nm", "readelf") if not shutil.which(x)), None)


def symbols(path: Path, which: str) -> set[str]:
    out = subprocess.run(["nm", "-D", which, path], capture_output=True, text=True, check=True)
    return {line.split()[-1].partition("@")[0] for line in out.stdout.splitlines()}


def needed(path: Path) -> list[str]:
    out = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    return [x.partition("[")[2].rstrip("]") for x in out.splitlines() if "(NEEDED)" in x]


def newest_versions(path: Path) -> dict[str, tuple[int, ...]]:
    """The newest version of each family, such as GLIBC, that the file's symbols need."""
    out = subprocess.run(["readelf", "-V", path], capture_output=True, text=True, check=True).stdout
    newest: dict[str, tuple[int, ...]] = {}
    for family, number in re.findall(r"Name: ([A-Z]+)_([\d.]+)", out):
        version = tuple(map(int, number.split(".")))
        newest[family] = max(newest.get(family, ()), version)
    return newest


def not_provided(path: Path) -> set[str]:
    """Undefined torch symbols that no torch library below `path` has."""
    missing = {s for s in symbols(path, "--undefined-only") if "torch" in s or "c10" in s}
    for name in needed(path):
        if (TORCH / name).exists():
            missing -= symbols(TORCH / name, "--defined-only")
    return missing

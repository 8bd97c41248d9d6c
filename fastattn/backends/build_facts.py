"""What was built of this copy of fastattn, as setup.py recorded it in _build.json; why the rest is
missing, and how to build it."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
BUILD = "python setup.py build_ext --inplace"
# pip caches wheels that it built, even those without native code, and would install them again.
INSTALL = "pip install --no-cache-dir --force-reinstall --no-deps"


def recorded(package: Path = HERE) -> dict | None:
    """What setup.py recorded when it built `package`; None if it never did."""
    try:
        return json.loads((package / "_build.json").read_text())
    except (OSError, ValueError):
        return None


def why_missing(library: str) -> str:
    """Why `library` (_cpu, _cuda or _C) is not beside this file, and what builds it."""
    facts = recorded()
    if facts is None:
        return _nothing_built()
    reason = facts["missing"].get(library, "its file is gone")
    if facts["mode"] == "wheel":  # built on another machine
        return reason
    way = f"`{BUILD}` builds it" if _in_source_tree() else f"`{INSTALL}` of fastattn builds it"
    return f"{reason}; once that is fixed, {way}"


def _in_source_tree() -> bool:
    return (HERE.parent / "setup.py").exists()


def _nothing_built() -> str:
    if not _in_source_tree():
        return f"this copy in {HERE} was not installed by pip; `{INSTALL}` of fastattn builds it"
    here = f"this is the source tree {HERE.parent}, in which nothing is built (`{BUILD}` does)"
    if (other := _installed()) is None:
        return here
    return f"{here}; the built copy is {other}, imported from any other folder"


def _installed() -> Path | None:
    """The package that pip installed, if it is not this one and has native code."""
    for distribution in importlib.metadata.distributions(name="fastattn"):
        package = Path(str(distribution.locate_file("fastattn"))).resolve()
        if package != HERE and (recorded(package) or {}).get("built"):
            return package
    return None

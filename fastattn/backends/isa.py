"""The instruction sets of the CPU kernels: which the library has, and which one runs.

The library itself answers (csrc/cpu/machine.cpp), so that a wheel without the module `fastattn._C`
knows as much as a build with it.
"""

from __future__ import annotations

import ctypes
import functools
import json
from dataclasses import dataclass

from . import library


@dataclass(frozen=True)
class Isa:
    """An instruction set that the kernels are compiled for."""

    name: str
    automatic: bool  # may be selected when FASTATTN_ISA is not set
    lacking: tuple[str, ...]  # features that it needs and this machine does not have

    @property
    def supported(self) -> bool:
        return not self.lacking


def _ask(name: str) -> str | None:
    """The answer of one of the library's C functions; None for a null pointer."""
    try:
        function = getattr(library.NATIVE, f"fastattn_cpu_{name}")
    except AttributeError:
        path = getattr(library.NATIVE, "_name", None)
        raise RuntimeError(
            f"the native CPU library {path} is older than the Python files beside it and does not "
            "say its instruction sets: build it again (python setup.py build_ext --inplace, or "
            "pip install)"
        ) from None
    function.restype = ctypes.c_char_p
    answer = function()
    return None if answer is None else answer.decode()


@functools.cache
def _facts() -> dict:
    return {} if library.NATIVE is None else json.loads(_ask("facts") or "{}")


def features() -> dict[str, bool] | None:
    """CPU features that kernels use or could use, as /proc/cpuinfo names them -> whether this
    machine has them. None without the library."""
    return _facts().get("features")


def isas() -> list[Isa]:
    """Every instruction set of the library, best first; empty without it."""
    rows = _facts().get("isas", [])
    return [Isa(row["name"], row["automatic"], tuple(row["lacking"])) for row in rows]


def supported() -> list[str]:
    """Names of those that run here, best first."""
    return [isa.name for isa in isas() if isa.supported]


def problem() -> str | None:
    """Why no kernel can run with FASTATTN_ISA as it is now; None where one can, or without the
    library."""
    return None if library.NATIVE is None else _ask("isa_problem") or None


def selected() -> str | None:
    """The instruction set that a call made now would use; None without the library.

    Raises ValueError where FASTATTN_ISA names one that is unknown, or that this CPU does not have.
    """
    if reason := problem():
        raise ValueError(reason)
    return None if library.NATIVE is None else _ask("isa")

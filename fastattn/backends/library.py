"""Loads the libraries of native kernels, or records why one is missing."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from . import build_facts
from .gpu import constant


def _native_path(kind: str) -> Path | None:
    """The path of the kernels' library; FASTATTN_CPU_LIBRARY names another build of _cpu, such as a
    sanitizer's."""
    named = os.environ.get("FASTATTN_CPU_LIBRARY")
    if named and kind == "CPU":
        return Path(named)
    return next(iter(sorted(build_facts.HERE.glob(f"_{kind.lower()}.*so"))), None)


def _causes(error: BaseException | None) -> str:
    """The messages of an error and its causes: torch's loader has the reason only in the cause."""
    parts: list[str] = []
    while error is not None:
        parts.append(str(error).rstrip("."))
        error = error.__cause__ or error.__context__
    return ": ".join(dict.fromkeys(parts))


def _load(kind: str) -> tuple[ctypes.CDLL | None, str | None]:
    """(the library of the "CPU" or "CUDA" kernels, None), or (None, why there is none)."""
    path = _native_path(kind)
    if path is None:
        reason = build_facts.why_missing(f"_{kind.lower()}")
        return None, f"the native {kind} library is not built: {reason}"
    try:
        torch.ops.load_library(str(path))
        return ctypes.CDLL(str(path)), None
    except (OSError, RuntimeError) as error:
        return None, f"the native {kind} library {path} does not load: {_causes(error)}"


NATIVE, NATIVE_MISSING = _load("CPU")
CUDA, CUDA_MISSING = (
    (None, "this torch has no CUDA") if torch.version.cuda is None else _load("CUDA")
)


def cuda_fault() -> str | None:
    """Why the CUDA library cannot be used although it was built and torch has CUDA; None where it
    can, or where it was not built."""
    built = torch.version.cuda is not None and _native_path("CUDA") is not None
    return CUDA_MISSING if built else None


def cuda_question(name: str, *arguments) -> str | None:
    """The problem that one of the library's C functions reports, or None."""
    function = getattr(CUDA, name)
    function.restype = ctypes.c_char_p
    return function(*arguments).decode() or None


@constant
@functools.cache
def cuda_problem(index: int) -> str | None:
    """Why the loaded CUDA library cannot use GPU `index` (an old driver, say), or None."""
    return None if CUDA is None else cuda_question("fastattn_cuda_problem", index)

"""A row of the table of backends, and what it says to the user."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core.call import Call, Gradients, Result


@dataclass(frozen=True, slots=True)
class Backend:
    """One row. Its functions take a Call, in the operators' normal form.

    why_not looks only at devices, dtypes, shapes, the spec and which operands are there, never at
    values or strides: its answer is kept for calls that are alike in these.
    """

    name: str
    role: str
    why_not: Callable[[Call], str | None]
    forward: Callable[[Call], Result]
    # (call, its result, dout, dlse or None, needs: of which of LEAVES) -> Gradients
    backward: Callable[..., Gradients]
    refuses: Callable[[Call], str | None]  # why_not by the call alone, on any machine
    tile: tuple[int, int] | None = None  # rows and keys of a forward tile; None: no fixed ones
    probs_rounded: bool = False  # to half precision, as matrix units want them (tolerance.py)
    # (q, k, v, *numbers of the spec) -> (out, lse): the forward kernel of CPU tensors without
    # operands, called past torch's dispatcher; None: there is no such way
    simple: Callable | None = None
    # As why_not: why the row, though it can, does not run a call that names no backend.
    held_back: Callable[[Call], str | None] = lambda call: None


_warned: set[str] = set()


def warn_once(sentence: str) -> None:
    if sentence not in _warned and not torch.compiler.is_compiling():
        _warned.add(sentence)
        warnings.warn(sentence, UserWarning, stacklevel=caller_level())


def caller_level() -> int:
    """The stacklevel of the user's line, seen from the function that calls this one."""
    level, frame = 1, sys._getframe(1)
    own = ("fastattn", "contextlib")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in own:
        level, frame = level + 1, frame.f_back
    return level

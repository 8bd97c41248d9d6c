"""What a backend is, and how it warns the user."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..core import derivatives
from ..core.call import Call, Gradients, JvpResult, Result
from ..core.statistics import FirstPass, Maps
from ..core.tensors import as_gradient_of


def _plain_jvp_bwd(call, result, tangents, dtout, dtlse, needs) -> Gradients:
    del result  # computed again, a chunk of rows at a time
    grads = derivatives.jvp_bwd(call, tangents, dtout, dtlse, needs)
    return Gradients(*map(as_gradient_of, (call.q, call.k, call.v), grads[:3]), *grads[3:])


@dataclass(frozen=True, slots=True)
class Backend:
    """An entry of registry.py's table. Its functions take a Call in the operators' normal form.

    why_not may look at devices, dtypes, shapes, the spec and at which operands are given, but not
    at values or strides, because its answer is cached for all calls that agree in these.
    """

    name: str
    role: str
    why_not: Callable[[Call], str | None]
    forward: Callable[[Call], Result]
    # (call, its result, dout, dlse or None, needs: one bool for each of LEAVES) -> Gradients; a
    # backend with forward_statistics also takes dentropy, the gradient of entropy, whose part
    # -dentropy * entropy is in dlse
    backward: Callable[..., Gradients]
    unsupported_reason: Callable[[Call], str | None]  # the part of why_not that no machine changes
    tile: tuple[int, int] | None = None  # query rows and keys of a forward tile; None: not fixed
    probs_rounded: bool = False  # P is rounded to half precision for the matrix units
    # (q, k, v, *numbers of the spec) -> (out, lse): the forward kernel for CPU tensors and no
    # operands, called without torch's dispatcher; None: the backend has no such kernel
    simple: Callable | None = None
    # Both by default in plain torch, in O(S) memory: (call, Tangents) -> JvpResult; and (call, its
    # JvpResult, Tangents, dtout, dtlse or None, needs) -> Gradients
    jvp: Callable[..., JvpResult] = derivatives.jvp
    jvp_bwd: Callable[..., Gradients] = _plain_jvp_bwd
    # Called like why_not: the reason why a backend that could run the call does so only when
    # backend= or FASTATTN_BACKEND names it.
    why_not_auto: Callable[[Call], str | None] = lambda call: None
    # (call, need_entropy, need_argmax) -> FirstPass, and (call, lse, need_col_mass, topk, pooled)
    # -> Maps, as core/statistics.py defines them; None: plain torch computes them
    forward_statistics: Callable[[Call, bool, bool], FirstPass] | None = None
    maps: Callable[..., Maps] | None = None


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

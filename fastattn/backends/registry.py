"""Which backend runs a call, and why the others do not. Next hop: the operator in operators.py,
whose kernels are in csrc/cpu/ops_attention.cpp or kernels/launch.py, or core/reference.py.

BACKENDS is a list, best first. The first row whose why_not and held_back are None runs the call;
backend= (or the environment's FASTATTN_BACKEND) names one, which then runs it, held back or not, or
raises with its sentence. The reference is never taken in silence. FASTATTN_LOG=1 prints each
distinct decision to stderr once.
"""

from __future__ import annotations

import os
import sys

import torch

from ..core.call import Call
from . import cpu, cuda, library, plain, proof, triton
from .backend import Backend, warn_once

BACKENDS = [cuda.ROW, triton.ROW, cpu.ROW, plain.ROW]
BY_NAME = {row.name: row for row in BACKENDS}
NAMES = tuple(BY_NAME)

# ---- choosing ------------------------------------------------------------------------------------


# os.environ.get() costs 1.5 us; the dict behind it, 0.1 us.
_ENVIRON, _encode = vars(os.environ)["_data"], os.environ.encodekey
_FORCED = _encode("FASTATTN_BACKEND")


def forced() -> bytes | str | None:
    """What FASTATTN_BACKEND says now, undecoded; None (or empty) when it says nothing."""
    return _ENVIRON.get(_FORCED)


def named(name: str | None) -> str | None:
    """The backend that backend= or FASTATTN_BACKEND asks for, if any; it must be one there is."""
    source = "backend"
    if name is None:
        name, source = os.environ.get("FASTATTN_BACKEND") or None, "FASTATTN_BACKEND"
    if name is not None and name not in NAMES:
        raise ValueError(f"{source} is {name!r}; accepted are {', '.join(map(repr, NAMES))}")
    return name


def auto_select(call: Call) -> Backend:
    """The row that runs a call which names none."""
    row = next(row for row in BACKENDS if not (row.held_back(call) or row.why_not(call)))
    return cuda.PROVEN if row.name == "cuda" else row


def pick(name: str | None, call: Call) -> Backend:
    """The row that runs this call: `name`, or what FASTATTN_BACKEND names, or the first able."""
    wanted = named(name)
    if wanted is not None:
        row = BY_NAME[wanted]
        reason = row.why_not(call)
        if reason:
            source = "FASTATTN_BACKEND" if name is None else "backend"
            raise NotImplementedError(f"{source}={wanted!r} cannot run this call: {reason}")
    else:
        row = auto_select(call)
        if row.name == "reference":
            _warn_reference(call)
        if call.q.is_cuda and not library.CUDA_MISSING and row.name != "cuda":
            _say_how_to_prove(call)
    if not torch.compiler.is_compiling():
        _log(row, call)
    return row


def _say_how_to_prove(call: Call) -> None:
    """Warns, once, where the CUDA kernels could run this call but verify has never run."""
    able = BY_NAME["cuda"].why_not(call) is None
    if able and (sentence := proof.missing(call.q.device.index or 0)):
        warn_once(sentence)


_logged: set[str] = set()


def _warn_reference(call: Call) -> None:
    """The slow backend runs, unasked: say so, once for each reason."""
    closest = "cpu" if call.q.device.type in ("cpu", "meta") else "triton"
    reason = BY_NAME[closest].why_not(call)
    warn_once(
        f"fastattn runs on its slow reference backend (O(S^2) memory), because {reason}. "
        'backend="reference" asks for it without this warning.'
    )


def _log(row: Backend, call: Call) -> None:
    """FASTATTN_LOG=1: one line for each distinct decision."""
    if os.environ.get("FASTATTN_LOG", "0") in ("", "0"):
        return
    q, given = call.q, call.operands.given()
    reasons = [
        f"not {other.name}: {reason}"
        for other in BACKENDS[: NAMES.index(row.name)]
        if (reason := other.why_not(call) or other.held_back(call))
    ]
    line = (
        f"fastattn: {row.name} runs q {list(q.shape)} k {list(call.k.shape)} "
        f"v {list(call.v.shape)} {str(q.dtype).removeprefix('torch.')} {call.spec}"
        + (f" with {', '.join(given)}" if given else "")
        + (f" ({'; '.join(reasons)})" if reasons else "")
    )
    if line not in _logged:
        _logged.add(line)
        print(line, file=sys.stderr, flush=True)

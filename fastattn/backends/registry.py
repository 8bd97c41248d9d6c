"""Which backend runs a call, and why the others do not. Next hop: the operator in operators.py,
whose kernels are in csrc/cpu/ops_attention.cpp or kernels/launch.py, or core/reference.py.

BACKENDS is a list, best first. The first whose why_not and why_not_auto are both None runs the
call. backend= (or the environment variable FASTATTN_BACKEND) names one instead: it runs the call
whatever its why_not_auto says, or raises with the sentence of its why_not. The reference is never
chosen silently. FASTATTN_LOG=1 prints each distinct decision to stderr once.
"""

from __future__ import annotations

import os
import sys

import torch

from ..core.call import Call
from . import cpu, cuda, library, plain, proof, triton
from .backend import Backend, warn_once

BACKENDS = [cuda.BACKEND, triton.BACKEND, cpu.BACKEND, plain.BACKEND]
BY_NAME = {backend.name: backend for backend in BACKENDS}
NAMES = tuple(BY_NAME)

# ---- choosing ------------------------------------------------------------------------------------


# os.environ.get() costs 1.5 us; the dict behind it, 0.1 us.
_ENVIRON, _encode = vars(os.environ)["_data"], os.environ.encodekey
_FORCED = _encode("FASTATTN_BACKEND")


def forced() -> bytes | str | None:
    """FASTATTN_BACKEND's value now, undecoded; None or empty where it is not set."""
    return _ENVIRON.get(_FORCED)


def named(name: str | None) -> str | None:
    """The backend that backend= or FASTATTN_BACKEND names, if any; an unknown name raises."""
    source = "backend"
    if name is None:
        name, source = os.environ.get("FASTATTN_BACKEND") or None, "FASTATTN_BACKEND"
    if name is not None and name not in NAMES:
        raise ValueError(f"{source} is {name!r}; accepted are {', '.join(map(repr, NAMES))}")
    return name


def auto_select(call: Call) -> Backend:
    """The backend that runs a call which names none."""
    backend = next(x for x in BACKENDS if not (x.why_not_auto(call) or x.why_not(call)))
    return cuda.PROVEN if backend.name == "cuda" else backend


def pick(name: str | None, call: Call) -> Backend:
    """The backend that runs this call: `name`, or FASTATTN_BACKEND's, or the first that can."""
    wanted = named(name)
    if wanted is not None:
        backend = BY_NAME[wanted]
        reason = backend.why_not(call)
        if reason:
            source = "FASTATTN_BACKEND" if name is None else "backend"
            raise NotImplementedError(f"{source}={wanted!r} cannot run this call: {reason}")
    else:
        backend = auto_select(call)
        if backend.name == "reference":
            _warn_reference(call)
        if call.q.is_cuda and not library.CUDA_MISSING and backend.name != "cuda":
            _say_how_to_prove(call)
    if not torch.compiler.is_compiling():
        _log(backend, call)
    return backend


def _say_how_to_prove(call: Call) -> None:
    """Warns, once, where the CUDA kernels could run this call but verify has never run."""
    able = BY_NAME["cuda"].why_not(call) is None
    if able and (sentence := proof.missing(call.q.device.index or 0)):
        warn_once(sentence)


_logged: set[str] = set()


def _warn_reference(call: Call) -> None:
    """Warns, once for each reason, that the slow backend runs although nobody named it."""
    closest = "cpu" if call.q.device.type in ("cpu", "meta") else "triton"
    reason = BY_NAME[closest].why_not(call)
    warn_once(
        f"fastattn runs on its slow reference backend (O(S^2) memory), because {reason}. "
        'backend="reference" asks for it without this warning.'
    )


def _log(backend: Backend, call: Call) -> None:
    """FASTATTN_LOG=1: one line for each distinct decision."""
    if os.environ.get("FASTATTN_LOG", "0") in ("", "0"):
        return
    q, given = call.q, call.operands.given()
    reasons = [
        f"not {other.name}: {reason}"
        for other in BACKENDS[: NAMES.index(backend.name)]
        if (reason := other.why_not(call) or other.why_not_auto(call))
    ]
    line = (
        f"fastattn: {backend.name} runs q {list(q.shape)} k {list(call.k.shape)} "
        f"v {list(call.v.shape)} {str(q.dtype).removeprefix('torch.')} {call.spec}"
        + (f" with {', '.join(given)}" if given else "")
        + (f" ({'; '.join(reasons)})" if reasons else "")
    )
    if line not in _logged:
        _logged.add(line)
        print(line, file=sys.stderr, flush=True)

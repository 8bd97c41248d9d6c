"""Which backend runs a call, and why the others do not. Next hop: the operator in ops.py, whose
kernels are in csrc/ops_cpu.cpp or kernels/launch.py, or reference.py.

BACKENDS is a list, best first. The first row whose why_not and held_back are None runs the call;
backend= (or the environment's FASTATTN_BACKEND) names one, which then runs it, held back or not, or
raises with its sentence. The reference is never taken in silence. FASTATTN_LOG=1 prints each
distinct decision to stderr once.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from . import ops, proof
from .autograd import reference_grads_of
from .call import Call, Gradients, Result
from .descales import E4M3, widened
from .gpu import gpu_missing, interpreting, triton_missing
from .reference import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 65536  # of the CPU kernels


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
    weights_rounded: bool = False  # to halves, as matrix units want them (judge.py)
    # As why_not: why the row, though it can, does not run a call that names no backend.
    held_back: Callable[[Call], str | None] = lambda call: None


# ---- the rows' functions -----------------------------------------------------------------------


def _cpu_forward(call):
    if call.operands.descales is not None:
        return widened(_cpu_forward, call)
    return Result(*ops.forward(*ops.arguments(call), call.num_splits))


def _cpu_backward(call, result, dout, dlse, needs):
    return Gradients(*ops.backward(dout, dlse, *result, *ops.arguments(call), *needs))


def _triton_forward(call):
    descales = call.operands.descales or ()
    return Result(*ops.forward_triton(*ops.arguments(call), call.num_splits, *descales))


def _triton_backward(call, result, dout, dlse, needs):
    return Gradients(*ops.backward_triton(dout, dlse, *result, *ops.arguments(call), *needs))


def _reference_forward(call):
    if call.operands.descales is not None:
        return widened(_reference_forward, call)
    # It has no splits: every number of them is one.
    return reference(call.q, call.k, call.v, call.spec, call.operands)


def _reference_backward(call, result, dout, dlse, needs):
    grads = reference_grads_of(call.spec, call.operands.others(), needs)
    return Gradients(*grads(dout, dlse, call.q, call.k, call.v, *call.operands.leaves()))


# What csrc/cuda has kernels for: a closed table. Everything else is the next row's.
CUDA_DTYPES = (torch.bfloat16, torch.float16)
CUDA_HEAD_DIMS = (64, 128, 256)
CUDA_OPERANDS = (
    "sinks", "kv_lens", "kv_starts", "document_ids", "cu_seqlens_q", "cu_seqlens_k", "page_table",
)  # fmt: skip
CUDA_CAPABILITY = (8, 0)  # and later
# The rounding of their tanh is that of 1, and the cap multiplies it; the backward divides by it.
CUDA_SOFTCAPS = 0.01, 1000.0
CUDA_WIDE_BACKWARD = 166912  # bytes of shared memory that a CTA must have with head dimension 256
# float8 q, k and v are for the kernels of sm_90, which have no pages.
CUDA_FLOAT8_CAPABILITY = (9, 0)
CUDA_FLOAT8_OPERANDS = (*(name for name in CUDA_OPERANDS if name != "page_table"), "descales")


def documents_as_sequences(x):
    """Operands without document_ids: in their place, cu_seqlens of each entry, int32 [B, n + 1],
    for the CUDA kernels. Entries with fewer than n documents, the most, have empty ones at the end.
    Waits for the GPU, as n is a shape."""
    if (ids := x.document_ids) is None:
        return x
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    number = first.cumsum(1) - 1
    most = int(number[:, -1].max()) + 1 if ids.numel() else 0
    bounds = ids.new_full((ids.shape[0], most + 1), ids.shape[1], dtype=torch.int32)
    entry, row = first.nonzero(as_tuple=True)
    bounds[entry, number[entry, row]] = row.to(torch.int32)
    return replace(x, document_ids=None, cu_seqlens_q=bounds, cu_seqlens_k=bounds)


def _cuda_forward(call):
    call = call.but(operands=documents_as_sequences(call.operands))
    descales = call.operands.descales
    if descales is None:
        return _cpu_forward(call)
    return Result(*ops.forward_float8(*ops.arguments(call), call.num_splits, *descales))


def _cuda_why_not(call):
    q = call.q
    if q.device.type != "cuda":
        return f"q is on {q.device} and this backend runs on NVIDIA GPUs"
    if ops.CUDA_MISSING:
        return ops.CUDA_MISSING
    if (found := torch.cuda.get_device_capability(q.device)) < CUDA_CAPABILITY:
        return f"the GPU is sm_{found[0]}{found[1]}; the kernels are for sm_80 and later"
    if q.dtype == E4M3 and found != CUDA_FLOAT8_CAPABILITY:
        return f"the GPU is sm_{found[0]}{found[1]}; the kernels of float8 are for sm_90"
    if problem := ops.cuda_problem(q.device.index or 0):
        return problem
    if torch.compiler.is_compiling() and (reason := _cuda_backward_refuses(q)):
        return f"torch.compile may want the backward, and {reason}"
    return _cuda_refuses(call)


def _cuda_refuses(call):
    """The part of why_not that looks at the call alone."""
    q, spec, operands = call.q, call.spec, call.operands
    dims = (q.shape[3], call.v.shape[3])
    float8 = q.dtype == E4M3
    if q.dtype not in CUDA_DTYPES and not float8:
        return f"q is {q.dtype}; the kernels take bfloat16, float16 and float8_e4m3fn"
    if dims[0] != dims[1] or dims[0] not in CUDA_HEAD_DIMS:
        return (
            f"head dimensions are {dims[0]} (q, k) and {dims[1]} (v); the kernels have 64, 128 "
            "and 256, the same for both"
        )
    if operands.key_begin is not None:
        return (
            "key_ranges is given; the kernels bound keys by window, length and document, and not "
            "row by row, as backend 'triton' does"
        )
    accepted = CUDA_FLOAT8_OPERANDS if float8 else CUDA_OPERANDS
    if other := [name for name in operands.given() if name not in accepted]:
        return f"{other[0]} is given; the kernels take {', '.join(accepted)}"
    low, high = CUDA_SOFTCAPS
    if spec.softcap and not low <= spec.softcap <= high:
        return f"softcap is {spec.softcap}; the kernels take 0 (off) and [{low}, {high}]"
    if operands.document_ids is not None and torch.compiler.is_compiling():
        return "torch.compile cannot know how many documents there are, which the kernels need"
    return None


def _cuda_backward_refuses(q):
    """Why the backward kernels cannot follow on this GPU, if so."""
    if q.shape[3] < 256 or not q.is_cuda:
        return None
    shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    if shared >= CUDA_WIDE_BACKWARD:
        return None
    return (
        f"with head dimension 256 it takes {CUDA_WIDE_BACKWARD} bytes of shared memory a block, "
        f"this GPU has {shared}"
    )


def _features(call, gradient: bool) -> tuple[str, ...]:
    """Which of proof.FEATURES a call has."""
    x = call.operands
    of_lengths = (x.kv_lens, x.kv_starts, x.cu_seqlens_q, x.document_ids)
    lengths = any(y is not None for y in of_lengths)
    features = ["call"]
    features += ["lengths"] if lengths else []
    features += ["pages"] if x.page_table is not None else []
    features += ["float8"] if call.q.dtype == E4M3 else []
    if gradient:
        features += ["gradient", "gradient of lengths"] if lengths else ["gradient"]
    return tuple(features)


def _cuda_held_back(call):
    q = call.q
    if q.device.type != "cuda" or ops.CUDA_MISSING:
        return "it cannot run here"
    if call.operands.document_ids is not None:
        return "document_ids make its calls wait for the GPU, so they run there only when named"
    if reason := _cuda_backward_refuses(q):
        return f"its backward cannot follow: {reason}"
    gradient = torch.compiler.is_compiling()  # then autograd is the operator's own
    return proof.why_not(q.device.index or 0, _features(call, gradient))


def _cuda_backward_proven(call, *rest):
    """As _cuda_backward, for a call that names no backend: of gradients that are proven."""
    if reason := proof.why_not(call.q.device.index or 0, _features(call, True)):
        return _next_backward(reason, call, *rest)
    return _cuda_backward(call, *rest)


def _next_backward(reason, call, *rest):
    rows = BACKENDS[BACKENDS.index(BY_NAME["cuda"]) + 1 :]
    row = next(row for row in rows if row.why_not(call) is None)
    _warn_once(f"fastattn: {row.name} runs a backward of the cuda backend: {reason}.")
    return row.backward(call, *rest)


def _cuda_backward(call, *rest):
    if reason := _cuda_backward_refuses(call.q):
        return _next_backward(reason, call, *rest)
    call = call.but(operands=documents_as_sequences(call.operands))
    return _cpu_backward(call, *rest)


MAX_TRITON_HEAD_DIM = 1024


def _triton_refuses(call):
    q, v = call.q, call.v
    if q.dtype not in DTYPES[:3] and call.operands.descales is None:
        return f"q is {q.dtype}; the kernels take float32, bfloat16 and float16"
    if max(q.shape[3], v.shape[3]) > MAX_TRITON_HEAD_DIM:
        return (
            f"head dimensions are {q.shape[3]} (q, k) and {v.shape[3]} (v); "
            f"the kernels go to {MAX_TRITON_HEAD_DIM}"
        )
    return None


def _triton_why_not(call):
    q = call.q
    if q.is_cuda:
        missing = gpu_missing(q.get_device())
    elif q.is_cpu and interpreting():
        missing = triton_missing()
    else:
        missing = (
            f"q is on {q.device} and this backend runs on GPUs (or, very slowly, on the CPU in "
            "Triton's interpreter: TRITON_INTERPRET=1)"
        )
    return missing or _triton_refuses(call)


def _triton_held_back(call):
    return "Triton's interpreter runs only when named" if call.q.is_cpu else None


def _cpu_why_not(call):
    q = call.q
    if q.device.type not in ("cpu", "meta"):
        return f"q is on {q.device} and this backend runs on the CPU"
    return ops.NATIVE_MISSING or _cpu_refuses(call)


def _cpu_refuses(call):
    q, v = call.q, call.v
    if call.operands.key_begin is not None:
        return "key_ranges is given, which these kernels do not take yet; mask= says the same"
    if q.dtype not in DTYPES and call.operands.descales is None:
        return f"q is {q.dtype}; the kernels take float32, bfloat16, float16 and float64"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return (
            f"head dimensions are {q.shape[3]} (q, k) and {v.shape[3]} (v); "
            f"the kernels go to {MAX_HEAD_DIM}"
        )
    return None


def _reference_why_not(call):
    return None


CPU_TILE = (96, 96)  # BLOCK_Q and BLOCK_KV in csrc/cpu/gemm.inl

BACKENDS = [
    Backend("cuda", "NVIDIA sm_80 and later", _cuda_why_not, _cuda_forward, _cuda_backward,
            _cuda_refuses, weights_rounded=True, held_back=_cuda_held_back),
    Backend("triton", "any GPU Triton supports",
            _triton_why_not, _triton_forward, _triton_backward, _triton_refuses,
            weights_rounded=True, held_back=_triton_held_back),
    Backend("cpu", "C++ kernels on the CPU",
            _cpu_why_not, _cpu_forward, _cpu_backward, _cpu_refuses, CPU_TILE),
    Backend("reference", "plain torch, O(S^2) memory, any device",
            _reference_why_not, _reference_forward, _reference_backward, _reference_why_not),
]  # fmt: skip
BY_NAME = {row.name: row for row in BACKENDS}
NAMES = tuple(BY_NAME)
_CUDA_PROVEN = replace(BY_NAME["cuda"], backward=_cuda_backward_proven)


# ---- choosing ----------------------------------------------------------------------------------

# os.environ.get() costs 1.5 us; the dict behind it, 0.1 us.
_ENVIRON, _encode = os.environ._data, os.environ.encodekey
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
    return _CUDA_PROVEN if row.name == "cuda" else row


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
        if call.q.is_cuda and not ops.CUDA_MISSING and row.name != "cuda":
            _say_how_to_prove(call)
    if not torch.compiler.is_compiling():
        _log(row, call)
    return row


def _say_how_to_prove(call: Call) -> None:
    """Warns, once, where the CUDA kernels could run this call but verify has never run."""
    able = BY_NAME["cuda"].why_not(call) is None
    if able and (sentence := proof.missing(call.q.device.index or 0)):
        _warn_once(sentence)


_warned: set[str] = set()
_logged: set[str] = set()


def _warn_reference(call: Call) -> None:
    """The slow backend runs, unasked: say so, once for each reason."""
    closest = "cpu" if call.q.device.type in ("cpu", "meta") else "triton"
    reason = BY_NAME[closest].why_not(call)
    _warn_once(
        f"fastattn runs on its slow reference backend (O(S^2) memory), because {reason}. "
        'backend="reference" asks for it without this warning.'
    )


def _warn_once(sentence: str) -> None:
    if sentence not in _warned and not torch.compiler.is_compiling():
        _warned.add(sentence)
        warnings.warn(sentence, UserWarning, stacklevel=caller_level())


def caller_level() -> int:
    """The stacklevel of the user's line, seen from the function that calls this one."""
    level, frame = 1, sys._getframe(1)
    own = (__package__, "contextlib")
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in own:
        level, frame = level + 1, frame.f_back
    return level


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

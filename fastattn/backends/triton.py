"""The backend of the Triton kernels. Next hop: kernels/launch.py."""

from __future__ import annotations

from ..core.call import Gradients, JvpResult, Result
from . import schema
from .backend import Backend
from .cpu import DTYPES
from .gpu import gpu_missing, interpreting, triton_missing

MAX_HEAD_DIM = 1024


def forward(call):
    descales = call.operands.descales or ()
    return Result(*schema.forward_triton(*schema.arguments(call), call.num_splits, *descales))


def backward(call, result, dout, dlse, needs):
    return Gradients(*schema.backward_triton(dout, dlse, *result, *schema.arguments(call), *needs))


def jvp(call, tangents):
    return JvpResult(*schema.jvp_triton(*schema.arguments(call), *tangents))


def jvp_bwd(call, result, tangents, dtout, dtlse, needs):
    arguments = (*result, *schema.arguments(call), *tangents, *needs)
    return Gradients(*schema.jvp_bwd_triton(dtout, dtlse, *arguments))


def unsupported_reason(call):
    q, v = call.q, call.v
    if q.dtype not in DTYPES[:3] and call.operands.descales is None:
        return f"q is {q.dtype}; the kernels take float32, bfloat16 and float16"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return (
            f"head dimensions are {q.shape[3]} (q, k) and {v.shape[3]} (v); "
            f"the kernels go to {MAX_HEAD_DIM}"
        )
    return None


def why_not(call):
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
    return missing or unsupported_reason(call)


def why_not_auto(call):
    return "Triton's interpreter runs only when named" if call.q.is_cpu else None


BACKEND = Backend(
    "triton",
    "any GPU Triton supports",
    why_not,
    forward,
    backward,
    unsupported_reason,
    probs_rounded=True,
    why_not_auto=why_not_auto,
    jvp=jvp,
    jvp_bwd=jvp_bwd,
)

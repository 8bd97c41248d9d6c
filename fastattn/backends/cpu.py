"""The backend of the C++ kernels on the CPU. Next hop: csrc/cpu/ops_attention.cpp."""

from __future__ import annotations

import functools

import torch

from ..core.call import Gradients, JvpResult, Result
from ..core.quantization import widened
from ..core.statistics import FirstPass, Maps
from . import library, schema
from .backend import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MAX_HEAD_DIM = 65536  # of the CPU kernels
TILE = (96, 96)  # BLOCK_Q and BLOCK_KV in csrc/cpu/gemm.inl


def forward(call):
    if call.operands.descales is not None:
        return widened(forward, call)
    return Result(*schema.forward(*schema.arguments(call), call.num_splits))


def backward(call, result, dout, dlse, needs, dentropy=None):
    tensors = (dout, dlse, *result, *schema.arguments(call))
    return Gradients(*schema.backward(*tensors, *needs, dentropy))


def forward_statistics(call, need_entropy, need_argmax):
    needs = (call.num_splits, need_entropy, need_argmax)
    return FirstPass(*schema.FORWARD_STATISTICS[""](*schema.arguments(call), *needs))


def maps(call, lse, need_col_mass, topk, pooled):
    asked = (need_col_mass, topk, pooled)
    return Maps(*schema.MAPS[""](lse, *schema.arguments(call), *asked))


def jvp(call, tangents):
    return JvpResult(*schema.jvp(*schema.arguments(call), *tangents))


def jvp_bwd(call, result, tangents, dtout, dtlse, needs):
    arguments = (*result, *schema.arguments(call), *tangents, *needs)
    return Gradients(*schema.jvp_bwd(dtout, dtlse, *arguments))


def why_not(call):
    q = call.q
    if q.device.type not in ("cpu", "meta"):
        return f"q is on {q.device} and this backend runs on the CPU"
    return library.NATIVE_MISSING or unsupported_reason(call)


def unsupported_reason(call):
    q, v = call.q, call.v
    if q.dtype not in DTYPES and call.operands.descales is None:
        return f"q is {q.dtype}; the kernels take float32, bfloat16, float16 and float64"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return (
            f"head dimensions are {q.shape[3]} (q, k) and {v.shape[3]} (v); "
            f"the kernels go to {MAX_HEAD_DIM}"
        )
    return None


# Past the dispatcher: autograd, modes and subclasses are autograd.py's and functional.py's to see.
simple = functools.partial(
    schema.forward_simple._handle.redispatch_boxed,
    torch._C.DispatchKeySet(torch._C.DispatchKey.CPU),
)

BACKEND = Backend(
    "cpu",
    "C++ kernels on the CPU",
    why_not,
    forward,
    backward,
    unsupported_reason,
    TILE,
    simple=simple,
    forward_statistics=forward_statistics,
    maps=maps,
    jvp=jvp,
    jvp_bwd=jvp_bwd,
)

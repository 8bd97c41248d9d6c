"""The backend of the CUDA kernels. Next hop: csrc/cuda/ops.cu.

A call that names no backend runs here only where proof.py has recorded that the kernels are right
on this GPU.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from ..core.call import Result
from ..core.quantization import E4M3
from . import cpu, library, plain, proof, schema, triton
from .backend import Backend, warn_once

# What csrc/cuda has kernels for: a closed table. The next backend runs everything else.
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128, 256)
OPERANDS = (
    "sinks", "kv_lens", "kv_starts", "document_ids", "cu_seqlens_q", "cu_seqlens_k", "page_table",
)  # fmt: skip
NUMBERS = ("scale", "softcap", "left", "right", "align_end")
CAPABILITY = (8, 0)  # and later
# Their tanh rounds as a number near 1 does, which a large cap multiplies in the forward and a small
# one in the backward, which divides by it.
SOFTCAPS = 0.01, 1000.0
WIDE_BACKWARD = 166912  # bytes of shared memory that a CTA must have with head dimension 256
# Only the sm_90 kernels take float8 q, k and v, and these have no paged keys.
FLOAT8_CAPABILITY = (9, 0)
FLOAT8_OPERANDS = (*(name for name in OPERANDS if name != "page_table"), "descales")


def documents_as_sequences(x):
    """The operands with document_ids replaced by cu_seqlens of each batch entry, int32 [B, n + 1],
    as the CUDA kernels take them. n is the largest number of documents; a batch entry with fewer
    has empty ones at the end. This waits for the GPU, because n is a shape."""
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


def forward(call):
    call = call.but(operands=documents_as_sequences(call.operands))
    descales = call.operands.descales
    if descales is None:
        return cpu.forward(call)
    return Result(*schema.forward_float8(*schema.arguments(call), call.num_splits, *descales))


def backward(call, *rest):
    if reason := why_no_backward(call.q):
        return _next_backward(reason, call, *rest)
    call = call.but(operands=documents_as_sequences(call.operands))
    return cpu.backward(call, *rest)


def backward_proven(call, *rest):
    """The backward of calls that name no backend: the kernels run only where proof.py has recorded
    that their gradients are right."""
    if reason := proof.why_not(call.q.device.index or 0, _features(call, True)):
        return _next_backward(reason, call, *rest)
    return backward(call, *rest)


def _next_backward(reason, call, *rest):
    others = (triton.BACKEND, cpu.BACKEND, plain.BACKEND)  # in registry.py's order
    backend = next(x for x in others if x.why_not(call) is None)
    warn_once(f"fastattn: {backend.name} runs a backward of the cuda backend: {reason}.")
    return backend.backward(call, *rest)


def _second_order(call):
    """The backend of forward mode and second derivatives, for which csrc/cuda has no kernels."""
    backends = (triton.BACKEND, plain.BACKEND)
    return next(x for x in backends if x.why_not(call) is None)


def jvp(call, tangents):
    return _second_order(call).jvp(call, tangents)


def jvp_bwd(call, *rest):
    return _second_order(call).jvp_bwd(call, *rest)


# ---- what they take ------------------------------------------------------------------------------


def why_not(call):
    q = call.q
    if q.device.type != "cuda":
        return f"q is on {q.device} and this backend runs on NVIDIA GPUs"
    if library.CUDA_MISSING:
        return library.CUDA_MISSING
    if (found := torch.cuda.get_device_capability(q.device)) < CAPABILITY:
        return f"the GPU is sm_{found[0]}{found[1]}; the kernels are for sm_80 and later"
    if q.dtype == E4M3 and found != FLOAT8_CAPABILITY:
        return f"the GPU is sm_{found[0]}{found[1]}; the kernels of float8 are for sm_90"
    if problem := library.cuda_problem(q.device.index or 0):
        return problem
    if torch.compiler.is_compiling() and (reason := why_no_backward(q)):
        return f"torch.compile may want the backward, and {reason}"
    return unsupported_reason(call)


def unsupported_reason(call):
    """The part of why_not that looks at the call alone."""
    q, spec, operands = call.q, call.spec, call.operands
    dims = (q.shape[3], call.v.shape[3])
    float8 = q.dtype == E4M3
    if q.dtype not in DTYPES and not float8:
        return f"q is {q.dtype}; the kernels take bfloat16, float16 and float8_e4m3fn"
    if dims[0] != dims[1] or dims[0] not in HEAD_DIMS:
        return (
            f"head dimensions are {dims[0]} (q, k) and {dims[1]} (v); the kernels have 64, 128 "
            "and 256, the same for both"
        )
    if operands.key_begin is not None:
        return (
            "key_ranges is given; the kernels bound keys by window, length and document, and not "
            "row by row, as backend 'triton' does"
        )
    accepted = FLOAT8_OPERANDS if float8 else OPERANDS
    if other := [name for name in operands.given() if name not in accepted]:
        return f"{other[0]} is given; the kernels take {', '.join(accepted)}"
    for x in fields(spec):
        if x.name not in NUMBERS and getattr(spec, x.name) != x.default:
            return f"{x.name} is {getattr(spec, x.name)}; the kernels take {', '.join(NUMBERS)}"
    if call.statistics is not None:
        return "return_stats is given; the kernels compute out and lse alone"
    low, high = SOFTCAPS
    if spec.softcap and not low <= spec.softcap <= high:
        return f"softcap is {spec.softcap}; the kernels take 0 (off) and [{low}, {high}]"
    if operands.document_ids is not None and torch.compiler.is_compiling():
        return "torch.compile cannot know how many documents there are, which the kernels need"
    return None


def why_no_backward(q):
    """The reason why this GPU cannot run the backward kernels, or None."""
    if q.shape[3] < 256 or not q.is_cuda:
        return None
    shared = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin
    if shared >= WIDE_BACKWARD:
        return None
    return (
        f"with head dimension 256 it takes {WIDE_BACKWARD} bytes of shared memory a block, "
        f"and this GPU has {shared}"
    )


def _features(call, gradient: bool) -> tuple[str, ...]:
    """Which of proof.FEATURES a call has."""
    x = call.operands
    vectors = (x.kv_lens, x.kv_starts, x.cu_seqlens_q, x.document_ids)
    lengths = any(y is not None for y in vectors)
    features = ["call"]
    features += ["lengths"] if lengths else []
    features += ["pages"] if x.page_table is not None else []
    features += ["float8"] if call.q.dtype == E4M3 else []
    if gradient:
        features += ["gradient", "gradient of lengths"] if lengths else ["gradient"]
    return tuple(features)


def why_not_auto(call):
    q = call.q
    if q.device.type != "cuda" or library.CUDA_MISSING:
        return "it cannot run here"
    if call.operands.document_ids is not None:
        return "document_ids make its calls wait for the GPU, so they run there only when named"
    if reason := why_no_backward(q):
        return f"it cannot run the backward: {reason}"
    gradient = torch.compiler.is_compiling()  # then autograd is the operator's own
    return proof.why_not(q.device.index or 0, _features(call, gradient))


BACKEND = Backend(
    "cuda",
    "NVIDIA sm_80 and later",
    why_not,
    forward,
    backward,
    unsupported_reason,
    probs_rounded=True,
    why_not_auto=why_not_auto,
    jvp=jvp,
    jvp_bwd=jvp_bwd,
)
PROVEN = replace(BACKEND, backward=backward_proven)

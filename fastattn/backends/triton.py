"""The backend of the Triton kernels. Next hop: kernels/launch.py."""

from __future__ import annotations

from ..core.call import Gradients, JvpResult, Result
from ..core.statistics import FirstPass, Maps
from . import schema
from .backend import Backend
from .cpu import DTYPES
from .gpu import gpu_missing, interpreting, launcher, triton_missing

MAX_HEAD_DIM = 1024

# Where kernels/ has the kernels of Triton's operators, beside those of the ordinary forward and
# backward, which operators.py registers. flash_attn_jvp_bwd_triton is plain torch.
KERNELS = {
    "flash_attn_jvp": ("launch_jvp", "jvp"),
    "flash_attn_fwd_stats": ("launch", "forward_stats"),
    "flash_attn_maps": ("launch_maps", "maps"),
}
for _key in ("CUDA", "CPU"):  # on the CPU, Triton's interpreter
    for _name, _place in KERNELS.items():
        schema.LIBRARY.impl(f"{_name}_triton", launcher(*_place), _key)


def forward(call):
    descales = call.operands.descales or ()
    return Result(*schema.forward_triton(*schema.arguments(call), call.num_splits, *descales))


def forward_statistics(call, need_entropy, need_argmax):
    needs = (call.num_splits, need_entropy, need_argmax)
    return FirstPass(*schema.FORWARD_STATISTICS["_triton"](*schema.arguments(call), *needs))


def backward(call, result, dout, dlse, needs, dentropy=None):
    arguments = (dout, dlse, *result, *schema.arguments(call), *needs, dentropy)
    return Gradients(*schema.backward_triton(*arguments))


def jvp(call, tangents):
    return JvpResult(*schema.jvp_triton(*schema.arguments(call), *tangents))


def jvp_bwd(call, result, tangents, dtout, dtlse, needs):
    arguments = (*result, *schema.arguments(call), *tangents, *needs)
    return Gradients(*schema.jvp_bwd_triton(dtout, dtlse, *arguments))


def maps(call, lse, need_col_mass, topk, pooled):
    arguments = (lse, *schema.arguments(call), need_col_mass, topk, pooled)
    return Maps(*schema.MAPS["_triton"](*arguments))


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
    forward_statistics=forward_statistics,
    maps=maps,
)

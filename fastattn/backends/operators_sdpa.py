"""The backward of aten's efficient attention on the CPU, which override.py uses. In torch it has no
derivative of its own. csrc/cpu/ops_aten.cpp sends each call of it to one of two operators with its
schema.

    sdpa_bwd                  the kernel of ops_aten.cpp, without a derivative
    sdpa_bwd_differentiable   for gradients that are to be differentiated again: AttentionBackward
"""

from __future__ import annotations

import torch

from ..core.spec import LEAVES, Spec
from . import cpu, flops
from .schema import LIBRARY
from .second_order import attention_backward

_NO_LEAVES = (None,) * len(LEAVES)


def define(schema: str) -> None:
    """Defines both, with the schema of aten's operator."""
    for name in ("sdpa_bwd", "sdpa_bwd_differentiable"):
        LIBRARY.define(name + schema)
    LIBRARY.impl("sdpa_bwd", torch.library.fallthrough_kernel, "AutogradCPU")
    LIBRARY.impl("sdpa_bwd_differentiable", _differentiable, "CompositeImplicitAutograd")
    torch.library.register_fake("fastattn::sdpa_bwd", _fake, lib=LIBRARY)
    flops.register(torch.ops.fastattn.sdpa_bwd, _flops)


def _fake(dout, q, k, v, *rest, scale=None):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _flops(dout, q, k, v, *rest, out_val=None, **_) -> int:
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(dout, q, k, v)


def _differentiable(
    dout, q, k, v, bias, out, lse, seed, offset, dropout_p, mask, is_causal=False, *, scale=None
):
    # override.py gives neither a bias nor dropout.
    spec = Spec(
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        right=0 if is_causal else -1,
        align_end=False,
    )
    how = (spec, cpu.BACKEND, (False,) * len(LEAVES))
    grads = attention_backward(dout, None, out, lse, q, k, v, *_NO_LEAVES, None, how)
    return *grads[:3], None

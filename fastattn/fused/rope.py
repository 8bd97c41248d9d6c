"""rotate(): rotary embeddings of queries and keys. Kernels: csrc/cpu/ops_fused.cpp and
kernels/rope.py. Next hop: operator.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.schema import LIBRARY, TAGS
from ..core.tensors import unit_stride
from .operator import differentiable, floating, has_kernel, on_gpu


def rotate_reference(x, cos, sin, positions, interleaved):
    """x [..., S, D], pairs of its first 2 * cos.shape[-1] channels turned by the angles of rows
    s (or positions[s] or [b, s]) of cos and sin; those may also be [B, S, pairs]."""
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # over the heads
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].to(cos.dtype), x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
        turned = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    """x turned, as rotate_reference says, in x's memory order; nothing is copied."""
    floating("x", x)
    if x.dim() > 4 or cos.dim() > 2 or not has_kernel(x, cos, sin, positions):
        return rotate_reference(x, cos, sin, positions, interleaved)
    shape = x.shape
    turned = _rotate(x[(None,) * (4 - x.dim())], cos, sin, positions, interleaved, False)
    return turned if x.dim() == 4 else turned.view(shape)


# ---- the operator --------------------------------------------------------------------------------


LIBRARY.define(
    "rotate(Tensor x, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse)"
    " -> Tensor",
    tags=TAGS,
)
on_gpu("rope", "rotate")


@torch.library.register_fake("fastattn::rotate", lib=LIBRARY)
def _rotate_fake(x, cos, sin, positions, interleaved, inverse):
    return torch.empty_like(unit_stride(x))


def _rotate_setup(ctx, inputs, output):
    _, cos, sin, positions, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin, positions)
    ctx.set_materialize_grads(False)


def _rotate_gradient(ctx, dout):
    """A rotation's transpose is the rotation back. cos and sin are tables: no gradient."""
    nothing = (None,) * 5
    if dout is None:
        return None, *nothing
    return _rotate(dout, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), *nothing


_rotate = differentiable("rotate", _rotate_setup, _rotate_gradient)

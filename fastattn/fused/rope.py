"""rotate(): rotary position embedding (RoPE) of queries and keys. Kernels: csrc/cpu/ops_fused.cpp
and kernels/rope.py. Next hop: operator.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.schema import LIBRARY, TAGS
from ..core.tensors import unit_stride
from .operator import differentiable, floating, has_kernel, on_gpu


def rotate_reference(x, cos, sin, positions, interleaved):
    """x [..., S, D] with its first 2 * pairs channels rotated; the other channels pass through.

    cos and sin are [positions, pairs], and token s takes row s, or row positions[s] (positions [S])
    or positions[b, s] (positions [B, S]). They may also be [B, S, pairs], one row for each token.
    Pairs are channels 2c and 2c + 1 where interleaved (RoFormer, GPT-J), else c and c + pairs
    (GPT-NeoX, Llama). Computed in cos's dtype and rounded to x's once.
    """
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # over the heads
    pairs = cos.shape[-1]
    rotated, rest = x[..., : 2 * pairs].to(cos.dtype), x[..., 2 * pairs :]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = rotated[..., :pairs], rotated[..., pairs:]
        rotated = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    """rotate_reference() by a kernel where there is one. The result is a new tensor in x's memory
    order; x is read in place, whatever its strides."""
    floating("x", x)
    if x.dim() > 4 or cos.dim() > 2 or not has_kernel(x, cos, sin, positions):
        return rotate_reference(x, cos, sin, positions, interleaved)
    shape = x.shape
    rotated = _rotate(x[(None,) * (4 - x.dim())], cos, sin, positions, interleaved, False)
    return rotated if x.dim() == 4 else rotated.view(shape)


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
    """A rotation's transpose is its inverse. cos and sin are tables and get no gradient."""
    nothing = (None,) * 5
    if dout is None:
        return None, *nothing
    return _rotate(dout, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), *nothing


_rotate = differentiable("rotate", _rotate_setup, _rotate_gradient)

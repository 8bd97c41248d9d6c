"""norm(): RMSNorm or LayerNorm, with dropout and the residual addition in the same pass. Kernels:
csrc/cpu/ops_fused.cpp and kernels/norm.py. Next hop: operator.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.schema import LIBRARY, TAGS
from ..core import checks
from ..core.philox import keep_probability, keep_rows
from ..core.tensors import accumulate_dtype, empty_result
from ..core.transforms import pull_back
from .operator import (
    arrived,
    differentiable,
    floating,
    has_kernel,
    on_gpu,
    save_inputs,
    through,
)


def norm_reference(x, residual, weight, bias, eps, center):
    """(y, summed): summed is x + residual, or x, and y is its norm, LayerNorm with center (which
    subtracts the mean), else RMSNorm. Computed in fp32 (fp64 for fp64), rounded once."""
    summed = x if residual is None else x + residual
    y = summed.to(accumulate_dtype(summed.dtype))
    if center:
        y = y - y.mean(-1, keepdim=True)
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(summed.dtype), summed


def drop_reference(x, seed, dropout_p):
    """x [..., n] after the kernels' dropout with key `seed`. Rows are numbered in logical order,
    not in memory order."""
    if not dropout_p:
        return x
    kept = keep_rows(seed, x.shape[:-1].numel(), x.shape[-1], dropout_p, device=x.device)
    return x * (kept.view(x.shape).to(x.dtype) / keep_probability(dropout_p))


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    center: bool,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """norm(dropout(x) + residual), and the sum itself.

    Args:
        x: [..., n], a floating dtype and any strides.
        residual: x's shape, or None; required with dropout_p.
        weight, bias: [n] each, or None.
        eps: added to the variance (LayerNorm) or the mean square (RMSNorm).
        center: True is LayerNorm, False is RMSNorm.
        dropout_p: the probability in [0, 1) of dropping an element of x before the addition.

    Returns:
        (y, summed), both in x's shape and in the promoted dtype of x and residual.

    Raises:
        TypeError: a dtype is not a floating one. ValueError: shapes do not fit, or dropout_p came
        without a residual.
    """
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and checks.tensor("x", x).shape[-1:] != vector.shape:
            raise ValueError(f"x has shape {checks.show(x)} and {name} {checks.show(vector)}; "
                             f"accepted is [..., {vector.shape[0]}]")  # fmt: skip
    floating("x", x)
    x, residual = arrived(x), arrived(residual)
    if residual is not None:
        if floating("residual", residual).shape != x.shape:
            raise ValueError(f"residual has shape {checks.show(residual)} and x {checks.show(x)}; "
                             "they must be equal")  # fmt: skip
        if residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
    elif dropout_p:
        raise ValueError(f"dropout_p is {dropout_p} and residual is None; accepted is 0 without a "
                         "residual")  # fmt: skip
    small = center and not dropout_p and x.numel() < SMALL_LAYER_NORM
    if small or not has_kernel(x, residual, weight, bias):
        return _norm_in_torch(F.dropout(x, dropout_p), residual, weight, bias, eps, center)
    seed = checks.dropout_key(None, x.device) if dropout_p else None
    y, summed, _, _ = _norm(x, residual, weight, bias, eps, center, seed, dropout_p)
    return y, (x if residual is None else summed)


# Below this many elements, the operator's higher cost per call (8 us more than aten's, 40 us with
# gradients) exceeds what its kernel saves: 64 x 256 takes 18 us, aten 10; 2048 x 768 takes 321 us,
# aten 497.
SMALL_LAYER_NORM = 1 << 17


def _norm_in_torch(x, residual, weight, bias, eps, center):
    """torch's own norms, which are fast on every device, and the reference for what they do not
    accept: mixed dtypes, and RMSNorm with a bias."""
    mixed = any(vector is not None and vector.dtype != x.dtype for vector in (weight, bias))
    if mixed or (bias is not None and not center):
        return norm_reference(x, residual, weight, bias, eps, center)
    summed = x if residual is None else x + residual
    if center:
        return F.layer_norm(summed, x.shape[-1:], weight, bias, eps), summed
    return F.rms_norm(summed, x.shape[-1:], weight, eps), summed


# ---- the operators -------------------------------------------------------------------------------


for _schema in (
    "norm_fwd(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool center,"
    " Tensor? dropout_seed=None, float dropout_p=0.0)"
    " -> (Tensor y, Tensor summed, Tensor mean, Tensor rstd)",
    "norm_bwd(Tensor dy, Tensor? dsummed, Tensor x, Tensor? weight, Tensor mean, Tensor rstd,"
    " float eps, bool center, bool need_dweight, bool need_dbias, Tensor? dropout_seed=None,"
    " float dropout_p=0.0) -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dkept)",
):
    LIBRARY.define(_schema, tags=TAGS)
on_gpu("norm", "norm_fwd", "norm_bwd")


@torch.library.register_fake("fastattn::norm_fwd", lib=LIBRARY)
def _norm_fake(x, residual, weight, bias, eps, center, dropout_seed=None, dropout_p=0.0):
    x = x.contiguous() if dropout_p else x
    rows, dtype = x.shape[:-1].numel(), accumulate_dtype(x.dtype)
    mean, rstd = (x.new_empty(n, dtype=dtype) for n in (rows if center else 0, rows))
    return empty_result(x), x.new_empty(0) if residual is None else empty_result(x), mean, rstd


@torch.library.register_fake("fastattn::norm_bwd", lib=LIBRARY)
def _norm_backward_fake(
    dy, dsummed, x, weight, mean, rstd, eps, center, need_dweight, need_dbias,
    dropout_seed=None, dropout_p=0.0,
):  # fmt: skip
    x = x.contiguous() if dropout_p else x
    sizes = (x.shape[-1] if need else 0 for need in (need_dweight, need_dbias))
    sums = (x.new_empty(n, dtype=accumulate_dtype(x.dtype)) for n in sizes)
    return empty_result(x), *sums, empty_result(x) if dropout_p else x.new_empty(0)


def _norm_setup(ctx, inputs, output):
    x, residual, weight, bias, ctx.eps, ctx.center, seed, ctx.dropout_p = inputs
    _, summed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    base = x if residual is None else summed
    ctx.save_for_backward(base, weight, bias, mean, rstd, seed)
    ctx.residual = residual is not None
    ctx.set_materialize_grads(False)


def _norm_gradient(ctx, dy, dsummed, dmean, drstd):
    base, weight, bias, mean, rstd, seed = ctx.saved_tensors
    dsummed = dsummed if ctx.residual else None
    _, _, need_dweight, need_dbias, *_ = ctx.needs_input_grad
    if dy is None:
        if dsummed is None or not ctx.dropout_p:
            return dsummed, dsummed, *(None,) * 6
        dy = torch.zeros_like(dsummed)
    dx, dweight, dbias, dkept = _norm_backward(
        dy, dsummed, base, weight, mean, rstd, ctx.eps, ctx.center, need_dweight, need_dbias,
        seed, ctx.dropout_p,
    )  # fmt: skip
    dweight = dweight.to(weight.dtype) if need_dweight else None
    dbias = dbias.to(bias.dtype) if need_dbias else None
    kept = dkept if ctx.dropout_p else dx
    return kept, dx if ctx.residual else None, dweight, dbias, *(None,) * 4


def _norm_grads(
    dy, dsummed, x, weight, mean, rstd, eps, center, need_dweight, need_dbias, seed, dropout_p
):
    """norm_bwd's results as a function of (dy, dsummed, x, weight) by the reference, for second
    derivatives. mean and rstd follow from x."""

    def gradients(dy, dsummed, x, weight):
        dtype = accumulate_dtype(x.dtype)
        weight = None if weight is None else weight.to(dtype)

        def reference(x, weight):
            return norm_reference(x, None, weight, None, eps, center)[:1]

        dx, dweight = pull_back(reference, (x, weight), (dy,))
        dx = dx if dsummed is None else dx + dsummed
        dbias = dy.to(dtype).flatten(0, -2).sum(0) if need_dbias else x.new_empty(0, dtype=dtype)
        dkept = drop_reference(dx, seed, dropout_p) if dropout_p else x.new_empty(0)
        return dx, dweight if need_dweight else x.new_empty(0, dtype=dtype), dbias, dkept

    return gradients


_norm = differentiable("norm_fwd", _norm_setup, _norm_gradient)
_norm_backward = differentiable("norm_bwd", save_inputs, through(_norm_grads, 4))

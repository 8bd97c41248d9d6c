"""activate(): bias, activation and dropout in one pass, dropout(activation(x + bias)). Kernels:
csrc/cpu/activate.inl and kernels/activate.py. Next hop: operator.py, which says when they run.

Dropout takes 16 Philox bits per element, keyed by a (seed, offset) from torch's generator. So the
backward pass computes the mask again instead of storing it, all threads draw in parallel (torch's
bernoulli_ draws on one), and recomputation under checkpointing drops the same elements. ReLU saves
its result, whose sign gives the gradient; the other activations save their input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends.schema import LIBRARY, TAGS
from ..core import checks
from ..core.philox import keep_probability
from ..core.tensors import accumulate_dtype, empty_result
from ..core.transforms import pull_back
from . import gate, operator
from .norm import drop_reference

ACTIVATIONS = {"identity": lambda x: x, "relu": F.relu, **gate.GATES}


def activate_reference(x, bias, seed, dropout_p, activation):
    """dropout(activation(x + bias)), computed in fp32 (fp64 for fp64) and rounded once."""
    y = x.to(accumulate_dtype(x.dtype))
    y = y if bias is None else y + bias.to(y.dtype)
    return drop_reference(ACTIVATIONS[activation](y), seed, dropout_p).to(x.dtype)


def activate(
    x: Tensor,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    activation: str = "identity",
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """dropout(activation(x + bias)) in one pass.

    Args:
        x: [..., n], a floating dtype.
        bias: [n], or None.
        dropout_p: the probability in [0, 1) that an element becomes 0. The others are divided by
            the probability with which they are kept, a multiple of 1/65536.
        activation: a key of ACTIVATIONS.
        dropout_seed: int64 [2], (seed, offset); None draws it from the device's generator.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: x is not of a floating dtype. ValueError: shapes do not fit, or activation or
        dropout_p is not accepted.
    """
    n = operator.floating("x", x).shape[-1:]
    if bias is not None and checks.tensor("bias", bias).shape != n:
        raise ValueError(f"x has shape {checks.show(x)} and bias {checks.show(bias)}; accepted is "
                         f"[..., {bias.shape[0]}]")  # fmt: skip
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted are {', '.join(ACTIVATIONS)}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p is {dropout_p}; accepted is [0, 1)")
    x = operator.arrived(x)
    if x.dim() == 0 or not operator.has_kernel(x, bias):
        if dropout_seed is not None:
            return activate_reference(x, bias, dropout_seed, dropout_p, activation)
        return F.dropout(activate_reference(x, bias, None, 0.0, activation), dropout_p)
    seed = checks.dropout_key(dropout_seed, x.device) if dropout_p else None
    return _activate(x, bias, seed, dropout_p, activation)


for _schema in (
    "activate_fwd(Tensor x, Tensor? bias, Tensor? dropout_seed, float dropout_p, str activation)"
    " -> Tensor",
    "activate_bwd(Tensor dout, Tensor? saved, Tensor? bias, Tensor? dropout_seed, float dropout_p,"
    " str activation, bool need_dbias) -> (Tensor dx, Tensor dbias)",
):
    LIBRARY.define(_schema, tags=TAGS)
operator.on_gpu("activate", "activate_fwd", "activate_bwd")


@torch.library.register_fake("fastattn::activate_fwd", lib=LIBRARY)
def _activate_fake(x, bias, seed, dropout_p, activation):
    return empty_result(x.contiguous() if dropout_p else x)


@torch.library.register_fake("fastattn::activate_bwd", lib=LIBRARY)
def _activate_backward_fake(dout, saved, bias, seed, dropout_p, activation, need_dbias):
    sums = dout.new_empty(dout.shape[-1] if need_dbias else 0, dtype=accumulate_dtype(dout.dtype))
    return _activate_fake(dout, bias, seed, dropout_p, activation), sums


def _setup(ctx, inputs, output):
    x, bias, seed, ctx.dropout_p, ctx.activation = inputs
    saved = {"identity": None, "relu": output}.get(ctx.activation, x)
    ctx.save_for_backward(saved, bias, seed)
    ctx.set_materialize_grads(False)


def _gradient(ctx, dout):
    nothing = (None,) * 3
    if dout is None:
        return None, None, *nothing
    saved, bias, seed = ctx.saved_tensors
    need_dbias = ctx.needs_input_grad[1]
    call = (seed, ctx.dropout_p, ctx.activation, need_dbias)
    dx, dbias = _activate_backward(dout, saved, bias, *call)
    return dx, dbias.to(bias.dtype) if need_dbias else None, *nothing


def _grads(dout, saved, bias, seed, dropout_p, activation, need_dbias):
    """(dout, saved, bias) -> activate_bwd's results, by the reference."""

    def gradients(dout, saved, bias):
        dtype = accumulate_dtype(dout.dtype)
        if activation == "relu":  # saved is the result after dropout
            dx = torch.where(saved > 0, dout.to(dtype) / keep_probability(dropout_p), 0.0)
        elif activation == "identity":
            dx = drop_reference(dout.to(dtype), seed, dropout_p)
        else:

            def reference(x, bias):
                return (activate_reference(x, bias, seed, dropout_p, activation),)

            bias = None if bias is None else bias.to(dtype)
            dx, _ = pull_back(reference, (saved.to(dtype), bias), (dout.to(dtype),))
        dbias = dx.flatten(0, -2).sum(0) if need_dbias else dx.new_empty(0)
        return dx.to(dout.dtype), dbias

    return gradients


_activate = operator.differentiable("activate_fwd", _setup, _gradient)
_activate_backward = operator.differentiable(
    "activate_bwd", operator.save_inputs, operator.through(_grads, 3)
)

"""F.linear in float32 without MKL on AMD CPUs, where MKL is slower: oneDNN, which torch includes,
computes the product and the input's gradient, and csrc/cpu/ops_linear.cpp the gradients of weight
and bias.

A training step of two encoder layers (768 channels, 8 heads, 1024 rows) on two Zen 4 cores takes
419 ms with MKL, 402 ms with oneDNN and MKL's weight gradients, and 392 ms like this. oneDNN's
weight gradients were slower than MKL's. Intel CPUs were not measured and keep MKL.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import capturing
from ..backends.schema import LIBRARY, TAGS
from ..fused import operator


def _on_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as lines:
            return "AuthenticAMD" in lines.read(1000)
    except OSError:
        return False


_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _on_amd() else None
SMALL_PRODUCT = 1 << 26  # multiply-adds; below this a call's overhead exceeds the difference


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear: x [..., in] @ weight [out, in]^T + bias [out], with all derivatives. A bias of a
    dtype other than weight's is added to the product, as nn.MultiheadAttention does it."""
    if bias is not None and bias.dtype != weight.dtype:
        out = linear(x, weight, None)
        return (out + bias).to(out.dtype)
    if (
        _ONEDNN is None
        or not operator.has_kernel(x, weight, bias)
        or x.is_nested
        or x.numel() * weight.shape[0] < SMALL_PRODUCT
        or any(t is not None and t.dtype != torch.float32 for t in (x, weight, bias))
        or torch.is_autocast_enabled("cpu")
        or not torch._C._get_mkldnn_enabled()
        or x.shape[-1] != weight.shape[-1]  # F.linear raises the error
    ):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        out = _ONEDNN(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, "none", [], "")
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dout: Tensor):
        x, weight = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad
        dx = linear(dout, weight.t(), None) if need_dx else None
        if not (need_dweight or need_dbias):
            return dx, None, None
        rows, x = dout.reshape(-1, dout.shape[-1]), x.reshape(-1, x.shape[-1])
        if need_dweight and operator.has_kernel(rows, x):
            dweight, dbias = _weight_gradients(rows, x, need_dbias)
        else:
            dweight, dbias = _weight_reference(rows, x, need_dbias)
        return dx, dweight if need_dweight else None, dbias if need_dbias else None


# ---- the operator of the weight's and the bias's gradients -------------------------------------

LIBRARY.define(
    "linear_bwd_weight(Tensor dout, Tensor x, bool need_dbias) -> (Tensor dweight, Tensor dbias)",
    tags=TAGS,
)


@torch.library.register_fake("fastattn::linear_bwd_weight", lib=LIBRARY)
def _weight_fake(dout, x, need_dbias):
    dweight = x.new_empty(dout.shape[1], x.shape[1])
    return dweight, x.new_empty(dout.shape[1] if need_dbias else 0)


def _weight_reference(dout, x, need_dbias):
    """(dweight [out, in], dbias [out] or [0] if not needed) from dout [rows, out], x [rows, in]."""
    return dout.t() @ x, dout.sum(0) if need_dbias else dout.new_empty(0)


_weight_gradients = operator.differentiable(
    "linear_bwd_weight",
    operator.save_inputs,
    operator.through(lambda *inputs: lambda dout, x: _weight_reference(dout, x, inputs[2]), 2),
)


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), by linear() where module is torch's Linear without hooks."""
    if any(plain(module, cls) for cls in (nn.Linear, NonDynamicallyQuantizableLinear)):
        return linear(x, module.weight, module.bias)
    return module(x)


def plain(module, cls: type) -> bool:
    """Is the module exactly of class cls, and does calling it run only the forward of cls?"""
    return (
        type(module) is cls
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not capturing.has_other_hooks()
    )

"""F.linear in float32 by oneDNN instead of MKL, on AMD's CPUs, where MKL leaves speed behind.

torch has both and asks MKL. In ms on two Zen 4 cores, 1024 rows, 768 to 2304 channels:

                  MKL   oneDNN
    product      22.5     17.9
    dx           19.0     17.6
    dweight      19.0     20.9   which MKL keeps

On Intel's CPUs nothing was measured, and MKL stays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook

from ..fused import has_kernel


def _on_amd() -> bool:
    try:
        with open("/proc/cpuinfo") as lines:
            return "AuthenticAMD" in lines.read(1000)
    except OSError:
        return False


_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _on_amd() else None
SMALL_PRODUCT = 1 << 26  # multiplications: below, the difference is less than a call's own cost


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] weight [out, in]' + bias [out], with all derivatives: F.linear."""
    if (
        _ONEDNN is None
        or not has_kernel(x, weight, bias)
        or x.is_nested
        or x.numel() * weight.shape[0] < SMALL_PRODUCT
        or any(t is not None and t.dtype != torch.float32 for t in (x, weight, bias))
        or torch.is_autocast_enabled("cpu")
        or not torch._C._get_mkldnn_enabled()
        or x.shape[-1] != weight.shape[-1]  # torch's own says so
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
        rows = dout.reshape(-1, dout.shape[-1])
        dx = linear(dout, weight.t(), None) if need_dx else None
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if need_dweight else None
        return dx, dweight, rows.sum(0) if need_dbias else None


def call_linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x): torch's Linear, if there is nothing attached, by linear()."""
    if any(plain(module, cls) for cls in (nn.Linear, NonDynamicallyQuantizableLinear)):
        return linear(x, module.weight, module.bias)
    return module(x)


def plain(module, cls: type) -> bool:
    """Is it exactly a cls, and would calling it run nothing but its forward?"""
    return (
        type(module) is cls
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
    )

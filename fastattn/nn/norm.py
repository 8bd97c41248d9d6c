"""RMSNorm and LayerNorm over the last dimension, with an optional fused residual addition.
Next hop: ../fused/norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks
from ..fused import norm
from ._arguments import positive, probability


class _Norm(nn.Module):
    """The base of both norms: weight, optional bias, and the call with or without a residual."""

    center: bool  # True subtracts the mean

    def __init__(self, dim: int, eps: float, affine: bool, bias: bool, device, dtype) -> None:
        super().__init__()
        self.dim, self.eps = positive("dim", dim), checks.number("eps", eps)
        if self.eps < 0:
            raise ValueError(f"eps is {eps}; accepted is a number >= 0")
        place = {"device": device, "dtype": dtype}
        affine, bias = checks.flag("elementwise_affine", affine), checks.flag("bias", bias)
        self.weight = nn.Parameter(torch.empty(dim, **place)) if affine else None
        self.bias = nn.Parameter(torch.empty(dim, **place)) if affine and bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0
    ) -> Tensor | tuple[Tensor, Tensor]:
        """norm(x), or with a residual (norm(x + residual), x + residual), in one pass.

        Args:
            x: [..., dim], float32, bfloat16, float16 or float64; any strides.
            residual: x's shape. Different dtypes are promoted as in x + residual.
            dropout_p: probability in [0, 1) that an element of x is dropped before the residual is
                added; it needs a residual. It applies in training and evaluation alike.

        Returns:
            The normed values in x's dtype (with a residual, the dtype of the sum). Computed in
            float32 (float64 for float64) and rounded once.

        Raises:
            ValueError or TypeError: shapes or dtypes do not fit, or dropout_p came without a
            residual.
        """
        p = probability("dropout_p", dropout_p)
        normed, summed = norm.norm(x, residual, self.weight, self.bias, self.eps, self.center, p)
        return normed if residual is None else (normed, summed)

    def extra_repr(self) -> str:
        shown = f"{self.dim}, eps={self.eps}"
        return shown if self.weight is not None else f"{shown}, elementwise_affine=False"


class RMSNorm(_Norm):
    """y = x / sqrt(mean(x^2) + eps) * weight.

    Args:
        dim: the size of the last dimension.
        eps: added to the mean square, default 1e-6 (Llama's and T5's).
        elementwise_affine: whether there is a weight [dim], initially 1.

    Llama's own module rounds to x's dtype before it multiplies by the weight; this one rounds once.

    Source: Zhang and Sennrich, arXiv:1910.07467.
    """

    center = False

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, elementwise_affine, False, device, dtype)


class LayerNorm(_Norm):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.

    Args:
        dim: the size of the last dimension.
        eps: added to the (biased) variance, default 1e-5 (torch's).
        elementwise_affine: whether there are a weight [dim], initially 1, and a bias [dim], 0.
        bias: False omits the bias.

    State dicts are interchangeable with those of torch.nn.LayerNorm(dim).

    Source: Ba, Kiros and Hinton, arXiv:1607.06450.
    """

    center = True

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, elementwise_affine, bias, device, dtype)

"""Feed-forward blocks: SwiGLU, GeGLU and the plain MLP. Next hop: ../fused/gate.py."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..fused import gate
from ._arguments import choice, last_size, positive

ACTIVATIONS = {**gate.GATES, "relu": F.relu, "relu2": lambda x: F.relu(x).square()}


class _FeedForward(nn.Module):
    def reset_parameters(self) -> None:
        """Initialises each projection as torch.nn.Linear does."""
        for child in self.children():
            child.reset_parameters()

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


class _Gated(_FeedForward):
    """down_proj(activation(gate_proj(x)) * up_proj(x))."""

    activation: str  # a key of fused.gate.GATES

    def __init__(self, dim, hidden, bias, device, dtype) -> None:
        super().__init__()
        positive("dim", dim)
        if hidden is None:  # 2/3 of 4 * dim: as many parameters as a plain MLP
            hidden = 64 * math.ceil(dim * 8 / 3 / 64)
        positive("hidden", hidden)
        place = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(dim, hidden, **place)
        self.up_proj = nn.Linear(dim, hidden, **place)
        self.down_proj = nn.Linear(hidden, dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        last_size("x", x, self.gate_proj.in_features)
        return self.down_proj(gate.gate(self.gate_proj(x), self.up_proj(x), self.activation))


class SwiGLU(_Gated):
    """down_proj(silu(gate_proj(x)) * up_proj(x)); parameter names are Llama's.

    Args:
        dim: size of the last dimension of input and output.
        hidden: hidden size; None: 8/3 * dim rounded up to a multiple of 64.
        bias: whether the three projections have biases, default False.

    Source: Shazeer, arXiv:2002.05202.
    """

    activation = "silu"

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, hidden, bias, device, dtype)


class GeGLU(_Gated):
    """down_proj(gelu(gate_proj(x)) * up_proj(x)).

    Args:
        dim: size of the last dimension of input and output.
        hidden: hidden size; None: 8/3 * dim rounded up to a multiple of 64.
        bias: whether the three projections have biases, default False.
        approximate: "none" (erf, the default as in torch) or "tanh" (as in Gemma and T5).

    Source: Shazeer, arXiv:2002.05202.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        bias: bool = False,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, hidden, bias, device, dtype)
        choice("approximate", approximate, ("none", "tanh"))
        self.activation = "gelu" if approximate == "none" else "gelu_tanh"


class MLP(_FeedForward):
    """down_proj(activation(up_proj(x))), the plain feed-forward block.

    Args:
        dim: size of the last dimension of input and output.
        hidden: hidden size; None: 4 * dim.
        activation: "gelu" (erf), "gelu_tanh", "relu", "relu2" (squared) or "silu".
        bias: whether the two projections have biases, default True.
    """

    def __init__(
        self,
        dim: int,
        hidden: int | None = None,
        *,
        activation: str = "gelu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = 4 * positive("dim", dim) if hidden is None else positive("hidden", hidden)
        self.activation = choice("activation", activation, tuple(ACTIVATIONS))
        place = {"bias": bias, "device": device, "dtype": dtype}
        self.up_proj = nn.Linear(dim, hidden, **place)
        self.down_proj = nn.Linear(hidden, dim, **place)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., dim]."""
        last_size("x", x, self.up_proj.in_features)
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))

"""Positional encodings that are added to embeddings: sinusoidal and learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks
from ._arguments import positive
from .rotary import AngleTable, frequencies


class _Positional(nn.Module):
    """The base of both encodings: dim, max_len, and the positions of a call's rows."""

    def __init__(self, dim: int, max_len: int) -> None:
        super().__init__()
        self.dim, self.max_len = positive("dim", dim), positive("max_len", max_len)

    def forward(self, x: Tensor, offset: int | Tensor = 0) -> Tensor:
        """x plus the encoding of its positions, in x's shape and dtype.

        Args:
            x: [B, S, dim], or [S, dim].
            offset: the position of row 0: an int, or an integer tensor [B] with one for each
                sequence (the lengths of a cache, in decoding). offset + S is at most max_len.

        Raises:
            ValueError or TypeError: x or offset is not accepted.
        """
        if checks.tensor("x", x).dim() not in (2, 3) or x.shape[-1] != self.dim:
            raise ValueError(f"x has shape {checks.show(x)}; accepted are [B, S, {self.dim}] and "
                             f"[S, {self.dim}]")  # fmt: skip
        rows = x.shape[-2]
        if rows > self.max_len:
            raise ValueError(f"x has {rows} rows; accepted are at most max_len = {self.max_len}")

        def accepted():  # formatted only on error, see checks.show
            return f"a first position that leaves room for {rows} rows, in"

        if isinstance(offset, Tensor):
            if x.dim() != 3:
                raise ValueError("offset is a tensor and x has no batch; an int is accepted")
            offset = checks.int_vector("offset", offset, x.shape[:1], x.device, "[B]")
            checks.lengths("offset", offset, 0, self.max_len - rows, accepted)
            positions = offset.long().unsqueeze(1) + torch.arange(rows, device=x.device)
            added = self._at(positions, x)
        else:
            if not 0 <= checks.integer("offset", offset) <= self.max_len - rows:
                raise ValueError(f"offset is {offset}; accepted is {accepted()} "
                                 f"[0, {self.max_len - rows}]")  # fmt: skip
            added = self._rows(offset, offset + rows, x)
        return x + added.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.max_len}"


class SinusoidalPositionalEncoding(_Positional):
    """Adds sin(p / base^(2i / dim)) to x[.., p, 2i] and the cosine of it to x[.., p, 2i + 1].

    Args:
        dim: the size of the last dimension.
        max_len: the number of positions.
        base: default 10000.

    It has no parameters and no buffers. The encoding is computed in float64 and added in x's dtype.

    Source: Vaswani et al., arXiv:1706.03762, section 3.5.
    """

    def __init__(self, dim: int, max_len: int, base: float = 10000.0) -> None:
        super().__init__(dim, max_len)
        if not checks.number("base", base) > 0:
            raise ValueError(f"base is {base}; accepted is a number > 0")
        self.base = float(base)
        self.table = AngleTable(frequencies(dim, self.base))

    def _rows(self, start, end, x):
        return self._encoding(*self.table.rows(start, end, x.device, _table_dtype(x)))

    def _at(self, positions, x):
        return self._encoding(*self.table.at(positions, _table_dtype(x)))

    def _encoding(self, cos, sin):
        return torch.stack((sin, cos), dim=-1).flatten(-2)[..., : self.dim]


class LearnedPositionalEncoding(_Positional):
    """Adds weight[p] to x[.., p, :], with a learned weight [max_len, dim].

    Args:
        dim: the size of the last dimension.
        max_len: the number of positions.
        std: standard deviation of the weight's initial normal distribution, default 0.02 (GPT-2,
            BERT).
    """

    def __init__(
        self,
        dim: int,
        max_len: int,
        *,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, max_len)
        if not checks.number("std", std) >= 0:
            raise ValueError(f"std is {std}; accepted is a number >= 0")
        self.std = std
        self.weight = nn.Parameter(torch.empty(max_len, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises the weight from a normal distribution with standard deviation std."""
        nn.init.normal_(self.weight, std=self.std)

    def _rows(self, start, end, x):
        return self.weight[start:end]

    def _at(self, positions, x):
        return self.weight[positions]


def _table_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32

"""RotaryEmbedding, and the table of angles that it shares with sinusoidal positions.
Next hop: ../fused/rope.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..core import checks
from ..fused import rope
from ._arguments import positive


class AngleTable:
    """cos and sin of position * frequency, [positions, frequencies].

    Computed in float64, rounded once to float32 (or kept in float64), and cached for each device
    and dtype. The table is not a buffer: model.to(bfloat16) must not round it, and a module that
    was made on the meta device, copied or unpickled computes it again.
    """

    def __init__(self, frequencies: Sequence[float]) -> None:
        self.frequencies = tuple(frequencies)
        self._kept: dict = {}

    def __getstate__(self) -> dict:
        return {"frequencies": self.frequencies, "_kept": {}}

    def rows(self, start: int, end: int, device, dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin) of positions [start, end): each [end - start, frequencies]."""
        if torch.compiler.is_compiling():
            return self.at(torch.arange(start, end, device=device), dtype)
        device = torch.device(device)
        cos, sin = self._kept.get((device, dtype), (None, None))
        if cos is None or cos.shape[0] < end:
            length = max(64, 1 << max(0, end - 1).bit_length())
            positions = torch.arange(length, device="cpu" if device.type != "meta" else "meta")
            cos, sin = (x.to(device) for x in self.at(positions, dtype))
            if device.type != "meta":
                self._kept[device, dtype] = cos, sin
        return cos[start:end], sin[start:end]

    def at(self, positions: Tensor, dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin) of any positions [...]: each [..., frequencies]."""
        device = positions.device
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=device)
        angles = positions.to(torch.float64).unsqueeze(-1) * frequencies
        return angles.cos().to(dtype), angles.sin().to(dtype)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding: rotates pairs of channels by position * frequency.

    Args:
        dim: how many channels are rotated, an even number: the first `dim` of each head. Where it
            is less than the head dimension (partial rotary, GPT-NeoX), the rest pass unchanged.
        base: frequency i is base^(-2i / dim), default 10000.
        interleaved: True pairs channels (2i, 2i + 1), as in RoFormer and GPT-J; False, the default,
            pairs (i, i + dim / 2), as in GPT-NeoX, Llama and transformers.
        scaling: None, or a dict with "rope_type" (transformers' names and keys):
            "linear", "factor": positions are divided by factor.
            "ntk", "factor": the base is multiplied by factor^(dim / (dim - 2)).
            "llama3", "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings": low frequencies are divided by factor, high ones
            kept, and those between interpolated.

    It has no parameters and no buffers, and all layers may share one. Angles are computed in
    float64 and kept in float32, whatever the model's dtype.

    Sources: RoFormer (Su et al., arXiv:2104.09864); linear scaling (Chen et al.,
    arXiv:2306.15595); NTK-aware scaling as in YaRN, section 3.1 (Peng et al., arXiv:2309.00071);
    Llama 3.1's scaling as described in transformers' documentation.

    Raises:
        ValueError or TypeError: an argument, which is named, is not accepted.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        *,
        interleaved: bool = False,
        scaling: Mapping | None = None,
    ) -> None:
        super().__init__()
        if positive("dim", dim) % 2:
            raise ValueError(f"dim is {dim}; accepted is an even number of channels")
        if not 0 < checks.number("base", base) < math.inf:
            raise ValueError(f"base is {base}; accepted is a finite number > 0")
        self.dim, self.base = dim, float(base)
        self.interleaved = checks.flag("interleaved", interleaved)
        self.scaling = None if scaling is None else dict(scaling)
        self.table = AngleTable(_scaled_frequencies(dim, self.base, self.scaling))

    def twin(self) -> RotaryEmbedding:
        """Another module with the same angles, which shares this one's table. A model that is split
        into pipeline stages needs a module for each layer, because torch cannot trace one module
        under two names."""
        twin = RotaryEmbedding(
            self.dim, self.base, interleaved=self.interleaved, scaling=self.scaling
        )
        twin.table = self.table
        return twin

    def forward(
        self,
        q: Tensor,
        k: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """q, or (q, k), rotated: new tensors in the shape, dtype and memory order of the inputs.

        Args:
            q: [B, heads, S, head_dim] (as fastattn.attention takes it), or any [..., S, head_dim]
                with head_dim >= dim; any strides.
            k: the same with its own number of heads; None: only q is rotated and returned.
            positions: integers >= 0, [S] or [B, S] (then q has 4 dimensions); None: offset,
                offset + 1, ...
            offset: the position of row 0 where positions is None.

        Raises:
            ValueError or TypeError: shapes, dtypes or positions are not accepted.
        """
        tensors = {"q": q} if k is None else {"q": q, "k": k}
        for name, x in tensors.items():
            if checks.tensor(name, x).dim() < 2 or x.shape[-1] < self.dim:
                raise ValueError(f"{name} has shape {checks.show(x)}; accepted is [..., S, "
                                 f"head_dim] with head_dim at least {self.dim}")  # fmt: skip
        if k is not None and k.shape[-2] != q.shape[-2]:
            raise ValueError(f"k has length {k.shape[-2]} and q {q.shape[-2]}; they must be equal")
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        if positions is None:
            offset = checks.length("offset", offset)
            cos, sin = self.table.rows(offset, offset + q.shape[-2], q.device, dtype)
        else:
            cos, sin, positions = self._given(positions, q, dtype)
        rotated = [rope.rotate(x, cos, sin, positions, self.interleaved) for x in tensors.values()]
        return rotated[0] if k is None else tuple(rotated)

    def _given(self, positions, q, dtype):
        """(cos, sin, positions). cos and sin are the rows of all positions up to the largest, to be
        indexed by positions; or, with positions None, one row for each of q's rows."""
        shapes = [(q.shape[-2],)] + ([(q.shape[0], q.shape[-2])] if q.dim() == 4 else [])
        checks.on_device("positions", positions, q.device)
        if tuple(positions.shape) not in shapes:
            raise ValueError(f"positions has shape {checks.show(positions)}; accepted are "
                             f"{' and '.join(str(list(x)) for x in shapes)}")  # fmt: skip
        if positions.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"positions is {positions.dtype}; accepted are int32 and int64")
        if not checks.has_values(positions) or positions.numel() == 0:
            return *self.table.at(positions, dtype), None
        low, high = (int(x) for x in positions.aminmax())
        if low < 0:
            raise ValueError(f"positions holds {low}; accepted are integers >= 0")
        return *self.table.rows(0, high + 1, q.device, dtype), positions

    def extra_repr(self) -> str:
        shown = f"{self.dim}, base={self.base:g}, interleaved={self.interleaved}"
        return shown if self.scaling is None else f"{shown}, scaling={self.scaling}"


# ---- frequencies --------------------------------------------------------------------------------


def frequencies(dim: int, base: float) -> list[float]:
    """base^(-2i / dim) for the pairs i of `dim` channels."""
    return [base ** (-i / dim) for i in range(0, dim, 2)]


def _linear(dim, base, factor):
    return [f / factor for f in frequencies(dim, base)]


def _ntk(dim, base, factor):
    if dim == 2:  # its one frequency is 1 under every base
        return frequencies(dim, base)
    return frequencies(dim, base * factor ** (dim / (dim - 2)))


def _llama3(dim, base, factor, low_freq_factor, high_freq_factor, original_max_position_embeddings):
    if not 0 < low_freq_factor < high_freq_factor:
        raise ValueError(f"scaling has low_freq_factor {low_freq_factor} and high_freq_factor "
                         f"{high_freq_factor}; accepted is 0 < low < high")  # fmt: skip

    def scaled(f):
        periods = original_max_position_embeddings * f / (2 * math.pi)
        kept = (periods - low_freq_factor) / (high_freq_factor - low_freq_factor)
        kept = min(1.0, max(0.0, kept))  # 1: high frequency, kept; 0: low, divided by factor
        return kept * f + (1 - kept) * f / factor

    return [scaled(f) for f in frequencies(dim, base)]


_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
SCALINGS = {  # rope_type: (function, its keys in `scaling`)
    "default": (frequencies, ()),
    "linear": (_linear, ("factor",)),
    "ntk": (_ntk, ("factor",)),
    "llama3": (_llama3, ("factor", *_LLAMA3_KEYS)),
}


def _scaled_frequencies(dim, base, scaling) -> list[float]:
    if scaling is None:
        return frequencies(dim, base)
    given = {key: x for key, x in scaling.items() if key not in ("rope_type", "type", "rope_theta")}
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in SCALINGS:
        raise ValueError(f"scaling's rope_type is {kind!r}; accepted are "
                         f"{', '.join(map(repr, SCALINGS))}")  # fmt: skip
    function, keys = SCALINGS[kind]
    if set(given) != set(keys):
        raise ValueError(f"scaling of rope_type {kind!r} has the keys {sorted(given)}; accepted "
                         f"are {sorted(keys)}")  # fmt: skip
    for key, x in given.items():
        if not 0 < checks.number(f"scaling's {key}", x) < math.inf:
            raise ValueError(f"scaling's {key} is {x}; accepted is a finite number > 0")
    return function(dim, base, **given)

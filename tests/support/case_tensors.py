"""What a Case of cases.py is made of: tensors whose missing parts are NaN, and every kind of mask,
bias, key range and memory layout by name.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# ---- tensors ------------------------------------------------------------------------------------


def int32(values) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def normal(draw: torch.Generator, places: Tensor, heads: int, dim: int) -> Tensor:
    """Normal values [rows, heads, len, dim] where places [rows, len] is True, NaN elsewhere."""
    rows, length = places.shape
    x = torch.randn(rows, heads, length, dim, generator=draw, dtype=torch.float64)
    return x.masked_fill_(~places[:, None, :, None], torch.nan)


def concatenate(exists: Tensor, capacity: list[int], spare: int) -> Tensor:
    """[N, longest] -> [1, sum(capacity) + spare]."""
    parts = [row[:n] for row, n in zip(exists, capacity, strict=True)]
    return torch.cat([*parts, torch.zeros(spare, dtype=torch.bool)])[None]


def paginate(exists: Tensor, page_size: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scattered pages for keys [N, longest]: which slots exist [pages, page_size], and the table.

    Page 0 holds nothing; table slots that no key needs name it.
    """
    entries, longest = exists.shape
    columns = -(-longest // page_size)
    exists = torch.nn.functional.pad(exists, (0, columns * page_size - longest))
    slots = exists.view(entries * columns, page_size)
    pages = torch.randperm(entries * columns, generator=draw) + 1
    places = torch.zeros(entries * columns + 1, page_size, dtype=torch.bool)
    places[pages] = slots
    table = torch.where(slots.any(1), pages, 0).view(entries, columns)
    return places, table.int()


def ids_of_documents(lengths: tuple[int, ...], batch: int) -> Tensor:
    """[batch, sum(lengths)]; ids rise by steps other than one too."""
    rows = []
    for b in range(batch):
        turn = b % len(lengths)
        rotated = torch.tensor(lengths[turn:] + lengths[:turn])
        rows.append(torch.repeat_interleave(3 * torch.arange(len(lengths)) - 4, rotated))
    return torch.stack(rows).int()


# ---- masks and biases ---------------------------------------------------------------------------


def _bools(draw: torch.Generator, *shape: int, p: float = 0.7) -> Tensor:
    return torch.rand(shape, generator=draw) < p


def _floats(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def _padding(shape, draw, left: bool = False) -> Tensor:
    """[N, 1, 1, kv]: about half of the keys of each entry are padding."""
    entries, _, _, kv_len = shape
    share = 0.3 + 0.5 * torch.rand(entries, 1, 1, 1, generator=draw)
    at = torch.arange(kv_len)
    return at >= kv_len * share if left else at < kv_len * share


def _blocks(shape, draw) -> Tensor:
    """[1, 1, q, kv]: blocks of 32 x 32, most of them empty."""
    blocks = _bools(draw, -(-shape[2] // 32), -(-shape[3] // 32), p=0.3)
    plane = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)
    return plane[None, None, : shape[2], : shape[3]]


def _dead_rows(shape, draw) -> Tensor:
    """[N, heads, q, kv]: every third row sees nothing."""
    return _bools(draw, *shape) & (torch.arange(shape[2]) % 3 != 1)[:, None]


def _minus_inf(shape, draw) -> Tensor:
    """[N, heads, q, kv]: a quarter of the scores are -inf, and whole rows."""
    bias = _floats(draw, *shape).masked_fill_(_bools(draw, *shape, p=0.25), -torch.inf)
    return bias.masked_fill_((torch.arange(shape[2]) % 5 == 3)[:, None], -torch.inf)


def _in_memory(x: Tensor, *order: int) -> Tensor:
    """The same tensor with its dimensions in that order in memory."""
    inverse = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(inverse)


MASKS = {  # (N, heads, q, kv), generator -> bool
    "full": lambda s, g: _bools(g, *s),
    "heads": lambda s, g: _bools(g, 1, *s[1:]),
    "entries": lambda s, g: _bools(g, s[0], 1, *s[2:]),
    "plane": lambda s, g: _bools(g, 1, 1, *s[2:]),
    "rows": lambda s, g: _bools(g, s[0], 1, s[2], 1),
    "padding": _padding,
    "left_padding": lambda s, g: _padding(s, g, left=True),
    "expanded": lambda s, g: _padding(s, g).expand(s),
    "transposed": lambda s, g: _in_memory(_bools(g, *s), 3, 0, 2, 1),
    "blocks": _blocks,
    "dead_rows": _dead_rows,
    "nothing": lambda s, g: torch.zeros(1, 1, 1, 1, dtype=torch.bool),
    "all": lambda s, g: torch.ones(1, 1, 1, 1, dtype=torch.bool),
}

BIASES = {  # (N, heads, q, kv), generator -> fp64
    "full": lambda s, g: _floats(g, *s),
    "heads": lambda s, g: _floats(g, 1, *s[1:]),
    "entries": lambda s, g: _floats(g, s[0], 1, *s[2:]),
    "plane": lambda s, g: _floats(g, 1, 1, *s[2:]),
    "keys": lambda s, g: _floats(g, s[0], 1, 1, s[3]),
    "rows": lambda s, g: _floats(g, 1, s[1], s[2], 1),
    "scalar": lambda s, g: _floats(g, 1, 1, 1, 1),
    "t5": lambda s, g: _in_memory(_floats(g, 1, *s[1:]), 0, 2, 3, 1),
    "expanded": lambda s, g: _floats(g, 1, 1, 1, s[3]).expand(s),
    "minus_inf": _minus_inf,
}

# ---- key ranges ---------------------------------------------------------------------------------


def _rows(shape) -> Tensor:
    return torch.arange(shape[2]).view(1, 1, -1, 1)


def _chunks(size: int, step: int = 0) -> Callable:
    """Chunks of `size` keys that begin every `step` keys: with gaps between where it is larger."""

    def ranges(shape, draw):
        begin = _rows(shape) // size * (step or size)
        return begin, begin + size

    return ranges


def _random(entries: bool, heads: bool) -> Callable:
    """Any ends that never decrease, in part past the keys; many rows see nothing."""

    def ranges(shape, draw):
        size = (shape[0] if entries else 1, shape[1] if heads else 1, shape[2], 1)
        ends = [torch.randint(-20, shape[3] + 20, size, generator=draw) for _ in range(2)]
        return tuple(x.sort(dim=2).values for x in ends)

    return ranges


def _banded(shape, draw):
    """About 40 keys a row, at another place in each head."""
    size = (*shape[:2], shape[2], 1)
    begin = torch.randint(0, max(1, shape[3]), size, generator=draw).sort(dim=2).values
    return begin, begin + 40


RANGES: dict[str, Callable] = {  # (N, heads, q, kv), generator -> begin, end
    "prefix": lambda shape, draw: (torch.zeros(1, 1, 1, 1), (_rows(shape) + 1).clamp(min=30)),
    "chunks": _chunks(50),
    "chunks_of_1": _chunks(1),
    "chunks_of_a_tile": _chunks(96),
    "gaps": _chunks(20, 45),
    "far_gaps": lambda shape, draw: (x := _rows(shape) // 30 * 200, x + 25),
    "block_causal": lambda shape, draw: (torch.zeros(1, 1, 1, 1), _rows(shape) // 32 * 32 + 32),
    "random": _random(False, False),
    "random_by_head": _random(True, True),
    "random_by_entry": _random(True, False),
    "banded": _banded,
    "one_for_all": lambda shape, draw: (torch.full((1, 1, 1, 1), 20), torch.full((1, 1, 1, 1), 70)),
    "nothing": lambda shape, draw: (_rows(shape) + 9, _rows(shape)),
    "everything": lambda shape, draw: (
        torch.full((1, 1, 1, 1), -(2**31)),
        torch.full((1, 1, 1, 1), 2**31 - 1),
    ),
}

# ---- layouts ------------------------------------------------------------------------------------


def _bshd(*tensors: Tensor) -> list[Tensor]:
    return [_in_memory(x, 0, 2, 1, 3) for x in tensors]


def _qkv(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Views of one projection's output [B, S, 3, heads, D]."""
    return _in_memory(torch.stack([q, k, v]), 1, 3, 0, 2, 4).unbind()


def _ragged(*tensors: Tensor) -> list[Tensor]:
    """Rows a few elements apart, the first not at an aligned address; NaN between them."""
    return [torch.nn.functional.pad(x, (1, 4), value=torch.nan)[..., 1:-4] for x in tensors]


LAYOUTS = {  # q, k, v contiguous -> the same values elsewhere in memory
    "bhsd": lambda q, k, v: (q, k, v),
    "bshd": _bshd,
    "qkv": _qkv,
    "ragged": _ragged,
    "expanded": lambda q, k, v: (q, k[:1].expand_as(k), v[:1].expand_as(v)),
    "one_kv_head": lambda q, k, v: (q, k[:, :1].expand_as(k), v[:, :1].expand_as(v)),
}

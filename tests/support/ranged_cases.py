"""Cases with key ranges. The reference results come from the equivalent mask (as_mask),
independently of key ranges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import Case, Problem
from torch import Tensor

# (entries, heads, rows, keys) and a generator -> begin, end


def _rows(shape) -> Tensor:
    return torch.arange(shape[2]).view(1, 1, -1, 1)


def _chunks(size: int, step: int = 0) -> Callable:
    """Chunks of `size` keys that begin every `step` keys, with gaps between them if step is
    larger."""

    def ranges(shape, draw):
        begin = _rows(shape) // size * (step or size)
        return begin, begin + size

    return ranges


def _random(entries: bool, heads: bool) -> Callable:
    """Random ends that never decrease, some of them beyond the keys; many rows see nothing."""

    def ranges(shape, draw):
        size = (shape[0] if entries else 1, shape[1] if heads else 1, shape[2], 1)
        ends = [torch.randint(-20, shape[3] + 20, size, generator=draw) for _ in range(2)]
        return tuple(x.sort(dim=2).values for x in ends)

    return ranges


def _banded(shape, draw):
    """About 40 keys per row, at a different place in each head."""
    size = (*shape[:2], shape[2], 1)
    begin = torch.randint(0, max(1, shape[3]), size, generator=draw).sort(dim=2).values
    return begin, begin + 40


RANGES: dict[str, Callable] = {
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


@dataclass(frozen=True)
class Ranged(Case):
    """A case with key ranges or, if as_mask, with the equivalent mask."""

    ranges: str = ""
    expanded: bool = False  # all dimensions, some with strides of 0
    as_mask: bool = False

    def make(self, dtype, seed: int = 0, device: str = "cpu") -> Problem:
        problem = super().make(dtype, seed, device)
        pages = -(-self.kv_len // (self.page_size or 1)) * (self.page_size or 1)
        lengths = self.packed or [(self.q_len, pages)]
        shape = (self.entries, self.heads, max(n for n, _ in lengths), max(n for _, n in lengths))
        ends = RANGES[self.ranges](shape, torch.Generator().manual_seed(seed + 5))
        ends = [x.to(device).expand(*shape[:3], 1) if self.expanded else x.to(device) for x in ends]
        operands = problem.operands
        if not self.as_mask:
            begin, end = (x.int() for x in ends)
            return problem._replace(operands=replace(operands, key_begin=begin, key_end=end))
        j = torch.arange(shape[3], device=device)
        mask = (ends[0] <= j) & (j < ends[1])
        mask = mask if operands.mask is None else mask & operands.mask
        return problem._replace(operands=replace(operands, mask=mask))

"""Cases with key ranges. The reference results come from the equivalent mask (as_mask),
independently of key ranges."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from cases import Case, Problem


@dataclass(frozen=True)
class Ranged(Case):
    """A case with key ranges or, if as_mask, with the equivalent mask."""

    expanded: bool = False  # each dimension full, with strides of 0
    as_mask: bool = False

    def make(self, dtype, seed: int = 0, device: str = "cpu") -> Problem:
        problem = super().make(dtype, seed, device)
        operands = problem.operands
        begin, end = operands.key_begin, operands.key_end
        pages = -(-self.kv_len // (self.page_size or 1)) * (self.page_size or 1)
        lengths = self.packed or [(self.q_len, pages)]
        rows, keys = (max(x) for x in zip(*lengths))
        if self.expanded:
            begin, end = (x.expand(self.entries, self.heads, rows, 1) for x in (begin, end))
        changed = {"key_begin": begin, "key_end": end}
        if self.as_mask:
            j = torch.arange(keys, device=device)
            mask = (begin <= j) & (j < end)
            mask = mask if operands.mask is None else mask & operands.mask
            changed = {"key_begin": None, "key_end": None, "mask": mask}
        return problem._replace(operands=replace(operands, **changed))

"""key_ranges in normal form: two numbers for each row, the first key that it sees and one past the
last. ../masks.py makes them for users. Next hop: back to ../forms.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks

_ACCEPTED = "a pair (begin, end) of int32 tensors, each broadcastable to [B, heads, rows]"


def normal_form(x, full, device, rank: int = 4) -> dict[str, Tensor]:
    """The operands key_begin and key_end of a call of [batch, heads, rows, keys] = full, each int32
    [batch or 1, heads or 1, rows or 1, 1] and never decreasing along the rows."""
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise TypeError(f"key_ranges is {checks.said(x)}; accepted is {_ACCEPTED}, or None")
    return {f"key_{end}": _end_of(f"key_ranges' {end}", one, full, device, rank)
            for end, one in zip(("begin", "end"), x)}  # fmt: skip


def _end_of(name: str, x, full, device, rank: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {checks.said(x)}; key_ranges accepts {_ACCEPTED}")
    checks.on_device(name, x, device)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} is {x.dtype}; accepted is torch.int32")
    wide = x.unsqueeze(1) if rank == 3 and x.dim() == 2 else x  # 3-D calls have no heads
    while wide.dim() < 3:
        wide = wide.unsqueeze(0)
    if wide.dim() > 3 or any(n != 1 and n != m for n, m in zip(wide.shape, full)):
        batch, heads, rows, _ = full
        hint = f", here {name.split()[-1]}[:, None]" if tuple(x.shape) == (batch, rows) else ""
        raise ValueError(
            f"{name} has shape {checks.show(x)}; accepted is any that broadcasts to "
            f"{[batch, heads, rows]} (batch, heads, rows){hint}"
        )
    return _never_decreasing(name, checks.int32(name, wide)).unsqueeze(3)


def _never_decreasing(name: str, x: Tensor) -> Tensor:
    """x [batch, heads, rows] that never decreases along the rows, or an error. On a GPU, where
    reading it would synchronize, each row instead takes the maximum of the rows up to it."""
    if x.shape[2] < 2:
        return x
    if not x.is_cpu:
        return x.cummax(2).values
    if checks.has_values(x):
        wrong = x[:, :, 1:] < x[:, :, :-1]
        for n, head, row in wrong.nonzero()[:1].tolist() if bool(wrong.any()) else ():
            high, low = x[n, head, row : row + 2].tolist()
            raise ValueError(
                f"{name} decreases along the rows, from {high} to {low} at row {row + 1} "
                f"(batch entry {n}, head {head}); accepted are numbers that never decrease, and "
                "mask= takes any others"
            )
    return x

"""How many scores a call computes: the one count behind explain(), the FLOP formulas of
backends/operators.py and the benchmarks. Next hop: reference.pieces.

A pair is a row and a key that it sees: inside the causal or windowed band, the lengths of entries
and packed sequences, one document and the row's key range. An arbitrary mask or bias is not looked
into.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .call import Call
from .reference import Piece, part_of, pieces
from .spec import Operands

_LENGTHS = (
    *("kv_lens", "kv_starts", "document_ids", "key_begin", "key_end"),
    *("cu_seqlens_q", "cu_seqlens_k"),
)


def _clamped_sum(first: int, rows: int, high: int) -> int:
    """Sum over i in [0, rows) of first + i clipped to [0, high]."""
    below = min(rows, max(0, -first))  # rows that clip to 0
    above = min(rows - below, max(0, first + rows - high))  # rows that clip to high
    n, start = rows - below - above, first + below
    return n * start + n * (n - 1) // 2 + above * high


def pairs_of_band(q_len: int, kv_len: int, left: int = -1, right: int = -1, offset: int = 0) -> int:
    """(row, key) pairs with 0 <= key < kv_len and -left <= key - row - offset <= right; a negative
    side is unbounded."""
    end = q_len * kv_len if right < 0 else _clamped_sum(offset + right + 1, q_len, kv_len)
    return end - (0 if left < 0 else _clamped_sum(offset - left, q_len, kv_len))


def count_pairs(call: Call) -> int:
    """Pairs of a call over all heads. Lengths whose values cannot be read (meta and fake tensors)
    count as not given: the most that there can be."""
    call, spec = call.but(operands=_without_unreadable(call.operands)), call.spec
    batch, heads, total = *call.q.shape[:2], 0
    for p in pieces(call.q, call.k, call.operands):
        times = heads * (batch if p.entry is None else 1)
        if call.operands.key_begin is None:
            offset = spec.offset(p.q_len, p.kv_len) + p.i.start - p.j.start
            pairs = pairs_of_band(len(p.i), len(p.j), spec.left, spec.right, offset)
        else:
            lo, hi = bounds(call, p)
            pairs, times = int((hi - lo).sum()), times // max(1, lo[..., 0].numel())
        total += pairs * times
    return total


def bounds(call: Call, piece: Piece) -> tuple[Tensor, Tensor]:
    """lo and hi >= lo of each row of a piece, which sees keys [lo, hi): [b, heads or 1, rows]; b is
    1, or counts the entries that the piece stands for."""
    spec, x = call.spec, call.operands
    begin = 0 if x.key_begin is None else part_of(x.key_begin, piece)[..., 0]  # [b, h, rows or 1]
    end = piece.kv_len if x.key_end is None else part_of(x.key_end, piece)[..., 0]
    device = None if x.key_begin is None else x.key_begin.device
    i = torch.arange(piece.i.start, piece.i.stop, device=device).expand(1, 1, -1)
    ends = (
        torch.maximum(spec.lo(i, piece.q_len, piece.kv_len), torch.as_tensor(begin, device=device)),
        torch.minimum(spec.hi(i, piece.q_len, piece.kv_len), torch.as_tensor(end, device=device)),
    )
    lo, hi = (x.clamp(piece.j.start, piece.j.stop) for x in ends)
    return torch.broadcast_tensors(lo, torch.maximum(lo, hi))


def _without_unreadable(operands: Operands) -> Operands:
    given = {name: getattr(operands, name) for name in _LENGTHS}
    unreadable = {
        n for n, x in given.items() if x is not None and (type(x) is not Tensor or x.is_meta)
    }
    if unreadable & {"cu_seqlens_q", "cu_seqlens_k"}:  # the others are lengths of what they cut
        unreadable = set(_LENGTHS)
    return replace(operands, **dict.fromkeys(unreadable)) if unreadable else operands

"""How many scores a call computes: the one count behind explain(), the FLOP formulas of
backends/operators.py and the benchmarks. Next hop: reference.pieces.

A pair is a row and a key that it sees: inside the causal or windowed band, the lengths of entries
and packed sequences, and one document. An arbitrary mask or bias is not looked into.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .call import Call
from .reference import pieces
from .spec import Operands

_LENGTHS = ("kv_lens", "kv_starts", "document_ids", "cu_seqlens_q", "cu_seqlens_k")


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
    operands, spec = _without_unreadable(call.operands), call.spec
    total = 0
    for p in pieces(call.q, call.k, operands):
        offset = spec.offset(p.q_len, p.kv_len) + p.i.start - p.j.start
        pairs = pairs_of_band(len(p.i), len(p.j), spec.left, spec.right, offset)
        total += pairs * (call.q.shape[0] if p.entry is None else 1)
    return total * call.q.shape[1]


def _without_unreadable(operands: Operands) -> Operands:
    given = {name: getattr(operands, name) for name in _LENGTHS}
    unreadable = {
        n for n, x in given.items() if x is not None and (type(x) is not Tensor or x.is_meta)
    }
    if unreadable & {"cu_seqlens_q", "cu_seqlens_k"}:  # the others are lengths of what they cut
        unreadable = set(_LENGTHS)
    return replace(operands, **dict.fromkeys(unreadable)) if unreadable else operands

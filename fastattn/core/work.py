"""What a call cannot avoid, counted exactly: visible pairs, FLOPs and bytes. The one count behind
explain(), torch's FLOP counter and the benchmarks. Next hop: reference.pieces.

A pair is a row and a key that it sees: inside the causal or windowed band, the lengths of entries
and packed sequences, one document and the row's key range. An arbitrary mask or bias is not looked
into.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .call import Call
from .reference import Piece, part_of, pieces
from .spec import Operands

MODES = ("fwd", "bwd", "fwdbwd")
FORMULAS = {  # FLOP, 2 per multiply-add, softmax not counted
    "fwd": "2 (D + Dv) per visible pair",
    "bwd": "2 (3 D + 2 Dv) per visible pair",
    "fwdbwd": "2 (4 D + 3 Dv) per visible pair",
}

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
            pairs, times = int((hi - lo).sum()), times // max(1, lo.shape[0] * lo.shape[1])
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


# ---- FLOPs and bytes -----------------------------------------------------------------------------


def flops(pairs: int, dim: int, v_dim: int, mode: str) -> int:
    """Two for each multiplication and addition. Forward: QK^T and PV, 2 (D + Dv) a pair. Backward:
    five products, QK^T again, dO V^T, dS K, dS^T Q and P^T dO, 2 (3 D + 2 Dv) a pair (2.5 forwards
    at D = Dv). Softmax is not counted."""
    one = {"fwd": dim + v_dim, "bwd": 3 * dim + 2 * v_dim, "fwdbwd": 4 * dim + 3 * v_dim}
    return 2 * pairs * one[mode]


@dataclass(frozen=True, slots=True)
class Work:
    """What a call cannot avoid: arithmetic on the visible pairs, and compulsory traffic."""

    pairs: int
    flops: int
    bytes: int


def attention_work(
    *,
    pairs: int,  # visible pairs over all batches and query heads
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,  # keys that exist: those past a padding mask need not be read
    dim: int,
    v_dim: int | None = None,
    itemsize: int = 4,
    mask_bytes: int = 0,  # a bool mask: read once in each pass
    bias_bytes: int = 0,  # a learned bias: read once in each pass, its gradient written once
    mode: str = "fwd",
) -> Work:
    """FLOPs as flops() counts them; bytes: each operand read once and each result written once, in
    each pass."""
    v_dim = dim if v_dim is None else v_dim
    q_bytes = batch * heads * q_len * dim * itemsize
    k_bytes = batch * kv_heads * kv_len * dim * itemsize
    v_bytes = batch * kv_heads * kv_len * v_dim * itemsize
    out_bytes = batch * heads * q_len * v_dim * itemsize
    lse_bytes = batch * heads * q_len * 4  # kept only for a backward pass
    inputs = q_bytes + k_bytes + v_bytes
    moved = {
        "fwd": inputs + out_bytes + (lse_bytes if mode != "fwd" else 0) + mask_bytes + bias_bytes,
        "bwd": 2 * inputs + 2 * out_bytes + lse_bytes + mask_bytes + 2 * bias_bytes,
    }
    passes = ("fwd", "bwd") if mode == "fwdbwd" else (mode,)
    return Work(pairs, flops(pairs, dim, v_dim, mode), sum(moved[p] for p in passes))

"""The work that a call cannot avoid, counted exactly: visible pairs, FLOPs and bytes. explain(),
torch's FLOP counter and the benchmarks all use this count. Next hop: reference.pieces.

A pair is a row (a query) and a key that it sees: inside the causal or windowed band, the length of
its sequence, its document and its key range. The values of a mask or bias are not read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .call import Call, Tangents
from .reference import Piece, part_of, pieces
from .spec import Operands

MODES = ("fwd", "bwd", "fwdbwd")
FORMULAS = {  # FLOPs, 2 per multiply-add, softmax not counted
    "fwd": "2 (D + Dv) per visible pair",
    "bwd": "2 (3 D + 2 Dv) per visible pair",
    "fwdbwd": "2 (4 D + 3 Dv) per visible pair",
}

_LENGTHS = (
    *("kv_lens", "kv_starts", "document_ids", "key_begin", "key_end"),
    *("cu_seqlens_q", "cu_seqlens_k"),
)


def _clamped_sum(first: int, rows: int, high: int) -> int:
    """The sum over i in [0, rows) of first + i, each clipped to [0, high]."""
    below = min(rows, max(0, -first))  # rows that clip to 0
    above = min(rows - below, max(0, first + rows - high))  # rows that clip to high
    n, start = rows - below - above, first + below
    return n * start + n * (n - 1) // 2 + above * high


def pairs_of_band(q_len: int, kv_len: int, left: int = -1, right: int = -1, offset: int = 0) -> int:
    """The number of (row, key) pairs in [0, q_len) x [0, kv_len) with
    -left <= key - row - offset <= right. A negative left or right is unbounded."""
    end = q_len * kv_len if right < 0 else _clamped_sum(offset + right + 1, q_len, kv_len)
    return end - (0 if left < 0 else _clamped_sum(offset - left, q_len, kv_len))


def count_pairs(call: Call) -> int:
    """Visible pairs of a call over all batch entries and query heads. Lengths whose values cannot
    be read (meta and fake tensors) count as not given, which is an upper bound."""
    call, spec = call.but(operands=_without_unreadable(call.operands)), call.spec
    batch, heads, total = *call.q.shape[:2], 0
    for p in pieces(call.q, call.k, call.operands):
        times = heads * (batch if p.sequence is None else 1)
        if call.operands.key_begin is None:
            offset = spec.offset(p.q_len, p.kv_len) + p.i.start - p.j.start
            pairs = pairs_of_band(len(p.i), len(p.j), spec.left, spec.right, offset)
        else:
            lo, hi = bounds(call, p)
            pairs, times = int((hi - lo).sum()), times // max(1, lo.shape[0] * lo.shape[1])
        total += pairs * times
    return total


def bounds(call: Call, piece: Piece) -> tuple[Tensor, Tensor]:
    """(lo, hi): each row of a piece sees keys [lo, hi), with lo <= hi. Both are int [b, heads or 1,
    rows]; b is 1, or the number of sequences for which the piece stands."""
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
    if unreadable & {"cu_seqlens_q", "cu_seqlens_k"}:  # the others are per packed sequence
        unreadable = set(_LENGTHS)
    return replace(operands, **dict.fromkeys(unreadable)) if unreadable else operands


# ---- FLOPs and bytes -----------------------------------------------------------------------------


def flops(pairs: int, dim: int, v_dim: int, mode: str) -> int:
    """FLOPs of visible pairs, 2 for each multiply-add; softmax is not counted.

    Forward: QK^T and PV, 2 (D + Dv) per pair. Backward: five products, QK^T again, dO V^T, dS K,
    dS^T Q and P^T dO, 2 (3 D + 2 Dv) per pair, which is 2.5 forwards where D = Dv (the count of
    FlashAttention-2, arXiv 2307.08691). mode is one of MODES.
    """
    one = {"fwd": dim + v_dim, "bwd": 3 * dim + 2 * v_dim, "fwdbwd": 4 * dim + 3 * v_dim}
    return 2 * pairs * one[mode]


def flops_of_jvp(pairs: int, dim: int, v_dim: int, tangents: Tangents, mode: str) -> int:
    """FLOPs of forward mode ("jvp") and of its backward ("jvp_bwd"), counted like flops().

    jvp: QK^T, PV, (P T)V, and for each tangent of q, k and v one product with K, Q and P. Its
    backward: QK^T, G V^T, (P T)^T G, dS K and dS^T Q; for tq tq K^T and dS^T tq, for tk Q tK^T and
    dS tK, for tv G tV^T.
    """
    q, k, v = (x is not None for x in tangents[:3])
    one = {
        "jvp": dim * (1 + q + k) + v_dim * (2 + v),
        "jvp_bwd": dim * (3 + 2 * q + 2 * k) + v_dim * (2 + v),
    }
    return 2 * pairs * one[mode]


@dataclass(frozen=True, slots=True)
class Work:
    """The arithmetic on a call's visible pairs, and its compulsory memory traffic in bytes."""

    pairs: int
    flops: int
    bytes: int


def attention_work(
    *,
    pairs: int,  # visible pairs over all batch entries and query heads
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
    """The Work of a dense call. FLOPs are those of flops(); bytes count each operand read once and
    each result written once, in each pass of `mode` (one of MODES)."""
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

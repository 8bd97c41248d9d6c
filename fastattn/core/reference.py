"""The reference: attention in plain torch, with every option, differentiable any number of times.

A call is cut into pieces: rows that share one set of existing keys. Each piece is an ordinary
attention over exactly those rows and keys, so what does not exist (keys past kv_lens, other
documents, other sequences) is never read, and NaN there reaches no result. Memory is O(S^2).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .call import Result
from .philox import heads_of, keep_block, keep_probability
from .spec import NO_OPERANDS, Operands, Spec


def reference(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, operands: Operands = NO_OPERANDS
) -> Result:
    """Attention of q [B, heads, q_len, D] over k, v [B, kv_heads, kv_len, D | v_dim].

    Args:
        q: fp32, bf16, fp16 or fp64; k and v in the same dtype. heads is a multiple of kv_heads.
            Packed sequences: B is 1, and the sequences lie one after the other. Pages: k and v are
            [pages, kv_heads, page_size, D | v_dim].
        spec: the numbers. operands: the optional tensors, in normal form (core/checks.py).

    Returns:
        out [B, heads, q_len, v_dim] in q's dtype and memory order, and lse [B, heads, q_len].
        Everything is computed in fp32 (fp64 for fp64 inputs), and out is rounded once, at the end.
        A row that sees no key is 0, and its lse is -inf.
    """
    if operands.varlen and operands.document_ids is not None:
        raise ValueError("document_ids came with cu_seqlens: packed sequences take cu_seqlens only")
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, q_len, _ = q.shape
    wide = (q.to(compute), k.to(compute), v.to(compute))
    outs, lses = [], []
    with no_autocast(q.device.type):
        for piece in pieces(q, k, operands):
            out, lse = _attend(*wide, spec, operands, piece)
            outs.append(out)
            lses.append(lse)
    if len(outs) != 1 or outs[0].shape[:3] != q.shape[:3]:
        rest = batch * q_len - sum(out.shape[2] for out in outs)  # packed rows of no sequence
        outs.append(wide[0].new_zeros(1, heads, rest, v.shape[-1]))
        lses.append(wide[0].new_full((1, heads, rest), -torch.inf))
        out = torch.cat(outs, dim=2)[0].unflatten(1, (batch, q_len)).transpose(0, 1)
        lse = torch.cat(lses, dim=2)[0].unflatten(1, (batch, q_len)).transpose(0, 1)
    return Result(in_memory_order_of(q, out.to(q.dtype)), lse.contiguous())


# Queried once, at import: torch.compile of torch 2.10 cannot trace is_autocast_available().
AUTOCAST = frozenset(x for x in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(x))


def no_autocast(device_type: str):
    """A context in which autocast changes no dtype."""
    if device_type not in AUTOCAST:  # e.g. meta
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


class Piece(NamedTuple):
    """Rows that share one set of existing keys. Positions count from the start of the sequence."""

    sequence: int | None  # number of the batch entry or packed sequence; None: the whole batch
    i: range  # positions of the rows
    j: range  # positions of the keys
    row: int  # index in q of the sequence's first row (0 unless packed)
    key: int  # index in k of the sequence's first key (0 unless packed, or if paged)
    q_len: int  # lengths of the sequence, which place its diagonal
    kv_len: int


def pieces(q: Tensor, k: Tensor, operands: Operands) -> Iterator[Piece]:
    """The pieces of a call, in the order of q's rows."""
    batch, _, q_len, _ = q.shape
    x = operands
    if all(y is None for y in (x.kv_lens, x.kv_starts, x.document_ids, x.cu_seqlens_q)):
        table = operands.page_table
        kv_len = k.shape[2] * (1 if table is None else table.shape[1])
        yield Piece(None, range(q_len), range(kv_len), 0, 0, q_len, kv_len)
        return
    if operands.cu_seqlens_q is not None and operands.cu_seqlens_k is not None:
        rows, keys = operands.cu_seqlens_q.tolist(), operands.cu_seqlens_k.tolist()
        q_lens = [end - start for start, end in pairwise(rows)]
        kv_lens = [end - start for start, end in pairwise(keys)]
    else:
        rows = keys = [0] * batch
        q_lens, kv_lens = [q_len] * batch, [k.shape[2]] * batch
    if operands.kv_lens is not None:
        kv_lens = operands.kv_lens.tolist()
    starts = [0] * len(kv_lens) if operands.kv_starts is None else operands.kv_starts.tolist()
    for n, (q_len, kv_len, start) in enumerate(zip(q_lens, kv_lens, starts, strict=True)):
        for i, same_document in _documents(operands.document_ids, n, q_len, kv_len):
            first = max(start, same_document.start)
            j = range(first, max(first, min(kv_len, same_document.stop)))
            yield Piece(n, i, j, rows[n], keys[n], q_len, kv_len)


def _documents(document_ids: Tensor | None, n: int, q_len: int, kv_len: int):
    """(rows, keys) of each document of sequence n; without documents, all rows and all keys."""
    if document_ids is None:
        yield range(q_len), range(kv_len)
        return
    first = 0
    for length in torch.unique_consecutive(document_ids[n], return_counts=True)[1].tolist():
        document = range(first, first + length)
        yield document, document
        first += length


def _attend(q: Tensor, k: Tensor, v: Tensor, spec: Spec, operands: Operands, piece: Piece):
    """out [b, heads, m, v_dim] and lse [b, heads, m] of one piece: m rows over n keys."""
    q = rows_of(q, operands, piece)  # [b, heads, m, D]
    k, v = (for_query_heads(keys_of(x, operands, piece), q.shape[1]) for x in (k, v))
    bias = None if operands.bias is None else part_of(operands.bias, piece)
    scores, _ = scores_of(q, k, bias, spec, operands, piece)
    softmax = softmax_of(scores, operands.sinks)
    probs = softmax.probs
    if spec.dropout_p > 0:
        probs = probs * keep_factors(probs, spec, operands, piece)
    return probs @ v, softmax.lse


def scores_of(
    q: Tensor, k: Tensor, bias: Tensor | None, spec: Spec, operands: Operands, piece: Piece
) -> tuple[Tensor, Tensor | None]:
    """The scores of one piece, [b, heads, m, n], -inf where a row does not see a key; and the tanh
    of the softcap, None without one. q [b, heads, m, D], k [b, heads, n, D] and bias are the
    piece's."""
    i = torch.arange(piece.i.start, piece.i.stop, device=q.device)[:, None]  # [m, 1]
    j = torch.arange(piece.j.start, piece.j.stop, device=q.device)  # [n]
    lengths = (piece.q_len, piece.kv_len)

    scores, tanh = spec.scale * (q @ k.mT), None  # [b, heads, m, n]
    if spec.softcap > 0:
        tanh = torch.tanh(scores / spec.softcap)
        scores = spec.softcap * tanh
    if bias is not None:
        scores = finite_sum(scores, bias)
    if operands.alibi_slopes is not None:
        slopes = operands.alibi_slopes.to(scores.dtype)[..., None, None]
        slopes = slopes[_index(piece)] if slopes.dim() == 4 else slopes  # [b,] heads, 1, 1
        scores = finite_sum(scores, -slopes * (i + spec.offset(*lengths) - j).abs())
    visible = (j >= spec.lo(i, *lengths)) & (j < spec.hi(i, *lengths))  # [m, n]
    if operands.mask is not None:
        visible = visible & part_of(operands.mask, piece)
    if operands.key_begin is not None and operands.key_end is not None:
        begin, end = part_of(operands.key_begin, piece), part_of(operands.key_end, piece)
        visible = visible & (j >= begin) & (j < end)
    return torch.where(visible, scores, -torch.inf), tanh


class Softmax(NamedTuple):
    """The softmax of a piece's scores. A row that sees no key is 0, and its lse is -inf."""

    probs: Tensor  # [b, heads, m, n], without dropout
    sink_probs: Tensor  # [b, heads, m, 1], or [b, heads, m, 0] without sinks
    lse: Tensor  # [b, heads, m]
    dead: Tensor  # bool [b, heads, m, 1]: the row sees no key


def softmax_of(scores: Tensor, sinks: Tensor | None) -> Softmax:
    """The softmax of scores [b, heads, m, n] and, with sinks [heads], of one more logit a row."""
    # A row that sees no key is computed from scores of 0 and its results are then replaced, so that
    # no 0/0 is formed that would reach a derivative of some order.
    keys = scores.shape[-1]
    dead = (scores == -torch.inf).all(-1, keepdim=True)  # [b, heads, m, 1]
    if sinks is not None:
        sinks = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)  # the last column belongs to no key
    scores = torch.where(dead, 0.0, scores)
    lse = torch.where(dead, -torch.inf, scores.logsumexp(-1, keepdim=True))
    probs = torch.where(dead, 0.0, scores.softmax(-1))
    return Softmax(probs[..., :keys], probs[..., keys:], lse.squeeze(-1), dead)


def keep_factors(probs: Tensor, spec: Spec, operands: Operands, piece: Piece) -> Tensor:
    """What dropout multiplies the probabilities [b, heads, m, n] of one piece with: 0, or 1 / the
    probability of being kept."""
    if (seed := operands.dropout_seed) is None:
        raise ValueError("dropout_p came without dropout_seed, which says what is dropped")
    first = piece.sequence or 0
    bh = heads_of(seed, range(first, first + probs.shape[0]), probs.shape[1])
    i = torch.arange(piece.i.start, piece.i.stop, device=probs.device)
    j = torch.arange(piece.j.start, piece.j.stop, device=probs.device)
    kept = keep_block(seed, bh, i, j, spec.dropout_p)
    return kept.view_as(probs).to(probs.dtype) / keep_probability(spec.dropout_p)


def finite_sum(scores: Tensor, term: Tensor) -> Tensor:
    """scores + term in scores' dtype. The sum of finite values is clamped to stay finite, because
    -inf would mask the key."""
    limit = torch.finfo(scores.dtype).max
    if term.dtype != scores.dtype:
        saturated = term.clamp(-limit, limit) if term.dtype == torch.float64 else term
        term = torch.where(term.isfinite(), saturated, term).to(scores.dtype)
    total = scores + term
    overflown = total.isinf() & scores.isfinite() & term.isfinite()
    return torch.where(overflown, total.clamp(-limit, limit), total)


def _index(piece: Piece) -> slice:
    """The piece's sequence as an index that keeps the dimension."""
    n = piece.sequence
    return slice(None) if n is None else slice(n, n + 1)


def _batch(operands: Operands, piece: Piece) -> slice:
    """Where the sequence lies along the batch dimension: packed sequences share index 0."""
    return slice(0, 1) if operands.varlen else _index(piece)


def _span(positions: range, base: int) -> slice:
    return slice(base + positions.start, base + positions.stop)


def rows_of(x: Tensor, operands: Operands, piece: Piece) -> Tensor:
    """The piece's rows of q or of what has its rows: [b, heads, m, *]."""
    return x[_batch(operands, piece), :, _span(piece.i, piece.row)]


def for_query_heads(x: Tensor, heads: int) -> Tensor:
    """k or v [b, kv_heads, n, *] as [b, heads, n, *]."""
    groups = heads // max(1, x.shape[1])  # a call may have no heads
    return x.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


def keys_of(x: Tensor, operands: Operands, piece: Piece) -> Tensor:
    """The piece's keys of k or v: [b, kv_heads, n, *]."""
    if operands.page_table is None:
        return x[_batch(operands, piece), :, _span(piece.j, piece.key)]
    page_size = x.shape[2]
    used = operands.page_table[piece.sequence, : -(-piece.j.stop // max(1, page_size))].long()
    return x[used].transpose(0, 1).flatten(1, 2)[None, :, _span(piece.j, 0)]


def part_of(x: Tensor, piece: Piece) -> Tensor:
    """The piece's part of an operand with four dimensions. Sizes of 1 stay and broadcast."""
    wanted = (_index(piece), slice(None), _span(piece.i, 0), _span(piece.j, 0))
    return x[tuple(slice(None) if n == 1 else s for n, s in zip(x.shape, wanted, strict=True))]


def in_memory_order_of(q: Tensor, out: Tensor) -> Tensor:
    """out with q's strides where q is dense and has out's shape, else contiguous."""
    order = sorted(range(4), key=lambda d: (q.stride(d), q.shape[d]), reverse=True)
    if q.shape != out.shape or not q.permute(order).is_contiguous():
        return out.contiguous()
    inverse = sorted(range(4), key=order.__getitem__)
    return out.permute(order).contiguous().permute(inverse)

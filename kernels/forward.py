"""The forward kernel: one tile of query rows against its keys, tile by tile, with the softmax kept
online (Milakov and Gimelshein 2018; Dao et al., FlashAttention, 2022). Next: backward.py.

Sections as in csrc/cpu/forward.inl: load, one step, the loop, finish, the kernel.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .params import Range
from .philox import dropout_head, keep_each, keep_tile
from .score import LN2, NEG_INF, finish_scores, from_base2, logit
from .spec import document_at, edge_tile, full_segment, sequence_of_tile
from .tile import (
    dot,
    factor_of,
    in_band,
    keys_at,
    keys_of_tile,
    load_rows,
    long_dot,
    rows_at,
    store_rows,
    tile_rows,
    widen,
)

NO_KEY = tl.constexpr(2**31 - 1)  # past every key


class Query(NamedTuple):
    """A tile's query rows, and how to load its keys."""

    rows: Any
    kv_head: Any
    at: Any  # [rows] pointers
    x: Any  # [rows, BLOCK_D]; 0 where D > BLOCK_D, which loads chunks again for each tile of keys
    first: Any  # column of v and out that this program computes
    k_tma: Any  # tensor descriptors of k and v; None: plain loads
    v_tma: Any


class RowStatistics(NamedTuple):
    """What the loop keeps of each row for Statistics. None: not asked for."""

    entropy: Any  # [rows]: sum of P log2(P), where P = exp2(score - row_max)
    argmax: Any  # [rows]: the first key whose score is row_max


# ---- load ---------------------------------------------------------------------------------------


@triton.jit
def load_keys(
    p, s, q, x, tma, start, j, ok, first,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_KV, BLOCK_D] of k or v: keys j, which begin with start; channels from `first` on."""
    if tma is None:
        return load_rows(keys_at(p, x, s, q.kv_head, j, ok), ok, first, D, BLOCK_D, EDGE)
    else:
        block = tma.load([s.batch, q.kv_head, start, first])
        return tl.reshape(block, [j.shape[0], BLOCK_D])


@triton.jit
def descale(p, s, kv_head, pointer):
    """A scale of FP8 or int8 tensors; 1 without one."""
    if pointer is None:
        return 1.0
    else:
        return tl.load(pointer + s.n * p.descale.batch + kv_head * p.descale.head)


# ---- one step -----------------------------------------------------------------------------------


@triton.jit
def forward_step(
    p, s, q, t, row_max, row_sum, acc, stats, score_scale, C: tl.constexpr, EDGE: tl.constexpr
):
    """The rows' softmax state after key tile t."""
    start = t * C.BLOCK_KV
    j = start + tl.arange(0, C.BLOCK_KV)
    exists = (j >= s.key_begin) & (j < s.key_end)
    rows = q.rows
    if C.D > C.BLOCK_D:
        k_at = keys_at(p, p.k, s, q.kv_head, j, exists)
        x = long_dot(q.at, rows.ok, k_at, exists, C.D, C.BLOCK_D, C.PRECISION)
    else:
        k = load_keys(p, s, q, p.k, q.k_tma, start, j, exists, 0, C.D, C.BLOCK_D, EDGE)
        x = dot(q.x, tl.trans(widen(k, q.x.dtype)), None, C.PRECISION)
    if p.descale.q is not None or p.descale.k is not None:
        x = x * score_scale
    i = rows.i[:, None]
    if C.GROUP == 1:
        head = rows.head
    else:
        head = rows.head[:, None]
    seen = in_band(rows, j, EDGE)
    x, _ = finish_scores(p, s.n, x, head, i, j[None, :], seen, s.offset, EDGE)

    new_max = tl.maximum(row_max, tl.max(x, 1))
    base = tl.where(new_max == NEG_INF, 0.0, new_max)  # -inf - -inf would be NaN
    probs = tl.exp2(x - base[:, None])
    rescale = tl.exp2(row_max - base)
    stats = stats_after(stats, x, probs, j, row_max, row_sum, base)
    row_sum = row_sum * rescale + tl.sum(probs, 1)
    if p.dropout.seed is not None:
        bh = dropout_head(p, s.n, head)
        if C.GROUP == 1:
            kept = keep_tile(p, bh, tl.min(rows.i, 0), start, C.BLOCK_Q, C.BLOCK_KV, False)
        else:
            kept = keep_each(p, bh, i, j)
        probs = tl.where(kept, probs, 0.0)
    v = load_keys(p, s, q, p.v, q.v_tma, start, j, exists, q.first, C.DV, C.BLOCK_DV, EDGE)
    if v.dtype.primitive_bitwidth == 8:  # P would lose too much precision in FP8
        if p.q.ptr.dtype.element_ty.primitive_bitwidth == 8:
            v = widen(v, tl.bfloat16)
        else:
            v = widen(v, p.q.ptr.dtype.element_ty)
    acc = dot(probs.to(v.dtype), v, acc * rescale[:, None], C.PRECISION)
    return new_max, row_sum, acc, stats


@triton.jit
def stats_after(stats, x, probs, j, row_max, row_sum, base):
    """RowStatistics after a tile of scores x [rows, keys]; row_max and row_sum are those before it,
    and base is the new maximum."""
    entropy, argmax = stats.entropy, stats.argmax
    if entropy is not None:
        terms = tl.where(probs == 0.0, 0.0, probs * (x - base[:, None]))  # 0 * -inf would be NaN
        entropy = entropy_at(entropy, row_max, row_sum, base) + tl.sum(terms, 1)
    if argmax is not None:
        tile_max = tl.max(x, 1)
        first = tl.min(tl.where(x == tile_max[:, None], j[None, :], NO_KEY), 1)
        # Tiles on the edges come before those between, so equal scores are compared by key.
        better = (tile_max > row_max) | ((tile_max == row_max) & (first < argmax))
        argmax = tl.where(better, first, argmax)
    return RowStatistics(entropy, argmax)


@triton.jit
def entropy_at(entropy, row_max, row_sum, base):
    """RowStatistics' entropy with probabilities relative to base instead of row_max."""
    grown = tl.where(row_max == NEG_INF, 0.0, tl.minimum(base - row_max, 256.0))  # exp2 gives 0
    return (entropy - row_sum * grown) * tl.exp2(-grown)


# ---- the loop -----------------------------------------------------------------------------------


@triton.jit
def forward_tile(p, s, visible, start, head, kv_head, chunk, split, k_tma, v_tma, C: tl.constexpr):
    """out and lse of the tile's rows in segment s, or their partial result for one split."""
    rows = tile_rows(p, s, head, start, C.BLOCK_Q, C.GROUP)
    top = tl.maximum(start // C.GROUP, s.row_begin)
    bottom = tl.minimum((start + C.BLOCK_Q - 1) // C.GROUP + 1, s.row_end)
    r = keys_of_tile(p, s, rows, top, bottom, C.BLOCK_KV)
    if C.SPLITS > 1:
        step = tl.cdiv(r.end - r.begin, C.SPLITS)
        begin = tl.minimum(r.begin + split * step, r.end)
        end = tl.minimum(begin + step, r.end)
        full_begin = tl.minimum(tl.maximum(r.full_begin, begin), end)
        full_end = tl.minimum(tl.maximum(r.full_end, full_begin), end)
        r = Range(begin, full_begin, full_end, end)

    at = rows_at(p.q, s, rows)
    x = 0
    if C.D <= C.BLOCK_D:
        x = factor_of(load_rows(at, rows.ok, 0, C.D, C.BLOCK_D, True))
    q = Query(rows, kv_head, at, x, chunk * C.BLOCK_DV, k_tma, v_tma)
    score_scale = descale(p, s, kv_head, p.descale.q) * descale(p, s, kv_head, p.descale.k)

    row_max = tl.full([C.BLOCK_Q], NEG_INF, tl.float32)
    row_sum = tl.zeros([C.BLOCK_Q], tl.float32)
    acc = tl.zeros([C.BLOCK_Q, C.BLOCK_DV], tl.float32)
    stats = no_statistics(p, C.BLOCK_Q)
    if p.mask.ptr is not None:
        if visible.rank is not None:  # only the tiles that hold a True, in order
            at = s.n * visible.batch + head * visible.head + start // C.BLOCK_Q * visible.row
            rank = visible.rank + at.to(tl.int64) * (visible.others + 1)
            tiles = visible.tile + at.to(tl.int64) * visible.others
            for e in tl.range(tl.load(rank + r.begin), tl.load(rank + r.end), num_stages=C.STAGES):
                row_max, row_sum, acc, stats = forward_step(
                    p, s, q, tl.load(tiles + e), row_max, row_sum, acc, stats, score_scale, C, True
                )
        else:
            for t in tl.range(r.begin, r.end, num_stages=C.STAGES):
                row_max, row_sum, acc, stats = forward_step(
                    p, s, q, t, row_max, row_sum, acc, stats, score_scale, C, True
                )
    else:
        edges = r.end - r.begin - (r.full_end - r.full_begin)
        for e in tl.range(0, edges, num_stages=C.STAGES):
            row_max, row_sum, acc, stats = forward_step(
                p, s, q, edge_tile(r, e), row_max, row_sum, acc, stats, score_scale, C, True
            )
        for t in tl.range(r.full_begin, r.full_end, num_stages=C.STAGES):
            row_max, row_sum, acc, stats = forward_step(
                p, s, q, t, row_max, row_sum, acc, stats, score_scale, C, False
            )
    finish(p, s, q, split, row_max, row_sum, acc, stats, C)


@triton.jit
def no_statistics(p, BLOCK_Q: tl.constexpr):
    """RowStatistics before the first key."""
    entropy, argmax = None, None
    if p.statistics is not None:
        if p.statistics.entropy is not None:
            entropy = tl.zeros([BLOCK_Q], tl.float32)
        if p.statistics.argmax is not None:
            argmax = tl.full([BLOCK_Q], NO_KEY, tl.int32)
    return RowStatistics(entropy, argmax)


# ---- finish -------------------------------------------------------------------------------------


@triton.jit
def is_dead(row_max, row_sum):
    """Whether the row has seen no key. One that saw only NaN has no maximum either, but its sum is
    NaN."""
    return (row_max == NEG_INF) & (row_sum == 0.0)


@triton.jit
def add_sinks(p, head, row_max, row_sum):
    """(row_max, row_sum, rescale of acc, the sink's part of row_sum) with the sink in the sum of
    rows that see a key."""
    if p.sinks.ptr is None:
        return row_max, row_sum, row_sum * 0 + 1, row_sum * 0
    else:
        sink = logit(tl.load(p.sinks.ptr + head * p.sinks.head))
        sink = tl.where(is_dead(row_max, row_sum), NEG_INF, sink)
        top = tl.maximum(row_max, sink)
        base = tl.where(top == NEG_INF, 0.0, top)
        rescale, part = tl.exp2(row_max - base), tl.exp2(sink - base)
        return top, row_sum * rescale + part, rescale, part


@triton.jit
def finish(p, s, q, split, row_max, row_sum, acc, stats, C: tl.constexpr):
    rows = q.rows
    if p.statistics is not None:  # noqa: SIM102  a compile-time condition, unlike the next
        if q.first == 0:
            store_statistics(p, s, rows, split, row_max, row_sum, stats)
    row_max, row_sum, rescale, _ = add_sinks(p, rows.head, row_max, row_sum)
    dead = is_dead(row_max, row_sum)
    row_sum = tl.where(dead, 1.0, row_sum)
    rescale = rescale / row_sum
    if p.dropout.seed is not None:
        rescale *= p.dropout.inverse_keep
    if p.descale.v is not None:
        rescale *= descale(p, s, q.kv_head, p.descale.v)
    out = tl.where(dead[:, None], 0.0, acc * rescale[:, None])
    lse = tl.where(dead, NEG_INF, from_base2(row_max + tl.log2(row_sum)))
    # Partial results lie split after split, each as large as the whole batch.
    out_at = rows_at(p.out, s, rows) + split.to(tl.int64) * p.out.col
    store_rows(out_at, out, rows.ok, q.first, C.DV, C.BLOCK_DV)
    if q.first == 0:
        lse_at = rows_at(p.lse, s, rows) + split.to(tl.int64) * p.lse.col
        tl.store(lse_at, lse, mask=rows.ok)


@triton.jit
def store_statistics(p, s, rows, split, row_max, row_sum, stats):
    """The statistics of the rows, from the softmax state without the sink. A NaN among the scores,
    which row_max does not show, makes row_sum NaN: then these are NaN, and argmax is -1."""
    to = p.statistics
    at = rows_at(to.max_logit, s, rows) + split.to(tl.int64) * to.max_logit.col
    tl.store(at, tl.where(row_sum == row_sum, from_base2(row_max), row_sum), mask=rows.ok)
    if to.entropy is not None:
        at = rows_at(to.entropy, s, rows) + split.to(tl.int64) * to.entropy.col
        entropy = entropy_with_sinks(p, rows.head, row_max, row_sum, stats.entropy)
        tl.store(at, entropy, mask=rows.ok)
    if to.argmax is not None:
        at = rows_at(to.argmax, s, rows) + split.to(tl.int64) * to.argmax.col
        argmax = tl.where((row_max == NEG_INF) | (row_sum != row_sum), -1, stats.argmax)
        tl.store(at, argmax.to(tl.int64), mask=rows.ok)


@triton.jit
def entropy_with_sinks(p, head, row_max, row_sum, entropy):
    """The entropy in nats: log(row_sum) minus the mean of log(P); 0 where a row sees no key."""
    top, total, _, part = add_sinks(p, head, row_max, row_sum)
    entropy = entropy_at(entropy, row_max, row_sum, top)
    entropy += tl.where(part == 0.0, 0.0, part * tl.log2(part))
    dead = is_dead(top, total)
    total = tl.where(dead, 1.0, total)
    return tl.where(dead, 0.0, (tl.log2(total) - entropy / total) * LN2)


# ---- the kernel ---------------------------------------------------------------------------------


@triton.jit
def forward_kernel(p, visible, tiles, k_tma, v_tma, C: tl.constexpr):
    """Programs: tiles x splits x chunks of v x sequences (1 in varlen calls) x heads / GROUP.

    Heads are innermost, so that those of one kv head run together and find its keys in L2. Tiles
    are outermost and, where the right side is bounded, start with the last, which sees most keys.
    """
    program = tl.program_id(0)
    heads = p.heads // C.GROUP
    head, program = program % heads * C.GROUP, program // heads
    kv_head = head // (p.heads // p.kv_heads)
    n = program * 0
    if p.lengths.cu_q is None:
        n, program = program % p.lengths.sequences, program // p.lengths.sequences
    chunk, program = program % tl.cdiv(C.DV, C.BLOCK_DV), program // tl.cdiv(C.DV, C.BLOCK_DV)
    split, tile = program % C.SPLITS, program // C.SPLITS
    if p.right is not None:
        tile = tiles - 1 - tile
    if p.lengths.cu_q is not None:
        n, first = sequence_of_tile(p.lengths.cu_q, p.lengths.sequences, tile, C.GROUP, C.BLOCK_Q)
        tile -= first
    s = full_segment(p, n)
    start = tile * C.BLOCK_Q
    if start < s.row_end * C.GROUP:
        if p.lengths.doc_begin is None:
            forward_tile(p, s, visible, start, head, kv_head, chunk, split, k_tma, v_tma, C)
        else:  # one document at a time, so that a NaN in one does not reach another
            row = start // C.GROUP
            end = tl.minimum((start + C.BLOCK_Q - 1) // C.GROUP + 1, s.row_end)
            while row < end:
                d = document_at(p, s, row)
                forward_tile(p, d, visible, start, head, kv_head, chunk, split, k_tma, v_tma, C)
                row = d.row_end

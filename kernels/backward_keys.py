"""dk and dv: each program loops over the rows of one tile of keys. Next: launch.py."""

import triton
import triton.language as tl

from .backward import (
    Keys,
    Tma,
    chunk_of,
    gradient_of_scores,
    load_keys,
    load_query,
    without_full_tiles,
)
from .params import Range
from .spec import document_at, edge_tile, full_segment, q_range, range_of, sequence_of_tile
from .tile import dot, keys_at, rows_of_keys, store_rows, while_below


@triton.jit
def keys_step(
    p, g, s, tma, y, head, key, chunk, t, dk, dv, sums, C: tl.constexpr, EDGE: tl.constexpr
):
    """dk, dv and the sums of dS over rows after row tile t of one head."""
    start = t * C.BLOCK_Q
    r = load_query(p, g, s, tma, head, start, C, EDGE)
    probs, ds, dbias = gradient_of_scores(p, s, r, y, head, start, key, C, True, EDGE)
    if g.bias_keys.ptr is not None:
        sums += tl.sum(dbias, 1)
    dout = chunk_of(r.dout, r.dout_at, r.rows.ok, chunk * C.BLOCK_DV, C.DV, C.BLOCK_DV)
    dv = dot(probs.to(dout.dtype), dout, dv, C.PRECISION)
    q = chunk_of(r.q, r.q_at, r.rows.ok, chunk * C.BLOCK_D, C.D, C.BLOCK_D)
    dk = dot(ds.to(q.dtype), q, dk, C.PRECISION)
    return dk, dv, sums


@triton.jit
def keys_of_head(p, s, y, head):
    """The keys, with the rows of one head that see them."""
    first, last = rows_of_keys(p, s, head, y.j, y.exists)
    return Keys(y.j, y.exists, y.k_at, y.v_at, y.k, y.v, first, last)


@triton.jit
def rows_of_tile(p, s, y, key, C: tl.constexpr):
    """The row tiles that see a tile of keys, which begins with `key`."""
    left, right = tl.maximum(key, s.key_begin), tl.minimum(key + C.BLOCK_KV, s.key_end)
    if y.first is None:
        span = q_range(p, s, left, right, C.BLOCK_Q)
    else:
        span = range_of(y.first, y.last, y.exists, s.row_begin, s.row_end, C.BLOCK_Q)
    end = tl.where(left < right, span.end, span.begin)
    full_begin = tl.minimum(span.full_begin, end)
    full_end = tl.where(right - left == C.BLOCK_KV, tl.minimum(span.full_end, end), full_begin)
    return Range(span.begin, full_begin, full_end, end)


@triton.jit
def keys_tile(p, g, s, tma, visible, key, own_begin, own_end, kv_head, chunk, C: tl.constexpr):
    """dk and dv of keys [own_begin, own_end) in the tile that begins with `key`."""
    y = load_keys(p, s, Tma(None, None), kv_head, key, C, True)
    whole_span = rows_of_tile(p, s, y, key, C)
    dk = tl.zeros([C.BLOCK_KV, C.BLOCK_D], tl.float32)
    dv = tl.zeros([C.BLOCK_KV, C.BLOCK_DV], tl.float32)
    group = p.heads // p.kv_heads
    for h in range(0, group):
        head = kv_head * group + h
        own = keys_of_head(p, s, y, head)
        span = whole_span
        if p.ranges.first.ptr is not None:
            span = rows_of_tile(p, s, own, key, C)
        span = without_full_tiles(p, g, s, head, span)
        sums = tl.zeros([C.BLOCK_KV], tl.float32)
        if visible.rank is not None:
            at = s.n * visible.batch + head * visible.head + key // C.BLOCK_KV * visible.row
            rank = visible.rank + at.to(tl.int64) * (visible.others + 1)
            tiles = visible.tile + at.to(tl.int64) * visible.others
            for e in tl.range(
                tl.load(rank + span.begin), tl.load(rank + span.end), num_stages=C.STAGES
            ):
                dk, dv, sums = keys_step(
                    p, g, s, tma, own, head, key, chunk, tl.load(tiles + e), dk, dv, sums, C, True
                )
        else:
            edges = span.end - span.begin - (span.full_end - span.full_begin)
            for e in tl.range(0, edges, num_stages=C.STAGES):
                dk, dv, sums = keys_step(
                    p, g, s, tma, own, head, key, chunk, edge_tile(span, e), dk, dv, sums, C, True
                )
            for t in tl.range(span.full_begin, span.full_end, num_stages=C.STAGES):
                dk, dv, sums = keys_step(
                    p, g, s, tma, own, head, key, chunk, t, dk, dv, sums, C, False
                )
        if g.bias_keys.ptr is not None:
            at = g.bias_keys.ptr + s.n.to(tl.int64) * g.bias_keys.batch + head * g.bias_keys.head
            tl.store(at + y.j, sums, mask=(y.j >= own_begin) & (y.j < own_end))
    if p.dropout.seed is not None:
        dv = dv * p.dropout.inverse_keep
    mine = (y.j >= own_begin) & (y.j < own_end)
    dk_at, dv_at = keys_at(p, g.dk, s, kv_head, y.j, mine), keys_at(p, g.dv, s, kv_head, y.j, mine)
    first, first_v = chunk * C.BLOCK_D, chunk * C.BLOCK_DV
    store_rows(dk_at, dk * p.scale, while_below(mine, first, C.D), first, C.D, C.BLOCK_D)
    store_rows(dv_at, dv, while_below(mine, first_v, C.DV), first_v, C.DV, C.BLOCK_DV)


@triton.jit
def keys_kernel(p, g, visible, chunks, q_tma, dout_tma, C: tl.constexpr):
    """Programs: tiles of keys x chunks of q or v x sequences (1 in varlen calls) x kv heads. Under
    a causal mask most rows see the first tiles, which therefore run first."""
    program = tl.program_id(0)
    kv_head, program = program % p.kv_heads, program // p.kv_heads
    n = program * 0
    if p.lengths.cu_q is None:
        n, program = program % p.lengths.sequences, program // p.lengths.sequences
    chunk, tile = program % chunks, program // chunks
    if p.lengths.cu_q is not None:
        n, first = sequence_of_tile(p.lengths.cu_k, p.lengths.sequences, tile, 1, C.BLOCK_KV)
        tile -= first
    s = full_segment(p, n)
    own_end = n * 0 + p.lengths.kv_len  # slots past kv_lens are included: their gradient is 0
    if p.lengths.cu_k is not None:
        own_end = tl.load(p.lengths.cu_k + n + 1) - tl.load(p.lengths.cu_k + n)
    key = tile * C.BLOCK_KV
    if key < own_end:
        if p.lengths.doc_begin is None:
            keys_tile(p, g, s, Tma(q_tma, dout_tma), visible, key, key, own_end, kv_head, chunk, C)
        else:
            row, end = key, tl.minimum(key + C.BLOCK_KV, own_end)
            while row < end:
                d = document_at(p, s, row)
                keys_tile(
                    p,
                    g,
                    d,
                    Tma(q_tma, dout_tma),
                    visible,
                    key,
                    d.row_begin,
                    d.row_end,
                    kv_head,
                    chunk,
                    C,
                )
                row = d.row_end

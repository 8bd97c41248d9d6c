"""Forward mode: one pass over the keys gives the results and their tangents. Next: launch.py.

    T = slope * scale (tQ K' + Q tK') + tbias, the tangent of the scores S
    tlse = rowsum(P T),  tout = (P (T - tlse)) V + P tV

Beside the forward's state a row keeps the sum of P T, and a tile of P tV + (P T) V: six matrix
products where the forward has two. tlse is subtracted at the end. Tangents that are not given are
absent at compile time, with their products.

Sections as in forward.py: load, one step, the loop, finish, the kernel.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .backward import product
from .forward import add_sinks, is_dead
from .params import Tensor4
from .philox import dropout_head, keep_tile
from .score import NEG_INF, finish_scores, from_base2, operand_at
from .spec import document_at, edge_tile, full_segment, sequence_of_tile
from .tile import dot, in_band, keys_at, keys_of_tile, load_rows, rows_at, store_rows, tile_rows


class Tangents(NamedTuple):
    q: Tensor4
    k: Tensor4
    v: Tensor4
    bias: Tensor4
    sinks: Tensor4
    out: Tensor4  # of the results: written
    lse: Tensor4
    scores: int | None  # 1: a score depends on what has a tangent; None: only v and the sinks have


class Query(NamedTuple):
    """A tile's query rows and their tangents."""

    rows: Any
    kv_head: Any
    at: Any  # [rows] pointers
    x: Any  # [rows, BLOCK_D]; 0 where D > BLOCK_D, which loads chunks
    tangent_at: Any  # the same of q's tangent; None without one
    tangent: Any
    first: Any  # column of v and out that this program computes


# ---- load ---------------------------------------------------------------------------------------


@triton.jit
def whole(at, ok, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """[rows, BLOCK_D]; 0 where D > BLOCK_D, whose products load chunks."""
    if D > BLOCK_D:
        return 0
    else:
        return load_rows(at, ok, 0, D, BLOCK_D, EDGE)


@triton.jit
def load_query(p, t, s, rows, kv_head, first, C: tl.constexpr):
    at = rows_at(p.q, s, rows)
    x = whole(at, rows.ok, C.D, C.BLOCK_D, True)
    tangent_at, tangent = None, None
    if t.q.ptr is not None:
        tangent_at = rows_at(t.q, s, rows)
        tangent = whole(tangent_at, rows.ok, C.D, C.BLOCK_D, True)
    return Query(rows, kv_head, at, x, tangent_at, tangent, first)


@triton.jit
def values(p, s, q, x, j, exists, C: tl.constexpr, EDGE: tl.constexpr):
    """[BLOCK_KV, BLOCK_DV] of v or its tangent."""
    return load_rows(
        keys_at(p, x, s, q.kv_head, j, exists), exists, q.first, C.DV, C.BLOCK_DV, EDGE
    )


# ---- one step -----------------------------------------------------------------------------------


@triton.jit
def products(p, t, s, q, j, exists, C: tl.constexpr, EDGE: tl.constexpr):
    """(Q K', tQ K' + Q tK'), the second 0 without tangents of q and k."""
    ok = q.rows.ok
    k_at = keys_at(p, p.k, s, q.kv_head, j, exists)
    k = whole(k_at, exists, C.D, C.BLOCK_D, EDGE)
    x = product(q.x, q.at, ok, k, k_at, exists, C.D, C.BLOCK_D, C.PRECISION)
    tangent = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], tl.float32)
    if t.q.ptr is not None:
        tangent += product(
            q.tangent, q.tangent_at, ok, k, k_at, exists, C.D, C.BLOCK_D, C.PRECISION
        )
    if t.k.ptr is not None:
        tk_at = keys_at(p, t.k, s, q.kv_head, j, exists)
        tk = whole(tk_at, exists, C.D, C.BLOCK_D, EDGE)
        tangent += product(q.x, q.at, ok, tk, tk_at, exists, C.D, C.BLOCK_D, C.PRECISION)
    return x, tangent


@triton.jit
def jvp_step(
    p, t, s, q, tile, row_max, row_sum, tsum, acc, tacc, C: tl.constexpr, EDGE: tl.constexpr
):
    """The rows' softmax state after a tile of keys: tsum is rowsum(P T), tacc P tV + (P T) V."""
    start = tile * C.BLOCK_KV
    j = start + tl.arange(0, C.BLOCK_KV)
    exists = (j >= s.key_begin) & (j < s.key_end)
    rows, head = q.rows, q.rows.head
    i = rows.i[:, None]
    seen = in_band(rows, j, EDGE)
    x, tx = products(p, t, s, q, j, exists, C, EDGE)
    x, slope = finish_scores(p, s.n, x, head, i, j[None, :], seen, s.offset, EDGE)
    tx = tx * p.scale * slope
    if t.bias.ptr is not None:
        at = operand_at(t.bias, s.n, head, i, j[None, :])
        tx += tl.load(at, mask=seen, other=0.0).to(tl.float32)

    new_max = tl.maximum(row_max, tl.max(x, 1))
    base = tl.where(new_max == NEG_INF, 0.0, new_max)  # -inf - -inf would be NaN
    probs = tl.exp2(x - base[:, None])
    rescale = tl.exp2(row_max - base)
    row_sum = row_sum * rescale + tl.sum(probs, 1)
    moved = probs * tx
    if EDGE or p.mask.ptr is not None:
        moved = tl.where(probs == 0.0, 0.0, moved)  # a hidden key's tangent may be NaN
    if t.scores is not None:
        tsum = tsum * rescale + tl.sum(moved, 1)
    if p.dropout.seed is not None:
        bh = dropout_head(p, s.n, head)
        kept = keep_tile(p, bh, tl.min(rows.i, 0), start, C.BLOCK_Q, C.BLOCK_KV, False)
        probs, moved = tl.where(kept, probs, 0.0), tl.where(kept, moved, 0.0)
    v = values(p, s, q, p.v, j, exists, C, EDGE)
    probs = probs.to(v.dtype)
    acc = dot(probs, v, acc * rescale[:, None], C.PRECISION)
    tacc = tacc * rescale[:, None]
    if t.scores is not None:
        tacc = dot(moved.to(v.dtype), v, tacc, C.PRECISION)
    if t.v.ptr is not None:
        tacc = dot(probs, values(p, s, q, t.v, j, exists, C, EDGE), tacc, C.PRECISION)
    return new_max, row_sum, tsum, acc, tacc


# ---- the loop -----------------------------------------------------------------------------------


@triton.jit
def jvp_tile(p, t, s, visible, start, head, chunk, C: tl.constexpr):
    """The results of the tile's rows in segment s, and their tangents."""
    rows = tile_rows(p, s, head, start, C.BLOCK_Q, 1)
    top, bottom = tl.maximum(start, s.row_begin), tl.minimum(start + C.BLOCK_Q, s.row_end)
    r = keys_of_tile(p, s, rows, top, bottom, C.BLOCK_KV)
    q = load_query(p, t, s, rows, head // (p.heads // p.kv_heads), chunk * C.BLOCK_DV, C)
    row_max = tl.full([C.BLOCK_Q], NEG_INF, tl.float32)
    row_sum = tl.zeros([C.BLOCK_Q], tl.float32)
    tsum = tl.zeros([C.BLOCK_Q], tl.float32)
    acc = tl.zeros([C.BLOCK_Q, C.BLOCK_DV], tl.float32)
    tacc = tl.zeros([C.BLOCK_Q, C.BLOCK_DV], tl.float32)
    if visible.rank is not None:  # only the tiles that hold a True, in order
        at = s.n * visible.batch + head * visible.head + start // C.BLOCK_Q * visible.row
        rank = visible.rank + at.to(tl.int64) * (visible.others + 1)
        tiles = visible.tile + at.to(tl.int64) * visible.others
        for e in tl.range(tl.load(rank + r.begin), tl.load(rank + r.end), num_stages=C.STAGES):
            row_max, row_sum, tsum, acc, tacc = jvp_step(
                p, t, s, q, tl.load(tiles + e), row_max, row_sum, tsum, acc, tacc, C, True
            )
    else:
        edges = r.end - r.begin - (r.full_end - r.full_begin)
        for e in tl.range(0, edges, num_stages=C.STAGES):
            row_max, row_sum, tsum, acc, tacc = jvp_step(
                p, t, s, q, edge_tile(r, e), row_max, row_sum, tsum, acc, tacc, C, True
            )
        for tile in tl.range(r.full_begin, r.full_end, num_stages=C.STAGES):
            row_max, row_sum, tsum, acc, tacc = jvp_step(
                p, t, s, q, tile, row_max, row_sum, tsum, acc, tacc, C, False
            )
    finish(p, t, s, q, row_max, row_sum, tsum, acc, tacc, C)


# ---- finish -------------------------------------------------------------------------------------


@triton.jit
def finish(p, t, s, q, row_max, row_sum, tsum, acc, tacc, C: tl.constexpr):
    rows = q.rows
    row_max, row_sum, rescale, part = add_sinks(p, rows.head, row_max, row_sum)
    tsum = tsum * rescale
    if t.sinks.ptr is not None:
        tsum += part * tl.load(t.sinks.ptr + rows.head * t.sinks.head).to(tl.float32)
    dead = is_dead(row_max, row_sum)
    row_sum = tl.where(dead, 1.0, row_sum)
    tlse = tl.where(dead, 0.0, tsum / row_sum)
    rescale = rescale / row_sum
    if p.dropout.seed is not None:
        rescale *= p.dropout.inverse_keep
    out = tl.where(dead[:, None], 0.0, acc * rescale[:, None])
    tout = tl.where(dead[:, None], 0.0, tacc * rescale[:, None] - tlse[:, None] * out)
    lse = tl.where(dead, NEG_INF, from_base2(row_max + tl.log2(row_sum)))
    store_rows(rows_at(p.out, s, rows), out, rows.ok, q.first, C.DV, C.BLOCK_DV)
    store_rows(rows_at(t.out, s, rows), tout, rows.ok, q.first, C.DV, C.BLOCK_DV)
    if q.first == 0:
        tl.store(rows_at(p.lse, s, rows), lse, mask=rows.ok)
        tl.store(rows_at(t.lse, s, rows), tlse, mask=rows.ok)


# ---- the kernel ---------------------------------------------------------------------------------


@triton.jit
def jvp_kernel(p, t, visible, tiles, C: tl.constexpr):
    """Programs: tiles x chunks of v x sequences (1 in varlen calls) x heads, in forward_kernel's
    order."""
    program = tl.program_id(0)
    head, program = program % p.heads, program // p.heads
    n = program * 0
    if p.lengths.cu_q is None:
        n, program = program % p.lengths.sequences, program // p.lengths.sequences
    chunk, tile = program % tl.cdiv(C.DV, C.BLOCK_DV), program // tl.cdiv(C.DV, C.BLOCK_DV)
    if p.right is not None:
        tile = tiles - 1 - tile
    if p.lengths.cu_q is not None:
        n, first = sequence_of_tile(p.lengths.cu_q, p.lengths.sequences, tile, 1, C.BLOCK_Q)
        tile -= first
    s = full_segment(p, n)
    start = tile * C.BLOCK_Q
    if start < s.row_end:
        if p.lengths.doc_begin is None:
            jvp_tile(p, t, s, visible, start, head, chunk, C)
        else:  # one document at a time, so that a NaN in one does not reach another
            row, end = start, tl.minimum(start + C.BLOCK_Q, s.row_end)
            while row < end:
                d = document_at(p, s, row)
                jvp_tile(p, t, d, visible, start, head, chunk, C)
                row = d.row_end

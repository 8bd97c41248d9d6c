"""The backward kernels. Next: launch.py, which launches them.

There are two passes, so that no program adds to memory that another writes: without atomics, the
results are the same bits every time. `rows_kernel` loops over the keys of a tile of rows for dq,
`keys_kernel` over the rows of a tile of keys for dk and dv. Both compute the scores and dP, which
makes seven matrix products, where one pass with atomics would need five. `bias_kernel` computes
dbias where sequences or heads share a bias.

    P = exp(S - lse), dP = dO V', dS = P * (dP - delta), delta = rowsum(dO * O) - dlse
    dV = P' dO, dQ = scale dS K, dK = scale dS' Q, dbias = dS

A gradient of the rows' entropy, -rowsum(P log P), adds -dentropy * P log P to dS and
-dentropy * entropy to dlse, which the caller does.

Sections: load, one step, rows (dq). backward_keys.py has dk and dv, backward_bias.py the bias.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .params import Range, Tensor4
from .philox import dropout_head, keep_tile
from .score import LN2, NEG_INF, finish_scores, to_base2
from .spec import (
    document_at,
    edge_tile,
    full_segment,
    sequence_of_tile,
)
from .tile import (
    dot,
    in_band,
    in_band_transposed,
    keys_at,
    keys_of_tile,
    load_rows,
    long_dot,
    rows_at,
    store_rows,
    tile_rows,
    while_below,
)

# From this magnitude on, lse is rounded so coarsely that a probability exp(score - lse) can exceed
# 1 by 2^-9 or more, so it is clamped to 1. Below, the excess is negligible, and full tiles skip the
# clamp.
LARGE_LSE = tl.constexpr(2.0**14)


class Gradients(NamedTuple):
    dout: Tensor4
    delta: Tensor4  # [B, heads, q_len] fp32
    lse: Tensor4  # [B, heads, q_len] fp32, base 2; +inf where a row sees no key, so that P is 0
    dq: Tensor4
    dk: Tensor4
    dv: Tensor4
    dbias: Tensor4  # fp32, written by rows_kernel or, where the bias is shared, by bias_kernel
    bias_rows: Tensor4  # [sequences, heads, rows] fp32: dS summed over keys
    bias_keys: Tensor4  # [sequences, heads, keys] fp32: dS summed over rows
    large: Any  # int32 [B, heads]: 1 where some lse is at least LARGE_LSE
    dentropy: Any  # a Tensor4 [B, heads, q_len], gradient of the rows' entropy, or None


class Tma(NamedTuple):
    """Tensor descriptors of the inner loop's tensors, k and v or q and dout; None: plain loads."""

    x: Any = None
    y: Any = None


class Query(NamedTuple):
    """A tile's query rows and what the backward loads for them."""

    rows: Any
    q_at: Any  # [rows] pointers
    dout_at: Any
    q: Any  # [rows, BLOCK_D]; 0 where D > BLOCK_D, which loads chunks
    dout: Any
    lse: Any  # [rows], in base 2; +inf where there is no row
    delta: Any
    dentropy: Any  # [rows]; None: the entropy has no gradient


class Keys(NamedTuple):
    j: Any
    exists: Any
    k_at: Any
    v_at: Any
    k: Any  # [keys, BLOCK_D]; 0 where D > BLOCK_D, which loads chunks
    v: Any
    first: Any  # [keys]: rows [first, last) of one head see a key; None without key ranges
    last: Any


# ---- load ---------------------------------------------------------------------------------------


@triton.jit
def load_query(p, g, s, tma, head, start, C: tl.constexpr, EDGE: tl.constexpr):
    rows = tile_rows(p, s, head, start, C.BLOCK_Q, 1)
    q_at, dout_at = rows_at(p.q, s, rows), rows_at(g.dout, s, rows)
    q, dout = 0, 0
    if tma.x is not None:
        q = tl.reshape(tma.x.load([s.batch, head, start, 0]), [C.BLOCK_Q, C.BLOCK_D])
        dout = tl.reshape(tma.y.load([s.batch, head, start, 0]), [C.BLOCK_Q, C.BLOCK_DV])
    else:
        if C.D <= C.BLOCK_D:
            q = load_rows(q_at, rows.ok, 0, C.D, C.BLOCK_D, EDGE)
        if C.DV <= C.BLOCK_DV:
            dout = load_rows(dout_at, rows.ok, 0, C.DV, C.BLOCK_DV, EDGE)
    lse_at, delta_at = rows_at(g.lse, s, rows), rows_at(g.delta, s, rows)
    if EDGE:
        lse = tl.load(lse_at, mask=rows.ok, other=float("inf"))
        delta = tl.load(delta_at, mask=rows.ok, other=0.0)
    else:
        lse, delta = tl.load(lse_at), tl.load(delta_at)
    dentropy = None
    if g.dentropy is not None:
        dentropy = tl.load(rows_at(g.dentropy, s, rows), mask=rows.ok, other=0.0).to(tl.float32)
    return Query(rows, q_at, dout_at, q, dout, lse, delta, dentropy)


@triton.jit
def load_keys(p, s, tma, kv_head, start, C: tl.constexpr, EDGE: tl.constexpr):
    j = start + tl.arange(0, C.BLOCK_KV)
    exists = (j >= s.key_begin) & (j < s.key_end)
    k_at, v_at = keys_at(p, p.k, s, kv_head, j, exists), keys_at(p, p.v, s, kv_head, j, exists)
    k, v = 0, 0
    if tma.x is not None:
        k = tl.reshape(tma.x.load([s.batch, kv_head, start, 0]), [C.BLOCK_KV, C.BLOCK_D])
        v = tl.reshape(tma.y.load([s.batch, kv_head, start, 0]), [C.BLOCK_KV, C.BLOCK_DV])
    else:
        if C.D <= C.BLOCK_D:
            k = load_rows(k_at, exists, 0, C.D, C.BLOCK_D, EDGE)
        if C.DV <= C.BLOCK_DV:
            v = load_rows(v_at, exists, 0, C.DV, C.BLOCK_DV, EDGE)
    return Keys(j, exists, k_at, v_at, k, v, None, None)


@triton.jit
def chunk_of(whole, at, ok, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The channels from `first` on: the loaded tile, or one chunk, 0 past the end."""
    if D > BLOCK_D:
        return load_rows(at, while_below(ok, first, D), first, D, BLOCK_D, True)
    else:
        return whole


@triton.jit
def product(
    a, a_at, a_ok, b, b_at, b_ok, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """a b', of loaded tiles or in chunks of channels."""
    if D > BLOCK_D:
        return long_dot(a_at, a_ok, b_at, b_ok, D, BLOCK_D, PRECISION)
    else:
        return dot(a, tl.trans(b), None, PRECISION)


@triton.jit
def delta_kernel(
    out,
    dout,
    lse,
    dlse,
    delta,
    lse2,
    large,
    q_len,
    heads,
    DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """delta [B, heads, q_len] = rowsum(dout * out) - dlse, and lse2 and large of Gradients.
    Programs: B x heads x tiles of rows."""
    tiles = tl.cdiv(q_len, BLOCK_Q)
    tile, rest = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    head, batch = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    i = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ok, row = i < q_len, i.to(tl.int64)
    out_at = out.ptr + batch * out.batch + head * out.head + row * out.row
    dout_at = dout.ptr + batch * dout.batch + head * dout.head + row * dout.row
    total = tl.zeros([BLOCK_Q], tl.float32)
    for first in tl.static_range(0, DV, BLOCK_DV):
        a = load_rows(out_at, ok, first, DV, BLOCK_DV, True).to(tl.float32)
        total += tl.sum(a * load_rows(dout_at, ok, first, DV, BLOCK_DV, True).to(tl.float32), 1)
    if dlse.ptr is not None:
        at = dlse.ptr + batch * dlse.batch + head * dlse.head + row * dlse.row
        total -= tl.load(at, mask=ok, other=0.0).to(tl.float32)
    at = lse.ptr + batch * lse.batch + head * lse.head + row * lse.row
    base2 = tl.load(at, mask=ok, other=0.0)
    far = ok & (tl.abs(base2) >= LARGE_LSE) & (base2 != NEG_INF)
    if tl.max(far.to(tl.int32), 0) > 0:
        tl.store(large + rest, 1)  # any of the head's programs may store it
    base2 = tl.where(base2 == NEG_INF, float("inf"), to_base2(base2))
    to = rest.to(tl.int64) * q_len + i
    tl.store(delta + to, total, mask=ok)
    tl.store(lse2 + to, base2, mask=ok)


@triton.jit
def without_full_tiles(p, g, s, head, r):
    """r; where the head has large scores, without full tiles, because only edge tiles clamp P."""
    large = tl.load(g.large + s.batch * p.heads + head)
    return Range(r.begin, r.full_begin, tl.where(large != 0, r.full_begin, r.full_end), r.end)


# ---- one step -----------------------------------------------------------------------------------


@triton.jit
def gradient_of_scores(
    p,
    s,
    r,
    y,
    head,
    start_i,
    start_j,
    C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    EDGE: tl.constexpr,
):
    """(P after dropout without its factor; dS; dS before the cap) of rows r and keys y: [rows,
    keys] or, TRANSPOSED, [keys, rows]. dS is the gradient of scale q.k."""
    if TRANSPOSED:
        x = product(y.k, y.k_at, y.exists, r.q, r.q_at, r.rows.ok, C.D, C.BLOCK_D, C.PRECISION)
        dp = product(
            y.v, y.v_at, y.exists, r.dout, r.dout_at, r.rows.ok, C.DV, C.BLOCK_DV, C.PRECISION
        )
        i, j = r.rows.i[None, :], y.j[:, None]
        seen = in_band_transposed(p, s, r.rows.i, r.rows.ok, y.j, y.first, y.last, EDGE)
        lse, delta, dentropy = r.lse[None, :], r.delta[None, :], r.dentropy
        if dentropy is not None:
            dentropy = dentropy[None, :]
    else:
        x = product(r.q, r.q_at, r.rows.ok, y.k, y.k_at, y.exists, C.D, C.BLOCK_D, C.PRECISION)
        dp = product(
            r.dout, r.dout_at, r.rows.ok, y.v, y.v_at, y.exists, C.DV, C.BLOCK_DV, C.PRECISION
        )
        i, j = r.rows.i[:, None], y.j[None, :]
        seen = in_band(r.rows, y.j, EDGE)
        lse, delta, dentropy = r.lse[:, None], r.delta[:, None], r.dentropy
        if dentropy is not None:
            dentropy = dentropy[:, None]
    x, slope = finish_scores(p, s.n, x, head, i, j, seen, s.offset, EDGE)
    x -= lse
    if EDGE:  # the clamp of LARGE_LSE, which keeps NaN
        x = tl.where(x > 0.0, 0.0, x)
    probs = tl.exp2(x)
    dropped = probs
    if p.dropout.seed is not None:
        bh = dropout_head(p, s.n, head)
        kept = keep_tile(p, bh, start_i, start_j, C.BLOCK_Q, C.BLOCK_KV, TRANSPOSED)
        dp = tl.where(kept, dp * p.dropout.inverse_keep, 0.0)
        dropped = tl.where(kept, probs, 0.0)
    ds = probs * (dp - delta)
    if dentropy is not None:
        ds -= tl.where(probs == 0.0, 0.0, dentropy * probs * (x * LN2))  # 0 * -inf would be NaN
    if EDGE or p.mask.ptr is not None:
        ds = tl.where(probs == 0.0, 0.0, ds)  # 0 * NaN would be NaN where a hidden key or value is
    before_cap = ds
    if p.cap is not None:
        ds = tl.where(ds == 0.0, 0.0, ds * slope)
    return dropped, ds, before_cap


# ---- rows: dq -----------------------------------------------------------------------------------


@triton.jit
def rows_step(p, g, s, tma, r, kv_head, chunk, t, dq, sums, C: tl.constexpr, EDGE: tl.constexpr):
    """dq and the sums of dS over keys after key tile t."""
    start = t * C.BLOCK_KV
    y = load_keys(p, s, tma, kv_head, start, C, EDGE)
    head, rows = r.rows.head, r.rows
    _, ds, dbias = gradient_of_scores(p, s, r, y, head, tl.min(rows.i, 0), start, C, False, EDGE)
    if g.bias_rows.ptr is not None:
        sums += tl.sum(dbias, 1)
    if g.dbias.ptr is not None:  # noqa: SIM102  a compile-time condition, unlike the next
        if chunk == 0:
            row = (rows.head * 1).to(tl.int64) * g.dbias.head + rows.i.to(tl.int64) * g.dbias.row
            at = g.dbias.ptr + s.n.to(tl.int64) * g.dbias.batch + row[:, None] + y.j * g.dbias.col
            tl.store(at, dbias, mask=rows.ok[:, None] & y.exists)
    k = chunk_of(y.k, y.k_at, y.exists, chunk * C.BLOCK_D, C.D, C.BLOCK_D)
    return dot(ds.to(k.dtype), k, dq, C.PRECISION), sums


@triton.jit
def rows_tile(p, g, s, tma, visible, start, head, chunk, C: tl.constexpr):
    kv_head = head // (p.heads // p.kv_heads)
    r = load_query(p, g, s, Tma(None, None), head, start, C, True)
    top, bottom = tl.maximum(start, s.row_begin), tl.minimum(start + C.BLOCK_Q, s.row_end)
    span = keys_of_tile(p, s, r.rows, top, bottom, C.BLOCK_KV)
    span = without_full_tiles(p, g, s, head, span)
    dq = tl.zeros([C.BLOCK_Q, C.BLOCK_D], tl.float32)
    sums = tl.zeros([C.BLOCK_Q], tl.float32)
    if visible.rank is not None:
        at = (s.n * visible.batch + head * visible.head + start // C.BLOCK_Q * visible.row).to(
            tl.int64
        )
        rank, tiles = visible.rank + at * (visible.others + 1), visible.tile + at * visible.others
        first, last = tl.load(rank + span.begin), tl.load(rank + span.end)
        for e in tl.range(first, last, num_stages=C.STAGES):
            dq, sums = rows_step(
                p, g, s, tma, r, kv_head, chunk, tl.load(tiles + e), dq, sums, C, True
            )
    else:
        edges = span.end - span.begin - (span.full_end - span.full_begin)
        for e in tl.range(0, edges, num_stages=C.STAGES):
            dq, sums = rows_step(
                p, g, s, tma, r, kv_head, chunk, edge_tile(span, e), dq, sums, C, True
            )
        for t in tl.range(span.full_begin, span.full_end, num_stages=C.STAGES):
            dq, sums = rows_step(p, g, s, tma, r, kv_head, chunk, t, dq, sums, C, False)
    rows = r.rows
    store_rows(rows_at(g.dq, s, rows), dq * p.scale, rows.ok, chunk * C.BLOCK_D, C.D, C.BLOCK_D)
    if g.bias_rows.ptr is not None:
        at = g.bias_rows.ptr + s.n.to(tl.int64) * g.bias_rows.batch + head * g.bias_rows.head
        tl.store(at + rows.i, sums, mask=rows.ok)


@triton.jit
def rows_kernel(p, g, visible, tiles, k_tma, v_tma, C: tl.constexpr):
    """Programs: tiles x chunks of q x sequences (1 in varlen calls) x heads."""
    program = tl.program_id(0)
    head, program = program % p.heads, program // p.heads
    n = program * 0
    if p.lengths.cu_q is None:
        n, program = program % p.lengths.sequences, program // p.lengths.sequences
    chunk, tile = program % tl.cdiv(C.D, C.BLOCK_D), program // tl.cdiv(C.D, C.BLOCK_D)
    if p.right is not None:
        tile = tiles - 1 - tile
    if p.lengths.cu_q is not None:
        n, first = sequence_of_tile(p.lengths.cu_q, p.lengths.sequences, tile, 1, C.BLOCK_Q)
        tile -= first
    s = full_segment(p, n)
    start = tile * C.BLOCK_Q
    if start < s.row_end:
        if p.lengths.doc_begin is None:
            rows_tile(p, g, s, Tma(k_tma, v_tma), visible, start, head, chunk, C)
        else:
            row, end = start, tl.minimum(start + C.BLOCK_Q, s.row_end)
            while row < end:
                d = document_at(p, s, row)
                rows_tile(p, g, d, Tma(k_tma, v_tma), visible, start, head, chunk, C)
                row = d.row_end

"""The backward kernels. Next: launch.py, which launches them.

Two passes that share nothing but their inputs, so that nobody adds to what another wrote: the same
bits every time, without atomics. `rows_kernel` walks the keys of a tile of rows for dq,
`keys_kernel` the rows of a tile of keys for dk and dv. Both make the scores and dP again: seven
products where one pass with atomics would need five. `bias_kernel` makes dbias where entries or
heads share it.

    P = exp(S - lse), dP = dO V', dS = P * (dP - delta), delta = rowsum(dO * O) - dlse
    dV = P' dO, dQ = scale dS K, dK = scale dS' Q, dbias = dS

Sections: load, one step, rows (dq), keys (dk, dv); backward_bias.py has the bias.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .params import Range, Tensor4
from .philox import dropout_head, keep_tile
from .score import NEG_INF, finish_scores, to_base2
from .spec import (
    document_at,
    edge_tile,
    entry_of_tile,
    q_range,
    range_of,
    whole_entry,
)
from .tile import (
    dot,
    in_band,
    in_band_turned,
    keys_at,
    keys_of_lanes,
    lanes_of,
    load_rows,
    long_dot,
    rows_at,
    rows_of_keys,
    store_rows,
    while_below,
)

# From here on the rounding of lse is 2^-9 of a weight, and grows with it: exp(score - lse) is
# clamped to 1. Below, a weight above 1 by that little harms nothing, and full tiles are spared the
# test.
LARGE_LSE = tl.constexpr(2.0**14)


class Gradients(NamedTuple):
    dout: Tensor4
    delta: Tensor4  # [B, heads, q_len] fp32
    lse: Tensor4  # [B, heads, q_len] fp32, base 2; +inf where a row sees nothing: its weights are 0
    dq: Tensor4
    dk: Tensor4
    dv: Tensor4
    dbias: Tensor4  # fp32, written as it is by rows_kernel, or summed by bias_kernel
    bias_rows: Tensor4  # [entries, heads, rows] fp32: dS summed over keys
    bias_keys: Tensor4  # [entries, heads, keys] fp32: dS summed over rows
    large: Any  # int32 [B, heads]: 1 where some lse is so large that exp(score - lse) may pass 1


class Tma(NamedTuple):
    """Tensor descriptors of what the inner loop reads, k and v or q and dout; None: plain loads."""

    x: Any = None
    y: Any = None


class Rows(NamedTuple):
    """A tile's rows as the backward reads them."""

    lanes: Any
    q_at: Any  # [lanes] pointers
    dout_at: Any
    q: Any  # [lanes, BLOCK_D]; unless channels come in chunks
    dout: Any
    lse: Any  # [lanes], as Gradients has it; +inf too where there is no row
    delta: Any


class Keys(NamedTuple):
    j: Any
    exists: Any
    k_at: Any
    v_at: Any
    k: Any  # [keys, BLOCK_D]; unless channels come in chunks
    v: Any
    first: Any  # [keys]: the rows of one head that see them, by key ranges; None: by the band
    last: Any


# ---- load ---------------------------------------------------------------------------------------


@triton.jit
def load_query(p, g, s, tma, head, start, C: tl.constexpr, EDGE: tl.constexpr):
    lanes = lanes_of(p, s, head, start, C.BLOCK_Q, 1)
    q_at, dout_at = rows_at(p.q, s, lanes), rows_at(g.dout, s, lanes)
    q, dout = 0, 0
    if tma.x is not None:
        q = tl.reshape(tma.x.load([s.batch, head, start, 0]), [C.BLOCK_Q, C.BLOCK_D])
        dout = tl.reshape(tma.y.load([s.batch, head, start, 0]), [C.BLOCK_Q, C.BLOCK_DV])
    else:
        if C.D <= C.BLOCK_D:
            q = load_rows(q_at, lanes.ok, 0, C.D, C.BLOCK_D, EDGE)
        if C.DV <= C.BLOCK_DV:
            dout = load_rows(dout_at, lanes.ok, 0, C.DV, C.BLOCK_DV, EDGE)
    lse_at, delta_at = rows_at(g.lse, s, lanes), rows_at(g.delta, s, lanes)
    if EDGE:
        lse = tl.load(lse_at, mask=lanes.ok, other=float("inf"))
        delta = tl.load(delta_at, mask=lanes.ok, other=0.0)
    else:
        lse, delta = tl.load(lse_at), tl.load(delta_at)
    return Rows(lanes, q_at, dout_at, q, dout, lse, delta)


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
    """Channels first.. of rows: those at hand, or one chunk of them, 0 past the last."""
    if D > BLOCK_D:
        return load_rows(at, while_below(ok, first, D), first, D, BLOCK_D, True)
    else:
        return whole


@triton.jit
def product(
    a, a_at, a_ok, b, b_at, b_ok, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr
):
    """a b' of rows at hand, or in chunks of their channels."""
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
        tl.store(large + rest, 1)  # by any of the head's programs
    base2 = tl.where(base2 == NEG_INF, float("inf"), to_base2(base2))
    to = rest.to(tl.int64) * q_len + i
    tl.store(delta + to, total, mask=ok)
    tl.store(lse2 + to, base2, mask=ok)


@triton.jit
def without_full_tiles(p, g, s, head, r):
    """r; where the head has large scores, all its tiles take the step that bounds weights."""
    large = tl.load(g.large + s.batch * p.heads + head)
    return Range(r.begin, r.full_begin, tl.where(large != 0, r.full_begin, r.full_end), r.end)


# ---- one step -----------------------------------------------------------------------------------


@triton.jit
def gradient_of_scores(
    p, s, r, y, head, start_i, start_j, C: tl.constexpr, TURN: tl.constexpr, EDGE: tl.constexpr
):
    """(weights after dropout, but for its factor; dS; dS before the cap) of rows r and keys y:
    [rows, keys], or [keys, rows] turned. dS is that of scale q.k."""
    if TURN:
        x = product(y.k, y.k_at, y.exists, r.q, r.q_at, r.lanes.ok, C.D, C.BLOCK_D, C.PRECISION)
        dp = product(
            y.v, y.v_at, y.exists, r.dout, r.dout_at, r.lanes.ok, C.DV, C.BLOCK_DV, C.PRECISION
        )
        i, j = r.lanes.i[None, :], y.j[:, None]
        seen = in_band_turned(p, s, r.lanes.i, r.lanes.ok, y.j, y.first, y.last, EDGE)
        lse, delta = r.lse[None, :], r.delta[None, :]
    else:
        x = product(r.q, r.q_at, r.lanes.ok, y.k, y.k_at, y.exists, C.D, C.BLOCK_D, C.PRECISION)
        dp = product(
            r.dout, r.dout_at, r.lanes.ok, y.v, y.v_at, y.exists, C.DV, C.BLOCK_DV, C.PRECISION
        )
        i, j = r.lanes.i[:, None], y.j[None, :]
        seen = in_band(r.lanes, y.j, EDGE)
        lse, delta = r.lse[:, None], r.delta[:, None]
    x, slope = finish_scores(p, s.n, x, head, i, j, seen, s.offset, EDGE)
    x -= lse
    if EDGE:  # all tiles of a head with large scores take this; NaN stays
        x = tl.where(x > 0.0, 0.0, x)
    weights = tl.exp2(x)
    dropped = weights
    if p.dropout.seed is not None:
        bh = dropout_head(p, s.n, head)
        kept = keep_tile(p, bh, start_i, start_j, C.BLOCK_Q, C.BLOCK_KV, TURN)
        dp = tl.where(kept, dp * p.dropout.inverse_keep, 0.0)
        dropped = tl.where(kept, weights, 0.0)
    ds = weights * (dp - delta)
    if EDGE or p.mask.ptr is not None:
        ds = tl.where(weights == 0.0, 0.0, ds)  # not 0 * NaN where a hidden value is NaN
    before_cap = ds
    if p.cap is not None:
        ds = tl.where(ds == 0.0, 0.0, ds * slope)
    return dropped, ds, before_cap


# ---- rows: dq -----------------------------------------------------------------------------------


@triton.jit
def rows_step(p, g, s, tma, r, kv_head, chunk, t, dq, sums, C: tl.constexpr, EDGE: tl.constexpr):
    """Key tile t, added to dq and to the sums of dS over keys."""
    start = t * C.BLOCK_KV
    y = load_keys(p, s, tma, kv_head, start, C, EDGE)
    head, lanes = r.lanes.head, r.lanes
    _, ds, dbias = gradient_of_scores(p, s, r, y, head, tl.min(lanes.i, 0), start, C, False, EDGE)
    if g.bias_rows.ptr is not None:
        sums += tl.sum(dbias, 1)
    if g.dbias.ptr is not None:  # noqa: SIM102  decided as it is compiled, unlike the next
        if chunk == 0:
            row = (lanes.head * 1).to(tl.int64) * g.dbias.head + lanes.i.to(tl.int64) * g.dbias.row
            at = g.dbias.ptr + s.n.to(tl.int64) * g.dbias.batch + row[:, None] + y.j * g.dbias.col
            tl.store(at, dbias, mask=lanes.ok[:, None] & y.exists)
    k = chunk_of(y.k, y.k_at, y.exists, chunk * C.BLOCK_D, C.D, C.BLOCK_D)
    return dot(ds.to(k.dtype), k, dq, C.PRECISION), sums


@triton.jit
def rows_tile(p, g, s, tma, visible, start, head, chunk, C: tl.constexpr):
    kv_head = head // (p.heads // p.kv_heads)
    r = load_query(p, g, s, Tma(None, None), head, start, C, True)
    top, bottom = tl.maximum(start, s.row_begin), tl.minimum(start + C.BLOCK_Q, s.row_end)
    span = keys_of_lanes(p, s, r.lanes, top, bottom, C.BLOCK_KV)
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
    lanes = r.lanes
    store_rows(rows_at(g.dq, s, lanes), dq * p.scale, lanes.ok, chunk * C.BLOCK_D, C.D, C.BLOCK_D)
    if g.bias_rows.ptr is not None:
        at = g.bias_rows.ptr + s.n.to(tl.int64) * g.bias_rows.batch + head * g.bias_rows.head
        tl.store(at + lanes.i, sums, mask=lanes.ok)


@triton.jit
def rows_kernel(p, g, visible, tiles, k_tma, v_tma, C: tl.constexpr):
    """Programs: tiles x chunks of q x entries (one when packed) x heads."""
    program = tl.program_id(0)
    head, program = program % p.heads, program // p.heads
    n = program * 0
    if p.lengths.cu_q is None:
        n, program = program % p.lengths.entries, program // p.lengths.entries
    chunk, tile = program % tl.cdiv(C.D, C.BLOCK_D), program // tl.cdiv(C.D, C.BLOCK_D)
    if p.right is not None:
        tile = tiles - 1 - tile
    if p.lengths.cu_q is not None:
        n, first = entry_of_tile(p.lengths.cu_q, p.lengths.entries, tile, 1, C.BLOCK_Q)
        tile -= first
    s = whole_entry(p, n)
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


# ---- keys: dk, dv -------------------------------------------------------------------------------


@triton.jit
def keys_step(
    p, g, s, tma, y, head, key, chunk, t, dk, dv, sums, C: tl.constexpr, EDGE: tl.constexpr
):
    """Row tile t of one head, added to dk, dv and to the sums of dS over rows."""
    start = t * C.BLOCK_Q
    r = load_query(p, g, s, tma, head, start, C, EDGE)
    weights, ds, dbias = gradient_of_scores(p, s, r, y, head, start, key, C, True, EDGE)
    if g.bias_keys.ptr is not None:
        sums += tl.sum(dbias, 1)
    dout = chunk_of(r.dout, r.dout_at, r.lanes.ok, chunk * C.BLOCK_DV, C.DV, C.BLOCK_DV)
    dv = dot(weights.to(dout.dtype), dout, dv, C.PRECISION)
    q = chunk_of(r.q, r.q_at, r.lanes.ok, chunk * C.BLOCK_D, C.D, C.BLOCK_D)
    dk = dot(ds.to(q.dtype), q, dk, C.PRECISION)
    return dk, dv, sums


@triton.jit
def keys_of_head(p, s, y, head):
    """The keys, with the rows of one head that see them."""
    first, last = rows_of_keys(p, s, head, y.j, y.exists)
    return Keys(y.j, y.exists, y.k_at, y.v_at, y.k, y.v, first, last)


@triton.jit
def rows_of_tile(p, s, y, key, C: tl.constexpr):
    """Row tiles of a tile's keys, the first of which is `key`."""
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
    """Programs: tiles of keys x chunks of q or v x entries (one when packed) x kv heads. Under a
    causal mask the first tiles are seen by most rows, and come first."""
    program = tl.program_id(0)
    kv_head, program = program % p.kv_heads, program // p.kv_heads
    n = program * 0
    if p.lengths.cu_q is None:
        n, program = program % p.lengths.entries, program // p.lengths.entries
    chunk, tile = program % chunks, program // chunks
    if p.lengths.cu_q is not None:
        n, first = entry_of_tile(p.lengths.cu_k, p.lengths.entries, tile, 1, C.BLOCK_KV)
        tile -= first
    s = whole_entry(p, n)
    own_end = n * 0 + p.lengths.kv_len  # keys that do not exist have a gradient too: 0
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

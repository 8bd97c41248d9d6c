"""Column mass: the probabilities of each key, summed over the rows. Next: launch_maps.py.

    mass[j] = sum over rows i of P[i, j],  P = exp(S - lse)

A program owns a tile of keys of one head and loops over the rows that see them, as keys_kernel in
backward_keys.py does, so that sums need no atomics and have the same bits every time.
"""

import triton
import triton.language as tl

from .backward import Tma, load_keys, product
from .backward_keys import keys_of_head, rows_of_tile
from .score import NEG_INF, finish_scores, to_base2
from .spec import document_at, edge_tile, full_segment, sequence_of_tile
from .tile import in_band_transposed, load_rows, rows_at, tile_rows


@triton.jit
def mass_step(p, s, y, head, t, sums, C: tl.constexpr, EDGE: tl.constexpr):
    """The sums of P over rows after row tile t; scores are [keys, rows]."""
    rows = tile_rows(p, s, head, t * C.BLOCK_Q, C.BLOCK_Q, 1)
    q_at = rows_at(p.q, s, rows)
    q = 0
    if C.D <= C.BLOCK_D:
        q = load_rows(q_at, rows.ok, 0, C.D, C.BLOCK_D, EDGE)
    x = product(y.k, y.k_at, y.exists, q, q_at, rows.ok, C.D, C.BLOCK_D, C.PRECISION)
    seen = in_band_transposed(p, s, rows.i, rows.ok, y.j, y.first, y.last, EDGE)
    i, j = rows.i[None, :], y.j[:, None]
    x, _ = finish_scores(p, s.n, x, head, i, j, seen, s.offset, EDGE)
    lse = tl.load(rows_at(p.lse, s, rows), mask=rows.ok, other=NEG_INF)
    lse = tl.where(lse == NEG_INF, float("inf"), to_base2(lse))  # P of such a row is 0
    x -= lse[None, :]
    return sums + tl.sum(tl.exp2(tl.where(x > 0.0, 0.0, x)), 1)  # P is at most 1; NaN stays


@triton.jit
def mass_tile(p, to, s, visible, key, own_begin, own_end, head, C: tl.constexpr):
    """The mass of keys [own_begin, own_end) in the tile that begins with `key`."""
    y = load_keys(p, s, Tma(None, None), head // (p.heads // p.kv_heads), key, C, True)
    y = keys_of_head(p, s, y, head)
    span = rows_of_tile(p, s, y, key, C)
    sums = tl.zeros([C.BLOCK_KV], tl.float32)
    if visible.rank is not None:
        at = s.n * visible.batch + head * visible.head + key // C.BLOCK_KV * visible.row
        rank = visible.rank + at.to(tl.int64) * (visible.others + 1)
        tiles = visible.tile + at.to(tl.int64) * visible.others
        first, last = tl.load(rank + span.begin), tl.load(rank + span.end)
        for e in tl.range(first, last, num_stages=C.STAGES):
            sums = mass_step(p, s, y, head, tl.load(tiles + e), sums, C, True)
    else:
        edges = span.end - span.begin - (span.full_end - span.full_begin)
        for e in tl.range(0, edges, num_stages=C.STAGES):
            sums = mass_step(p, s, y, head, edge_tile(span, e), sums, C, True)
        for t in tl.range(span.full_begin, span.full_end, num_stages=C.STAGES):
            sums = mass_step(p, s, y, head, t, sums, C, False)
    at = to.ptr + s.batch.to(tl.int64) * to.batch + head.to(tl.int64) * to.head + s.key0 + y.j
    tl.store(at, sums, mask=(y.j >= own_begin) & (y.j < own_end))


@triton.jit
def mass_kernel(p, to, visible, C: tl.constexpr):
    """Writes `to` [B, heads, kv_len]. Programs: tiles of keys x sequences (1 in varlen calls) x
    heads. Under a causal mask most rows see the first tiles, which therefore run first."""
    program = tl.program_id(0)
    head, program = program % p.heads, program // p.heads
    n = program * 0
    if p.lengths.cu_q is None:
        n, program = program % p.lengths.sequences, program // p.lengths.sequences
    tile = program
    if p.lengths.cu_q is not None:
        n, first = sequence_of_tile(p.lengths.cu_k, p.lengths.sequences, tile, 1, C.BLOCK_KV)
        tile -= first
    s = full_segment(p, n)
    own_end = n * 0 + p.lengths.kv_len  # slots past kv_lens are included: their mass is 0
    if p.lengths.cu_k is not None:
        own_end = tl.load(p.lengths.cu_k + n + 1) - tl.load(p.lengths.cu_k + n)
    key = tile * C.BLOCK_KV
    if key < own_end:
        if p.lengths.doc_begin is None:
            mass_tile(p, to, s, visible, key, key, own_end, head, C)
        else:
            row, end = key, tl.minimum(key + C.BLOCK_KV, own_end)
            while row < end:
                d = document_at(p, s, row)
                mass_tile(p, to, d, visible, key, d.row_begin, d.row_end, head, C)
                row = d.row_end

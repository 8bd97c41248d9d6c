"""dbias where sequences or heads share a bias. Next: launch.py."""

import triton
import triton.language as tl

from .backward import Query, Tma, gradient_of_scores, load_keys, load_query
from .params import TileRows
from .spec import full_segment, kv_range, range_of
from .tile import tile_rows


@triton.jit
def bias_step(p, g, s, head, start, key, acc, C: tl.constexpr):
    """acc plus dS of one head's rows from `start` on and keys from `key` on."""
    r = load_query(p, g, s, Tma(None, None), head, start, C, True)
    if p.lengths.doc_begin is not None:
        rows = document_rows(p, s, r.rows)
        r = Query(rows, r.q_at, r.dout_at, r.q, r.dout, r.lse, r.delta, r.dentropy)
    y = load_keys(p, s, Tma(None, None), head // (p.heads // p.kv_heads), key, C, True)
    _, _, ds = gradient_of_scores(p, s, r, y, head, start, key, C, False, True)
    return acc + ds


@triton.jit
def bias_kernel(p, g, rows, keys, shared_sequences, shared_heads, C: tl.constexpr):
    """One tile of dbias [batch, heads, rows, keys], summed over sequences and heads that share it.
    Programs: batch x heads x tiles of rows x tiles of keys."""
    columns = tl.cdiv(keys, C.BLOCK_KV)
    program = tl.program_id(0)
    key, program = program % columns * C.BLOCK_KV, program // columns
    tiles = tl.cdiv(rows, C.BLOCK_Q)
    start, program = program % tiles * C.BLOCK_Q, program // tiles
    bias_heads = p.heads // shared_heads
    bias_head, bias_n = program % bias_heads, program // bias_heads
    acc = tl.zeros([C.BLOCK_Q, C.BLOCK_KV], tl.float32)
    for sequence in range(shared_sequences):
        n = bias_n * shared_sequences + sequence
        s = full_segment(p, n)
        seen = kv_range(
            p, s, start, tl.minimum(start + C.BLOCK_Q, tl.maximum(s.row_end, 1)), C.BLOCK_KV
        )
        tile = key // C.BLOCK_KV
        if (start < s.row_end) & (tile >= seen.begin) & (tile < seen.end):
            for h in range(shared_heads):
                head = bias_head * shared_heads + h
                if p.ranges.begin.ptr is None:
                    acc = bias_step(p, g, s, head, start, key, acc, C)
                else:
                    r = tile_rows(p, s, head, start, C.BLOCK_Q, 1)
                    own = range_of(r.lo, r.hi, r.ok, s.key_begin, s.key_end, C.BLOCK_KV)
                    if (tile >= own.begin) & (tile < own.end):
                        acc = bias_step(p, g, s, head, start, key, acc, C)
    i, j = start + tl.arange(0, C.BLOCK_Q), key + tl.arange(0, C.BLOCK_KV)
    at = g.dbias.ptr + bias_n.to(tl.int64) * g.dbias.batch + bias_head.to(tl.int64) * g.dbias.head
    at = at + (i.to(tl.int64) * g.dbias.row)[:, None] + j * g.dbias.col
    tl.store(at, acc, mask=(i < rows)[:, None] & (j < keys))


@triton.jit
def document_rows(p, s, rows):
    """The rows, with bounds that end at their own document."""
    at = s.n.to(tl.int64) * p.lengths.q_len + rows.i
    begin = tl.load(p.lengths.doc_begin + at, mask=rows.ok, other=0)
    end = tl.load(p.lengths.doc_end + at, mask=rows.ok, other=0)
    low, high = tl.maximum(rows.lo, begin), tl.minimum(rows.hi, end)
    return TileRows(rows.i, rows.head, rows.ok, low, high)

"""A mask is an interval: row i sees keys [lo(i), hi(i)). As in csrc/spec.h. Next: tile.py."""

import triton
import triton.language as tl

from .params import Range, Segment


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def lo(p, s, i):
    """First key that row i sees, in [key_begin, key_end]."""
    if p.left is None:
        return i * 0 + s.key_begin
    else:
        return clamp(i + s.offset - p.left, s.key_begin, s.key_end)


@triton.jit
def hi(p, s, i):
    """One past the last key that row i sees."""
    if p.right is None:
        return i * 0 + s.key_end
    else:
        return clamp(i + s.offset + p.right + 1, s.key_begin, s.key_end)


@triton.jit
def first_row(p, s, j):
    """The transpose: the first row that sees key j, in [row_begin, row_end]."""
    if p.right is None:
        return j * 0 + s.row_begin
    else:
        return clamp(j - s.offset - p.right, s.row_begin, s.row_end)


@triton.jit
def last_row(p, s, j):
    """One past the last row that sees key j."""
    if p.left is None:
        return j * 0 + s.row_end
    else:
        return clamp(j - s.offset + p.left + 1, s.row_begin, s.row_end)


@triton.jit
def tiles_of(begin, full_begin, full_end, end, BLOCK: tl.constexpr):
    """A range of positions as a range of tiles, which begin at multiples of BLOCK."""
    first = begin // BLOCK
    last = tl.maximum(tl.cdiv(end, BLOCK), first)
    last = tl.where(begin < end, last, first)
    full_first = clamp(tl.cdiv(full_begin, BLOCK), first, last)
    full_last = clamp(full_end // BLOCK, full_first, last)
    return Range(first, full_first, full_last, last)


@triton.jit
def kv_range(p, s, top, bottom, BLOCK: tl.constexpr):
    """The key tiles that rows [top, bottom) see; the first and last row bound those between."""
    begin, full_begin = lo(p, s, top), lo(p, s, bottom - 1)
    return tiles_of(begin, full_begin, hi(p, s, top), hi(p, s, bottom - 1), BLOCK)


@triton.jit
def q_range(p, s, left, right, BLOCK: tl.constexpr):
    """The row tiles that see keys [left, right)."""
    begin, full_begin = first_row(p, s, left), first_row(p, s, right - 1)
    return tiles_of(begin, full_begin, last_row(p, s, left), last_row(p, s, right - 1), BLOCK)


@triton.jit
def range_of(lo, hi, ok, low, high, BLOCK: tl.constexpr):
    """The range of tiles of rows (or keys) that each have bounds [lo, hi) of their own, within
    [low, high]. A row that sees nothing touches no tile, and none is full for it."""
    sees = ok & (lo < hi)
    begin, end = tl.min(tl.where(sees, lo, high), 0), tl.max(tl.where(sees, hi, low), 0)
    full_begin, full_end = tl.max(tl.where(ok, lo, low), 0), tl.min(tl.where(ok, hi, high), 0)
    return tiles_of(begin, full_begin, full_end, end, BLOCK)


@triton.jit
def edge_tile(r, e):
    """The e-th tile of a range that is not full."""
    behind = r.full_begin - r.begin
    return tl.where(e < behind, r.begin + e, r.full_end + e - behind)


# ---- sequences ----------------------------------------------------------------------------------


@triton.jit
def full_segment(p, n):
    """The segment of all rows and keys of sequence n."""
    x = p.lengths
    if x.cu_q is not None:
        batch, row0, key0 = n * 0, tl.load(x.cu_q + n), tl.load(x.cu_k + n)
        q_len = tl.load(x.cu_q + n + 1) - row0
        kv_len = tl.load(x.cu_k + n + 1) - key0
    else:
        batch, row0, key0 = n, n * 0, n * 0
        q_len, kv_len = n * 0 + x.q_len, n * 0 + x.kv_len
    if p.pages.table is not None:
        key0 = n * 0
        kv_len = tl.minimum(kv_len, x.kv_len)
    if x.kv_lens is not None:  # clamped, because values on a GPU are not checked
        kv_len = clamp(tl.load(x.kv_lens + n), 0, kv_len)
    key_begin = n * 0
    if x.kv_starts is not None:
        key_begin = clamp(tl.load(x.kv_starts + n), 0, kv_len)
    offset = n * 0
    if p.align_end is not None:
        offset = kv_len - q_len
    return Segment(n, batch, row0, key0, offset, n * 0, q_len, key_begin, kv_len)


@triton.jit
def document_at(p, s, i):
    """The segment of row i's document in sequence s. Its key slots, filled or not, have the same
    positions as its rows."""
    at = s.n.to(tl.int64) * p.lengths.q_len + i
    begin, end = tl.load(p.lengths.doc_begin + at), tl.load(p.lengths.doc_end + at)
    key_begin, key_end = tl.maximum(s.key_begin, begin), tl.minimum(s.key_end, end)
    key_end = tl.maximum(key_begin, key_end)
    d = Segment(s.n, s.batch, s.row0, s.key0, s.offset, begin, end, key_begin, key_end)
    return d


@triton.jit
def sequence_of_tile(cu, sequences, tile, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, its first tile) of a tile of a varlen call, where each row takes GROUP tile rows.

    Sequence n begins with tile cu[n] * GROUP // BLOCK + n, which leaves room for the last, partial
    tile of each sequence before it, so that tiles need not be counted beforehand.
    """
    low, high = tile * 0, tile * 0 + sequences - 1
    while low < high:
        middle = (low + high + 1) // 2
        below = tl.load(cu + middle) * GROUP // BLOCK + middle <= tile
        low, high = tl.where(below, middle, low), tl.where(below, high, middle - 1)
    return low, tl.load(cu + low) * GROUP // BLOCK + low

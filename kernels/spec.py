"""A mask is an interval: row i sees keys [lo(i), hi(i)). The twin of csrc/spec.h. Next: tile.py."""

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
    """The transposed question: the first row that sees key j, in [row_begin, row_end]."""
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
    """The range of positions as a range of tiles, which lie at multiples of BLOCK."""
    first = begin // BLOCK
    last = tl.maximum(tl.cdiv(end, BLOCK), first)
    last = tl.where(begin < end, last, first)
    full_first = clamp(tl.cdiv(full_begin, BLOCK), first, last)
    full_last = clamp(full_end // BLOCK, full_first, last)
    return Range(first, full_first, full_last, last)


@triton.jit
def kv_range(p, s, top, bottom, BLOCK: tl.constexpr):
    """Key tiles of rows [top, bottom): the first and last row bound all rows between."""
    begin, full_begin = lo(p, s, top), lo(p, s, bottom - 1)
    return tiles_of(begin, full_begin, hi(p, s, top), hi(p, s, bottom - 1), BLOCK)


@triton.jit
def q_range(p, s, left, right, BLOCK: tl.constexpr):
    """Row tiles of keys [left, right)."""
    begin, full_begin = first_row(p, s, left), first_row(p, s, right - 1)
    return tiles_of(begin, full_begin, last_row(p, s, left), last_row(p, s, right - 1), BLOCK)


@triton.jit
def range_of(lo, hi, ok, low, high, BLOCK: tl.constexpr):
    """The range of tiles where positions [lo, hi) of each row (or key) that is `ok` were looked up
    one by one, and lie in [low, high]. Those that see nothing make no tile full and touch none."""
    sees = ok & (lo < hi)
    begin, end = tl.min(tl.where(sees, lo, high), 0), tl.max(tl.where(sees, hi, low), 0)
    full_begin, full_end = tl.max(tl.where(ok, lo, low), 0), tl.min(tl.where(ok, hi, high), 0)
    return tiles_of(begin, full_begin, full_end, end, BLOCK)


@triton.jit
def edge_tile(r, e):
    """The e-th tile of a range outside its full part."""
    behind = r.full_begin - r.begin
    return tl.where(e < behind, r.begin + e, r.full_end + e - behind)


# ---- entries ------------------------------------------------------------------------------------


@triton.jit
def whole_entry(p, n):
    """Entry n, all its rows and keys."""
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
    if x.kv_lens is not None:  # clamped: on a GPU nobody has looked at the values
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
    """The part of entry s that is row i's document, from row i on. Its own keys, existing or not,
    are rows [begin, row_end)."""
    at = s.n.to(tl.int64) * p.lengths.q_len + i
    begin, end = tl.load(p.lengths.doc_begin + at), tl.load(p.lengths.doc_end + at)
    key_begin, key_end = tl.maximum(s.key_begin, begin), tl.minimum(s.key_end, end)
    key_end = tl.maximum(key_begin, key_end)
    d = Segment(s.n, s.batch, s.row0, s.key0, s.offset, begin, end, key_begin, key_end)
    return d


@triton.jit
def entry_of_tile(cu, entries, tile, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """(sequence, its first tile) of a tile of a packed call, LANES lanes a row.

    Sequence n begins with tile cu[n] * LANES // BLOCK + n, which leaves room for its last, partial
    tile: nobody needs to count tiles beforehand.
    """
    low, high = tile * 0, tile * 0 + entries - 1
    while low < high:
        middle = (low + high + 1) // 2
        below = tl.load(cu + middle) * LANES // BLOCK + middle <= tile
        low, high = tl.where(below, middle, low), tl.where(below, high, middle - 1)
    return low, tl.load(cu + low) * LANES // BLOCK + low

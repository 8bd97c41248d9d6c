"""Loads and products of tiles: rows, keys and values in any layout. Next: score.py."""

import os

import triton
import triton.language as tl

from .params import TileRows
from .spec import first_row, hi, kv_range, last_row, lo, range_of

# The interpreter multiplies bf16 numbers as integers, so products are computed in fp32 there.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))


@triton.jit
def tile_rows(p, s, head, first, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """The rows from `first` on of a tile whose first head is `head`."""
    row = first + tl.arange(0, BLOCK)
    i = row // GROUP
    if GROUP == 1:
        heads = head
    else:
        heads = head + row % GROUP
    ok = (i >= s.row_begin) & (i < s.row_end)
    low, high = within(p.ranges.begin, p.ranges.end, s, heads, i, ok, lo(p, s, i), hi(p, s, i))
    return TileRows(i, heads, ok, low, high)


@triton.jit
def within(begin, end, s, head, at, ok, low, high):
    """[low, high) intersected with the key ranges [begin, end) at positions `at`."""
    if begin.ptr is not None:
        first = tl.load(position_at(begin, s, head, at), mask=ok, other=0)
        last = tl.load(position_at(end, s, head, at), mask=ok, other=0)
        # An end far past the keys would overflow when it is rounded up to a tile.
        low, high = tl.maximum(low, tl.minimum(first, high)), tl.minimum(high, last)
    return low, high


@triton.jit
def position_at(x, s, head, at):
    """Pointers into a tensor of Ranges."""
    return (
        x.ptr
        + s.n.to(tl.int64) * x.batch
        + (head * 1).to(tl.int64) * x.head
        + at.to(tl.int64) * x.row
    )


@triton.jit
def keys_of_tile(p, s, rows, top, bottom, BLOCK: tl.constexpr):
    """The key tiles that a tile's rows, [top, bottom), see."""
    if p.ranges.begin.ptr is None:
        return kv_range(p, s, top, bottom, BLOCK)
    else:
        return range_of(rows.lo, rows.hi, rows.ok, s.key_begin, s.key_end, BLOCK)


@triton.jit
def rows_of_keys(p, s, head, j, exists):
    """(first, last): rows [first, last) at most see key j. None without key ranges, where computing
    it at each use takes fewer registers."""
    if p.ranges.first.ptr is None:
        return None, None
    else:
        first, last = first_row(p, s, j), last_row(p, s, j)
        at = s.key0 + j  # varlen ranges count keys as they lie in memory
        return within(p.ranges.first, p.ranges.last, s, head, at, exists, first, last)


@triton.jit
def in_band(rows, j, EDGE: tl.constexpr):
    """[rows, keys]: whether a pair exists and lies in the band."""
    if EDGE:
        low, high = rows.lo[:, None], rows.hi[:, None]
        return (j[None, :] >= low) & (j[None, :] < high) & rows.ok[:, None]
    else:
        return rows.ok[:, None] & (j[None, :] >= 0)


@triton.jit
def in_band_transposed(p, s, i, ok, j, first, last, EDGE: tl.constexpr):
    """[keys, rows]: the same by the keys' bounds, which take fewer registers in a transposed tile.
    first and last are those of rows_of_keys."""
    if EDGE:
        if first is None:
            first, last = first_row(p, s, j), last_row(p, s, j)
        first, last = first[:, None], last[:, None]
        exists = ((j >= s.key_begin) & (j < s.key_end))[:, None]
        return (i[None, :] >= first) & (i[None, :] < last) & exists
    else:
        return ok[None, :] & (j[:, None] >= 0)


@triton.jit
def rows_at(x, s, rows):
    """[rows] pointers to rows of x, a tensor laid out like q: q, out, lse or a gradient."""
    base = x.ptr + s.batch.to(tl.int64) * x.batch + s.row0.to(tl.int64) * x.row
    return base + (rows.head * 1).to(tl.int64) * x.head + rows.i.to(tl.int64) * x.row


@triton.jit
def keys_at(p, x, s, kv_head, j, ok):
    """[keys] pointers to keys of x, a tensor laid out like k; ok says which exist."""
    head = kv_head.to(tl.int64) * x.head
    if p.pages.table is not None:
        table = p.pages.table + s.n.to(tl.int64) * p.pages.row
        page = tl.load(table + j // p.pages.size, mask=ok, other=0).to(tl.int64)
        return x.ptr + head + page * x.batch + (j % p.pages.size).to(tl.int64) * x.row
    else:
        base = x.ptr + s.batch.to(tl.int64) * x.batch + s.key0.to(tl.int64) * x.row
        return base + head + j.to(tl.int64) * x.row


@triton.jit
def load_rows(at, ok, first, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """[rows, BLOCK_D]: channels from `first` on of each row, 0 where there are none."""
    d = first + tl.arange(0, BLOCK_D)
    at = at[:, None] + d
    if D % BLOCK_D == 0:
        if EDGE:
            return tl.load(at, mask=ok[:, None], other=0.0)
        else:
            return tl.load(at)
    else:
        if EDGE:
            return tl.load(at, mask=ok[:, None] & (d < D), other=0.0)
        else:
            return tl.load(at, mask=d < D, other=0.0)


@triton.jit
def while_below(ok, first, end):
    """ok where first < end, else False. Both sides are vectors, because Triton 3.9 interprets
    vector & scalar as an int."""
    return ok & (ok.to(tl.int32) * 0 + first < end)


@triton.jit
def store_rows(at, x, ok, first, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = first + tl.arange(0, BLOCK_D)
    ok = ok[:, None]
    if D % BLOCK_D != 0:
        ok = ok & (d < D)
    tl.store(at[:, None] + d, x.to(at.dtype.element_ty), mask=ok)


@triton.jit
def widen(x, dtype: tl.constexpr):
    """x in a wider dtype, exactly. Bytes are float8_e4m3fn on a GPU without that type: their seven
    lower bits, shifted into a float16, are 2^-8 of the number, subnormal or not."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        half = ((bits & 0x80) << 8 | (bits & 0x7F) << 7).to(tl.float16, bitcast=True) * 256
        half = tl.where((bits & 0x7F) == 0x7F, float("nan"), half)
        return half.to(dtype)
    elif x.dtype == tl.int8:
        return x.to(tl.float32).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def narrow_e4m3(x):
    """fp32 x as the bits of a float8_e4m3fn: rounded to nearest even, clamped to +-448."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)  # 120 = 127 - 7, the biases
    # Below 2^-6 FP8 numbers are 2^-9 apart, as fp32 numbers are from 2^14 on, so the sum rounds.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | (x.to(tl.int32, bitcast=True) >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def narrow_int8(x):
    """fp32 x as int8: rounded to nearest even, clamped to [-128, 127]. Adding 1.5 * 2^23 rounds,
    because fp32 numbers of that size are whole."""
    x = tl.minimum(tl.maximum(x, -128.0), 127.0)
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def factor_of(x):
    """x in a dtype that matrix instructions take."""
    if x.dtype == tl.uint8:
        return widen(x, tl.bfloat16)
    else:
        return x


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b; acc may be None."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def long_dot(a_at, a_ok, b_at, b_ok, D: tl.constexpr, BLOCK_D: tl.constexpr,
             PRECISION: tl.constexpr):  # fmt: skip
    """a b' [rows of a, rows of b], where a row is too long for one tile: in chunks of BLOCK_D
    channels."""
    acc = tl.zeros([a_at.shape[0], b_at.shape[0]], tl.float32)
    for first in tl.static_range(0, D, BLOCK_D):
        a = factor_of(load_rows(a_at, a_ok, first, D, BLOCK_D, True))
        b = load_rows(b_at, b_ok, first, D, BLOCK_D, True)
        acc = dot(a, tl.trans(widen(b, a.dtype)), acc, PRECISION)
    return acc

"""What a tile loads: rows, keys and values of any layout, and products of them. Next: score.py."""

import os

import triton
import triton.language as tl

from .params import Lanes
from .spec import first_row, hi, kv_range, last_row, lo, range_of

# The interpreter multiplies bf16 as if it were integers, so there products are in fp32.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"))


@triton.jit
def lanes_of(p, s, head, first, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    """Lanes first.. of a tile whose first head is `head`."""
    lane = first + tl.arange(0, BLOCK)
    i = lane // GROUP
    if GROUP == 1:
        heads = head
    else:
        heads = head + lane % GROUP
    ok = (i >= s.row_begin) & (i < s.row_end)
    low, high = within(p.ranges.begin, p.ranges.end, s, heads, i, ok, lo(p, s, i), hi(p, s, i))
    return Lanes(i, heads, ok, low, high)


@triton.jit
def within(begin, end, s, head, at, ok, low, high):
    """[low, high) without what lies outside of [begin, end), two of Ranges, at positions `at`."""
    if begin.ptr is not None:
        first = tl.load(position_at(begin, s, head, at), mask=ok, other=0)
        last = tl.load(position_at(end, s, head, at), mask=ok, other=0)
        # An end far past the keys would overflow once it is rounded up to a tile.
        low, high = tl.maximum(low, tl.minimum(first, high)), tl.minimum(high, last)
    return low, high


@triton.jit
def position_at(x, s, head, at):
    """Pointers into one of Ranges."""
    return (
        x.ptr
        + s.n.to(tl.int64) * x.batch
        + (head * 1).to(tl.int64) * x.head
        + at.to(tl.int64) * x.row
    )


@triton.jit
def keys_of_lanes(p, s, lanes, top, bottom, BLOCK: tl.constexpr):
    """Key tiles of a tile's rows, which are rows [top, bottom)."""
    if p.ranges.begin.ptr is None:
        return kv_range(p, s, top, bottom, BLOCK)
    else:
        return range_of(lanes.lo, lanes.hi, lanes.ok, s.key_begin, s.key_end, BLOCK)


@triton.jit
def rows_of_keys(p, s, head, j, exists):
    """(first, last): key j is seen by rows [first, last) at most. None without key ranges: computed
    where it is needed, it takes fewer registers."""
    if p.ranges.first.ptr is None:
        return None, None
    else:
        first, last = first_row(p, s, j), last_row(p, s, j)
        at = s.key0 + j  # of packed sequences, keys are counted as they lie in memory
        return within(p.ranges.first, p.ranges.last, s, head, at, exists, first, last)


@triton.jit
def in_band(lanes, j, EDGE: tl.constexpr):
    """[lanes, keys]: which pairs exist and lie in the band."""
    if EDGE:
        low, high = lanes.lo[:, None], lanes.hi[:, None]
        return (j[None, :] >= low) & (j[None, :] < high) & lanes.ok[:, None]
    else:
        return lanes.ok[:, None] & (j[None, :] >= 0)


@triton.jit
def in_band_turned(p, s, i, ok, j, first, last, EDGE: tl.constexpr):
    """[keys, rows]: the same from the keys' side, whose bounds are few registers a thread there.
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
def rows_at(x, s, lanes):
    """[lanes] pointers to rows of q, out and their likes."""
    base = x.ptr + s.batch.to(tl.int64) * x.batch + s.row0.to(tl.int64) * x.row
    return base + (lanes.head * 1).to(tl.int64) * x.head + lanes.i.to(tl.int64) * x.row


@triton.jit
def keys_at(p, x, s, kv_head, j, ok):
    """[keys] pointers to keys of k, v and their likes; ok says which exist."""
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
    """[rows, BLOCK_D]: channels first.. of each row, 0 where there is none."""
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
    """ok, where first < end; as a vector, since Triton 3.9 interprets vector & scalar as an int."""
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
    """x in a wider dtype, exactly. Bytes are float8_e4m3fn where the GPU does not know these: their
    seven lower bits, moved to a half's, are 2^-8 of the number, subnormal or not."""
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
    """x, fp32, as the bits of a float8_e4m3fn: to nearest, ties to even, clamped to +-448."""
    size = tl.minimum(tl.abs(x), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)  # 120 = 127 - 7, the biases
    # Below 2^-6 numbers are 2^-9 apart, as those from 2^14 on are in fp32: the sum rounds.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | (x.to(tl.int32, bitcast=True) >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def narrow_int8(x):
    """x, fp32, to nearest, ties to even, clamped to [-128, 127]: 1.5 * 2^23 is where fp32 holds
    whole numbers only."""
    x = tl.minimum(tl.maximum(x, -128.0), 127.0)
    return ((x + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit
def factor_of(x):
    """x as matrix instructions take it."""
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
    """a b' [a rows, b rows] of rows too long for one tile: channels come in chunks of BLOCK_D."""
    acc = tl.zeros([a_at.shape[0], b_at.shape[0]], tl.float32)
    for first in tl.static_range(0, D, BLOCK_D):
        a = factor_of(load_rows(a_at, a_ok, first, D, BLOCK_D, True))
        b = load_rows(b_at, b_ok, first, D, BLOCK_D, True)
        acc = dot(a, tl.trans(widen(b, a.dtype)), acc, PRECISION)
    return acc

"""fastattn::cache_append: writes new keys and values into a cache, rotated and quantised. It
computes what Append.in_torch in fastattn/fused/kv_append.py does. Next: launch.py.

It is one launch that does not wait for the GPU, so lengths there are not checked: tokens that do
not fit into the cache are not written, and a position outside the rotary tables gives NaN.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..core.quantization import E4M3, INT8
from ..core.tensors import unit_stride
from .params import Pages, Tensor4
from .tile import narrow_e4m3, narrow_int8

TILE = 2048  # values of k or v that a program writes


class New(NamedTuple):
    """New keys or new values, and the cache that they are written to."""

    x: Tensor4  # [B, kv_heads, Snew, D]
    cache: Tensor4  # [B, kv_heads, slots, D], or [pages, kv_heads, page_size, D]; 8-bit: bytes
    descale: Any = None  # [B, kv_heads]
    batch: int = 0
    head: int = 0


class Rotary(NamedTuple):
    cos: Any = None  # [positions, pairs]
    sin: Any = None
    positions: int = 0


# ---- the kernel ---------------------------------------------------------------------------------


@triton.jit
def rotated(t, x, at, ok, d, position, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x [rows, D] with its first 2 * PAIRS channels rotated in pairs."""
    if INTERLEAVED:
        pair, second = d // 2, d % 2 == 1
        other = tl.where(second, d - 1, d + 1)
    else:
        pair, second = d % PAIRS, d >= PAIRS
        other = tl.where(second, d - PAIRS, d + PAIRS)
    inside = ok & (d < 2 * PAIRS)[None, :]
    known = inside & ((position >= 0) & (position < t.positions))[:, None]
    angle = position.to(tl.int64)[:, None] * PAIRS + pair[None, :]
    c = tl.load(t.cos + angle, mask=known, other=float("nan")).to(tl.float32)
    s = tl.load(t.sin + angle, mask=known, other=float("nan")).to(tl.float32)
    y = tl.load(at[:, None] + other[None, :], mask=inside, other=0.0).to(tl.float32)
    y = x * c + tl.where(second[None, :], y, -y) * s
    return tl.where((d < 2 * PAIRS)[None, :], y, x)


@triton.jit
def append_one(new, t, pages, b, head, i, start, length, capacity, rows,
               D: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr,
               INTERLEAVED: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """New tokens i [rows] of batch entry b and a kv head; the first goes to slot `start`."""
    d = tl.arange(0, BLOCK_D)
    ok = (i < length)[:, None] & (d < D)[None, :]
    at = new.x.ptr + b.to(tl.int64) * new.x.batch + head.to(tl.int64) * new.x.head
    at += i.to(tl.int64) * new.x.row
    x = tl.load(at[:, None] + d[None, :], mask=ok, other=0.0)
    y = x.to(tl.float32)
    if PAIRS > 0:
        y = rotated(t, y, at, ok, d, start + i, PAIRS, INTERLEAVED)
    if KIND != "plain":  # quantise the key as rounded to x's dtype
        y = y.to(x.dtype).to(tl.float32)
        y = tl.div_rn(y, tl.load(new.descale + b * new.batch + head * new.head))
    if KIND == "int8":
        y = narrow_int8(y)
    if KIND == "e4m3":
        y = narrow_e4m3(y)

    slot = start + i
    fits = (i < length) & (slot >= 0) & (slot < capacity)
    place = b.to(tl.int64) + i * 0
    if pages.table is not None:
        table = pages.table + b.to(tl.int64) * pages.row
        place = tl.load(table + slot // pages.size, mask=fits, other=0).to(tl.int64)
        slot = slot % pages.size
        fits = fits & (place >= 0) & (place < rows)
    to = new.cache.ptr + place * new.cache.batch + head.to(tl.int64) * new.cache.head
    to += slot.to(tl.int64) * new.cache.row
    to = to[:, None] + d[None, :] * new.cache.col
    tl.store(to, y.to(to.dtype.element_ty), mask=ok & fits[:, None])


@triton.jit
def append_kernel(k, v, t, pages, cache_lens, kv_heads, length, capacity, rows,
                  D: tl.constexpr, DV: tl.constexpr, PAIRS: tl.constexpr,
                  INTERLEAVED: tl.constexpr, KIND: tl.constexpr, BLOCK_S: tl.constexpr,
                  BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """Programs: blocks of new tokens x batch entries x kv heads (innermost). Each writes k, v."""
    program = tl.program_id(0)
    head, program = program % kv_heads, program // kv_heads
    blocks = tl.cdiv(length, BLOCK_S)
    block, b = program % blocks, program // blocks
    i = block * BLOCK_S + tl.arange(0, BLOCK_S)
    start = tl.load(cache_lens + b)
    append_one(k, t, pages, b, head, i, start, length, capacity, rows, D, BLOCK_D, PAIRS,
               INTERLEAVED, KIND)  # fmt: skip
    append_one(v, t, pages, b, head, i, start, length, capacity, rows, DV, BLOCK_DV, 0,
               INTERLEAVED, KIND)  # fmt: skip


# ---- the launch ---------------------------------------------------------------------------------

KINDS = {INT8: "int8", E4M3: "e4m3"}


def append(k, v, k_cache, v_cache, cache_lens, page_table, cos, sin, interleaved,
           k_descale, v_descale):  # fmt: skip
    """fastattn::cache_append: writes k [B, kv_heads, Snew, D] and v to slots cache_lens[b] + i of
    the caches, in place, or to the pages of page_table [B, max_pages]. With cos and sin [positions,
    pairs], k is rotated at positions cache_lens[b] + i. 8-bit caches come with descales [kv_heads]
    or [B, kv_heads]."""
    batch, kv_heads, length, head_dim = k.shape
    v_dim, (rows, _, size, _) = v.shape[3], k_cache.shape
    if k.numel() == 0:
        return
    table = None if page_table is None else page_table.contiguous()
    rotary, pairs = Rotary(), 0
    if cos is not None:
        rotary, pairs = Rotary(cos.contiguous(), sin.contiguous(), cos.shape[0]), cos.shape[1]
    blocks = [triton.next_power_of_2(n) for n in (head_dim, v_dim)]
    block_s = min(max(1, TILE // max(blocks)), triton.next_power_of_2(length))
    with torch.cuda.device_of(k):
        append_kernel[(batch * kv_heads * triton.cdiv(length, block_s),)](
            _new(k, k_cache, k_descale), _new(v, v_cache, v_descale), rotary,
            Pages() if table is None else Pages(table, table.stride(0), size),
            cache_lens.contiguous(), kv_heads, length,
            size * (1 if table is None else table.shape[1]), rows,
            D=head_dim, DV=v_dim, PAIRS=pairs, INTERLEAVED=interleaved,
            KIND=KINDS.get(k_cache.dtype, "plain"), BLOCK_S=block_s, BLOCK_D=blocks[0],
            BLOCK_DV=blocks[1],
        )  # fmt: skip


def _new(x, cache, descale) -> New:
    x = unit_stride(x)
    if cache.dtype == E4M3:
        cache = cache.view(torch.uint8)
    scale = ()
    if descale is not None:
        descale = descale.contiguous()
        scale = (descale, descale.shape[1] if descale.dim() == 2 else 0, 1)
    return New(Tensor4(x, *x.stride()[:3], 1), Tensor4(cache, *cache.stride()), *scale)

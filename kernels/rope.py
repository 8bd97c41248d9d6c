"""Rotary embedding on a GPU: fastattn::rotate. Its reference is in fastattn/fused/norm.py, the
CPU's kernel is rotate in csrc/cpu/fused.inl.

A program rotates BLOCK_S positions of HEADS heads, so that a row of cos and sin is loaded once for
all of them. Channels past the pairs are copied. A position outside the tables gives NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.tensors import unit_stride
from .tile import while_below

HEADS = 4  # of a program
TILE = 1024  # pairs of a program and head


# ---- the kernel ---------------------------------------------------------------------------------


@triton.jit
def _rotate(
    x, out, cos, sin, positions,
    heads, length, dim, pairs, table_rows,
    x_batch, x_head, x_row, out_batch, out_head, out_row, cos_row, sin_row, positions_batch,
    INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_PAIRS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """x, out [B, heads, S, dim]; cos, sin [table_rows, pairs]; positions [B or 1, S], or None."""
    tile = tl.program_id(0)  # fastest: groups of heads, then positions, then batches
    groups = tl.cdiv(heads, HEADS)
    blocks = tl.cdiv(length, BLOCK_S)
    group = tile % groups
    block = (tile // groups) % blocks
    batch = (tile // groups // blocks).to(tl.int64)

    s = block * BLOCK_S + tl.arange(0, BLOCK_S)[:, None]  # [BLOCK_S, 1]
    pair = tl.program_id(1) * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)[None, :]  # [1, BLOCK_PAIRS]
    row = s.to(tl.int64)
    place = row
    if positions is not None:
        place = tl.load(positions + batch * positions_batch + row, s < length, other=0)
        place = place.to(tl.int64)
    inside = (s < length) & (pair < pairs)
    known = inside & (place >= 0) & (place < table_rows)
    c = tl.load(cos + place * cos_row + pair, known, other=float("nan"))  # [BLOCK_S, BLOCK_PAIRS]
    d = tl.load(sin + place * sin_row + pair, known, other=float("nan"))
    if INVERSE:
        d = -d

    for n in range(HEADS):
        head = group * HEADS + n
        x_at = x + batch * x_batch + head.to(tl.int64) * x_head + row * x_row
        out_at = out + batch * out_batch + head.to(tl.int64) * out_head + row * out_row
        here = while_below(inside, head, heads)
        if INTERLEAVED:  # one load of whole lines, split in registers
            first = tl.program_id(1) * (2 * BLOCK_PAIRS)
            line = first + tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
            lines = while_below((s < length) & (line < 2 * pairs), head, heads)
            both = tl.load(x_at + line, lines, other=0.0).to(c.dtype)
            a, b = tl.split(tl.reshape(both, [BLOCK_S, BLOCK_PAIRS, 2]))
            rotated = tl.join(a * c - b * d, a * d + b * c)
            rotated = tl.reshape(rotated, [BLOCK_S, 2 * BLOCK_PAIRS])
            tl.store(out_at + line, rotated.to(out.dtype.element_ty), lines)
        else:
            a = tl.load(x_at + pair, here, other=0.0).to(c.dtype)
            b = tl.load(x_at + pairs + pair, here, other=0.0).to(c.dtype)
            tl.store(out_at + pair, (a * c - b * d).to(out.dtype.element_ty), here)
            tl.store(out_at + pairs + pair, (a * d + b * c).to(out.dtype.element_ty), here)
        if tl.program_id(1) == 0:
            for begin in range(2 * pairs, dim, BLOCK_PAIRS):
                channel = begin + tl.arange(0, BLOCK_PAIRS)[None, :]
                rest = while_below((s < length) & (channel < dim), head, heads)
                tl.store(out_at + channel, tl.load(x_at + channel, rest, other=0.0), rest)


# ---- the launch ---------------------------------------------------------------------------------


def rotate(x, cos, sin, positions, interleaved, inverse):
    """fastattn::rotate: x [B, heads, S, D] of any strides; the result lies as x does."""
    _check(x, cos, sin, positions)
    x, cos, sin = (unit_stride(t) for t in (x, cos, sin))
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    batch, heads, length, dim = x.shape
    pairs = cos.shape[1]
    positions_batch = 0
    if positions is not None:
        positions = positions.contiguous()
        positions_batch = length if positions.dim() == 2 else 0
    block_pairs = min(256, triton.next_power_of_2(max(1, pairs)))
    block_s = min(TILE // block_pairs, triton.next_power_of_2(length))
    groups, blocks = triton.cdiv(heads, HEADS), triton.cdiv(length, block_s)
    grid = (batch * groups * blocks, max(1, triton.cdiv(pairs, block_pairs)))
    with torch.cuda.device_of(x):
        _rotate[grid](
            x, out, cos, sin, positions, heads, length, dim, pairs, cos.shape[0],
            *x.stride()[:3], *out.stride()[:3], cos.stride(0), sin.stride(0), positions_batch,
            INTERLEAVED=interleaved, INVERSE=inverse,
            BLOCK_S=block_s, BLOCK_PAIRS=block_pairs, HEADS=HEADS, num_warps=4,
        )  # fmt: skip
    return out


def _check(x, cos, sin, positions) -> None:
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if x.dim() != 4 or not x.is_floating_point():
        raise RuntimeError("fastattn: x must be [B, heads, S, D] and floating, got "
                           f"{list(x.shape)} in {x.dtype}")  # fmt: skip
    for name, t in (("cos", cos), ("sin", sin)):
        if t.dtype != wanted or t.dim() != 2 or t.shape != cos.shape or t.device != x.device:
            raise RuntimeError(f"fastattn: {name} is {t.dtype} {list(t.shape)} on {t.device}, "
                               f"expected {wanted} [positions, pairs] on {x.device}, cos and sin "
                               "alike")  # fmt: skip
    batch, _, length, dim = x.shape
    if 2 * cos.shape[1] > dim:
        raise RuntimeError(f"fastattn: x has {dim} channels and {cos.shape[1]} pairs to rotate")
    if positions is None:
        if cos.shape[0] < length:
            raise RuntimeError(f"fastattn: cos has {cos.shape[0]} rows and x {length}")
    elif (
        positions.dtype not in (torch.int32, torch.int64)
        or tuple(positions.shape) not in ((length,), (batch, length))
        or positions.device != x.device
    ):
        raise RuntimeError(f"fastattn: positions is {positions.dtype} {list(positions.shape)} on "
                           f"{positions.device}, expected int32 or int64 [{length}] or "
                           f"[{batch}, {length}] on {x.device}")  # fmt: skip


# ---- what a launch compiles: benchmarks/compile/triton.py ----------------------------------------


def audit_subjects(arch):
    for dtype, interleaved, dim, rotated in (
        (torch.bfloat16, False, 128, 128),
        (torch.bfloat16, True, 128, 64),
        (torch.float16, False, 64, 64),
        (torch.float32, False, 256, 256),
    ):
        # [B, S, heads, D], as a projection gives it
        x = torch.empty(2, 4096, 16, dim, dtype=dtype, device="meta").transpose(1, 2)
        table = torch.empty(4096, rotated // 2, device="meta")
        order = "interleaved" if interleaved else "halves"
        name = f"{str(dtype)[6:]} {order} {rotated} of {dim}"

        def call(x=x, table=table, interleaved=interleaved):
            return rotate(x, table, table, None, interleaved, False)

        yield from arch.launches(name, call, hot=True)

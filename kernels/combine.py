"""Split-KV: merges the partial results of the splits. Next: kv_append.py."""

import torch
import triton
import triton.language as tl

from .forward import NO_KEY, add_sinks, entropy_at, entropy_with_sinks, is_dead
from .score import LN2, LOG2E, NEG_INF, from_base2, to_base2
from .tile import store_rows


@triton.jit
def combine_kernel(p, split_out, split_lse, split_stats, rows, splits, DV: tl.constexpr,
                   BLOCK_Q: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """out, lse and statistics from split_out [splits, B, heads, q_len, Dv] and split_lse [splits,
    B, heads, q_len], both fp32: lse = log sum exp(split_lse), out = sum exp(split_lse - lse)
    split_out. Programs: blocks of rows = B * heads * q_len x chunks of Dv.

    split_stats has the shape of split_lse, or is None. The entropy is that of the splits' own
    probabilities, exp(split_lse - lse), plus the mean of the splits' entropies."""
    chunks = tl.cdiv(DV, BLOCK_DV)
    row = tl.program_id(0) // chunks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    first = tl.program_id(0) % chunks * BLOCK_DV
    ok = row < rows
    at = row.to(tl.int64)
    row_max = tl.full([BLOCK_Q], NEG_INF, tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_DV], tl.float32)
    entropy = tl.zeros([BLOCK_Q], tl.float32)
    largest = tl.full([BLOCK_Q], NEG_INF, tl.float32)
    argmax = tl.full([BLOCK_Q], NO_KEY, tl.int64)
    d = first + tl.arange(0, BLOCK_DV)
    for split in range(splits):
        here = split * rows.to(tl.int64) + at
        x = to_base2(tl.load(split_lse + here, mask=ok, other=NEG_INF))
        new_max = tl.maximum(row_max, x)
        base = tl.where(new_max == NEG_INF, 0.0, new_max)
        weight, rescale = tl.exp2(x - base), tl.exp2(row_max - base)
        weight = tl.where(x == NEG_INF, 0.0, weight)
        values = tl.load(split_out + here[:, None] * DV + d, mask=ok[:, None] & (d < DV), other=0.0)
        if split_stats is not None:
            if split_stats.entropy is not None:
                own = tl.load(split_stats.entropy.ptr + here, mask=ok, other=0.0) * LOG2E
                terms = tl.where(weight == 0.0, 0.0, weight * (x - base - own))
                entropy = entropy_at(entropy, row_max, row_sum, base) + terms
            logit = tl.load(split_stats.max_logit.ptr + here, mask=ok, other=NEG_INF)
            if split_stats.argmax is not None:  # splits are in the order of the keys
                key = tl.load(split_stats.argmax.ptr + here, mask=ok, other=-1)
                argmax = tl.where(logit > largest, key, argmax)
            largest = tl.maximum(largest, logit)
        row_sum = row_sum * rescale + weight
        acc = acc * rescale[:, None] + weight[:, None] * values
        row_max = new_max
    q_len = p.lengths.q_len
    head = row // q_len % p.heads
    if p.statistics is not None:  # noqa: SIM102  a compile-time condition, unlike the next
        if first == 0:
            store_merged(p, head, at, ok, row_max, row_sum, entropy, largest, argmax)
    row_max, row_sum, rescale, _ = add_sinks(p, head, row_max, row_sum)
    dead = is_dead(row_max, row_sum)
    row_sum = tl.where(dead, 1.0, row_sum)
    acc = acc * (rescale / row_sum)[:, None]
    i, batch = row % q_len, row // q_len // p.heads
    out = p.out
    out_at = (
        batch.to(tl.int64) * out.batch + head.to(tl.int64) * out.head + i.to(tl.int64) * out.row
    )
    store_rows(out.ptr + out_at, acc, ok, first, DV, BLOCK_DV)
    if first == 0:
        total = tl.where(dead, NEG_INF, from_base2(row_max + tl.log2(row_sum)))
        tl.store(p.lse.ptr + at, total, mask=ok)


@triton.jit
def store_merged(p, head, at, ok, row_max, row_sum, entropy, largest, argmax):
    """The statistics of a block of rows; as in the forward, a NaN among the scores shows in
    row_sum."""
    to, nan = p.statistics, row_sum != row_sum
    tl.store(to.max_logit.ptr + at, tl.where(nan, row_sum, largest), mask=ok)
    if to.entropy is not None:
        merged = entropy_with_sinks(p, head, row_max, row_sum, entropy)
        tl.store(to.entropy.ptr + at, merged, mask=ok)
    if to.argmax is not None:
        tl.store(to.argmax.ptr + at, tl.where(nan | (largest == NEG_INF), -1, argmax), mask=ok)


@triton.jit
def merge_kernel(out_a, lse_a, out_b, lse_b, out, lse, rows,
                 DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr):  # fmt: skip
    """out [rows, Dv] and lse [rows] merged from two. Programs: blocks of rows x chunks of Dv."""
    chunks = tl.cdiv(DV, BLOCK_DV)
    row = tl.program_id(0) // chunks * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(0) % chunks * BLOCK_DV
    d = first + tl.arange(0, BLOCK_DV)
    ok = row < rows
    a = tl.load(lse_a + row, mask=ok, other=NEG_INF).to(tl.float32)
    b = tl.load(lse_b + row, mask=ok, other=NEG_INF).to(tl.float32)
    dead_a, dead_b = a == NEG_INF, b == NEG_INF
    base = tl.where(dead_a & dead_b, 0.0, tl.where(a > b, a, b))
    weight_a = tl.where(dead_a, 0.0, tl.exp2((a - base) * LOG2E))
    weight_b = tl.where(dead_b, 0.0, tl.exp2((b - base) * LOG2E))
    total = tl.where(dead_a & dead_b, 1.0, weight_a + weight_b)
    at = row.to(tl.int64)[:, None] * DV + d
    there = ok[:, None] & (d < DV)
    # A row of -inf saw no key, and its out may hold anything, so it is not read.
    x = tl.load(out_a + at, mask=there & ~dead_a[:, None], other=0.0).to(tl.float32)
    y = tl.load(out_b + at, mask=there & ~dead_b[:, None], other=0.0).to(tl.float32)
    merged = (weight_a / total)[:, None] * x + (weight_b / total)[:, None] * y
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=there)
    if first == 0:
        joined = tl.where(dead_a & dead_b, NEG_INF, base + tl.log2(total) * LN2)
        tl.store(lse + row, joined, mask=ok)


def merge(out_a, lse_a, out_b, lse_b):
    """merge_states() for checked tensors: (out in out_a's dtype, lse in fp32)."""
    out_a, lse_a, out_b, lse_b = (x.contiguous() for x in (out_a, lse_a, out_b, lse_b))
    out, lse = torch.empty_like(out_a), torch.empty_like(lse_a, dtype=torch.float32)
    rows, v_dim = lse.numel(), out.shape[-1]
    if out.numel() == 0:
        return out, torch.logaddexp(lse_a.float(), lse_b.float())
    block_dv = min(256, triton.next_power_of_2(v_dim))
    block_r = max(1, 2048 // block_dv)
    with torch.cuda.device_of(out):
        merge_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(v_dim, block_dv),)](
            out_a, lse_a, out_b, lse_b, out, lse, rows,
            DV=v_dim, BLOCK_R=block_r, BLOCK_DV=block_dv,
        )  # fmt: skip
    return out, lse

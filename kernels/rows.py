"""Shared by the row kernels: rows of a tensor in memory order, dropout's bits, activations, sums of
partial results. csrc/cpu/rows.inl has the CPU's.

A program works on a tile [BLOCK_R, BLOCK_N] of rows and columns. Arithmetic is fp32, or fp64 for
fp64 tensors. Rows are counted in 64 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..core.philox import keep_threshold
from ..core.tensors import empty_result
from .philox import dropout_key

# ---- rows, on the host --------------------------------------------------------------------------


class RowOrder:
    """The rows along a tensor's last dimension, in memory order if the tensor is dense.

    rows_of(t) is t as [rows, n] in that order: a view, or a copy where t has another order.
    """

    def __init__(self, x):
        if x.dim() == 0 or not x.is_floating_point():
            raise RuntimeError(f"fastattn: a tensor is {x.dtype} {list(x.shape)}, expected "
                               "floating with at least one dimension")  # fmt: skip
        self.like, self.order = x, None
        self.n = x.shape[-1]
        self.rows = x.numel() // self.n if self.n else x.shape[:-1].numel()
        if x.dim() > 2 and not x.is_contiguous():
            y = empty_result(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"))
            self.order = sorted(range(x.dim() - 1), key=lambda d: -y.stride(d))

    def rows_of(self, t, name="a tensor"):
        """t as [rows, n] with unit stride in a row; None for None."""
        if t is None:
            return None
        x = self.like
        if t.shape != x.shape or t.dtype != x.dtype or t.device != x.device:
            raise RuntimeError(f"fastattn: {name} is {t.dtype} {list(t.shape)} on {t.device}, "
                               f"expected {x.dtype} {list(x.shape)} on {x.device}")  # fmt: skip
        if self.order is not None:
            t = t.permute(*self.order, t.dim() - 1)
        t = t.reshape(self.rows, self.n)
        return t if self.n <= 1 or t.stride(1) == 1 else t.contiguous()

    def vector(self, t, name):
        """t [n] contiguous, in its own dtype; None for None."""
        if t is None:
            return None
        if tuple(t.shape) != (self.n,) or t.device != self.like.device:
            raise RuntimeError(f"fastattn: {name} has shape {list(t.shape)} on {t.device}, "
                               f"expected [{self.n}] on {self.like.device}")  # fmt: skip
        return t.contiguous()

    def new_like(self):
        """(a new result, its rows as [rows, n])."""
        t = empty_result(self.like)
        return t, self.rows_of(t)


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def arithmetic(dtype: torch.dtype):
    """accumulate(dtype) as Triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def tiles(order: RowOrder) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_N) of a kernel that does not need whole rows: 2048 values, 16 a thread."""
    block_n = min(512, max(64, triton.next_power_of_2(order.n)))
    return min(2048 // block_n, triton.next_power_of_2(order.rows)), block_n


def stride(t) -> int:
    """Elements from one row of [rows, n] to the next."""
    return 0 if t is None else t.stride(0)


def dropout_arguments(seed, p: float, x):
    """(seed and offset int64 [2] or None, how many of 65536 values are kept, x contiguous)."""
    if not 0 <= p < 1:
        raise RuntimeError(f"fastattn: dropout_p must be in [0, 1), got {p}")
    if p == 0:
        return None, 65536, x
    if seed is None:
        raise RuntimeError("fastattn: dropout needs dropout_seed")
    if seed.dtype != torch.int64 or tuple(seed.shape) != (2,) or seed.device != x.device:
        raise RuntimeError("fastattn: dropout_seed must be int64 [2]: seed and offset, on "
                           f"{x.device}")  # fmt: skip
    return seed.contiguous(), keep_threshold(p), x.contiguous()


# ---- tiles of rows ------------------------------------------------------------------------------


@triton.jit
def dropped(values, seed, threshold, row, first, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """values [BLOCK_R, BLOCK_N] after dropout; row [BLOCK_R, 1] int64, first: the first column, a
    multiple of 64, as BLOCK_N is. The bits are those of fastattn.core.philox.keep_rows.

    Half h of word w of philox call l in block b belongs to column 64 b + 16 w + 8 h + l.
    """
    BLOCKS: tl.constexpr = BLOCK_N // 64
    key, last = dropout_key(seed)
    call = (first // 8 + tl.arange(0, BLOCK_N // 8)[None, :]).to(tl.uint32)
    row = row.to(tl.uint64, bitcast=True)
    low, high = (row & 0xFFFFFFFF).to(tl.uint32), (row >> 32).to(tl.uint32)
    last = last.to(tl.uint32, bitcast=True)
    a, b, c, d = tl.philox(key, call, low, high, last)  # [BLOCK_R, BLOCK_N / 8] each
    words = tl.join(tl.join(a, c), tl.join(b, d))  # [..., w & 2, w & 1]
    words = tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK_R, BLOCKS, 8, 2, 2, 2])
    bits = tl.reshape(tl.permute(words, [0, 1, 3, 4, 5, 2]), [BLOCK_R, BLOCK_N])
    kept = bits < threshold
    # 65536 / threshold in the arithmetic type; a dropped NaN stays NaN * 0, as on every backend
    share = threshold.to(values.dtype) / 65536
    return values * tl.where(kept, 1.0 / share, 0.0).to(values.dtype)


# ---- activations --------------------------------------------------------------------------------


@triton.jit
def tanh(x):
    """2 sigmoid(2 x) - 1; near 0, where that cancels, fp32 uses the Taylor series."""
    far = 2 * tl.sigmoid(2 * x) - 1
    if x.dtype == tl.float64:
        return far
    y = x * x
    p = -0.008863235529902197 * y + 0.021869488536155203
    p = p * y - 0.05396825396825397
    p = p * y + 0.13333333333333333
    p = p * y - 0.3333333333333333
    return tl.where(tl.abs(x) < 0.3, x + x * y * p, far)


@triton.jit
def _sigmoid(x):
    """(sigmoid(x), 1 - sigmoid(x)), both without cancellation."""
    e = tl.exp(-tl.abs(x))  # never overflows
    large = 1 / (1 + e)
    small = e * large
    return tl.where(x < 0, small, large), tl.where(x < 0, large, small)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """(activation(x), its slope)."""
    if ACTIVATION == "identity":
        return x, x * 0 + 1
    elif ACTIVATION == "relu":  # NaN stays
        return tl.where(x <= 0, 0.0, x).to(x.dtype), tl.where(x <= 0, 0.0, 1.0).to(x.dtype)
    elif ACTIVATION == "silu":
        s, rest = _sigmoid(x)
        return x * s, s * (1 + x * rest)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        bell = tl.exp(x * x * -0.5) * 0.3989422804014327
        bump = tl.where(tl.abs(x) > 40, 0.0, x * bell)  # not inf * 0, which is NaN
        return x * cdf, cdf + bump.to(x.dtype)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        inner = 0.7978845608028654 * (1 + 0.134145 * x * x)  # sqrt(2 / pi) times u's slope
        s, rest = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # (1 + tanh(u)) / 2
        slope = s * rest
        bump = tl.where(slope == 0, 0.0, 2 * x * slope * inner)
        return x * s, s + bump.to(x.dtype)


# ---- sums over rows -----------------------------------------------------------------------------
# Programs write partial sums, which a second kernel adds in order, so that the result's bits depend
# only on the shapes.

MAX_PARTIALS = 256  # about two for each multiprocessor of a large GPU


@triton.jit
def _sum_partials(partials, out, count, n, COUNT: tl.constexpr, BLOCK_N: tl.constexpr):
    """partials [count, n] -> out [n]."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([COUNT, BLOCK_N], partials.dtype.element_ty)
    for begin in range(0, count, COUNT):
        part = begin + tl.arange(0, COUNT)[:, None].to(tl.int64)
        inside = (part < count) & (column < n)
        total += tl.load(partials + part * n + column, inside, other=0.0)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out + column, tl.sum(total, 0), column < n)


def sum_partials(partials, out) -> None:
    """out [n] = the sum of partials [count, n] over count."""
    count, n = partials.shape
    if n:
        _sum_partials[(triton.cdiv(n, 32),)](
            partials, out, count, n, COUNT=64, BLOCK_N=32, num_warps=4
        )

"""RMSNorm and LayerNorm on a GPU, with dropout and a residual in the same pass: fastattn::norm_fwd
and norm_bwd. Their reference is in fastattn/fused/norm.py, the CPU's kernels are in
csrc/cpu/fused.inl.

A row of up to MAX_FORWARD or MAX_BACKWARD values stays in registers and is read once. Wider rows
are read twice, in column blocks. Each program of the backward kernel takes every num_programs-th
tile of rows and writes one partial sum of dweight and of dbias.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import (
    MAX_PARTIALS,
    RowOrder,
    accumulate,
    dropout_arguments,
    dropped,
    stride,
    sum_partials,
)  # fmt: skip

MAX_FORWARD, MAX_BACKWARD = 16384, 8192  # 16 warps: 128 registers a thread
WIDE = 4096  # columns of a block of a wider row


# ---- forward ------------------------------------------------------------------------------------


@triton.jit
def _summed(
    x, residual, summed, seed, threshold, row, column, inside,
    x_stride, residual_stride, summed_stride, first,
    A: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of dropout(x) + residual, rounded and stored; or of x. 0 outside."""
    values = tl.load(x + row * x_stride + column, inside, other=0.0).to(A)
    if residual is not None:
        if seed is not None:
            values = dropped(values, seed, threshold, row, first, BLOCK_R, BLOCK_N)
        values += tl.load(residual + row * residual_stride + column, inside, other=0.0).to(A)
        rounded = values.to(x.dtype.element_ty)
        tl.store(summed + row * summed_stride + column, rounded, inside)
        values = tl.where(inside, rounded.to(A), 0.0).to(A)
    return values


@triton.jit
def _finish(centered, rstd, weight, bias, y, row, column, y_stride, inside, n):
    """Stores a tile of y."""
    out = centered * rstd
    within = column < n
    if weight is not None:
        out *= tl.load(weight + column, within, other=0.0).to(out.dtype)
    if bias is not None:
        out += tl.load(bias + column, within, other=0.0).to(out.dtype)
    tl.store(y + row * y_stride + column, out.to(y.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["threshold"])
def _norm_fwd(
    x, residual, weight, bias, y, summed, mean, rstd, seed, threshold, rows, n,
    x_stride, residual_stride, y_stride, summed_stride,
    EPS: tl.constexpr, CENTER: tl.constexpr, ONE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x, residual, y, summed [rows, n]; mean, rstd [rows]; ONE: a block holds a row."""
    A: tl.constexpr = rstd.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    here = row < rows
    middle = tl.zeros([BLOCK_R, 1], A)  # the mean, with CENTER
    squares = tl.zeros([BLOCK_R, 1], A)  # sum of squares of x minus the mean
    column = tl.arange(0, BLOCK_N)[None, :]
    if ONE:
        inside = here & (column < n)
        values = _summed(
            x, residual, summed, seed, threshold, row, column, inside,
            x_stride, residual_stride, summed_stride, 0, A, BLOCK_R, BLOCK_N,
        )  # fmt: skip
        if CENTER:
            middle = tl.sum(values, 1)[:, None] / n
            values = tl.where(inside, values - middle, 0.0).to(A)
        squares = tl.sum(values * values, 1)[:, None]
    else:
        for first in range(0, n, BLOCK_N):
            inside = here & (first + column < n)
            values = _summed(
                x, residual, summed, seed, threshold, row, first + column, inside,
                x_stride, residual_stride, summed_stride, first, A, BLOCK_R, BLOCK_N,
            )  # fmt: skip
            if CENTER:  # merged by Chan, Golub and LeVeque's rule (1979)
                count = tl.minimum(n - first, BLOCK_N).to(A)
                block = tl.sum(values, 1)[:, None] / count
                left = tl.where(inside, values - block, 0.0).to(A)
                step = block - middle
                share = count / (first + count)
                squares += tl.sum(left * left, 1)[:, None] + step * step * (first * share)
                middle += step * share
            else:
                squares += tl.sum(values * values, 1)[:, None]
    inverse = tl.rsqrt(squares / n + EPS)
    tl.store(rstd + row, inverse, here)
    if CENTER:
        tl.store(mean + row, middle, here)
    if ONE:
        _finish(values, inverse, weight, bias, y, row, column, y_stride, inside, n)
    else:
        tl.debug_barrier()  # all threads of the program see what it stored in summed
        for first in range(0, n, BLOCK_N):
            inside = here & (first + column < n)
            if residual is not None:
                at = summed + row * summed_stride + first + column
            else:
                at = x + row * x_stride + first + column
            values = tl.load(at, inside, other=0.0).to(A) - middle
            _finish(values, inverse, weight, bias, y, row, first + column, y_stride, inside, n)


def norm_fwd(x, residual, weight, bias, eps, center, dropout_seed=None, dropout_p=0.0):
    """fastattn::norm_fwd: (y, summed, mean, rstd)."""
    seed, threshold, x = dropout_arguments(dropout_seed, dropout_p, x)
    if residual is None and seed is not None:
        raise RuntimeError("fastattn: dropout needs a residual")
    order = RowOrder(x)
    y, y_rows = order.new_like()
    summed, summed_rows = (x.new_empty(0), None) if residual is None else order.new_like()
    kind = accumulate(x.dtype)
    mean = x.new_empty(order.rows if center else 0, dtype=kind)
    rstd = x.new_empty(order.rows, dtype=kind)
    x, residual = order.rows_of(x), order.rows_of(residual, "residual")
    weight, bias = order.vector(weight, "weight"), order.vector(bias, "bias")
    if x.numel() == 0:
        return y, summed, mean, rstd
    block_n = max(64, triton.next_power_of_2(order.n))
    one = block_n * kind.itemsize <= 4 * MAX_FORWARD
    block_n = block_n if one else WIDE
    block_r = max(1, 2048 // block_n)
    with torch.cuda.device_of(x):
        _norm_fwd[(triton.cdiv(order.rows, block_r),)](
            x, residual, weight, bias, y_rows, summed_rows, mean, rstd, seed, threshold,
            order.rows, order.n, stride(x), stride(residual), stride(y_rows), stride(summed_rows),
            EPS=eps, CENTER=center, ONE=one, BLOCK_R=block_r, BLOCK_N=block_n,
            num_warps=warps(block_r * block_n),
        )  # fmt: skip
    return y, summed, mean, rstd


def warps(values: int) -> int:
    """Warps of a program that holds this many values: 16 a thread, up to 16 warps."""
    return min(16, max(4, values // 512))


# ---- backward -----------------------------------------------------------------------------------


@triton.jit
def _normalized(x, mean, rstd, row, column, x_stride, rows, inside, CENTER: tl.constexpr):
    """(a tile of the normalized x, 0 outside; its rows' rstd)."""
    scale = tl.load(rstd + row, row < rows, other=0.0)
    values = tl.load(x + row * x_stride + column, inside, other=0.0).to(scale.dtype)
    if CENTER:
        values -= tl.load(mean + row, row < rows, other=0.0)
    return tl.where(inside, values * scale, 0.0).to(scale.dtype), scale


@triton.jit
def _store_dx(
    dx, dkept, dsummed, values, seed, threshold, row, column, inside,
    dx_stride, dkept_stride, dsummed_stride, first,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Stores values + dsummed, and what of it goes to x through the dropout."""
    if dsummed is not None:
        more = tl.load(dsummed + row * dsummed_stride + column, inside, other=0.0)
        values += more.to(values.dtype)
    tl.store(dx + row * dx_stride + column, values.to(dx.dtype.element_ty), inside)
    if seed is not None:
        values = dropped(values, seed, threshold, row, first, BLOCK_R, BLOCK_N)
        tl.store(dkept + row * dkept_stride + column, values.to(dx.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["threshold"])
def _norm_bwd(
    dy, dsummed, x, weight, mean, rstd, dx, dkept, dweight, dbias, seed, threshold, rows, n,
    dy_stride, dsummed_stride, x_stride, dx_stride, dkept_stride,
    CENTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A block holds a row. dweight, dbias [programs, n]: each program's sums over its rows."""
    A: tl.constexpr = rstd.dtype.element_ty
    column = tl.arange(0, BLOCK_N)[None, :]
    dweight_sum = tl.zeros([BLOCK_R, BLOCK_N], A)
    dbias_sum = tl.zeros([BLOCK_R, BLOCK_N], A)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = (tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < n)
        normal, scale = _normalized(x, mean, rstd, row, column, x_stride, rows, inside, CENTER)
        g = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(A)
        if dweight is not None:
            dweight_sum += g * normal
        if dbias is not None:
            dbias_sum += g
        if weight is not None:
            g *= tl.load(weight + column, column < n, other=0.0).to(A)
        values = g - normal * (tl.sum(g * normal, 1)[:, None] / n)
        if CENTER:
            values -= tl.sum(g, 1)[:, None] / n
        _store_dx(
            dx, dkept, dsummed, values * scale, seed, threshold, row, column, inside,
            dx_stride, dkept_stride, dsummed_stride, 0, BLOCK_R, BLOCK_N,
        )  # fmt: skip
    column = tl.arange(0, BLOCK_N)
    at = tl.program_id(0).to(tl.int64) * n + column
    if dweight is not None:
        tl.store(dweight + at, tl.sum(dweight_sum, 0), column < n)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(dbias_sum, 0), column < n)


@triton.jit(do_not_specialize=["threshold"])
def _norm_bwd_wide(
    dy, dsummed, x, weight, mean, rstd, dx, dkept, seed, threshold, rows, n,
    dy_stride, dsummed_stride, x_stride, dx_stride, dkept_stride,
    CENTER: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dx and dkept of one row, in two passes over its column blocks."""
    A: tl.constexpr = rstd.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    with_normal = tl.zeros([1, BLOCK_N], A)  # sums over blocks of dy weight normalized
    alone = tl.zeros([1, BLOCK_N], A)  # and of dy weight
    for begin in range(0, n, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)[None, :]
        inside = column < n
        normal, _ = _normalized(x, mean, rstd, row, column, x_stride, rows, inside, CENTER)
        g = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(A)
        if weight is not None:
            g *= tl.load(weight + column, inside, other=0.0).to(A)
        with_normal += g * normal
        alone += g
    normal_mean = tl.sum(with_normal, 1)[:, None] / n
    mean_g = tl.sum(alone, 1)[:, None] / n
    for begin in range(0, n, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)[None, :]
        inside = column < n
        normal, scale = _normalized(x, mean, rstd, row, column, x_stride, rows, inside, CENTER)
        g = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(A)
        if weight is not None:
            g *= tl.load(weight + column, inside, other=0.0).to(A)
        values = g - normal * normal_mean
        if CENTER:
            values -= mean_g
        _store_dx(
            dx, dkept, dsummed, values * scale, seed, threshold, row, column, inside,
            dx_stride, dkept_stride, dsummed_stride, begin, 1, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _norm_sums(
    dy, x, mean, rstd, dweight, dbias, rows, n, dy_stride, x_stride,
    CENTER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of dweight and dbias [programs, n] for a column block, each over every
    num_programs-th tile of rows."""
    A: tl.constexpr = rstd.dtype.element_ty
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    dweight_sum = tl.zeros([BLOCK_R, BLOCK_N], A)
    dbias_sum = tl.zeros([BLOCK_R, BLOCK_N], A)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = (tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < n)
        g = tl.load(dy + row * dy_stride + column, inside, other=0.0).to(A)
        if dweight is not None:
            normal, _ = _normalized(x, mean, rstd, row, column, x_stride, rows, inside, CENTER)
            dweight_sum += g * normal
        if dbias is not None:
            dbias_sum += g
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.program_id(0).to(tl.int64) * n + column
    if dweight is not None:
        tl.store(dweight + at, tl.sum(dweight_sum, 0), column < n)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(dbias_sum, 0), column < n)


def norm_bwd(
    dy, dsummed, x, weight, mean, rstd, eps, center, need_dweight, need_dbias,
    dropout_seed=None, dropout_p=0.0,
):  # fmt: skip
    """fastattn::norm_bwd: (dx, dweight, dbias, dkept), the sums in the arithmetic type."""
    seed, threshold, x = dropout_arguments(dropout_seed, dropout_p, x)
    order, kind = RowOrder(x), accumulate(x.dtype)
    for t, count in ((rstd, order.rows), (mean, order.rows if center else 0)):
        if t.dtype != kind or tuple(t.shape) != (count,) or t.device != x.device:
            raise RuntimeError("fastattn: mean and rstd must be those of the forward pass")
    needs = need_dweight, need_dbias
    dx, dx_rows = order.new_like()
    dkept, dkept_rows = (x.new_empty(0), None) if seed is None else order.new_like()
    sums = [x.new_zeros(order.n if need else 0, dtype=kind) for need in needs]
    x, dy, dsummed = (
        order.rows_of(t, name) for name, t in (("x", x), ("dy", dy), ("dsummed", dsummed))
    )
    weight, mean, rstd = order.vector(weight, "weight"), mean.contiguous(), rstd.contiguous()
    if x.numel() == 0:
        return dx, *sums, dkept
    rows, n = order.rows, order.n
    block_n = max(64, triton.next_power_of_2(n))
    wide = block_n * kind.itemsize > 4 * MAX_BACKWARD
    # 8 KiB a program hide memory latency; fewer rows where that would leave multiprocessors idle
    spread = triton.next_power_of_2(triton.cdiv(rows, MAX_PARTIALS))
    block_r = 8 if wide else max(1, min(8192 // x.element_size() // block_n, spread))
    programs = triton.cdiv(rows, block_r)
    if any(needs):
        programs = min(programs, MAX_PARTIALS)
    partials = [x.new_empty((programs, n), dtype=kind) if need else None for need in needs]
    inputs, gradients = (dy, dsummed, x, weight, mean, rstd), (dx_rows, dkept_rows)
    strides = [stride(t) for t in (dy, dsummed, x, dx_rows, dkept_rows)]
    with torch.cuda.device_of(x):
        if not wide:
            _norm_bwd[(programs,)](
                *inputs, *gradients, *partials, seed, threshold, rows, n, *strides,
                CENTER=center, BLOCK_R=block_r, BLOCK_N=block_n,
                num_warps=warps(2 * block_r * block_n),
            )  # fmt: skip
        else:
            _norm_bwd_wide[(rows,)](
                *inputs, *gradients, seed, threshold, rows, n, *strides,
                CENTER=center, BLOCK_N=WIDE // 2, num_warps=8,
            )  # fmt: skip
            if any(needs):
                _norm_sums[(programs, triton.cdiv(n, 128))](
                    dy, x, mean, rstd, *partials, rows, n, stride(dy), stride(x),
                    CENTER=center, BLOCK_R=8, BLOCK_N=128, num_warps=4,
                )  # fmt: skip
        for part, out in zip(partials, sums):
            if part is not None:
                sum_partials(part, out)
    return dx, *sums, dkept


# ---- what a launch compiles: benchmarks/compile/triton.py ----------------------------------------


def audit_subjects(arch):
    for dtype, n, center, dropout_p in (
        (torch.bfloat16, 768, True, 0.1),
        (torch.bfloat16, 4096, False, 0.0),
        (torch.bfloat16, 8192, False, 0.1),
        (torch.float16, 4096, True, 0.1),
        (torch.float32, 2048, True, 0.0),
        (torch.bfloat16, 16384, False, 0.0),
        (torch.bfloat16, 32768, True, 0.1),
    ):
        x = torch.empty(8192, n, dtype=dtype, device="meta")
        vector = torch.empty(n, dtype=dtype, device="meta")
        stats = torch.empty(8192, device="meta")
        seed = torch.empty(2, dtype=torch.int64, device="meta") if dropout_p else None
        kind = "layer" if center else "rms"
        name = f"{str(dtype)[6:]} {kind} {n}" + (" dropout" if dropout_p else "")

        def forward(x=x, vector=vector, center=center, seed=seed, p=dropout_p):
            norm_fwd(x, x, vector, vector if center else None, 1e-5, center, seed, p)

        def backward(x=x, vector=vector, stats=stats, center=center, seed=seed, p=dropout_p):
            mean = stats if center else stats[:0]
            norm_bwd(x, x, x, vector, mean, stats, 1e-5, center, True, center, seed, p)

        yield from arch.launches(name, forward, hot=True)
        yield from arch.launches(name, backward, hot=True)

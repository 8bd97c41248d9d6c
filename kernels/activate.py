"""Bias, activation and dropout in one pass on a GPU: fastattn::activate_fwd and activate_bwd. Their
reference is in fastattn/fused/activation.py, the CPU's kernels are in csrc/cpu/activate.inl.

A backward program takes a column block of every num_programs-th tile of rows and writes a partial
sum of the bias gradient. ReLU saves its result, whose zeros show what dropout dropped; the other
activations generate dropout's mask again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gate import _tile
from .rows import (
    MAX_PARTIALS,
    RowOrder,
    accumulate,
    activated,
    arithmetic,
    dropout_arguments,
    dropped,
    stride,
    sum_partials,
    tiles,
)  # fmt: skip

ACTIVATIONS = ("identity", "relu", "silu", "gelu", "gelu_tanh")


# ---- the kernels --------------------------------------------------------------------------------


@triton.jit
def _biased(x, bias, row, column, inside, n, x_stride, A: tl.constexpr):
    """A tile of x + bias."""
    values = tl.load(x + row * x_stride + column, inside, other=0.0).to(A)
    if bias is not None:
        values += tl.load(bias + column, column < n, other=0.0).to(A)
    return values


@triton.jit(do_not_specialize=["threshold"])
def _activate_fwd(
    x, bias, out, seed, threshold, rows, n, x_stride, out_stride,
    A: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """x, out [rows, n]; bias [n]."""
    row, column, inside = _tile(rows, n, BLOCK_R, BLOCK_N)
    value, _ = activated(_biased(x, bias, row, column, inside, n, x_stride, A), ACTIVATION)
    if seed is not None:
        first = tl.program_id(0) % tl.cdiv(n, BLOCK_N) * BLOCK_N
        value = dropped(value, seed, threshold, row, first, BLOCK_R, BLOCK_N)
    tl.store(out + row * out_stride + column, value.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["threshold"])
def _activate_bwd(
    dout, saved, bias, dx, dbias, seed, threshold, rows, n, dout_stride, saved_stride, dx_stride,
    A: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dout, saved, dx [rows, n]; dbias [programs, n]: each program's sums over its rows."""
    first = tl.program_id(0) * BLOCK_N  # neighbours share rows, as memory does
    column = first + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_N], A)
    for tile in range(tl.program_id(1), tl.cdiv(rows, BLOCK_R), tl.num_programs(1)):
        row = (tile * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < n)
        d = tl.load(dout + row * dout_stride + column, inside, other=0.0).to(A)
        if ACTIVATION == "relu":
            value = tl.load(saved + row * saved_stride + column, inside, other=0.0).to(A)
            d = tl.where(value > 0, d * (65536 / threshold.to(A)), 0.0).to(A)
        elif seed is not None:
            d = dropped(d, seed, threshold, row, first, BLOCK_R, BLOCK_N)
        if ACTIVATION != "relu" and ACTIVATION != "identity":
            values = _biased(saved, bias, row, column, inside, n, saved_stride, A)
            _, slope = activated(values, ACTIVATION)
            d *= slope
        tl.store(dx + row * dx_stride + column, d.to(dx.dtype.element_ty), inside)
        if dbias is not None:
            total += d
    if dbias is not None:
        column = first + tl.arange(0, BLOCK_N)
        at = tl.program_id(1).to(tl.int64) * n + column
        tl.store(dbias + at, tl.sum(total, 0), column < n)


# ---- the launches -------------------------------------------------------------------------------


def activate_fwd(x, bias, dropout_seed, dropout_p, activation):
    """fastattn::activate_fwd."""
    _check(activation)
    seed, threshold, x = dropout_arguments(dropout_seed, dropout_p, x)
    order = RowOrder(x)
    out, out_rows = order.new_like()
    x, bias = order.rows_of(x), order.vector(bias, "bias")
    if x.numel() == 0:
        return out
    block_r, block_n = tiles(order)
    programs = triton.cdiv(order.rows, block_r) * triton.cdiv(order.n, block_n)
    with torch.cuda.device_of(x):
        _activate_fwd[(programs,)](
            x, bias, out_rows, seed, threshold, order.rows, order.n, stride(x), stride(out_rows),
            A=arithmetic(x.dtype), ACTIVATION=activation,
            BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    return out


def activate_bwd(dout, saved, bias, dropout_seed, dropout_p, activation, need_dbias):
    """fastattn::activate_bwd: (dx, dbias), the sum in the arithmetic type."""
    _check(activation)
    if saved is None and activation != "identity":
        raise RuntimeError(f"fastattn: {activation} needs what was saved")
    seed, threshold, dout = dropout_arguments(dropout_seed, dropout_p, dout)
    order, kind = RowOrder(dout), accumulate(dout.dtype)
    dx, dx_rows = order.new_like()
    dbias = dout.new_zeros(order.n if need_dbias else 0, dtype=kind)
    dout, saved = order.rows_of(dout), order.rows_of(saved, "saved")
    bias = order.vector(bias, "bias")
    if dout.numel() == 0:
        return dx, dbias
    block_r, block_n = tiles(order)
    blocks, programs = triton.cdiv(order.n, block_n), triton.cdiv(order.rows, block_r)
    if need_dbias:
        programs = min(programs, MAX_PARTIALS)
    programs = min(programs, 65535)  # of the grid's second dimension
    partials = dout.new_empty((programs, order.n), dtype=kind) if need_dbias else None
    with torch.cuda.device_of(dout):
        _activate_bwd[(blocks, programs)](
            dout, saved, bias, dx_rows, partials, seed, threshold, order.rows, order.n,
            stride(dout), stride(saved), stride(dx_rows),
            A=arithmetic(dout.dtype), ACTIVATION=activation,
            BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
        if need_dbias:
            sum_partials(partials, dbias)
    return dx, dbias


def _check(activation) -> None:
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"fastattn: activation is '{activation}'; accepted are "
                           f"{', '.join(ACTIVATIONS)}")  # fmt: skip


# ---- what a launch compiles: benchmarks/compile/triton.py ----------------------------------------


def audit_subjects(arch):
    for dtype, activation, dropout_p in (
        (torch.bfloat16, "gelu", 0.1),
        (torch.bfloat16, "relu", 0.1),
        (torch.float16, "gelu_tanh", 0.0),
        (torch.float32, "silu", 0.1),
    ):
        x = torch.empty(8192, 4096, dtype=dtype, device="meta")
        bias = torch.empty(4096, dtype=dtype, device="meta")
        seed = torch.empty(2, dtype=torch.int64, device="meta") if dropout_p else None
        name = f"{str(dtype)[6:]} {activation}" + (" dropout" if dropout_p else "")

        def forward(x=x, bias=bias, seed=seed, p=dropout_p, activation=activation):
            activate_fwd(x, bias, seed, p, activation)

        def backward(x=x, bias=bias, seed=seed, p=dropout_p, activation=activation):
            activate_bwd(x, x, bias, seed, p, activation, True)

        yield from arch.launches(name, forward, hot=True)
        yield from arch.launches(name, backward, hot=True)

"""activation(gate) * up on a GPU: fastattn::gate_fwd and gate_bwd. Their reference is in
fastattn/fused/norm.py, the CPU's kernels are in csrc/cpu/activate.inl.

Each program takes one tile. The backward pass makes the activation again from its input.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import RowOrder, activated, arithmetic, stride, tiles

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


# ---- the kernels --------------------------------------------------------------------------------


@triton.jit
def _tile(rows, n, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row [BLOCK_R, 1] int64, column [1, BLOCK_N], which are inside) of this program."""
    blocks = tl.cdiv(n, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return row, column, (row < rows) & (column < n)


@triton.jit
def _gate_fwd(
    gate, up, out, rows, n, gate_stride, up_stride, out_stride,
    A: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """gate, up, out [rows, n]."""
    row, column, inside = _tile(rows, n, BLOCK_R, BLOCK_N)
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(A)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(A)
    value, _ = activated(g, ACTIVATION)
    tl.store(out + row * out_stride + column, (value * u).to(out.dtype.element_ty), inside)


@triton.jit
def _gate_bwd(
    dout, gate, up, dgate, dup, rows, n,
    dout_stride, gate_stride, up_stride, dgate_stride, dup_stride,
    A: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, n, BLOCK_R, BLOCK_N)
    d = tl.load(dout + row * dout_stride + column, inside, other=0.0).to(A)
    g = tl.load(gate + row * gate_stride + column, inside, other=0.0).to(A)
    u = tl.load(up + row * up_stride + column, inside, other=0.0).to(A)
    value, slope = activated(g, ACTIVATION)
    dg, du = (d * slope * u).to(dgate.dtype.element_ty), (d * value).to(dup.dtype.element_ty)
    tl.store(dgate + row * dgate_stride + column, dg, inside)
    tl.store(dup + row * dup_stride + column, du, inside)


# ---- the launches -------------------------------------------------------------------------------


def gate_fwd(gate, up, activation):
    """fastattn::gate_fwd."""
    order = RowOrder(gate)
    out, out_rows = order.new_like()
    _launch(_gate_fwd, order, activation, {"gate": gate, "up": up}, out_rows)
    return out


def gate_bwd(dout, gate, up, activation):
    """fastattn::gate_bwd: (dgate, dup)."""
    order = RowOrder(gate)
    (dgate, dgate_rows), (dup, dup_rows) = order.new_like(), order.new_like()
    _launch(
        _gate_bwd, order, activation, {"dout": dout, "gate": gate, "up": up}, dgate_rows, dup_rows
    )
    return dgate, dup


def _launch(kernel, order, activation, inputs, *outputs) -> None:
    if activation not in ACTIVATIONS:
        raise RuntimeError(f"fastattn: activation is '{activation}'; accepted are "
                           f"{', '.join(ACTIVATIONS)}")  # fmt: skip
    tensors = [*(order.rows_of(t, name) for name, t in inputs.items()), *outputs]
    if order.like.numel() == 0:
        return
    block_r, block_n = tiles(order)
    programs = triton.cdiv(order.rows, block_r) * triton.cdiv(order.n, block_n)
    with torch.cuda.device_of(order.like):
        kernel[(programs,)](
            *tensors, order.rows, order.n, *(stride(t) for t in tensors),
            A=arithmetic(order.like.dtype), ACTIVATION=activation,
            BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip


# ---- what a launch compiles: benchmarks/compile/triton.py ----------------------------------------


def audit_subjects(arch):
    for dtype, activation in (
        (torch.bfloat16, "silu"),
        (torch.bfloat16, "gelu"),
        (torch.float16, "gelu_tanh"),
        (torch.float32, "silu"),
    ):
        # halves of one projection
        gate, up = torch.empty(8192, 2 * 4096, dtype=dtype, device="meta").chunk(2, -1)
        name = f"{str(dtype)[6:]} {activation}"

        def forward(gate=gate, up=up, activation=activation):
            gate_fwd(gate, up, activation)

        def backward(gate=gate, up=up, activation=activation):
            gate_bwd(gate, gate, up, activation)

        yield from arch.launches(name, forward, hot=True)
        yield from arch.launches(name, backward, hot=True)

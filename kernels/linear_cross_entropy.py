"""A chunk of a language model's loss on a GPU: fastattn::cross_entropy_, each row's loss from its
logits, which become their own gradients in place. fastattn/fused/linear_cross_entropy.py has the
reference and the loop over chunks; the CPU's kernel is cross_entropy in csrc/cpu/fused.inl.

The products with the head are left to the BLAS library. A kernel that computed the logits itself
would save 6 bytes of memory traffic for each logit, but compute them again for each of the two
gradients: five products instead of three, which costs more.

A program reads a row twice. In the first pass each element of the block keeps the largest logit and
the sum of exponentials of its columns, which are reduced once at the end; the second pass finds the
row in the L2 cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .rows import RowOrder, accumulate, arithmetic, tanh

BLOCK = 8192  # columns of a step, 16 a thread; half of that in fp32


# ---- the kernel ---------------------------------------------------------------------------------


@triton.jit
def _capped(logits, at, inside, A: tl.constexpr, SOFTCAP: tl.constexpr):
    """(logits after the soft cap, -inf outside; the cap's slope)."""
    x = tl.load(logits + at, inside, other=-float("inf")).to(A)
    slope = tl.full(x.shape, 1.0, A)
    if SOFTCAP > 0:
        t = tanh(x / SOFTCAP)
        x = tl.where(inside, SOFTCAP * t, -float("inf")).to(A)
        slope = 1 - t * t
    return x, slope


@triton.jit
def _cross_entropy(
    logits, labels, scale, loss, lse, n, scale_stride, ignore_index,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, SOFTCAP: tl.constexpr,
    A: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """logits [rows, n], contiguous; labels int64, loss and lse [rows]; scale [rows] or None.

    loss = lse - (1 - SMOOTHING) at_label - SMOOTHING mean + Z_LOSS lse^2; gradient = scale *
    (softmax (1 + 2 Z_LOSS lse) - SMOOTHING / n - (1 - SMOOTHING) onehot) * the cap's slope.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * n
    label = tl.load(labels + row)
    kept = label != ignore_index
    lowest: tl.constexpr = -3.0e38  # below every useful logit; finite, so that -inf adds 0
    largest = tl.full([BLOCK], lowest, A)
    total = tl.zeros([BLOCK], A)
    sum_all = tl.zeros([BLOCK], A)
    for begin in range(0, n, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < n
        x, _ = _capped(logits, column, inside, A, SOFTCAP)
        before = largest
        largest = tl.maximum(largest, x)
        total = total * tl.exp(before - largest) + tl.exp(x - largest)
        if SMOOTHING > 0:
            sum_all += tl.where(inside, x, 0.0).to(A)
    top = tl.max(largest, 0)
    row_total = tl.sum(total * tl.exp(largest - top), 0)
    log_total = tl.log(row_total)
    row_lse = top + log_total
    known = (label >= 0) & (label < n)
    at_label, _ = _capped(logits, label, known, A, SOFTCAP)
    at_label = tl.where(known, at_label, float("nan")).to(A)  # a label outside the head gives NaN
    # lse - at_label would cancel where the label has the largest logit
    row_loss = log_total + (1 - SMOOTHING) * (top - at_label)
    if SMOOTHING > 0:
        row_loss += SMOOTHING * (top - tl.sum(sum_all, 0) / n)
    row_loss += Z_LOSS * row_lse * row_lse
    tl.store(loss + row, tl.where(kept, row_loss, 0.0).to(A))
    tl.store(lse + row, row_lse)
    if scale is not None:
        weight = tl.where(kept, tl.load(scale + row * scale_stride), 0.0).to(A)
        at_exp = (1 + 2 * Z_LOSS * row_lse) / row_total
        everywhere = tl.full([1], SMOOTHING, A) / n
        for begin in range(0, n, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < n
            x, slope = _capped(logits, column, inside, A, SOFTCAP)
            g = tl.exp(x - top) * at_exp - everywhere
            g -= (column == label).to(A) * (1 - SMOOTHING)
            g = tl.where(
                kept, g * slope * weight, 0.0
            )  # 0 for an ignored row, also where it holds NaN
            tl.store(logits + column, g.to(logits.dtype.element_ty), inside)


# ---- the launch ---------------------------------------------------------------------------------


def cross_entropy_(logits, labels, scale, ignore_index, label_smoothing, z_loss, softcap):
    """fastattn::cross_entropy_: (loss [N], lse [N]). A label that is neither ignored nor of the
    head gives NaN: checking it here would wait for the device."""
    order, kind = RowOrder(logits), accumulate(logits.dtype)
    if logits.dim() != 2 or not logits.is_contiguous():
        raise RuntimeError("fastattn: logits must be [N, V], contiguous")
    rows, n = logits.shape
    for name, t, dtype in (("labels", labels, torch.int64), ("scale", scale, kind)):
        if t is not None and (
            t.dtype != dtype or tuple(t.shape) != (rows,) or t.device != logits.device
        ):
            raise RuntimeError(f"fastattn: {name} is {t.dtype} {list(t.shape)} on {t.device}, "
                               f"expected {dtype} [{rows}] on {logits.device}")  # fmt: skip
    loss, lse = (logits.new_empty(order.rows, dtype=kind) for _ in range(2))
    if rows == 0:
        return loss, lse
    block = min(2 * BLOCK // max(2, logits.element_size()), max(128, triton.next_power_of_2(n)))
    with torch.cuda.device_of(logits):
        _cross_entropy[(rows,)](
            logits, labels.contiguous(), scale, loss, lse, n,
            0 if scale is None else scale.stride(0), ignore_index,
            SMOOTHING=label_smoothing, Z_LOSS=z_loss, SOFTCAP=softcap,
            A=arithmetic(logits.dtype), BLOCK=block, num_warps=max(4, min(16, block // 512)),
        )  # fmt: skip
    return loss, lse


# ---- what a launch compiles: benchmarks/compile/triton.py ----------------------------------------


def audit_subjects(arch):
    for dtype, n, numbers in (
        (torch.bfloat16, 32000, (0.0, 0.0, 0.0)),
        (torch.bfloat16, 128256, (0.1, 1e-4, 30.0)),
        (torch.float16, 50257, (0.0, 1e-4, 0.0)),
        (torch.float32, 50304, (0.1, 0.0, 0.0)),
    ):
        logits = torch.empty(1024, n, dtype=dtype, device="meta")
        labels = torch.empty(1024, dtype=torch.int64, device="meta")
        scale = torch.empty((), device="meta").expand(1024)

        def call(logits=logits, labels=labels, scale=scale, numbers=numbers):
            cross_entropy_(logits, labels, scale, -100, *numbers)

        yield from arch.launches(f"{str(dtype)[6:]} {n}", call, hot=True)

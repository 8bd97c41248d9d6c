"""From a product q.k to a score in base 2: cap, bias, ALiBi, mask. Next: forward.py.

`i` and `head` belong to rows and `j` to keys. Their shapes broadcast to the tile's: [rows, 1] and
[1, keys], or in a transposed tile [1, rows] and [keys, 1].
"""

import triton
import triton.language as tl

from .rows import tanh

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)
NEG_INF = tl.constexpr(float("-inf"))
MAX = tl.constexpr(3.4028234663852886e38)  # of float32
FAR_LOGIT = tl.constexpr(2.0**126 - 2.0**103)  # see to_base2
MAX_SLOPE = tl.constexpr(2.0**95)  # times a distance, which is below 2^30, every sum stays finite


@triton.jit
def to_base2(x):
    """A logit in base 2. The largest ones times LOG2E would overflow to infinity, so beyond 9e37
    the slope is 1/2; csrc/spec.h explains why that is exact enough."""
    far = x * 0.5
    return tl.minimum(tl.maximum(x * LOG2E, far - FAR_LOGIT), far + FAR_LOGIT)


@triton.jit
def from_base2(y):
    """The inverse of to_base2()."""
    return tl.minimum(tl.maximum(y * LN2, 2 * (y - FAR_LOGIT)), 2 * (y + FAR_LOGIT))


@triton.jit
def saturated(x, limit):
    """x with finite values clamped to +-limit."""
    return tl.where(tl.abs(x) < float("inf"), tl.minimum(tl.maximum(x, -limit), limit), x)


@triton.jit
def logit(x):
    """A bias or sink of any dtype in base 2; float64 saturates."""
    if x.dtype == tl.float64:
        x = saturated(x, MAX)
    return to_base2(x.to(tl.float32))


@triton.jit
def operand_at(x, n, head, i, j):
    """Pointers into a mask or bias. Indices are widened to 64 bits before any product."""
    base = x.ptr + n.to(tl.int64) * x.batch
    return base + (head * 1).to(tl.int64) * x.head + i.to(tl.int64) * x.row + j.to(tl.int64) * x.col


@triton.jit
def finish_scores(p, n, x, head, i, j, seen, offset, EDGE: tl.constexpr):
    """(scores in base 2, d score / d (scale q.k)) from x = q.k; the slope is 1 without a cap.

    seen says which pairs exist and lie in the band. Without EDGE these are all pairs, except those
    of rows past the last.
    """
    slope = 1.0
    if p.cap is not None:
        t = tanh(x * p.factor)
        slope = 1 - t * t
        x = t * p.cap
    else:
        x = x * p.factor
    if p.bias.ptr is not None:
        at = operand_at(p.bias, n, head, i, j)
        x += logit(tl.load(at, mask=seen, other=0.0))
    if p.slopes.ptr is not None:
        at = p.slopes.ptr + n * p.slopes.batch + head * p.slopes.head
        slope2 = saturated(tl.load(at) * 1.0, MAX_SLOPE / LOG2E) * LOG2E
        x -= slope2 * tl.abs(i + offset - j).to(tl.float32)
    if p.mask.ptr is not None:
        seen = seen & (tl.load(operand_at(p.mask, n, head, i, j), mask=seen, other=0) != 0)
    if EDGE or p.mask.ptr is not None:
        x = tl.where(seen, x, NEG_INF)
    return x, slope

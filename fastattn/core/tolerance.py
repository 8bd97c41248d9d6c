"""The rule for errors, of the tests, of `verify`, of the audit of models and of the benchmark.

An error against float64 may be twice the error of plain torch math in the same dtype (three times
for gradients) plus a few roundings. Of one attention call it must hold for the largest error, for
the largest error of each row and for the mean error (Tolerance); of a model, layer by layer
(cli/verify_model.py)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# How much more than plain torch's error: a factor, and roundings of the sums' terms.
FACTOR = {"result": 2.0, "gradient": 3.0}
ROUNDINGS = {
    "result": {torch.float64: 16.0, torch.float32: 4.0, torch.bfloat16: 0.25, torch.float16: 0.25},
    "gradient": {torch.float64: 16.0, torch.float32: 8.0, torch.bfloat16: 3.0, torch.float16: 3.0},
}
LAYER_ROUNDINGS = 8.0  # of what a layer of a model gives: its own, and some of those before it


def allowed_error(kind: str, plain_error, roundings):
    """The rule itself. plain_error is plain torch math's, in the call's dtype; roundings is what a
    few of them may amount to. Numbers or tensors."""
    return FACTOR[kind] * plain_error + roundings


@dataclass(frozen=True)
class Comparison:
    """Of the checks of one tensor, the one nearest to its limit, or furthest beyond."""

    what: str
    error: float  # against float64
    torch_error: float  # plain torch math's, in the same dtype
    allowed: float

    @property
    def ratio(self) -> float:
        """error / allowed: passed up to 1."""
        return self.error / self.allowed if self.allowed else (torch.inf if self.error else 0.0)

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return (
            f"{self.what} {self.error:.2e}, allowed {self.allowed:.2e}, "
            f"plain torch has {self.torch_error:.2e}"
        )


class Tolerance:
    """The rule for the results of one call, `q`, `k`, ... being its inputs.

    Beside plain torch's error it allows a few roundings of one term of each sum: a gradient may be
    a small difference of large terms, and a weight exp(score - lse) has its exponent's rounding.
    Kernels for matrix units round weights (and dS) to halves before they meet v (k and q), a second
    rounding of every term: `weights_rounded` allows twice as much, in half precision.
    """

    def __init__(self, q, k, v, scale, lse, dout=None, dlse=None, *, weights_rounded=False):
        self.slack = 2 if weights_rounded and q.dtype.itemsize == 2 else 1
        weight = v.shape[-1] ** 0.5 * _size(dout) * _size(v) + _size(dlse)  # d loss / d weight
        self.dtype = q.dtype
        self.compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.rows = lse.numel()
        self.exponent = max(1.0, float(_finite(lse).abs().amax())) if _finite(lse).numel() else 1.0
        self.terms = {
            "out": _size(v),
            "lse": self.exponent,
            "dv": _size(dout),
            "dq": abs(scale) * weight * _size(k),
            "dk": abs(scale) * weight * _size(q),
            "dbias": weight,
            "dsinks": weight,
        }

    def compare(self, name: str, got: Tensor, want: Tensor, torch_math: Tensor) -> Comparison:
        """`got` against `want`, in float64; torch_math is plain torch's result in the call's dtype.

        The last dimension is a row (of dsinks [heads], each head is). NaN and infinities must stand
        where want has them.
        """
        if got.shape != want.shape:
            return _broken(f"shape {list(got.shape)}, not {list(want.shape)}")
        got, want, torch_math = (x.detach().double().cpu() for x in (got, want, torch_math))
        if want.dim() == 1:
            got, want, torch_math = (x[:, None] for x in (got, want, torch_math))
        finite = want.isfinite()
        same = (got == want) | (got.isnan() & want.isnan())
        if not torch.where(finite, got.isfinite(), same).all():
            return _broken("NaN or infinity in the wrong place")
        if want.numel() == 0:
            return Comparison("nothing", 0.0, 0.0, 0.0)
        got, want, torch_math = (torch.where(finite, x, 0.0) for x in (got, want, torch_math))
        error, plain, size = (got - want).abs(), (torch_math - want).abs(), want.abs()

        kind = "result" if name in ("out", "lse") else "gradient"
        dtype = self.compute if name == "lse" else self.dtype
        eps = max(torch.finfo(dtype).eps, torch.finfo(self.compute).eps * self.exponent)
        roundings = ROUNDINGS["result" if name == "dv" else kind][dtype] * eps
        term = self.terms[name]
        if name in ("dbias", "dsinks"):  # each sums over the rows it is shared by
            term *= max(1.0, self.rows / size[..., 0].numel()) ** 0.5
        typical = min(1.0, 1 / 16 + 2 * want.numel() ** -0.5)  # of a mean: few values have no mean
        checks = {  # error, plain torch's error, what is rounded
            "largest error": (error.max(), plain.max(), size.max() + term),
            "mean error": (error.mean(), plain.mean(), typical * (size.mean() + term)),
            "largest error of a row": (error.amax(-1), plain.amax(-1), size.amax(-1) + term),
        }
        found = []
        for what, (mine, torchs, rounded) in checks.items():
            allowed = self.slack * allowed_error(kind, torchs, roundings * rounded)
            at = (mine / allowed.clamp(min=torch.finfo(torch.float64).tiny)).argmax()
            worst = (float(x.flatten()[at]) for x in (mine, torchs, allowed))
            found.append(Comparison(what, *worst))
        return max(found, key=lambda comparison: comparison.ratio)


def _broken(what: str) -> Comparison:
    return Comparison(f"{what}: error", torch.inf, 0.0, 0.0)


def _finite(x: Tensor) -> Tensor:
    return x.detach()[x.isfinite()].double()


def _size(x: Tensor | None) -> float:
    """Root mean square of the finite values."""
    x = _finite(x) if x is not None else torch.zeros(0)
    return float(x.square().mean().sqrt()) if x.numel() else 0.0

"""The tolerance rule of the tests, of `verify`, of the audit of models and of the benchmarks.

The error against float64 may be twice the error of plain torch math in the same dtype (three times
for gradients), plus a few roundings. For one attention call the rule applies to the largest error,
to the largest error of each row and to the mean error (Tolerance); for a model it applies layer by
layer (cli/verify_model.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# The allowed error is FACTOR times plain torch's error, plus ROUNDINGS times the dtype's epsilon
# times the size of one term of the sum.
FACTOR = {"result": 2.0, "gradient": 3.0}
ROUNDINGS = {
    "result": {torch.float64: 16.0, torch.float32: 4.0, torch.bfloat16: 0.25, torch.float16: 0.25},
    "gradient": {torch.float64: 16.0, torch.float32: 8.0, torch.bfloat16: 3.0, torch.float16: 3.0},
}
LAYER_ROUNDINGS = 8.0  # for a layer of a model: its own roundings and some of the layers before


def allowed_error(kind: str, plain_error, roundings):
    """The rule itself, for numbers or tensors.

    Args:
        kind: a key of FACTOR, "result" or "gradient".
        plain_error: the error of plain torch math in the call's dtype.
        roundings: the size of the roundings that are allowed on top.
    """
    return FACTOR[kind] * plain_error + roundings


@dataclass(frozen=True)
class Comparison:
    """The check of one tensor that is nearest to its limit, or furthest beyond it."""

    what: str
    error: float  # against float64
    torch_error: float  # of plain torch math in the same dtype, against float64
    allowed: float

    @property
    def ratio(self) -> float:
        """error / allowed; the check has passed if it is at most 1."""
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
    """The tolerance rule for the results of one call with the inputs q, k, v, ....

    It allows a few roundings of one term of each sum beside plain torch's error, because a gradient
    may be a small difference of large terms, and a probability exp(score - lse) carries the
    rounding of its exponent. Kernels for matrix units round P to half precision before the product
    with V (and dS before those with K and Q), which rounds every term a second time: probs_rounded
    doubles the allowed error of half-precision calls.

    Args:
        q, k, v: the call's inputs, [B, H, S, D] or any shape whose last dimension is D.
        scale: the call's scale.
        lse: the true lse, float64.
        dout, dlse: the cotangents, where gradients are compared.
        probs_rounded: whether the backend rounds P and dS to the dtype of q.
    """

    def __init__(self, q, k, v, scale, lse, dout=None, dlse=None, *, probs_rounded=False):
        self.slack = 2 if probs_rounded and q.dtype.itemsize == 2 else 1
        dprob = v.shape[-1] ** 0.5 * _size(dout) * _size(v) + _size(dlse)  # size of d loss / d P
        self.dtype = q.dtype
        self.compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.rows = lse.numel()
        self.exponent = max(1.0, float(_finite(lse).abs().amax())) if _finite(lse).numel() else 1.0
        self.terms = {
            "out": _size(v),
            "lse": self.exponent,
            "dv": _size(dout),
            "dq": abs(scale) * dprob * _size(k),
            "dk": abs(scale) * dprob * _size(q),
            "dbias": dprob,
            "dsinks": dprob,
        }

    def compare(self, name: str, got: Tensor, want: Tensor, torch_math: Tensor) -> Comparison:
        """Compares `got` with the truth `want`; torch_math is plain torch's result.

        Args:
            name: "out", "lse", "d" and an input's name, or (DerivativeTolerance) "tout", "tlse".
            got: the result, in the call's dtype.
            want: the same in float64.
            torch_math: the same by plain torch math in the call's dtype.

        A row is the last dimension (for dsinks [heads], one head). NaN and infinities must be where
        want has them.
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

        kind = "result" if name in ("out", "lse", "tout", "tlse") else "gradient"
        dtype = self.compute if name in ("lse", "tlse") else self.dtype
        eps = max(torch.finfo(dtype).eps, torch.finfo(self.compute).eps * self.exponent)
        roundings = ROUNDINGS["result" if name == "dv" else kind][dtype] * eps
        term = self.terms[name]
        if name in ("dbias", "dsinks"):  # each element is a sum over the rows that share it
            term *= max(1.0, self.rows / size[..., 0].numel()) ** 0.5
        typical = min(1.0, 1 / 16 + 2 * want.numel() ** -0.5)  # few values have no typical mean
        checks = {  # error, plain torch's error, size of what is rounded
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


class DerivativeTolerance(Tolerance):
    """The rule for forward mode's results, whose tangents are tout and tlse, and for the gradients
    of <dtout, tout> + <dtlse, tlse>, which are also the gradients of a backward's gradients. Their
    sums have terms of other sizes: those of core/derivatives.py's formulas.

    Args:
        q, k, v, scale, lse, probs_rounded: as in Tolerance.
        tangents: those of q, k, v, bias and sinks, each None where there is none.
        dtout, dtlse: the cotangents, where gradients are compared.
        softcap: the call's softcap.
    """

    def __init__(
        self, q, k, v, scale, lse, tangents, dtout=None, dtlse=None, *, softcap=0.0,
        probs_rounded=False,
    ):  # fmt: skip
        super().__init__(q, k, v, scale, lse, dtout, dtlse, probs_rounded=probs_rounded)
        tq, tk, tv, tbias, tsinks = map(_size, tangents)
        score = tq * _size(k) + _size(q) * tk  # size of T, the tangent of a score
        score = abs(scale) * q.shape[-1] ** 0.5 * score + tbias + tsinks
        wide = v.shape[-1] ** 0.5 * _size(dtout)
        first = wide * _size(v) + _size(dtlse)
        second = first * score * (1 + (2 / softcap if softcap else 0)) + wide * tv
        self.terms |= {
            "tout": tv + score * _size(v),
            "tlse": score,
            "dq": abs(scale) * (second * _size(k) + first * tk),
            "dk": abs(scale) * (second * _size(q) + first * tq),
            "dv": score * _size(dtout),
            "dbias": second,
            "dsinks": second,
        }


def _size(x: Tensor | None) -> float:
    """Root mean square of the finite values; 0 for None."""
    x = _finite(x) if x is not None else torch.zeros(0)
    return float(x.square().mean().sqrt()) if x.numel() else 0.0

"""Forward mode of a case: random tangents, the truth by torch's forward AD, and the comparison."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import Problem
from torch import Tensor
from torch.autograd import forward_ad

from fastattn.core.reference import reference
from fastattn.core.spec import LEAVES
from fastattn.core.tolerance import Tolerance

PRIMALS = ("q", "k", "v", *LEAVES)
RESULTS = ("out", "lse", "tout", "tlse")


def primals_of(problem: Problem) -> dict[str, Tensor]:
    """The tensors of a problem that have tangents, by name."""
    named = zip(PRIMALS, (*problem[:3], *problem.operands.leaves()))
    return {name: x for name, x in named if x is not None}


def tangents_of(problem: Problem, without=(), seed: int = 2) -> dict[str, Tensor]:
    """Random tangents in the memory order of their primals (contiguous for those of expanded ones),
    NaN where a primal is; none for the names in `without`."""
    draw = torch.Generator().manual_seed(seed)
    tangents = {}
    for name, x in primals_of(problem).items():
        t = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)
        if 0 not in x.stride():
            t = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(t)
        if name not in without:
            tangents[name] = torch.where(x.isnan(), x, t)
    return tangents


def true_jvp(problem: Problem, tangents: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's results and tangents, by torch's forward AD, in the problem's dtype."""
    with forward_ad.dual_level():
        x = {
            name: forward_ad.make_dual(p.contiguous(), tangents[name].to(p))
            if name in tangents
            else p
            for name, p in primals_of(problem).items()
        }
        operands = replace(problem.operands, **{n: x[n] for n in LEAVES if n in x})
        results = reference(x["q"], x["k"], x["v"], problem.spec, operands)
        pairs = [forward_ad.unpack_dual(y) for y in results]
    primals = [pair.primal for pair in pairs]
    moved = [torch.zeros_like(p) if t is None else t for p, t in pairs]
    return dict(zip(RESULTS, (*primals, *moved)))


def compare(problem: Problem, tangents: dict[str, Tensor], got: dict[str, Tensor], **kwargs):
    """Asserts that `got` is the truth within the tolerance rule. problem and tangents are on the
    CPU, in the dtype of the call."""
    dtype = problem.q.dtype
    want = true_jvp(problem.to(torch.float64), tangents)
    plain = true_jvp(problem.to(torch.promote_types(dtype, torch.float32)), tangents)
    plain = {name: x.to(dtype) if name.endswith("out") else x for name, x in plain.items()}
    tolerance = Tolerance(*problem[:3], problem.spec.scale, want["lse"], **kwargs)
    size = {name: _size(x) for name, x in (tangents | primals_of(problem)).items()}
    t = {name: _size(x) for name, x in tangents.items()}
    products = t.get("q", 0) * size["k"] + size["q"] * t.get("k", 0)
    score = abs(problem.spec.scale) * problem.q.shape[3] ** 0.5 * products
    score += t.get("bias", 0) + t.get("sinks", 0)  # the size of a score's tangent
    tolerance.terms |= {"tlse": score, "tout": score * _size(problem.v) + t.get("v", 0)}
    for name in RESULTS:
        comparison = tolerance.compare(name, got[name].cpu(), want[name], plain[name])
        assert comparison.passed, f"{name}: {comparison}"
    dead = want["lse"] == -torch.inf
    assert not got["tout"].cpu()[dead].any() and not got["tlse"].cpu()[dead].any()


def _size(x: Tensor) -> float:
    """Root mean square of the finite values."""
    x = x[x.isfinite()].double()
    return float(x.square().mean().sqrt()) if x.numel() else 0.0

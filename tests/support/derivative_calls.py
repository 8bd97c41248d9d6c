"""Calls of the operators of forward mode in their normal form, their truth, and the checks of a
case's results.

The truth shares no code with the operators: torch's own derivatives of the reference in float64, up
to the third.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from cases import Case, Problem
from operator_calls import cotangents_of, numbers, run_reference
from torch import Tensor

from fastattn.core.reference import reference
from fastattn.core.tolerance import DerivativeTolerance

NAMES = ("q", "k", "v", "bias", "sinks")
ABSENT = dict.fromkeys(NAMES)
# Which tangents a case has, besides all of them, which every other case has.
SUBSETS = ("q", "k", "v", "q k", "q v bias", "bias sinks", "v sinks")


class Operators(NamedTuple):
    """The two operators of one family."""

    jvp: object
    jvp_bwd: object

    def run(self, problem: Problem, tangents, cotangents, needs=None) -> dict[str, Tensor]:
        """out, lse, tout and tlse, and the gradients where cotangents (dtout, dtlse) are given."""
        q, k, v, spec, operands = problem
        shared = (q, k, v, *operands.tensors(), *numbers(spec))
        directions = [tangents[name] for name in NAMES]
        results = self.jvp(*shared, *directions)
        found = dict(zip(("out", "lse", "tout", "tlse"), results, strict=True))
        if cotangents is None:
            return found
        needs = needs or (operands.bias is not None, operands.sinks is not None)
        gradients = self.jvp_bwd(*cotangents, *results, *shared, *directions, *needs)
        for name, gradient in zip(NAMES, gradients, strict=True):
            if name in NAMES[:3] or needs[name == "sinks"]:
                found[f"d{name}"] = gradient
            else:
                assert gradient.shape == (0,)
        return found


CPU = Operators(torch.ops.fastattn.flash_attn_jvp, torch.ops.fastattn.flash_attn_jvp_bwd)


def primals_of(problem: Problem) -> dict[str, Tensor]:
    """The differentiable tensors that the call has, by name."""
    operands = problem.operands
    found = {"q": problem.q, "k": problem.k, "v": problem.v}
    found |= {"bias": operands.bias, "sinks": operands.sinks}
    return {name: x for name, x in found.items() if x is not None}


def tangents_of(problem: Problem, names=NAMES, seed: int = 2) -> dict[str, Tensor | None]:
    """Random tangents of those primals: NaN where the primal is, laid out in memory as it is."""
    draw = torch.Generator().manual_seed(seed)
    tangents: dict[str, Tensor | None] = dict(ABSENT)
    for name, x in primals_of(problem).items():
        drawn = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x.dtype)
        if name in names:
            tangents[name] = torch.empty_like(x).copy_(torch.where(x.isnan(), torch.nan, drawn))
    return tangents


def names_for(case: Case) -> tuple[str, ...]:
    """The tangents that a case is checked with."""
    number = sum(case.name.encode())
    return NAMES if number % 2 else tuple(SUBSETS[number // 2 % len(SUBSETS)].split())


def run_truth(problem: Problem, tangents, cotangents) -> dict[str, Tensor]:
    """What the operators return. The product of cotangents u with the derivative along the tangents
    is linear in u, and its gradient with respect to u is that derivative."""
    leaves = {name: x.detach().requires_grad_() for name, x in primals_of(problem).items()}
    changed = {name: leaves[name] for name in NAMES[3:] if name in leaves}
    q, k, v = (leaves[name] for name in NAMES[:3])
    results = reference(q, k, v, problem.spec, replace(problem.operands, **changed))
    cotangent = [torch.zeros_like(x).requires_grad_() for x in results]
    gradients = _gradients(results, list(leaves.values()), cotangent)
    product = cotangent[0].sum() * 0.0
    for name, gradient in zip(leaves, gradients, strict=True):
        if tangents[name] is not None:
            product = product + (gradient * tangents[name].to(gradient.dtype).nan_to_num()).sum()
    tout, tlse = _gradients([product], cotangent, None)
    found = {"out": results[0], "lse": results[1], "tout": tout, "tlse": tlse}
    if cotangents is not None:
        pairs = [(x, y.to(x.dtype)) for x, y in zip((tout, tlse), cotangents) if y is not None]
        loss = torch.stack([(x * y).sum() for x, y in pairs]).sum()
        seconds = _gradients([loss], list(leaves.values()), None)
        found |= {f"d{name}": x for name, x in zip(leaves, seconds, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def _gradients(results, inputs: list[Tensor], cotangents) -> tuple[Tensor, ...]:
    """Zeros where no result depends on an input: a call without rows has no graph."""
    kept = [n for n, x in enumerate(results) if x.requires_grad]
    if not kept:
        return tuple(torch.zeros_like(x) for x in inputs)
    weights = None if cotangents is None else [cotangents[n] for n in kept]
    return torch.autograd.grad(
        [results[n] for n in kept],
        inputs,
        weights,
        create_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )


def check(case: Case, dtype: torch.dtype, operators: Operators = CPU, names=None) -> None:
    """Checks everything about one case: errors, exact zeros, dtypes and memory order."""
    problem = case.make(dtype)
    tangents = tangents_of(problem, names or names_for(case))
    with_dlse = sum(case.name.encode()) % 3 > 0  # for most of the cases
    cotangents = cotangents_of(case, problem, with_dlse)
    got = operators.run(problem, tangents, cotangents)
    want = run_truth(problem.to(torch.float64), tangents, cotangents)
    compute = torch.promote_types(dtype, torch.float32)
    plain = run_truth(problem.to(compute), tangents, cotangents)
    plain = {name: x if name.endswith("lse") else x.to(dtype) for name, x in plain.items()}

    q, k, v, spec, _ = problem
    tolerance = DerivativeTolerance(
        q, k, v, spec.scale, want["lse"], [tangents[name] for name in NAMES], *(cotangents or ()),
        softcap=spec.softcap,
    )  # fmt: skip
    assert got.keys() == want.keys()
    for name, result in got.items():
        comparison = tolerance.compare(name, result, want[name], plain[name])
        assert comparison.passed, f"{name}: {comparison}"
        expected = dtype if name in ("out", "tout", "dq", "dk", "dv") else compute
        assert result.dtype == expected, f"{name} is {result.dtype}, not {expected}"
    dead = want["lse"] == -torch.inf
    assert not got["tout"][dead].any() and not got["tlse"][dead].any()
    assert got["tout"].stride() == got["out"].stride()
    assert got["tlse"].is_contiguous()
    if cotangents:
        assert not got["dq"][dead].any()
        first = run_reference(problem.to(torch.float64), cotangents)
        unseen = ~first["dv"].any(-1) & ~first["dk"].any(-1)
        assert not got["dk"][unseen].any() and not got["dv"][unseen].any()

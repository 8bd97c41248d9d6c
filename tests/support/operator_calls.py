"""Calls of the attention operators and the reference, for tests of several backends."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import Case, Problem

from fastattn.core.reference import reference
from fastattn.core.spec import Spec


def name_of(x) -> str:
    return x.name if isinstance(x, Case) else str(x).removeprefix("torch.")


def numbers(spec: Spec) -> tuple:
    return tuple(getattr(spec, name) for name in Spec.__slots__)


def run_reference(problem: Problem, cotangents) -> dict[str, torch.Tensor]:
    operands = problem.operands
    leaves = {"q": problem.q, "k": problem.k, "v": problem.v}
    leaves |= {name: getattr(operands, name) for name in ("bias", "sinks")}
    leaves = {n: x.detach().requires_grad_() for n, x in leaves.items() if x is not None}
    changed = {name: leaves[name] for name in ("bias", "sinks") if name in leaves}
    out, lse = reference(*list(leaves.values())[:3], problem.spec, replace(operands, **changed))
    results = {"out": out.detach(), "lse": lse.detach()}
    if cotangents:
        dout, dlse = cotangents
        pairs = [(out, dout.to(out.dtype))]
        pairs += [(lse, dlse.to(lse.dtype))] if dlse is not None else []
        gradients = torch.autograd.grad(
            [x for x, _ in pairs],
            list(leaves.values()),
            [x for _, x in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
        results |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return results


def cotangents_of(case: Case, problem: Problem, with_dlse: bool):
    """Random dout and dlse; none where there is no backward."""
    if not case.has_backward:
        return None
    q, v = problem.q, problem.v
    draw = torch.Generator().manual_seed(1)
    dout = torch.randn(*q.shape[:3], v.shape[3], generator=draw, dtype=torch.float64).to(q.dtype)
    dlse = torch.randn(q.shape[:3], generator=draw, dtype=torch.float64)
    return dout, dlse.to(torch.promote_types(q.dtype, torch.float32)) if with_dlse else None

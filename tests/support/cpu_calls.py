"""Calls of the CPU operators in their normal form, and the checks of a case's results."""

from __future__ import annotations

import torch
from cases import Case, Problem
from operator_calls import cotangents_of, numbers, run_reference

from fastattn.core.tolerance import Tolerance


def forward(problem: Problem, num_splits: int = 0):
    q, k, v, spec, operands = problem
    operator = torch.ops.fastattn.flash_attn_fwd
    return operator(q, k, v, *operands.tensors(), *numbers(spec), num_splits)


def backward(problem: Problem, dout, dlse, out, lse, needs=None) -> dict[str, torch.Tensor]:
    q, k, v, spec, operands = problem
    needs = needs or (operands.bias is not None, operands.sinks is not None)
    operator = torch.ops.fastattn.flash_attn_bwd
    dq, dk, dv, dbias, dsinks = operator(
        dout, dlse, out, lse, q, k, v, *operands.tensors(), *numbers(spec), *needs
    )
    gradients = {"dq": dq, "dk": dk, "dv": dv}
    for name, gradient, needed in zip(("dbias", "dsinks"), (dbias, dsinks), needs, strict=True):
        if needed:
            gradients[name] = gradient
        else:
            assert gradient.shape == (0,)
    return gradients


def run_kernels(problem: Problem, cotangents, num_splits: int = 0) -> dict[str, torch.Tensor]:
    """out, lse and, where cotangents (dout, dlse) are given, the gradients."""
    out, lse = forward(problem, num_splits)
    results = {"out": out, "lse": lse}
    return results | (backward(problem, *cotangents, out, lse) if cotangents else {})


def check(case: Case, dtype: torch.dtype, num_splits: int = 0, truth: Case | None = None) -> None:
    """Checks everything about one case: errors, exact zeros, dtypes and memory order. `truth`, if
    given, is an equivalent problem for the reference."""
    problem, same = case.make(dtype), (truth or case).make(dtype)
    with_dlse = sum(case.name.encode()) % 2 == 0  # for about half of the cases
    cotangents = cotangents_of(case, problem, with_dlse)
    got = run_kernels(problem, cotangents, num_splits)
    want = run_reference(same.to(torch.float64), cotangents)
    # Plain torch in the same dtype: half precision computes in fp32 and rounds once.
    compute = torch.promote_types(dtype, torch.float32)
    plain = run_reference(same.to(compute), cotangents)
    plain = {name: x if name == "lse" else x.to(dtype) for name, x in plain.items()}

    tolerance = Tolerance(*problem[:3], problem.spec.scale, want["lse"], *(cotangents or ()))
    for name, result in got.items():
        comparison = tolerance.compare(name, result, want[name], plain[name])
        assert comparison.passed, f"{name}: {comparison}"
        expected = dtype if name in ("out", "dq", "dk", "dv") else compute
        assert result.dtype == expected, f"{name} is {result.dtype}, not {expected}"
    dead = want["lse"] == -torch.inf
    assert not got["out"][dead].any()
    if cotangents:
        assert not got["dq"][dead].any()
        unseen = ~want["dv"].any(-1) & ~want["dk"].any(-1)
        assert not got["dk"][unseen].any() and not got["dv"][unseen].any()
    assert got["lse"].is_contiguous()
    same_shape = problem.q.shape == got["out"].shape
    dense = torch.empty_like(problem.q).stride() == problem.q.stride()
    if same_shape and dense:
        assert got["out"].stride() == problem.q.stride()
    else:
        assert got["out"].is_contiguous()

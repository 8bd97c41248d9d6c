"""Calls of the Triton kernels in the operators' normal form, and the checks of a case's results."""

from __future__ import annotations

import torch
from cases import Case
from operator_calls import cotangents_of, numbers, run_reference

from fastattn.core.tolerance import Tolerance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def row(block_q: int, block_kv: int):
    from fastattn.kernels.config import Config

    return Config(block_q, block_kv, 4, 1)


def run_triton(problem, cotangents, num_splits=0, config=None, needs=None):
    from fastattn.kernels import launch

    q, k, v, spec, operands = problem
    tensors, spec_numbers = operands.tensors(), numbers(spec)
    out, lse = launch.forward(q, k, v, *tensors, *spec_numbers, num_splits, config=config)
    results = {"out": out, "lse": lse}
    if cotangents:
        needs = needs or (operands.bias is not None, operands.sinks is not None)
        dout, dlse = (None if x is None else x.to(q.device) for x in cotangents)
        grads = launch.backward(
            dout, dlse, out, lse, q, k, v, *tensors, *spec_numbers, *needs, config=config
        )
        names = ("dq", "dk", "dv", "dbias", "dsinks")
        wanted = (True, True, True, *needs)
        results |= {name: x for name, x, want in zip(names, grads, wanted) if want}
    return results


def check(
    case: Case, dtype: torch.dtype, num_splits: int = 0, config=None, truth: Case | None = None
) -> None:
    """Like cpu_calls.check: errors, exact zeros, dtypes and memory order."""
    problem = case.make(dtype, device=DEVICE)
    cotangents = cotangents_of(case, case.make(dtype), sum(case.name.encode()) % 2 == 0)
    got = run_triton(problem, cotangents, num_splits, config)
    host = (truth or case).make(dtype)
    want = run_reference(host.to(torch.float64), cotangents)
    plain = run_reference(host.to(torch.promote_types(dtype, torch.float32)), cotangents)
    plain = {name: x if name == "lse" else x.to(dtype) for name, x in plain.items()}
    scale, given = host.spec.scale, cotangents or ()
    tolerance = Tolerance(*host[:3], scale, want["lse"], *given, probs_rounded=True)
    for name, result in got.items():
        result = result.cpu()
        comparison = tolerance.compare(name, result, want[name], plain[name])
        assert comparison.passed, f"{name}: {comparison}"
        expected = dtype if name in ("out", "dq", "dk", "dv") else torch.float32
        assert result.dtype == expected, f"{name} is {result.dtype}, not {expected}"
    dead = want["lse"] == -torch.inf
    assert not got["out"].cpu()[dead].any()
    if cotangents:
        assert not got["dq"].cpu()[dead].any()
        unseen = ~want["dv"].any(-1) & ~want["dk"].any(-1)
        assert not got["dk"].cpu()[unseen].any() and not got["dv"].cpu()[unseen].any()
    q, k, v = (
        torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta") for x in problem[:3]
    )
    fake = torch.ops.fastattn.flash_attn_fwd_triton(
        q, k, v,
        *(None if x is None else x.to("meta") for x in problem.operands.tensors()),
        *numbers(problem.spec), 0,
    )  # fmt: skip
    for result, expected in zip((got["out"], got["lse"]), fake):
        assert (result.shape, result.stride()) == (expected.shape, expected.stride())

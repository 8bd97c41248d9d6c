"""Compares what every contender computed with float64, by the tolerance rule that the tests use.
Only results that pass are timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastattn
from fastattn.core.tolerance import Comparison, DerivativeTolerance, Tolerance

from ..cases import AttentionCase, Problem, eager
from ..competitors import BARE, Forward, visible

DROPOUT_SEED = 3
GRADIENTS = ("out", "dq", "dk", "dv", "dbias")  # the results of a step, in this order
TANGENTS = ("out", "tout")  # the same in mode jvp
CHECKED_PAIRS = 1 << 24  # scores per case compared with float64; of more, some heads are sampled
# A competitor with a larger error computes a different function, not the same one with other
# rounding. The limits are loose: torch's half-precision gradients are off by several percent.
GROSS = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}

Makers = Mapping[str, Callable[[Problem], Forward]]


@dataclass(slots=True)
class Errors:
    """Errors against float64 relative to the largest true value, the worst of out and gradients."""

    largest: float = 0.0
    mean: float = 0.0
    excess: float = 0.0  # worst error / allowed error; above 1, fastattn's result is RED
    reason: str = ""  # the worst error, in words
    heads: list[int] = field(default_factory=list)  # the kv heads compared

    def keep_worst(self, name: str, found: Comparison) -> None:
        """Keeps the comparison that is nearest to its limit."""
        if found.ratio >= self.excess:
            self.excess, self.reason = found.ratio, f"{name}: {found}"

    def measure(self, result: Tensor, truth: Tensor) -> None:
        """Keeps the largest errors. NaN counts as infinite, since it would compare as small."""
        truth = truth.detach()
        error = (result.detach().double() - truth).abs() / truth.abs().max().clamp_min(1e-30)
        largest, mean = (x.nan_to_num(nan=torch.inf).item() for x in (error.max(), error.mean()))
        self.largest, self.mean = max(self.largest, largest), max(self.mean, mean)


def check(
    problem: Problem, forwards: Mapping[str, Forward], makers: Makers, pairs: int = CHECKED_PAIRS
) -> dict[str, Errors | Exception]:
    """Compares every contender's results with float64, one kv head and its query heads at a time.
    If a contender raises, its exception is returned in place of its errors.

    forwards  by name, the calls that will be timed
    makers    by name, functions that make such a call from a problem; cases with dropout use them
              to make the same call in float64
    pairs     scores to compare at most, though at least those of two kv heads
    """
    names = list(forwards)
    if problem.case.dropout:
        return {
            n: _tried(lambda n=n: _with_dropout(problem, forwards[n], makers[n])) for n in names
        }
    results = {n: _tried(problem.step(forwards[n], _whole(problem))) for n in names}
    heads = checked_heads(problem.case, pairs)
    found = {n: r if isinstance(r, Exception) else Errors(heads=heads) for n, r in results.items()}
    for head in heads:
        tolerance = _tolerance(problem, slice(head, head + 1))
        truths, rounded = _plain(problem, head, torch.float64), _plain(problem, head, torch.float32)
        for name, errors in found.items():
            if isinstance(errors, Exception):
                continue
            for index, (what, truth) in enumerate(zip(names_of(problem.case), truths)):
                one = results[name][index]
                if one is None and name == BARE:  # which ignores the tangents
                    continue
                one = _heads_of(problem.case, one, head, index)
                errors.keep_worst(
                    what, tolerance.compare(what, one, truth, rounded[index].to(problem.dtype))
                )
                errors.measure(one, truth)
    return found


def _whole(problem: Problem) -> str:
    """The mode to check in: gradients are checked together with their forward pass."""
    return "fwdbwd" if problem.case.mode == "bwd" else problem.case.mode


def names_of(case: AttentionCase) -> tuple[str, ...]:
    return TANGENTS if case.mode == "jvp" else GRADIENTS


def _tried(call):
    try:
        return call()
    except Exception as error:  # the other contenders are still measured
        return error


def verdict(name: str, found: Errors | Exception, dtype: torch.dtype) -> str | None:
    """Why a contender is not timed, or None. fastattn must pass the tests' tolerance rule; the
    others only must not compute a different function."""
    if isinstance(found, Exception):
        return f"{type(found).__name__}: {found}".split("\n")[0]
    if name == "fastattn" and not found.excess <= 1.0:
        return f"wrong {found.reason}"
    if not found.largest <= GROSS[dtype]:
        return f"wrong: its largest error is {found.largest:.1e} of the largest value"
    return None


def _tolerance(problem: Problem, kv_heads: slice) -> Tolerance:
    """The tolerance rule for these kv heads. lse determines only the rounding of the exponent."""
    case, scale = problem.case, problem.case.dim**-0.5
    q, dout = (
        t if t is None else t.unflatten(1, (case.kv_heads, -1)) for t in (problem.q, problem.dout)
    )
    q, k, v = (t[:, kv_heads].detach() for t in (q, problem.k, problem.v))
    scores = scale * q.float() @ k.float().mT.unsqueeze(2)  # [B, kv heads, group, q_len, keys]
    dout = None if dout is None else dout[:, kv_heads]
    lse, on_gpu = scores.logsumexp(-1), problem.device == "cuda"
    if problem.tangents:
        tangents = [*problem.tangents, None, None][:5]  # of the whole call: only sizes count
        return DerivativeTolerance(
            q, k, v, scale, lse, tangents, dout, softcap=case.softcap, probs_rounded=on_gpu
        )
    return Tolerance(q, k, v, scale, lse, dout, probs_rounded=on_gpu)


def checked_heads(case: AttentionCase, pairs: int = CHECKED_PAIRS) -> list[int]:
    """As many kv heads as fit, evenly spaced, the first and the last included."""
    per_head = case.batch * (case.heads // case.kv_heads) * case.q_len * case.keys
    count = min(case.kv_heads, max(2, pairs // per_head))
    return sorted({round(i * (case.kv_heads - 1) / max(count - 1, 1)) for i in range(count)})


def _heads_of(case: AttentionCase, tensor: Tensor, kv_head: int, index: int) -> Tensor:
    """The part of result `index` (out, dq, dk, dv, dbias) that belongs to one kv head."""
    group = 1 if index in (2, 3) else case.heads // case.kv_heads
    return tensor[:, kv_head * group : (kv_head + 1) * group]


def _plain(problem: Problem, kv_head: int, dtype: torch.dtype) -> list[Tensor]:
    """(out, gradients...) of one kv head and its query heads, by the formula, in `dtype`."""
    case = problem.case
    parts = (_heads_of(case, t, kv_head, i + 1) for i, t in enumerate(problem.inputs))
    inputs = [p.detach().to(dtype).requires_grad_(case.backward) for p in parts]
    alibi = problem.alibi_bias
    if alibi is not None:  # from the exact slopes, not from the rounded bias
        twin = problem.double()
        alibi = _heads_of(case, twin.alibi_bias, kv_head, 0).to(dtype)

    def forward(*inputs: Tensor) -> Tensor:
        biases = (inputs[3] if case.bias else None, alibi)
        return eager(*inputs[:3], masks=visible(problem), biases=biases, softcap=case.softcap)

    directions = (_heads_of(case, t, kv_head, i + 1) for i, t in enumerate(problem.tangents))
    tangents = tuple(t.to(dtype) for t in directions)
    if case.mode == "jvp":
        of_qkv = lambda *qkv: forward(*qkv, *inputs[3:])  # noqa: E731
        return list(torch.func.jvp(of_qkv, tuple(inputs[:3]), tangents))
    out = forward(*inputs)
    if not case.backward:
        return [out]
    dout = _heads_of(case, problem.dout, kv_head, 0).to(dtype)
    grads = torch.autograd.grad(out, inputs, dout, create_graph=case.mode == "double")
    if case.mode == "double":
        grads = torch.autograd.grad(grads, inputs, tangents)
    return [out, *grads]


# ---- dropout: each contender draws its own -------------------------------------------------------


def _with_dropout(problem: Problem, forward: Forward, make: Callable[[Problem], Forward]) -> Errors:
    """Compares a contender with float64 under its own dropout mask, from one seed: fastattn with
    its reference backend, plain torch code with itself in float64."""
    exact = problem.double()
    pairs = [(problem, forward), (exact, make(exact)), (problem, forward)]
    if make is Problem.fastattn:
        pairs[1:] = [(exact, _reference(exact)), (problem, _reference(problem))]
    results = []
    for owner, call in pairs:
        torch.manual_seed(DROPOUT_SEED)
        results.append(owner.step(call, _whole(problem))())
    errors = Errors(heads=list(range(problem.case.kv_heads)))
    tolerance = _tolerance(problem, slice(None))
    for what, one, true, plain in zip(GRADIENTS, *results):
        errors.keep_worst(what, tolerance.compare(what, one, true, plain))
        errors.measure(one, true)
    return errors


def _reference(problem: Problem) -> Forward:
    options = problem.call_options() | {"backend": "reference"}
    return lambda: fastattn.attention(problem.q, problem.k, problem.v, **options)

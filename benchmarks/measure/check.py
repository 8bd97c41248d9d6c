"""Correct before fast: what every contender computed, against float64, by the tests' own rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

import fastattn
from fastattn.cli import verify

from ..cases import Case, Row, eager
from ..competitors import Forward, visible

DROPOUT_SEED = 3
RESULTS = ("out", "dq", "dk", "dv", "dbias")  # what a step returns, in this order
CHECKED_PAIRS = 1 << 24  # scores per row compared with float64; more heads than fit are sampled
# A competitor's error from which on it computes another function, not with another rounding.
# torch's own gradients in half precision are off by several percent.
GROSS = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.1}

Makers = Mapping[str, Callable[[Case], Forward]]


@dataclass(slots=True)
class Errors:
    """Against float64, relative to the largest true value; the worst of out and gradients."""

    largest: float = 0.0
    mean: float = 0.0
    excess: float = 0.0  # the worst error / what the rule allows; above 1 fastattn's row is RED
    reason: str = ""  # that worst one in words
    heads: list[int] = field(default_factory=list)  # the kv heads compared

    def keep(self, name: str, found: verify.Comparison) -> None:
        """Keep the comparison nearest to its limit."""
        if found.ratio >= self.excess:
            self.excess, self.reason = found.ratio, f"{name}: {found}"

    def measure(self, result: Tensor, truth: Tensor) -> None:
        """Keep the largest errors; NaN, which compares as small, counts as infinite."""
        truth = truth.detach()
        error = (result.detach().double() - truth).abs() / truth.abs().max().clamp_min(1e-30)
        largest, mean = (x.nan_to_num(nan=torch.inf).item() for x in (error.max(), error.mean()))
        self.largest, self.mean = max(self.largest, largest), max(self.mean, mean)


def check(
    case: Case, forwards: Mapping[str, Forward], makers: Makers, pairs: int = CHECKED_PAIRS
) -> dict[str, Errors | Exception]:
    """Every contender's results against float64, one kv head and its group at a time. What a
    contender raises stands in its place.

    forwards  by name, the calls that will be timed
    makers    by name, who makes such a call of a case: of a twin in float64, where there is dropout
    pairs     scores compared at most, but those of two heads
    """
    names = list(forwards)
    if case.row.dropout:
        return {n: _tried(lambda n=n: _with_dropout(case, forwards[n], makers[n])) for n in names}
    results = {n: _tried(case.step(forwards[n], _whole(case))) for n in names}
    heads = checked_heads(case.row, pairs)
    found = {n: r if isinstance(r, Exception) else Errors(heads=heads) for n, r in results.items()}
    for head in heads:
        tolerance = _tolerance(case, slice(head, head + 1))
        truths, rounded = _plain(case, head, torch.float64), _plain(case, head, torch.float32)
        for name, errors in found.items():
            if isinstance(errors, Exception):
                continue
            for index, (what, truth) in enumerate(zip(RESULTS, truths)):
                one = _heads_of(case.row, results[name][index], head, index)
                errors.keep(
                    what, tolerance.compare(what, one, truth, rounded[index].to(case.dtype))
                )
                errors.measure(one, truth)
    return found


def _whole(case: Case) -> str:
    """The mode to check in: a backward pass with its own forward pass."""
    return "fwdbwd" if case.row.backward else "fwd"


def _tried(call):
    try:
        return call()
    except Exception as error:  # one contender's trouble is not the others'
        return error


def verdict(name: str, found: Errors | Exception, dtype: torch.dtype) -> str | None:
    """Why a contender gets no number, or None: fastattn by the tests' rule, the others where they
    compute something else."""
    if isinstance(found, Exception):
        return f"{type(found).__name__}: {found}".split("\n")[0]
    if name == "fastattn" and not found.excess <= 1.0:
        return f"wrong {found.reason}"
    if not found.largest <= GROSS[dtype]:
        return f"wrong: its largest error is {found.largest:.1e} of the largest value"
    return None


def _tolerance(case: Case, kv_heads: slice) -> verify.Tolerance:
    """The tolerance rule for these kv heads; lse only sets the size of an exponent's rounding."""
    row, scale = case.row, case.row.dim**-0.5
    q, dout = (t if t is None else t.unflatten(1, (row.kv_heads, -1)) for t in (case.q, case.dout))
    q, k, v = (t[:, kv_heads].detach() for t in (q, case.k, case.v))
    scores = scale * q.float() @ k.float().mT.unsqueeze(2)  # [B, kv heads, group, q_len, keys]
    dout = None if dout is None else dout[:, kv_heads]
    lse, on_gpu = scores.logsumexp(-1), case.device == "cuda"
    return verify.Tolerance(q, k, v, scale, lse, dout, probs_rounded=on_gpu)


def checked_heads(row: Row, pairs: int = CHECKED_PAIRS) -> list[int]:
    """Evenly spread kv heads, the first and the last included, as many as fit."""
    per_head = row.batch * (row.heads // row.kv_heads) * row.q_len * row.keys
    count = min(row.kv_heads, max(2, pairs // per_head))
    return sorted({round(i * (row.kv_heads - 1) / max(count - 1, 1)) for i in range(count)})


def _heads_of(row: Row, tensor: Tensor, kv_head: int, index: int) -> Tensor:
    """The part of result `index` (out, dq, dk, dv, dbias) that belongs to one kv head."""
    group = 1 if index in (2, 3) else row.heads // row.kv_heads
    return tensor[:, kv_head * group : (kv_head + 1) * group]


def _plain(case: Case, kv_head: int, dtype: torch.dtype) -> list[Tensor]:
    """(out, gradients...) of one kv head and its group, as the formula is written, in `dtype`."""
    row = case.row
    parts = (_heads_of(row, t, kv_head, i + 1) for i, t in enumerate(case.inputs))
    inputs = [p.detach().to(dtype).requires_grad_(row.backward) for p in parts]
    alibi = case.alibi_bias
    if alibi is not None:  # from the exact slopes, not as rounded for those who lack them
        twin = case.double()
        alibi = _heads_of(row, twin.alibi_bias, kv_head, 0).to(dtype)
    biases = (inputs[3] if row.bias else None, alibi)
    out = eager(*inputs[:3], masks=visible(case), biases=biases, softcap=row.softcap)
    if not row.backward:
        return [out]
    dout = _heads_of(row, case.dout, kv_head, 0).to(dtype)
    return [out, *torch.autograd.grad(out, inputs, dout)]


# ---- dropout: draws differ by design -------------------------------------------------------------


def _with_dropout(case: Case, forward: Forward, make: Callable[[Case], Forward]) -> Errors:
    """A side is held to float64 with its own draws, from one seed: fastattn by its reference
    backend, plain torch code by running itself in float64."""
    exact = case.double()
    pairs = [(case, forward), (exact, make(exact)), (case, forward)]
    if make is Case.fastattn:
        pairs[1:] = [(exact, _reference(exact)), (case, _reference(case))]
    results = []
    for owner, call in pairs:
        torch.manual_seed(DROPOUT_SEED)
        results.append(owner.step(call, _whole(case))())
    errors = Errors(heads=list(range(case.row.kv_heads)))
    tolerance = _tolerance(case, slice(None))
    for what, one, true, plain in zip(RESULTS, *results):
        errors.keep(what, tolerance.compare(what, one, true, plain))
        errors.measure(one, true)
    return errors


def _reference(case: Case) -> Forward:
    options = case.call_options() | {"backend": "reference"}
    return lambda: fastattn.attention(case.q, case.k, case.v, **options)

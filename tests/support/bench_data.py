"""Shared by the benchmark's tests: tiny cases, and the data of a run without running one."""

from __future__ import annotations

from dataclasses import replace

from fastattn.benchmarks.cases import AttentionCase
from fastattn.benchmarks.measure.check import Errors
from fastattn.benchmarks.measure.machine import Machine, working_set
from fastattn.benchmarks.measure.protocol import AGAIN, OURS, Result, Side
from fastattn.benchmarks.measure.timing import Comparison
from fastattn.benchmarks.report.record import as_json

from fastattn.core.work import Work


class FakeClock:
    """A clock in nanoseconds that only contenders advance."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def work(self, nanoseconds):
        """A callable that takes this long. It may be a function of the time, evaluated per call."""

        def fn():
            self.now += int(nanoseconds(self.now) if callable(nanoseconds) else nanoseconds)

        return fn


SMALL = AttentionCase("tiny", 1.0, heads=2, kv_heads=2, q_len=24, dim=16)
TINY = {
    "plain": SMALL,
    "causal": replace(SMALL, causal=True, mode="fwdbwd"),
    "back": replace(SMALL, causal=True, mode="bwd"),
    "decode": AttentionCase("tiny", 1.0, "bf16", 1, 4, 2, q_len=1, kv_len=40, dim=16),
    "padding": replace(SMALL, batch=2, padding=True, mode="fwdbwd"),
    "bias": replace(SMALL, bias=True, mode="fwdbwd"),
    "window": replace(SMALL, q_len=40, window=8),
    "alibi": replace(SMALL, alibi=True, causal=True, heads=4, mode="fwdbwd"),
    "documents": replace(SMALL, documents=3, causal=True),
    "chunk": replace(SMALL, chunk=5, causal=True),
    "softcap": replace(SMALL, softcap=2.0, mode="fwdbwd"),
    "dropout": replace(SMALL, causal=True, dropout=0.1, mode="fwdbwd"),
    "dropped back": replace(SMALL, dropout=0.1, mode="bwd"),
    "half": replace(SMALL, dtype="fp16", mode="fwdbwd"),
    "jvp": replace(SMALL, bias=True, mode="jvp"),
    "double": replace(SMALL, causal=True, mode="double"),
    "statistics": replace(SMALL, causal=True, stats="max_logit,entropy,col_mass"),
}

FACTS = {
    "device": "cpu",
    "gpu": None,
    "cpu": "Some CPU <1>",
    "cores": 2,
    "threads": 2,
    "isa": "avx2",
    "torch_isa": "AVX2",
    "torch": "2.0",
    "fastattn": "0.1.0",
    "python": "3.11",
    "date": "2026-01-02T03:04:05+00:00",
    "seed": 20,
    "load": [0.5, 0.4, 0.3],
    "commit": "0123456789abcdef",
    "dirty": True,
}
THROTTLED = {"before": {"mhz": 2000.0}, "after": {"mhz": 1000.0}, "throttled": "it got hot"}


def comparison(**seconds: float) -> Comparison:
    """Eight rounds in which each side takes about the given seconds, with some percent of jitter:
    the same in every call, in a different order for each side."""
    jitter = (0.98, 1.0, 1.01, 0.99, 1.02, 1.0, 0.99, 1.01)
    samples = {
        name: tuple(s * jitter[(i + 3 * n) % 8] for i in range(8))
        for n, (name, s) in enumerate(seconds.items())
    }
    return Comparison(samples, dict.fromkeys(seconds, 1))


def result(case: AttentionCase, red: str | None = None, **seconds: float) -> Result:
    """A measured case: `seconds` of fastattn, sdpa, ..."""
    errors = Errors(1e-6, 1e-7, 0.3, "out: fine", [0])
    backends = {OURS: "cpu, avx2", "sdpa": "flash"}
    sides = {
        name: Side(name, backend=backends.get(name, name), errors=errors, memory=1 << 20)
        for name in seconds
    }
    work = Work(
        case.q_len * case.keys, 4 * case.dim * case.q_len * case.keys, 8 * case.q_len * case.dim
    )
    found = Result(case, sides, work, red=red, seconds=0.5)
    found.comparison = None if red else comparison(**seconds)
    return found


def machine() -> Machine:
    sizes = {1 << n: 1e10 for n in range(20, 29)}
    return Machine(dict(FACTS), {"fp32": 1e11, "bf16": 5e10, "fp16": 5e10}, sizes, THROTTLED)


def example(**options) -> dict:
    """A run of two variants at several lengths: one case is slower, one RED, and one has a
    competitor that cannot run."""
    results = []
    for q_len in (64, 128, 256):
        t = 1e-9 * q_len * q_len
        results.append(result(replace(SMALL, q_len=q_len), fastattn=t, sdpa=2 * t, eager=3 * t))
        results.append(result(replace(SMALL, q_len=q_len, causal=True), fastattn=t, sdpa=t))
    results.append(result(replace(SMALL, dtype="bf16"), fastattn=2e-3, sdpa=1e-3))
    results[-1].sides["flex"] = Side("flex", why_not="flex has <no> such thing & more")
    results.append(
        result(replace(SMALL, window=8), red="wrong out: far off", fastattn=1.0, sdpa=1.0)
    )
    aa = Result(SMALL, comparison=comparison(**{"sdpa": 1e-3, "sdpa" + AGAIN: 1e-3}))
    for found in results:
        assert working_set(found.work) in machine().bandwidths
    given = {"level": "quick", "options": ["attention", "--vs", "sdpa,eager"], "aa": [aa]}
    return as_json(results, machine(), **(given | options))

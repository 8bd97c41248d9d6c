"""How fastattn measures speed: interleaved, paired, with an interval, beside exact work and a peak.

Facts that the protocol rests on
--------------------------------
* Machines are noisy. Clock frequency, neighbours on the same host and page placement move an
  absolute time by tens of percent between minutes. Two samples taken back to back share that noise,
  so only their *ratio* means something: every round runs every contender once, and the ratio is
  formed inside the round.
* Whoever runs second inherits a warmer (or hotter) machine. The order rotates from round to round
  and reverses after each full rotation (AB BA BA AB ...), which cancels linear drift as well.
* One call can be shorter than the clock's jitter. Each contender is repeated inside a sample until
  the sample lasts `min_seconds`; the repeat count is fixed before the first round.
* Noise is one-sided and heavy-tailed: medians, never means. The minimum is used in one place only,
  for the machine's peak, which is a maximum by definition.
* The interval is the exact binomial (order statistic) interval of the median. It assumes no
  distribution, needs no random numbers, and covers at least what it promises for any number of
  rounds, where the bootstrap of a median of some ten values covers less than it says.
  With fewer than 6 rounds no 95 % interval exists, and `compare` refuses.
* The number of rounds is decided from the warm-up, before a single ratio is known: stopping when
  the answer looks good would bias it.
* Every call sees the same buffers: what fits a cache is served from it, for all contenders alike.
* An interval that includes 1.00 is "no difference", whatever the median says.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median

import torch

MIN_ROUNDS = 6  # 2 * 2**-6 = 3 %: the fewest values whose range covers the median at 95 %
MAX_REPEATS = 1 << 18  # a clock that stands still must not hang the calibration


# ----------------------------------------------------------------------------- comparing contenders


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of doing the work. `scope` is entered around each sample, outside the clock."""

    name: str
    fn: Callable[[], object]
    scope: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True, slots=True)
class Ratio:
    """Baseline time / contender time: above 1 the contender is faster."""

    value: float
    low: float
    high: float
    coverage: float  # what the interval really covers, at least the confidence asked for

    @property
    def verdict(self) -> str:
        if self.low > 1.0:
            return "faster"
        return "slower" if self.high < 1.0 else "no difference"

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}] {self.verdict}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Every sample of a comparison. The first contender is the baseline of `ratio`."""

    samples: dict[str, tuple[float, ...]]  # seconds per call, one value per round
    repeats: dict[str, int]
    confidence: float = 0.95

    @property
    def baseline(self) -> str:
        return next(iter(self.samples))

    @property
    def rounds(self) -> int:
        return len(self.samples[self.baseline])

    def median(self, name: str) -> float:
        return median(self.samples[name])

    def ratio(self, name: str, baseline: str | None = None) -> Ratio:
        base = self.samples[baseline or self.baseline]
        ratios = [b / s for b, s in zip(base, self.samples[name], strict=True)]
        return Ratio(median(ratios), *median_interval(ratios, self.confidence))

    def as_dict(self) -> dict:
        """What a JSON report keeps: enough to compute every number above again."""
        return {
            "baseline": self.baseline,
            "rounds": self.rounds,
            "repeats": dict(self.repeats),
            "samples_s": {name: list(values) for name, values in self.samples.items()},
        }


def median_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """(low, high, coverage): the narrowest pair of order statistics x[k], x[n+1-k] that covers the
    median with at least `confidence`; P(median outside) = 2 * P(Binomial(n, 1/2) < k)."""
    ordered = sorted(values)
    count = len(ordered)
    outside = 2 * 0.5**count  # k = 1: the whole range
    if 1 - outside < confidence:
        raise ValueError(
            f"values: {count} of them cannot bound a median with confidence {confidence}; "
            f"at least {math.ceil(1 - math.log2(1 - confidence))} are needed"
        )
    k = 1
    while k < count // 2:
        wider = outside + 2 * math.comb(count, k) * 0.5**count
        if 1 - wider < confidence:
            break
        outside, k = wider, k + 1
    return ordered[k - 1], ordered[count - k], 1 - outside


def order(names: Sequence[str], round_index: int) -> list[str]:
    """Who runs when: rotated by one each round, reversed every other full rotation."""
    shift = round_index % len(names)
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if (round_index // len(names)) % 2 else rotated


def compare(
    contenders: Sequence[Contender],
    *,
    rounds: int = 15,
    min_seconds: float = 2e-3,
    max_seconds: float | None = None,
    warmup_seconds: float = 2e-2,
    confidence: float = 0.95,
    clock: Callable[[], int] = time.perf_counter_ns,
    on_round: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Run every contender once a round and keep all samples.

    rounds       at least 6, and at most this many
    min_seconds  a sample repeats its call until it lasts this long
    max_seconds  about how long all rounds together may take; fewer rounds run when that many do not
                 fit, never fewer than 6
    clock        nanoseconds, monotonic
    on_round     called with (rounds done, rounds planned)
    """
    names = [c.name for c in contenders]
    if len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"contenders: got the names {names}, needs two or more distinct ones")
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds: got {rounds}, needs at least {MIN_ROUNDS} for a 95 % interval")

    by_name = {c.name: c for c in contenders}
    repeats: dict[str, int] = {}
    round_seconds = 0.0
    for contender in contenders:
        count, seconds = _calibrate(contender, clock, min_seconds, warmup_seconds)
        repeats[contender.name] = count
        round_seconds += seconds
    if max_seconds is not None:
        rounds = max(MIN_ROUNDS, min(rounds, int(max_seconds / max(round_seconds, 1e-9))))

    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        for name in order(names, index):
            nanoseconds = _sample(by_name[name], repeats[name], clock)
            samples[name].append(max(nanoseconds, 1) * 1e-9 / repeats[name])
        if on_round is not None:
            on_round(index + 1, rounds)
    return Comparison({n: tuple(s) for n, s in samples.items()}, repeats, confidence)


def _sample(contender: Contender, repeats: int, clock: Callable[[], int]) -> int:
    """Nanoseconds that `repeats` calls take, the garbage collector held back as in timeit."""
    fn = contender.fn
    collecting = gc.isenabled()
    with contender.scope():
        gc.disable()
        try:
            start = clock()
            for _ in range(repeats):
                fn()
            return clock() - start
        finally:
            if collecting:
                gc.enable()


def _calibrate(
    contender: Contender, clock: Callable[[], int], min_seconds: float, warmup_seconds: float
) -> tuple[int, float]:
    """(repeats, seconds of one sample). Doubles as the warm-up: samples are thrown away until they
    add up to `warmup_seconds`, so that first-call costs do not set the repeat count."""
    repeats, spent = 1, 0.0
    _sample(contender, 1, clock)  # first call: lazy initialisation, page faults
    while True:
        seconds = _sample(contender, repeats, clock) * 1e-9
        spent += seconds
        if seconds < min_seconds and repeats < MAX_REPEATS:
            wanted = math.ceil(1.1 * repeats * min_seconds / max(seconds, 1e-9))
            repeats = min(max(wanted, repeats + 1), 16 * repeats, MAX_REPEATS)
        elif spent >= warmup_seconds or repeats >= MAX_REPEATS:
            return repeats, seconds


# ------------------------------------------------------------------------------------ counting work


def visible_pairs(
    q_len: int, kv_len: int, *, left: int = -1, right: int = -1, offset: int = 0
) -> int:
    """Scores that one head really needs: row i sees keys i+offset-left <= j <= i+offset+right with
    0 <= j < kv_len; a negative side is unbounded."""
    if left < 0 and right < 0:
        return q_len * kv_len
    total = 0
    for i in range(q_len):
        low = max(0, i + offset - left) if left >= 0 else 0
        high = min(kv_len, i + offset + right + 1) if right >= 0 else kv_len
        total += max(0, high - low)
    return total


@dataclass(frozen=True, slots=True)
class Work:
    """What a call cannot avoid: arithmetic on the visible pairs, and compulsory traffic."""

    pairs: int
    flops: int
    bytes: int


def attention_work(
    *,
    pairs: int,  # visible pairs over all batches and query heads
    batch: int,
    heads: int,
    kv_heads: int,
    q_len: int,
    kv_len: int,  # keys that exist: those past a padding mask need not be read
    dim: int,
    v_dim: int | None = None,
    itemsize: int = 4,
    mask_bytes: int = 0,  # a bool mask: read once in each pass
    bias_bytes: int = 0,  # a learned bias: read once in each pass, its gradient written once
    backward: bool = False,
) -> Work:
    """FLOPs: 2 per multiply-add. Forward: QK^T and PV, 2 (D + Dv) a pair. Backward: five products,
    QK^T again, dO V^T, dS K, dS^T Q and P^T dO, 2 (3 D + 2 Dv) a pair (2.5 forwards at D = Dv).
    Softmax is not counted. Bytes: each operand read once and each result written once, per pass."""
    v_dim = dim if v_dim is None else v_dim
    q_bytes = batch * heads * q_len * dim * itemsize
    k_bytes = batch * kv_heads * kv_len * dim * itemsize
    v_bytes = batch * kv_heads * kv_len * v_dim * itemsize
    out_bytes = batch * heads * q_len * v_dim * itemsize
    lse_bytes = batch * heads * q_len * 4 if backward else 0  # kept only for a backward pass
    flops = 2 * (dim + v_dim) * pairs
    moved = q_bytes + k_bytes + v_bytes + out_bytes + lse_bytes + mask_bytes + bias_bytes
    if backward:
        flops += 2 * (3 * dim + 2 * v_dim) * pairs
        moved += 2 * (q_bytes + k_bytes + v_bytes) + 2 * out_bytes + lse_bytes
        moved += mask_bytes + 2 * bias_bytes
    return Work(pairs, flops, moved)


# ------------------------------------------------------------------------------- the machine's peak


def peak_flops(dtype: torch.dtype = torch.float32, seconds: float = 0.5) -> float:
    """Multiply-add peak in FLOP/s with torch's current threads: the best matrix product seen within
    `seconds`. In half precision compare it with fp32's and take the better: without dot-product
    instructions the best plan is to convert and use fp32, and a slow library product is no peak."""
    size = 1024 if dtype == torch.float32 else 256  # a library may take a second for 512 in fp16
    a, b = torch.rand(2, size, size).to(dtype).unbind()
    out = torch.empty_like(a)
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), seconds)


def peak_bandwidth(nbytes: int = 1 << 28, seconds: float = 0.4) -> float:
    """Bytes a second through a working set of `nbytes`: the better of reading it (sum) and copying
    one half onto the other. Past the last-level cache that is the memory's bandwidth; below, the
    cache's, which is the honest roof for work that stays there."""
    data = torch.ones(max(nbytes // 8, 1024) * 2)  # fp32, an even number of elements
    source, target = data.chunk(2)
    moved = data.numel() * 4
    read = moved / _fastest(data.sum, seconds / 2)
    copy = moved / _fastest(lambda: target.copy_(source), seconds / 2)
    return max(read, copy)


def _fastest(fn: Callable[[], object], seconds: float) -> float:
    """The shortest of the calls that fit into `seconds`, at least three."""
    fn()
    best, end, calls = math.inf, time.perf_counter() + seconds, 0
    while calls < 3 or time.perf_counter() < end:
        start = time.perf_counter_ns()
        fn()
        best = min(best, time.perf_counter_ns() - start)
        calls += 1
    return best * 1e-9

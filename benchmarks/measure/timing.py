"""Interleaved, paired timing with a confidence interval. Next hop: devices.py.

The reasons behind the protocol
-------------------------------
* Machines are noisy. Clock frequency, neighbours on the same host and page placement move an
  absolute time by tens of percent between minutes. Two samples taken back to back share that noise,
  so only their *ratio* means something: every round runs every contender once, and the ratio is
  formed inside the round.
* What runs second finds warmer caches, or a hotter processor. The order rotates from round to round
  and reverses after each full rotation (AB BA BA AB ...), which cancels linear drift as well.
* One call can be shorter than the clock's jitter. Each contender is repeated inside a sample until
  the sample lasts `min_seconds`; the repeat count is fixed before the first round.
* Noise is one-sided and heavy-tailed, so samples are summarised by medians, never by means. The
  shortest time is used in one place only: the machine's peak, which is a maximum by definition.
* The interval is the exact binomial (order statistic) interval of the median. It assumes no
  distribution, needs no random numbers, and covers at least what it promises for any number of
  rounds, where the bootstrap of a median of some ten values covers less than it says.
  With fewer than 6 rounds no 95 % interval exists, and `compare` refuses.
* The number of rounds is decided after the warm-up, before a single ratio is known: stopping when
  the result looks good would bias it.
* Every call uses the same buffers, so data that fits into a cache stays there, for all contenders.
  (A GPU's second-level cache can be flushed before each call instead: devices.py.)
* A machine's noise is not known in advance, so it is measured: `noise_floor` summarises comparisons
  of an implementation with itself (A/A), and every table shows it.
* An interval that includes 1.00 is "no difference", whatever the median says.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, pairwise
from statistics import median

MIN_ROUNDS = 6  # 2 * 2**-6 = 3 %: the fewest values whose range covers the median at 95 %
MAX_REPEATS = 1 << 18  # bounds the calibration if the clock stands still


# ----------------------------------------------------------------------------- comparing contenders


@dataclass(frozen=True, slots=True)
class Contender:
    """One way of doing the work. `scope` is entered around each sample, outside the clock.

    sample   measures the nanoseconds of the given number of calls by other means than the clock of
             `compare`, such as a GPU's events or another process's clock
    """

    name: str
    fn: Callable[[], object]
    scope: Callable[[], AbstractContextManager] = nullcontext
    sample: Callable[[int], float] | None = None


@dataclass(frozen=True, slots=True)
class Ratio:
    """Baseline time / contender time: above 1 the contender is faster."""

    value: float
    low: float
    high: float
    coverage: float  # of the interval, at least the confidence asked for
    p20: float = math.nan  # of the rounds' ratios: a fifth of them are smaller
    p80: float = math.nan

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
    passes: tuple[int, ...] = ()  # rounds of each pass, if passes ran in separate processes

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
        spread = (quantile(ratios, 0.2), quantile(ratios, 0.8))
        low, high, coverage = median_interval(ratios, self.confidence)
        if self.passes:
            ends = list(accumulate(self.passes, initial=0))
            medians = [median(ratios[a:b]) for a, b in pairwise(ends)]
            low, high = min(low, *medians), max(high, *medians)
        return Ratio(median(ratios), low, high, coverage, *spread)

    def merged(self, other: Comparison) -> Comparison:
        """The rounds of both comparisons, which ran in different processes. A process can be slow
        for its whole life (its threads share a core, its memory layout is unlucky), which its own
        rounds cannot show. So the interval is widened to include the median of every pass."""
        if self.samples.keys() != other.samples.keys():
            raise ValueError(f"other: compares {list(other.samples)}, not {list(self.samples)}")
        samples = {name: (*self.samples[name], *other.samples[name]) for name in self.samples}
        passes = tuple(n for part in (self, other) for n in (part.passes or (part.rounds,)))
        return Comparison(samples, self.repeats, self.confidence, passes)

    def as_dict(self) -> dict:
        """The samples as a JSON report stores them: enough to recompute every number above."""
        return {
            "baseline": self.baseline,
            "rounds": self.rounds,
            "repeats": dict(self.repeats),
            "passes": list(self.passes),
            "samples_s": {name: list(values) for name, values in self.samples.items()},
        }


def median_interval(
    values: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """(low, high, coverage): the narrowest pair of order statistics x[k], x[n+1-k] that covers the
    median with at least `confidence`; P(median outside) = 2 * P(Binomial(n, 1/2) < k)."""
    ordered = sorted(values)
    count = len(ordered)
    outside = 2 / 2**count  # k = 1: the whole range
    if 1 - outside < confidence:
        raise ValueError(
            f"values: {count} of them cannot bound a median with confidence {confidence}; "
            f"at least {math.ceil(1 - math.log2(1 - confidence))} are needed"
        )
    k = 1
    while k < count // 2:
        wider = outside + 2 * math.comb(count, k) / 2**count  # integers: counts have no limit
        if 1 - wider < confidence:
            break
        outside, k = wider, k + 1
    return ordered[k - 1], ordered[count - k], 1 - outside


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of the values lie, linear between neighbours."""
    ordered = sorted(values)
    at = share * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True, slots=True)
class Noise:
    """A summary of A/A comparisons. Any verdict but "no difference" is a false one."""

    cells: int  # the number of comparisons; the name is a key of stored results
    no_difference: int  # the number of them with that verdict
    median: float  # the largest |ratio - 1|
    interval: float  # the largest distance of an interval's end from 1

    def __str__(self) -> str:
        return (
            f"A/A ratios differ from 1 by up to {self.median:.1%} (intervals reach "
            f"{self.interval:.1%}); no difference in {self.no_difference} of {self.cells} "
            "comparisons"
        )


def noise_floor(ratios: Sequence[Ratio]) -> Noise:
    """Summarises A/A comparisons."""
    return Noise(
        len(ratios),
        sum(ratio.verdict == "no difference" for ratio in ratios),
        max((abs(ratio.value - 1) for ratio in ratios), default=0.0),
        max((max(ratio.high - 1, 1 - ratio.low) for ratio in ratios), default=0.0),
    )


def order(names: Sequence[str], round_index: int) -> list[str]:
    """The order of a round: rotated by one each round, reversed every other full rotation."""
    shift = round_index % len(names)
    rotated = [*names[shift:], *names[:shift]]
    return rotated[::-1] if (round_index // len(names)) % 2 else rotated


def compare(
    contenders: Sequence[Contender],
    *,
    rounds: int = 15,
    turns: int = 1,
    min_seconds: float = 2e-3,
    max_seconds: float | None = None,
    warmup_seconds: float = 2e-2,
    confidence: float = 0.95,
    clock: Callable[[], int] = time.perf_counter_ns,
    on_round: Callable[[int, int], object] | None = None,
) -> Comparison:
    """Run every contender once a round and keep all samples.

    rounds       at least 6, and at most this many
    turns        samples of every contender in a round, of which the fastest is kept. On a busy
                 machine use more than one, because an interruption lasts longer than a call
    min_seconds  a sample repeats its call until it lasts this long
    max_seconds  about how long all rounds together may take; if necessary fewer rounds run, but
                 never fewer than 6
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
        fit = int(max_seconds / max(turns * round_seconds, 1e-9))
        rounds = max(MIN_ROUNDS, min(rounds, fit))

    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        best = dict.fromkeys(names, math.inf)
        for turn in range(index * turns, (index + 1) * turns):
            for name in order(names, turn):
                best[name] = min(best[name], _sample(by_name[name], repeats[name], clock))
        for name in names:
            samples[name].append(max(best[name], 1) * 1e-9 / repeats[name])
        if on_round is not None:
            on_round(index + 1, rounds)
    return Comparison({n: tuple(s) for n, s in samples.items()}, repeats, confidence)


def _sample(contender: Contender, repeats: int, clock: Callable[[], int]) -> float:
    """Nanoseconds that `repeats` calls take. The garbage collector is off, as in timeit."""
    fn = contender.fn
    if contender.sample is not None:
        with contender.scope():
            return contender.sample(repeats)
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
    """(repeats, seconds of one sample). This is also the warm-up: samples are discarded until they
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

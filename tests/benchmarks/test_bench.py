"""The benchmark's protocol: statistics with fake clocks, and the count of the work.

No test here asserts a time.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from bench_data import FakeClock
from fastattn.benchmarks.measure import devices, timing
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastattn.core import work
from fastattn.core.work import pairs_of_band

# ---- statistics -------------------------------------------------------------------------------


def outside(count: int, k: int) -> Fraction:
    """P(the median lies outside [x_k, x_(n+1-k)]) by counting coin flips."""
    return 2 * sum(Fraction(math.comb(count, i), 2**count) for i in range(k))


@pytest.mark.parametrize("count", range(6, 40))
def test_interval_is_the_narrowest_that_covers(count):
    values = list(range(1, count + 1))  # so that each value is its own rank
    random.Random(count).shuffle(values)
    low, high, coverage = timing.median_interval(values)
    assert low + high == count + 1
    assert coverage == pytest.approx(float(1 - outside(count, low)))
    assert coverage >= 0.95
    narrower = low + 1
    assert narrower > count / 2 or 1 - outside(count, narrower) < 0.95


def test_interval_of_many_values():
    """About median rank +- 0.98 sqrt(n), without overflow."""
    low, high, coverage = timing.median_interval(range(1, 5001))
    assert low + high == 5001 and 0.95 <= coverage < 0.951
    assert 2500 - low == pytest.approx(0.98 * 5000**0.5, abs=2)


def test_interval_needs_six_values():
    with pytest.raises(ValueError, match=r"5 of them .* at least 6"):
        timing.median_interval([1.0] * 5)
    assert timing.median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0, 1 - 2 * 0.5**6)


def test_interval_covers_the_median_of_a_skewed_distribution():
    rng, covered, trials = random.Random(1), 0, 3000
    for _ in range(trials):
        low, high, _ = timing.median_interval([rng.expovariate(1.0) for _ in range(11)])
        covered += low <= math.log(2) <= high
    assert covered / trials > 0.975  # exact for 11 values: 0.988


def test_order_rotates_and_reverses():
    names = "AB"
    assert ["".join(timing.order(names, r)) for r in range(4)] == ["AB", "BA", "BA", "AB"]
    rounds = [timing.order("ABC", r) for r in range(6)]
    for position in range(3):
        assert sorted(r[position] for r in rounds) == list("AABBCC")
    pairs = {(a, b) for r in rounds for a, b in itertools.pairwise(r)}
    assert len(pairs) == 6  # every contender runs after every other


def test_ratio_on_a_steady_clock():
    clock = FakeClock()
    contenders = [
        timing.Contender("slow", clock.work(3000)),
        timing.Contender("fast", clock.work(2000)),
    ]
    result = timing.compare(contenders, rounds=9, min_seconds=1e-4, clock=clock)
    assert result.median("slow") == pytest.approx(3e-6)
    assert result.repeats["slow"] * 3e-6 >= 1e-4 > 1e-4 / 20 >= 3e-6
    assert result.repeats["fast"] * 2e-6 >= 1e-4
    ratio = result.ratio("fast")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert ratio.verdict == "faster" and "faster" in str(ratio)
    assert result.ratio("slow", baseline="fast").verdict == "slower"
    assert result.rounds == 9 and result.baseline == "slow"


def test_drift_of_the_machine_cancels():
    """The clock slows down fourfold during the run: medians change, the ratio does not."""
    clock = FakeClock()

    def drifting(base):
        return lambda now: base * (1 + 3 * min(now / 2e8, 1.0))

    contenders = [
        timing.Contender("a", clock.work(drifting(200_000))),
        timing.Contender("b", clock.work(drifting(100_000))),
    ]
    result = timing.compare(contenders, rounds=40, min_seconds=2e-3, clock=clock)
    samples = result.samples["a"]
    assert max(samples) > 2 * min(samples)
    assert result.ratio("b").value == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_equal_contenders_make_no_difference(seed):
    clock, rng = FakeClock(), random.Random(seed)

    def noisy(_):
        return 100_000 * rng.lognormvariate(0, 0.3)

    contenders = [timing.Contender(name, clock.work(noisy)) for name in "ab"]
    # At 99.9 %, all twenty seeds together fail once in fifty; these do not.
    result = timing.compare(contenders, rounds=25, min_seconds=0, confidence=0.999, clock=clock)
    assert result.ratio("b").verdict == "no difference"


def test_interval_touching_one_is_no_difference():
    assert timing.Ratio(1.2, 1.0, 1.4, 0.95).verdict == "no difference"
    assert timing.Ratio(0.9, 0.8, 1.0, 0.95).verdict == "no difference"
    assert timing.Ratio(1.2, 1.01, 1.4, 0.95).verdict == "faster"
    assert timing.Ratio(0.9, 0.8, 0.99, 0.95).verdict == "slower"


def test_budget_sets_the_rounds_before_they_run():
    def rounds_within(seconds, wanted):
        clock, seen = FakeClock(), []
        contenders = [timing.Contender(name, clock.work(10_000_000)) for name in "ab"]
        result = timing.compare(
            contenders,
            rounds=wanted,
            max_seconds=seconds,
            clock=clock,
            on_round=lambda done, planned: seen.append((done, planned)),
        )
        assert seen == [(i + 1, result.rounds) for i in range(result.rounds)]
        return result.rounds

    assert rounds_within(None, 31) == 31
    assert rounds_within(0.2, 31) == 10  # 20 ms a round
    assert rounds_within(0.01, 31) == 6  # never fewer
    assert rounds_within(9.0, 8) == 8


def test_scope_is_entered_outside_the_clock():
    clock, entered = FakeClock(), []

    @contextmanager
    def scope():
        clock.now += 10**9
        entered.append(clock.now)
        yield
        clock.now += 10**9

    contenders = [
        timing.Contender("a", clock.work(5_000_000)),
        timing.Contender("b", clock.work(5_000_000), scope),
    ]
    result = timing.compare(contenders, rounds=6, clock=clock)
    assert result.ratio("b").value == pytest.approx(1.0)
    assert len(entered) >= 6 + 1  # the warm-up goes into it too


def test_refusals_of_compare():
    one = timing.Contender("a", lambda: None)
    with pytest.raises(ValueError, match="contenders: got the names"):
        timing.compare([one])
    with pytest.raises(ValueError, match="distinct"):
        timing.compare([one, one])
    with pytest.raises(ValueError, match="rounds: got 5, needs at least 6"):
        timing.compare([one, timing.Contender("b", lambda: None)], rounds=5)


def test_a_clock_that_stands_still_ends():
    stuck = [timing.Contender(name, lambda: None) for name in "ab"]
    result = timing.compare(stuck, rounds=6, min_seconds=1.0, clock=lambda: 7)
    assert result.ratio("b").verdict == "no difference"


def test_as_dict_is_json_and_complete():
    clock = FakeClock()
    contenders = [timing.Contender(n, clock.work(t)) for n, t in (("a", 4e6), ("b", 2e6))]
    result = timing.compare(contenders, rounds=6, clock=clock)
    stored = json.loads(json.dumps(result.as_dict()))
    again = timing.Comparison(
        {name: tuple(s) for name, s in stored["samples_s"].items()}, stored["repeats"]
    )
    assert again.ratio("b") == result.ratio("b")


# ---- work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (7, 7), (5, 9), (9, 5), (0, 4), (4, 0), (1, 33)])
@pytest.mark.parametrize(
    "left, right", [(-1, -1), (-1, 0), (2, 0), (0, 0), (3, 2), (-1, 2), (1, -1)]
)
@pytest.mark.parametrize("align_end", [False, True])
def test_visible_pairs_are_those_of_the_mask(q_len, kv_len, left, right, align_end):
    offset = kv_len - q_len if align_end else 0
    i, j = torch.arange(q_len)[:, None] + offset, torch.arange(kv_len)
    mask = torch.ones(q_len, kv_len, dtype=torch.bool)
    if left >= 0:
        mask &= j >= i - left
    if right >= 0:
        mask &= j <= i + right
    pairs = pairs_of_band(q_len, kv_len, left=left, right=right, offset=offset)
    assert pairs == int(mask.sum())


@pytest.mark.parametrize("dim, v_dim", [(16, 16), (16, 24)])
def test_flops_are_those_torch_counts(dim, v_dim):
    """torch's counter on the math path, which stores the probs: one product fewer in backward."""
    q, k = torch.randn(2, 3, 8, dim), torch.randn(2, 3, 10, dim)
    v = torch.randn(2, 3, 10, v_dim)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = F.scaled_dot_product_attention(q, k, v)
        forward = counter.get_total_flops()
        out.backward(torch.ones_like(out))
    pairs = 2 * 3 * pairs_of_band(8, 10)
    sizes = {"batch": 2, "heads": 3, "kv_heads": 3, "q_len": 8, "kv_len": 10}
    sizes |= {"dim": dim, "v_dim": v_dim}
    assert work.attention_work(pairs=pairs, **sizes).flops == forward
    both = work.attention_work(pairs=pairs, **sizes, mode="fwdbwd").flops
    back = work.attention_work(pairs=pairs, **sizes, mode="bwd").flops
    assert forward + back == both
    assert both == counter.get_total_flops() + 2 * dim * pairs
    if dim == v_dim:
        assert both == 3.5 * forward


def test_bytes_by_hand():
    sizes = {"pairs": 0, "batch": 2, "heads": 4, "kv_heads": 2, "q_len": 3, "kv_len": 5}
    sizes |= {"dim": 8, "itemsize": 2}
    q = out = 2 * 4 * 3 * 8 * 2
    k = v = 2 * 2 * 5 * 8 * 2
    lse = 2 * 4 * 3 * 4
    assert work.attention_work(**sizes).bytes == q + k + v + out
    with_mask = work.attention_work(**sizes, mask_bytes=100, bias_bytes=1000)
    assert with_mask.bytes == q + k + v + out + 1100
    both = work.attention_work(**sizes, mask_bytes=100, bias_bytes=1000, mode="fwdbwd")
    forward = q + k + v + out + lse + 1100
    backward = (q + k + v) + (out + out + lse) + 1100 + (q + k + v) + 1000  # read, then written
    assert both.bytes == forward + backward
    alone = work.attention_work(**sizes, mask_bytes=100, bias_bytes=1000, mode="bwd")
    assert alone.bytes == backward


def test_peaks_are_positive():
    assert devices.peak_flops(torch.bfloat16, seconds=0.0) > 0
    assert devices.peak_bandwidth(1 << 16, seconds=0.0) > 0


# ---- A/A, and what a planted slowdown looks like ------------------------------------------------


def noisy_pair(rng: random.Random, slowdown: float, rounds: int = 21) -> timing.Ratio:
    """A comparison on a machine whose speed drifts slowly, for both sides alike, and jitters by
    some percent, with occasional interruptions, as observed on a shared two-core machine."""
    clock = FakeClock()

    def work_of(factor: float):
        def once(now: int) -> float:
            wander = 1 + 0.3 * math.sin(now / 3e8)
            jitter = rng.lognormvariate(0, 0.03) * (1.5 if rng.random() < 0.05 else 1.0)
            return 1e6 * factor * wander * jitter

        return once

    sides = [
        timing.Contender("base", clock.work(work_of(1.0))),
        timing.Contender("fastattn", clock.work(work_of(1 + slowdown))),
    ]
    return timing.compare(sides, rounds=rounds, clock=clock).ratio("fastattn")


def test_equal_sides_make_no_difference_in_95_of_100_cells():
    rng = random.Random(5)
    ratios = [noisy_pair(rng, 0.0) for _ in range(200)]
    noise = timing.noise_floor(ratios)
    assert noise.cells == 200 and noise.no_difference >= 190
    assert 0 < noise.median < 0.1 < 1 and noise.interval >= noise.median
    assert f"{noise.no_difference} of 200" in str(noise)


def test_a_tenth_more_time_is_caught_in_nine_of_ten_runs_and_none_never():
    from fastattn.benchmarks.report.history import Change

    def caught(slowdown: float, seed: int) -> bool:
        ratio = noisy_pair(random.Random(seed), slowdown)
        change = Change("case", "base", ratio.value, ratio.low, ratio.high)
        return change.regressed(0.05)

    assert sum(caught(0.10, seed) for seed in range(100)) >= 90
    assert sum(caught(0.0, seed) for seed in range(100)) == 0


def test_quantiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [timing.quantile(values, q) for q in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx(
        [1.0, 1.8, 3.0, 4.2, 5.0]
    )
    assert timing.quantile([7.0], 0.2) == 7.0


def test_merged_rounds_are_those_of_both():
    one = timing.Comparison({"a": (1.0,) * 6, "b": (2.0,) * 6}, {"a": 1, "b": 1})
    two = timing.Comparison({"a": (3.0,) * 6, "b": (3.0,) * 6}, {"a": 1, "b": 1})
    both = one.merged(two)
    assert both.rounds == 12 and both.ratio("b").value == pytest.approx(0.75)
    assert both.passes == (6, 6) and both.merged(one).passes == (6, 6, 6)
    with pytest.raises(ValueError, match="compares"):
        one.merged(timing.Comparison({"a": (1.0,)}, {"a": 1}))


def test_passes_that_disagree_make_no_difference():
    """All rounds of a process may agree and yet be typical only of that process."""
    fast, slow = (0.5,) * 30, (1.5,) * 30
    passes = [timing.Comparison({"a": fast, "b": slow}, {}), timing.Comparison(
        {"a": slow, "b": fast}, {}), timing.Comparison({"a": slow, "b": fast}, {})]  # fmt: skip
    assert passes[0].ratio("b").verdict == "slower"
    both = passes[0].merged(passes[1]).merged(passes[2])
    assert both.ratio("b").verdict == "no difference"
    assert (both.ratio("b").low, both.ratio("b").high) == pytest.approx((1 / 3, 3.0))
    agreed = passes[1].merged(passes[2])
    assert agreed.ratio("b").verdict == "faster"


def test_the_best_of_several_turns_sheds_interruptions():
    """Two of three calls are interrupted, for longer than they take."""

    def share_caught(turns: int) -> float:
        caught = 0
        for seed in range(40):
            rng, clock = random.Random(seed), FakeClock()

            def call(factor, rng=rng):
                return lambda now: 1e6 * factor + (rng.random() < 0.66) * rng.expovariate(1 / 3e6)

            sides = [timing.Contender("base", clock.work(call(1.0))),
                     timing.Contender("ours", clock.work(call(1.1)))]  # fmt: skip
            options = {"rounds": 300 // turns, "turns": turns, "min_seconds": 0, "clock": clock}
            ratio = timing.compare(sides, **options).ratio("ours")
            caught += ratio.verdict == "slower" and ratio.value < 1 / 1.05
        return caught / 40

    assert share_caught(5) >= 0.9 > share_caught(1)


def test_a_contender_may_bring_its_own_clock():
    asked = []

    def elsewhere(repeats: int) -> float:
        asked.append(repeats)
        return 5e6 * repeats

    clock = FakeClock()
    sides = [
        timing.Contender("here", clock.work(10_000_000)),
        timing.Contender("there", lambda: pytest.fail("not called"), sample=elsewhere),
    ]
    result = timing.compare(sides, rounds=6, clock=clock)
    assert result.ratio("there").value == pytest.approx(2.0)
    assert len(asked) >= 7

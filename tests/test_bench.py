"""The benchmark: statistics on fake clocks, counting of work, and its refusal to time a lie.

No test here asserts a time.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import random
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastattn

# isort: split
from fastattn.benchmarks import bench, rows, timing
from fastattn.benchmarks.rows import Case, Row

# ---- statistics -------------------------------------------------------------------------------


class FakeClock:
    """Nanoseconds that pass only when a contender says so."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now

    def work(self, nanoseconds):
        """A callable that takes so long; a function of the clock's time is asked each call."""

        def fn():
            self.now += int(nanoseconds(self.now) if callable(nanoseconds) else nanoseconds)

        return fn


def outside(count: int, k: int) -> Fraction:
    """P(the median lies outside [x_k, x_(n+1-k)]) by counting coin flips."""
    return 2 * sum(Fraction(math.comb(count, i), 2**count) for i in range(k))


@pytest.mark.parametrize("count", range(6, 40))
def test_interval_is_the_narrowest_that_covers(count):
    values = list(range(1, count + 1))  # so that a value is its own rank
    random.Random(count).shuffle(values)
    low, high, coverage = timing.median_interval(values)
    assert low + high == count + 1
    assert coverage == pytest.approx(float(1 - outside(count, low)))
    assert coverage >= 0.95
    narrower = low + 1
    assert narrower > count / 2 or 1 - outside(count, narrower) < 0.95


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
    assert len(pairs) == 6  # everybody runs after everybody else


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
    """The clock slows down fourfold during the run: medians move, the ratio stays."""
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
    # At 99.9 % the twenty seeds together are wrong once in fifty; these are not.
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
    assert len(entered) >= 6 + 1  # the warm-up enters it too


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
    pairs = timing.visible_pairs(q_len, kv_len, left=left, right=right, offset=offset)
    assert pairs == int(mask.sum())


@pytest.mark.parametrize("dim, v_dim", [(16, 16), (16, 24)])
def test_flops_are_those_torch_counts(dim, v_dim):
    """torch's counter on the math path, which keeps the weights: one product fewer in backward."""
    q, k = torch.randn(2, 3, 8, dim), torch.randn(2, 3, 10, dim)
    v = torch.randn(2, 3, 10, v_dim)
    for tensor in (q, k, v):
        tensor.requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        out = F.scaled_dot_product_attention(q, k, v)
        forward = counter.get_total_flops()
        out.backward(torch.ones_like(out))
    pairs = 2 * 3 * timing.visible_pairs(8, 10)
    sizes = {"batch": 2, "heads": 3, "kv_heads": 3, "q_len": 8, "kv_len": 10}
    sizes |= {"dim": dim, "v_dim": v_dim}
    assert timing.attention_work(pairs=pairs, **sizes).flops == forward
    both = timing.attention_work(pairs=pairs, **sizes, backward=True).flops
    assert both == counter.get_total_flops() + 2 * dim * pairs
    if dim == v_dim:
        assert both == 3.5 * forward


def test_bytes_by_hand():
    sizes = {"pairs": 0, "batch": 2, "heads": 4, "kv_heads": 2, "q_len": 3, "kv_len": 5}
    sizes |= {"dim": 8, "itemsize": 2}
    q = out = 2 * 4 * 3 * 8 * 2
    k = v = 2 * 2 * 5 * 8 * 2
    lse = 2 * 4 * 3 * 4
    assert timing.attention_work(**sizes).bytes == q + k + v + out
    with_mask = timing.attention_work(**sizes, mask_bytes=100, bias_bytes=1000)
    assert with_mask.bytes == q + k + v + out + 1100
    both = timing.attention_work(**sizes, mask_bytes=100, bias_bytes=1000, backward=True)
    forward = q + k + v + out + lse + 1100
    backward = (q + k + v) + (out + out + lse) + 1100 + (q + k + v) + 1000  # read, then written
    assert both.bytes == forward + backward


def test_peaks_are_positive():
    assert timing.peak_flops(torch.bfloat16, seconds=0.0) > 0
    assert timing.peak_bandwidth(1 << 16, seconds=0.0) > 0


# ---- rows -------------------------------------------------------------------------------------


def test_rows_cover_what_is_asked():
    names = [row.name for row in rows.ROWS]
    assert len(set(names)) == len(names)
    asked = {  # (group, dtype, backward, causal): lengths
        ("dense", "fp32", False, True): {512, 1024, 2048, 4096},
        ("train", "fp32", True, False): {512, 1024, 2048},
        ("train", "fp32", True, True): {512, 1024, 2048},
        ("decode", "fp32", False, False): {2048, 4096, 8192, 16384},
        ("decode", "bf16", False, False): {2048, 4096, 8192, 16384},
        ("short", "fp32", False, False): {16, 32, 64},
        ("short", "fp32", True, False): {16, 32, 64},
    }
    for (group, dtype, backward, causal), lengths in asked.items():
        found = {
            row.keys
            for row in rows.ROWS
            if (row.group, row.dtype, row.backward, row.causal) == (group, dtype, backward, causal)
        }
        assert found == lengths, group
    assert {row.group for row in rows.ROWS} >= {"half", "dropout", "bias", "window", "padding"}


TINY = {
    "plain": Row("tiny", 1.0, heads=2, kv_heads=2, q_len=24, dim=16),
    "causal": Row("tiny", 1.0, heads=2, kv_heads=2, q_len=24, dim=16, causal=True, backward=True),
    "decode": Row("tiny", 1.0, "bf16", 1, 4, 2, q_len=1, kv_len=40, dim=16),
    "padding": Row(
        "tiny", 1.0, batch=2, heads=2, kv_heads=2, q_len=24, dim=16, padding=True, backward=True
    ),
    "bias": Row("tiny", 1.0, heads=2, kv_heads=2, q_len=24, dim=16, bias=True, backward=True),
    "window": Row("tiny", 1.0, heads=2, kv_heads=2, q_len=40, dim=16, window=8),
    "dropout": Row(
        "tiny", 1.0, heads=2, kv_heads=2, q_len=24, dim=16, causal=True, dropout=0.1, backward=True
    ),
    "half": Row("tiny", 1.0, "fp16", heads=2, kv_heads=2, q_len=24, dim=16, backward=True),
}


@pytest.fixture
def quick(monkeypatch):
    """The shortest run that is still a run."""
    monkeypatch.setitem(bench.LEVELS, "quick", (6, 0.0))
    monkeypatch.setattr(timing, "peak_flops", lambda dtype, seconds: 1e11)
    monkeypatch.setattr(timing, "peak_bandwidth", lambda size, seconds: 1e10)


@pytest.mark.parametrize("name", TINY)
def test_each_kind_of_row_is_right_and_timed(name, quick):
    result = bench.measure(TINY[name], "quick")
    assert result.red is None
    assert 0 < result.errors.fastattn < 0.02 and result.errors.excess <= 1
    assert result.errors.heads == list(range(TINY[name].kv_heads))
    assert result.comparison.rounds == 6
    assert result.fastattn_backend in ("cpu", "reference")


def test_pairs_of_a_row_are_those_its_mask_shows():
    for row in TINY.values():
        case = Case(row)
        visible = torch.ones(row.batch, row.heads, row.q_len, row.keys, dtype=torch.bool)
        if row.causal:
            visible &= torch.ones(row.q_len, row.keys, dtype=torch.bool).tril()
        if case.mask is not None:
            visible &= case.mask
        assert case.work().pairs == int(visible.sum()), row.name


def test_torch_backend_is_named():
    assert Case(TINY["plain"]).torch_backend() == "flash"
    assert Case(TINY["dropout"]).torch_backend() == "math"
    assert Case(TINY["bias"]).torch_backend() == "math"


def test_large_rows_check_some_heads():
    row = Row("big", 1.0, q_len=4096)
    assert bench._checked_heads(row) == [0, 7]
    assert bench._checked_heads(Row("decode", 1.0, "bf16", 1, 32, 8, 1, 2048)) == list(range(8))


def test_a_peak_is_the_most_ever_seen(monkeypatch):
    seen = iter([3e10, 9e10, 5e10])
    monkeypatch.setattr(timing, "peak_flops", lambda dtype, seconds: next(seen))
    machine = bench.Machine({})
    for _ in range(3):
        machine.measure_peaks({"fp32"}, set())
    assert machine.flops == {"fp32": 9e10}


def test_half_precision_is_held_to_the_better_peak():
    work = timing.Work(pairs=1, flops=10**9, bytes=1)
    machine = bench.Machine({}, {"fp32": 1e11, "bf16": 2e10}, {1 << 20: 1e10})
    assert machine.roof(TINY["decode"], work) == ("compute", 0.01)
    machine.flops["bf16"] = 2e11
    assert machine.roof(TINY["decode"], work) == ("compute", 0.005)
    assert machine.roof(TINY["plain"], timing.Work(1, 1, 1 << 20))[0] == "memory"


def off_by(amount):
    def call(q, k, v, *args, **kwargs):
        return F.scaled_dot_product_attention(q, k, v, *args, **kwargs) + amount

    return call


def refuses(*args, **kwargs):
    raise ValueError("q: nothing pleases me\nreally")


@pytest.mark.parametrize(
    "call, says",
    [
        (off_by(1e-3), "wrong out: "),
        (off_by(float("nan")), "wrong out: NaN or infinity"),
        (refuses, "ValueError: q: nothing pleases me"),
    ],
)
def test_a_wrong_row_is_red_and_has_no_number(call, says, quick, monkeypatch):
    monkeypatch.setattr(fastattn, "scaled_dot_product_attention", call)
    result = bench.measure(TINY["plain"], "quick")
    assert says in result.red and "really" not in result.red
    assert result.comparison is None
    machine = bench.Machine(bench.machine_facts())
    machine.measure_peaks({"fp32"}, {bench.MEMORY, bench._working_set(result.work)})
    entry = bench._row_json(result, machine)
    assert not {"torch_ms", "fastattn_ms", "ratio", "gflops"} & entry.keys()
    console = Console(record=True, width=170, file=io.StringIO())
    bench.print_table([result], machine, console)
    assert "RED" in console.export_text()


def test_a_wrong_gradient_is_red(quick, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.001 * grad

    def call(q, k, v, *args, **kwargs):
        return F.scaled_dot_product_attention(q, k, Wrong.apply(v), *args, **kwargs)

    monkeypatch.setattr(fastattn, "scaled_dot_product_attention", call)
    assert "wrong dv: " in bench.measure(TINY["causal"], "quick").red


# ---- command line and JSON --------------------------------------------------------------------


@pytest.fixture
def tiny_rows(monkeypatch, quick):
    monkeypatch.setattr(bench, "ROWS", (TINY["plain"], TINY["window"], TINY["decode"]))


def test_main_prints_and_writes(tiny_rows, tmp_path, capsys):
    target = tmp_path / "new" / "bench.json"
    threads = torch.get_num_threads()
    assert bench.main(["--quick", "--threads", "1", "--json", str(target)]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    for row in bench.ROWS:
        assert row.name in printed
    data = json.loads(target.read_text())
    assert data["schema"] == 1 and data["level"] == "quick"
    facts = {"cpu", "cores", "threads", "torch", "isa", "fastattn", "python", "date"}
    assert facts <= data["machine"].keys() and data["machine"]["threads"] == 1
    assert data["peak"]["flops"]["fp32"] == 1e11
    for entry, row in zip(data["rows"], bench.ROWS, strict=True):
        assert entry["name"] == row.name and entry["floor"] == row.floor and entry["red"] is None
        assert entry["torch_backend"] == "flash"
        assert entry["ratio"]["low"] <= entry["ratio"]["value"] <= entry["ratio"]["high"]
        seconds = entry["fastattn_ms"] / 1e3
        assert entry["gflops"] == pytest.approx(entry["work"]["flops"] / seconds / 1e9)
        least = max(entry["work"]["flops"] / 1e11, entry["work"]["bytes"] / 1e10)
        assert entry["percent_of_peak"] == pytest.approx(100 * least / seconds)
        assert len(entry["comparison"]["samples_s"]["torch"]) == 6


def test_main_selects_and_refuses_rows(tiny_rows, capsys):
    assert bench.main(["--rows", "window", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [TINY["window"].name]
    assert bench.main(["--rows", "no such row"]) == 2
    assert "no row matches 'no such row'" in capsys.readouterr().err
    for bad, says in ((["--rows", "("], "--rows"), (["--threads", "0"], "needs at least 1")):
        with pytest.raises(SystemExit) as stop:
            bench.main(bad)
        assert stop.value.code == 2 and says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        bench.main(["--quick", "--full"])


def test_main_fails_when_a_row_is_red(tiny_rows, monkeypatch, capsys):
    monkeypatch.setattr(fastattn, "scaled_dot_product_attention", off_by(1.0))
    assert bench.main(["--quick"]) == 1
    assert "RED" in capsys.readouterr().out


def test_pytest_benchmark_can_drive_a_row(request):
    pytest.importorskip("pytest_benchmark")
    benchmark = request.getfixturevalue("benchmark")
    (out,) = benchmark.pedantic(Case(TINY["plain"]).fastattn(), rounds=2)
    assert out.shape == (1, 2, 24, 16)

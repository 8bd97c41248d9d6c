"""Cases, competitors, and the check that comes before timing. No test here asserts a time."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from bench_data import SMALL, TINY
from fastattn.benchmarks import competitors, suites
from fastattn.benchmarks.cases import AttentionCase, Problem, eager
from fastattn.benchmarks.end_to_end import WORKLOADS, Built, Workload
from fastattn.benchmarks.measure import devices, machine, protocol, timing
from fastattn.benchmarks.measure.check import checked_heads, names_of

import fastattn
from fastattn.backends import registry

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
SDPA = competitors.named("sdpa")


@pytest.fixture
def quick(monkeypatch):
    """The shortest possible run."""
    monkeypatch.setitem(protocol.LEVELS, "quick", (6, 0.0))
    monkeypatch.setattr(devices, "peak_flops", lambda dtype, seconds, device: 1e11)
    monkeypatch.setattr(devices, "peak_bandwidth", lambda size, seconds, device: 1e10)


def measured(case, vs=SDPA, **options):
    return protocol.measure(case, protocol.Plan(devices.Cpu(), vs, "quick", **options))


# ---- selecting cases ----------------------------------------------------------------------------


def test_cases_cover_the_required_shapes():
    names = [case.name for case in suites.CASES]
    assert len(set(names)) == len(names)
    required = {  # (group, dtype, mode, causal): lengths
        ("dense", "fp32", "fwd", True): {512, 1024, 2048, 4096},
        ("train", "fp32", "fwdbwd", False): {512, 1024, 2048},
        ("train", "fp32", "fwdbwd", True): {512, 1024, 2048},
        ("decode", "fp32", "fwd", False): {2048, 4096, 8192, 16384},
        ("decode", "bf16", "fwd", False): {2048, 4096, 8192, 16384},
        ("short", "fp32", "fwd", False): {16, 32, 64},
        ("short", "fp32", "fwdbwd", False): {16, 32, 64},
    }
    for (group, dtype, mode, causal), lengths in required.items():
        found = {
            case.keys
            for case in suites.CASES
            if (case.group, case.dtype, case.mode, case.causal) == (group, dtype, mode, causal)
        }
        assert found == lengths, group
    assert set(suites.groups()) >= {"half", "dropout", "bias", "window", "padding", "endtoend"}


def test_every_model_and_sweep_makes_distinct_rows():
    assert set(suites.MODELS) == {
        *("bert-base", "gpt2", "llama3-8b", "t5-base", "vit-l", "whisper-small"),
    }
    assert set(suites.SWEEPS) == {"seqlen", "head_dim", "mask", "dtype", "batch"}
    for model in (None, *suites.MODELS):
        for sweep in (None, *suites.SWEEPS):
            cases = suites.select(model=model, sweep=sweep)
            names = [case.name for case in cases]
            assert len(set(names)) == len(names) >= 2, (model, sweep)
    assert {case.dim for case in suites.select(sweep="head_dim")} >= {64, 80, 256}
    assert {case.keys for case in suites.select(sweep="seqlen", model="llama3-8b")} >= {64, 4096}
    masks = suites.select(sweep="mask", model="bert-base")
    assert {case.group for case in masks} == {"bert-base-mask"}


def test_select_by_suite_group_modes_and_pattern():
    assert {c.group for c in suites.select("dense")} == {"dense"}
    assert suites.select("endtoend") == list(WORKLOADS)
    assert len(suites.select()) == len(suites.CASES) + len(WORKLOADS)
    both = suites.select("dense", modes=["fwd", "bwd"], pattern="S512")
    assert [c.mode for c in both] == ["fwd", "bwd"] * 2
    assert [c.floor for c in both if c.mode == "bwd"] == [
        0.0,
        0.0,
    ]  # only what was selected
    with pytest.raises(ValueError, match="suite: 'dens' is not known; accepted are all, attention"):
        suites.select("dens")
    with pytest.raises(ValueError, match="'dense' and --model gpt2 both choose cases"):
        suites.select("dense", model="gpt2")
    with pytest.raises(ValueError, match="--modes: 'fw' is not known"):
        suites.select("dense", modes=["fw"])


def test_the_most_informative_rows_come_first():
    order = suites.by_information(suites.CASES)
    assert set(order) == set(suites.CASES)
    variants = {suites.variant(case) for case in suites.CASES}
    first = order[: len(variants)]
    assert {suites.variant(case) for case in first} == variants  # one of each before any second
    dense = [case for case in first if case.name.startswith("dense fp32 fwd H8 D64")]
    assert {case.keys for case in dense} == {1024}  # the middle length
    weak = suites.CASES[-1].name
    assert suites.by_information(suites.CASES, [weak])[0].name == weak


def test_a_row_refuses_what_it_does_not_know():
    modes = "fwd, bwd, fwdbwd, jvp, double"
    with pytest.raises(ValueError, match=f"mode: got 'train', accepted are {modes}"):
        AttentionCase("x", mode="train")
    with pytest.raises(ValueError, match="dtype: got 'fp8'"):
        AttentionCase("x", dtype="fp8")


# ---- the tensors of a case ----------------------------------------------------------------------


def seen_by(problem: Problem) -> torch.Tensor:
    case = problem.case
    visible = torch.ones(case.batch, case.heads, case.q_len, case.keys, dtype=torch.bool)
    for mask in competitors.visible(problem):
        if mask is not None:
            visible &= mask
    return visible


@pytest.mark.parametrize("name", TINY)
def test_pairs_of_a_row_are_those_its_masks_show(name):
    problem = Problem(TINY[name])
    assert problem.work().pairs == int(seen_by(problem).sum())


@pytest.mark.parametrize("name", [n for n in TINY if not TINY[n].dropout])
@pytest.mark.parametrize("who", ["sdpa", "math", "eager"])
def test_every_way_to_write_a_row_computes_the_same(name, who):
    """To rounding in float64, every competitor computes what fastattn computes."""
    problem = Problem(TINY[name]).double()
    competitor = competitors.BY_NAME[who]
    if competitor.why_not(problem):
        pytest.skip(competitor.why_not(problem))
    if who == "sdpa" and name in ("jvp", "double"):
        pytest.skip("torch's kernel for the CPU has neither derivative")
    steps = [problem.step(forward) for forward in (competitor.forward(problem), problem.fastattn())]
    for theirs, ours, what in zip(*(step() for step in steps), names_of(problem.case)):
        assert torch.allclose(theirs, ours, rtol=1e-9, atol=1e-9), what


def test_eager_is_attention_by_hand():
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    mask, bias = torch.rand(5, 5) < 0.7, torch.randn(5, 5, dtype=torch.float64)
    mask |= torch.eye(5, dtype=torch.bool)
    scores = 3 * torch.tanh(q @ k.mT / 2 / 3) + bias
    want = torch.where(mask, scores, -torch.inf).softmax(-1) @ v
    assert torch.allclose(eager(q, k, v, masks=(mask,), biases=(bias,), softcap=3.0), want)


def test_large_rows_check_some_heads():
    assert checked_heads(AttentionCase("big", q_len=4096)) == [0, 7]
    assert checked_heads(AttentionCase("middle", q_len=1024)) == list(range(8))
    assert checked_heads(AttentionCase("middle", q_len=1024), 1 << 22) == [0, 2, 5, 7]
    assert checked_heads(AttentionCase("decode", 1.0, "bf16", 1, 32, 8, 1, 2048)) == list(range(8))


# ---- who competes -------------------------------------------------------------------------------


def test_what_ran_is_what_torch_says_it_chooses():
    for name in ("plain", "causal", "padding", "dropout", "bias", "half"):
        problem = Problem(TINY[name])
        arguments = competitors._sdpa_arguments(problem)
        chosen = competitors.torch_backend(
            *(problem.q, problem.k, problem.v, arguments["attn_mask"]),
            *(arguments["dropout_p"], arguments["is_causal"], problem.gqa),
        )
        assert competitors.ran(competitors._sdpa(problem)) == chosen, name
    assert competitors.ran(competitors._sdpa(Problem(TINY["plain"]))) == "flash"
    held = competitors._by(competitors.SDPBackend.MATH)
    assert competitors.ran(held(Problem(TINY["plain"]))) == "math"
    assert competitors.ran(competitors._eager(Problem(TINY["plain"]))) == "math"


def test_missing_competitors_say_so_and_the_rest_goes_on(quick):
    result = measured(SMALL, competitors.named("flash_attn,sdpa,xformers"))
    assert result.red is None
    assert "CUDA devices only" in result.sides["flash_attn"].why_not
    assert set(result.comparison.samples) == {"fastattn", "sdpa"}
    missing = competitors._package("no_such_module", "no-such-package")
    assert missing("cuda") == (
        "the package no-such-package is not installed (pip install no-such-package)"
    )


def test_rows_that_a_competitor_cannot_run(quick):
    result = measured(TINY["softcap"], competitors.named("sdpa,eager"))
    assert result.sides["sdpa"].why_not == "scaled_dot_product_attention has no softcap"
    assert result.comparison.samples.keys() == {"fastattn", "eager"}
    flex = competitors.BY_NAME["flex"]
    assert flex.why_not(Problem(TINY["dropout"])) == "flex_attention has no dropout"
    assert "no backward on a CPU" in flex.why_not(Problem(TINY["causal"]))
    assert "fp16 and bf16" in competitors.BY_NAME["flash_attn"].why_not(Problem(SMALL))
    assert "no argument for padding" in competitors.BY_NAME["xformers"].why_not(
        Problem(AttentionCase("x", dtype="bf16", padding=True))
    )


def test_unknown_competitors_are_refused():
    with pytest.raises(ValueError, match="--vs: 'cudnn' is not known; accepted are sdpa, math"):
        competitors.named("sdpa,cudnn")
    with pytest.raises(ValueError, match="each once"):
        competitors.named("sdpa,sdpa")
    assert [c.name for c in competitors.named("eager, sdpa")] == ["eager", "sdpa"]


# ---- checked, then timed ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_each_kind_of_row_is_right_and_timed(name, quick):
    result = measured(TINY[name], competitors.named("sdpa,eager"))
    assert result.red is None
    errors = result.sides["fastattn"].errors
    assert 0 < errors.largest < 0.02 and errors.mean <= errors.largest and errors.excess <= 1
    assert errors.heads == list(range(TINY[name].kv_heads))
    assert result.comparison.rounds == 6
    backend = result.sides["fastattn"].backend.split(",")[0]
    assert backend in {backend.name for backend in registry.BACKENDS}
    assert result.sides["eager"].errors.largest < 0.05


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
    result = measured(SMALL)
    assert says in result.red and "really" not in result.red
    assert result.comparison is None


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
    for name in ("causal", "back"):
        assert "wrong dv: " in measured(TINY[name]).red


def test_a_wrong_competitor_gets_no_number_and_the_others_do(quick):
    wrong = competitors.Competitor("eager", "", lambda problem: lambda: 2 * problem.q)
    result = measured(SMALL, [wrong, *SDPA])
    assert "wrong: its largest error" in result.sides["eager"].why_not
    assert result.red is None and set(result.comparison.samples) == {"fastattn", "sdpa"}


def test_a_competitor_that_raises_or_runs_out_of_memory(quick):
    def greedy(problem):
        return lambda: torch.empty(1 << 60)

    def broken(problem):
        raise RuntimeError("no compiler\nmore")

    sides = [competitors.Competitor("flex", "", broken), competitors.Competitor("math", "", greedy)]
    result = measured(SMALL, [*sides, *SDPA])
    assert result.sides["flex"].why_not == "RuntimeError: no compiler"
    assert result.sides["math"].why_not == "out of memory"
    assert set(result.comparison.samples) == {"fastattn", "sdpa"}


def test_what_would_not_fit_is_not_tried(quick, monkeypatch):
    monkeypatch.setattr(devices.Cpu, "free_memory", lambda self: 1000)
    result = measured(SMALL, competitors.named("sdpa,eager"))
    assert re.match(
        "out of memory: it keeps .* GiB of probabilities", result.sides["eager"].why_not
    )
    assert set(result.comparison.samples) == {"fastattn", "sdpa"}


def test_a_row_that_does_not_fit_is_a_result(quick, monkeypatch):
    def tensors(*args, **kwargs):
        return torch.empty(1 << 60)

    monkeypatch.setattr(torch, "randn", tensors)
    result = measured(SMALL)
    assert result.red == "out of memory" and result.comparison is None


def test_a_thing_against_itself(quick):
    result = measured(SMALL, aa=True, memory=False)
    assert list(result.comparison.samples) == ["sdpa", "sdpa again"]


def test_backend_names_come_from_the_table(quick, monkeypatch):
    monkeypatch.setenv("FASTATTN_BACKEND", "reference")
    assert measured(TINY["causal"]).sides["fastattn"].backend == "reference"


# ---- peaks --------------------------------------------------------------------------------------


def test_a_peak_is_the_most_ever_seen(monkeypatch):
    seen = iter([3e10, 9e10, 5e10])
    monkeypatch.setattr(devices, "peak_flops", lambda dtype, seconds, device: next(seen))
    found = machine.Machine({})
    for _ in range(3):
        found.measure_peaks({"fp32"}, set())
    assert found.flops == {"fp32": 9e10}


def test_half_precision_is_held_to_the_better_peak():
    from fastattn.core.work import Work

    work = Work(pairs=1, flops=10**9, bytes=1)
    found = machine.Machine({}, {"fp32": 1e11, "bf16": 2e10}, {1 << 20: 1e10})
    assert found.roof("bf16", work) == ("compute", 0.01)
    found.flops["bf16"] = 2e11
    assert found.roof("bf16", work) == ("compute", 0.005)
    assert found.roof("fp32", Work(1, 1, 1 << 20))[0] == "memory"


# ---- whole models -------------------------------------------------------------------------------


def linear_pair(wrong: float = 0.0) -> Built:
    one, other = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
    other.load_state_dict(one.state_dict())
    x = torch.randn(4, 6)

    def run(model):
        bent = wrong if model is other else 0.0
        return (model(x.to(model.weight.dtype)) * (1 + bent)).square().mean()

    return Built({"torch": one, "fastattn": other}, run, 4)


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_workloads_are_checked_then_timed(mode, quick):
    result = measured(Workload("tiny", linear_pair, mode=mode))
    assert result.red is None and result.tokens == 4
    assert list(result.comparison.samples) == ["fastattn", "torch"]
    wrong = measured(Workload("tiny", lambda: linear_pair(1e-4), mode=mode))
    what = "gradients" if mode == "fwdbwd" else "output"
    assert f"wrong {what}: largest error" in wrong.red and wrong.comparison is None


def test_a_workload_names_what_is_missing(quick):
    result = measured(Workload("tiny", linear_pair, needs=("no_such_module",)))
    assert result.red.startswith("not installed: no_such_module")


def test_the_plain_llama_block_is_fastattns(monkeypatch):
    from fastattn.benchmarks import end_to_end

    monkeypatch.setattr(end_to_end, "LLAMA", {"dim": 32, "heads": 4, "kv_heads": 2, "hidden": 48})
    monkeypatch.setattr(end_to_end, "HELD", 9)
    for build in (end_to_end._prefill, end_to_end._decode):
        built = build()
        with torch.no_grad():
            outs = [built.run(model.eval()) for model in built.models.values()]
        assert torch.allclose(*outs, atol=1e-5)
        assert outs[0].shape[1] == built.tokens


def test_pytest_benchmark_can_drive_a_row(request):
    pytest.importorskip("pytest_benchmark")
    benchmark = request.getfixturevalue("benchmark")
    problem = Problem(SMALL)
    (out,) = benchmark.pedantic(problem.step(problem.fastattn()), rounds=2)
    assert out.shape == (1, 2, 24, 16)


def test_the_interval_of_rounds_is_there(quick):
    ratio = measured(SMALL).comparison.ratio("fastattn", baseline="sdpa")
    assert ratio.low <= ratio.p20 <= ratio.value <= ratio.p80 <= ratio.high
    assert timing.noise_floor([ratio]).cells == 1

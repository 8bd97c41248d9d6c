"""The suite for pytest-benchmark: pytest benchmarks --benchmark-autosave, --benchmark-compare, ...

test_model_shape times each case of suites.MODELS with fastattn and with torch, one group per case.
The two are first measured interleaved, by this package's own protocol: extra_info has that ratio
with its interval, the errors, the rates and the kernel that ran. test_option times the tests' cases
(tests/support/cases.py), one option each, on small tensors: it shows the overhead of a call. A
wrong result fails and is not timed."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from fastattn.benchmarks import competitors, suites
from fastattn.benchmarks.cases import AttentionCase, Problem
from fastattn.benchmarks.measure import devices, protocol
from fastattn.benchmarks.measure.machine import MEMORY, Machine, machine_facts, working_set
from fastattn.benchmarks.report import record

import fastattn
from fastattn.core.reference import reference
from fastattn.core.tolerance import Tolerance

try:
    from cases import select
except ModuleNotFoundError:  # an installed package has no tests beside it
    select = None

pytest.importorskip("pytest_benchmark")
ROUNDS = 7
SHAPES = [case for cases in suites.MODELS.values() for case in cases]
DEVICE = devices.default_device()


@cache
def machine() -> Machine:
    found = Machine(machine_facts(DEVICE))
    found.measure_peaks({"fp32", "bf16", "fp16"}, {MEMORY}, seconds=0.2)
    return found


@cache
def interleaved(attention_case: AttentionCase) -> dict:
    """The case's entry in a run, as `bench` measures it."""
    device = devices.DEVICES[DEVICE]()
    with device:
        plan = protocol.Plan(device, competitors.named("sdpa"), "quick")
        result = protocol.measure(attention_case, plan)
    if result.work:
        machine().measure_peaks({"fp32"}, {working_set(result.work)}, seconds=0.03)
    return record.entry_json(result, machine(), [])


@pytest.mark.parametrize("side", [protocol.OURS, "sdpa"])
@pytest.mark.parametrize("attention_case", SHAPES, ids=lambda case: case.name.replace(" ", "-"))
def test_model_shape(attention_case: AttentionCase, side: str, benchmark) -> None:
    found = interleaved(attention_case)
    if found["red"]:
        pytest.fail(f"{attention_case.name}: {found['red']}")
    mine = found["sides"][side]
    if mine["why_not"]:
        pytest.skip(f"{side}: {mine['why_not']}")
    benchmark.group = attention_case.name
    benchmark.extra_info.update({key: value for key, value in mine.items() if key != "errors"})
    benchmark.extra_info["error"] = mine["errors"]["largest"]
    benchmark.extra_info["formula"] = found["formula"]
    benchmark.extra_info["ratio"] = found["versus"]["sdpa"]
    benchmark.extra_info["interleaved_rounds"] = found["comparison"]["rounds"]
    problem = Problem(attention_case, DEVICE)
    maker = Problem.fastattn if side == protocol.OURS else competitors.BY_NAME[side].forward
    step, device = problem.step(maker(problem)), devices.DEVICES[DEVICE]()
    repeats = found["comparison"]["repeats"][side]

    def whole() -> None:
        step()
        device.synchronize()

    benchmark.pedantic(whole, rounds=ROUNDS, iterations=repeats, warmup_rounds=1)


@pytest.mark.skipif(select is None, reason="tests/support/cases.py is not beside this folder")
@pytest.mark.parametrize("case", select("alone") if select else [], ids=lambda case: case.name)
def test_option(case, benchmark) -> None:
    if case.function is None:
        pytest.skip("no public function takes this case")
    problem = case.make(torch.float32)
    tensors, options = case.call(problem)
    function = getattr(fastattn, case.function)
    out = function(*tensors, **options)
    (want, lse), (plain, _) = (reference(*p) for p in (problem.to(torch.float64), problem))
    if case.packed:
        want, plain = (x[0].transpose(0, 1) for x in (want, plain))
        lse = lse[0].T
    tolerance = Tolerance(*(x.nan_to_num() for x in problem[:3]), problem.spec.scale, lse)
    compared = tolerance.compare("out", out, want, plain)
    assert compared.passed, f"wrong, so not timed: {compared}"
    benchmark.group = "one option each"
    benchmark.extra_info.update({"error": compared.error, "backend": _backend(tensors, options)})
    benchmark.pedantic(function, tensors, options, rounds=ROUNDS, iterations=5, warmup_rounds=1)


def _backend(tensors, options: dict) -> str | None:
    return fastattn.explain(*tensors, **options).backend

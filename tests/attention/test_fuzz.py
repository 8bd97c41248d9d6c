"""The fuzzer runs, and finds planted faults."""

from __future__ import annotations

import random
from dataclasses import replace

import fuzz
import pytest
from fuzz_cases import WRONG, Case, draw

from fastattn import attention

SECONDS = 8  # of each seed: a minute in all, in parts that workers can share


@pytest.mark.native
@pytest.mark.parametrize("seed", range(6))
def test_random_calls_are_right(seed):
    counts, found = fuzz.fuzz(seed, SECONDS)
    assert not found, found
    assert counts["right"] > counts["refused"]


@pytest.mark.native
@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 110))
def test_more_random_calls_are_right(seed):
    counts, found = fuzz.fuzz(seed, 60)
    assert not found, found


def wider_window(run):
    """A planted fault: one key too many on the left of a window."""

    def wrong(call, row):
        left = call.spec.left + (call.spec.left >= 0)
        return run(call.but(spec=replace(call.spec, left=left)), row)

    return wrong


@pytest.mark.native
def test_a_planted_fault_is_found_and_shrunk(monkeypatch):
    names = attention.__globals__
    monkeypatch.setitem(names, "run", wider_window(names["run"]))
    # A call alike to an earlier one would go past run().
    monkeypatch.setitem(names, "simple_plan", lambda *given: (None, None))
    case = Case(call="attention", seed=3, batch=2, group=2, q_len=17, kv_len=33, dim=8, v_dim=5,
                layout="bshd", window=(2, None), mask="bqk", softcap=3.0, lse=True)  # fmt: skip
    assert fuzz.failure(case)
    small = fuzz.shrink(case)
    assert small.window and small.q_len <= 2 and small.kv_len <= 5
    assert (small.batch, small.group, small.mask, small.softcap) == (1, 1, "", 0.0)
    lines = fuzz.reproduction(small)
    assert lines.startswith("# Wrong: ") and len(lines.splitlines()) <= 6
    with pytest.raises(fuzz.Wrong):
        exec(lines, {})
    rng = random.Random(0)
    drawn = (c for c in iter(lambda: draw(rng), None) if c.window and c.call == "attention")
    assert any(fuzz.failure(next(drawn)) for _ in range(60))


def longer_ranges(run):
    """A fault: one key too many at the end of a range."""

    def wrong(call, row):
        end = call.operands.key_end
        if end is None:
            return run(call, row)
        return run(call.but(operands=replace(call.operands, key_end=end + 1)), row)

    return wrong


@pytest.mark.native
def test_a_fault_in_key_ranges_is_found(monkeypatch):
    assert fuzz.has(Case(ranges="random"), "ranges") and not fuzz.has(Case(), "ranges")
    names = attention.__globals__
    monkeypatch.setitem(names, "run", longer_ranges(names["run"]))
    rng = random.Random(0)
    drawn = (c for c in iter(lambda: draw(rng), None) if c.ranges and c.call == "attention")
    assert any(fuzz.failure(next(drawn)) for _ in range(60))


@pytest.mark.native
@pytest.mark.parametrize("wrong", WRONG)
def test_a_spoilt_call_must_be_refused(wrong):
    for call in fuzz.FUNCTIONS:
        case = Case(call=call, batch=2, kv_heads=2, group=2, q_len=3, kv_len=4, wrong=wrong)
        assert fuzz.check(case).startswith("refused: ")


def test_what_raises_otherwise_is_a_failure(monkeypatch):
    def crude(*args, **named):
        raise RuntimeError("out of range")

    monkeypatch.setitem(fuzz.FUNCTIONS, "attention", crude)
    assert fuzz.failure(Case()) == "RuntimeError: out of range"

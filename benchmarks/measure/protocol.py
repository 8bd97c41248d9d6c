"""Measures one case: opens it, checks it against float64, takes its memory, then times it. A wrong
result is not timed. A contender that cannot run says why, and the others are still measured."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import fastattn
from fastattn.core.work import Work

from ..cases import DTYPES, AttentionCase, Problem
from ..competitors import Competitor, ran
from ..end_to_end import Running, Workload
from . import timing
from .check import CHECKED_PAIRS, Errors, check, verdict
from .devices import is_out_of_memory
from .timing import Comparison, Contender

LEVELS = {  # at most this many rounds, and seconds of rounds, for each case
    "quick": (11, 0.8),
    "default": (21, 3.0),
    "full": (41, 8.0),
}
CHECKED = {"quick": 1 << 21}  # overrides check.CHECKED_PAIRS
OURS = "fastattn"
AGAIN = " again"  # A/A: the second of two equal contenders
OUT_OF_MEMORY = "out of memory"


@dataclass(slots=True)
class Side:
    """One contender on one case: how it runs, or why it does not."""

    name: str
    step: Callable[[], object] | None = None
    scope: Callable = nullcontext
    backend: str = "unknown"
    why_not: str | None = None
    errors: Errors | None = None
    memory: int | None = None  # peak bytes beyond those held before
    sample: Callable[[int], float] | None = None  # samples of another process (other_commit.py)
    close: Callable[[], None] = lambda: None

    @property
    def able(self) -> bool:
        return self.why_not is None


@dataclass(slots=True)
class Result:
    """The result of one case. `red` says why fastattn is wrong or cannot run; then nothing is
    timed."""

    case: object  # AttentionCase or Workload
    sides: dict[str, Side] = field(default_factory=dict)
    work: Work | None = None
    tokens: int | None = None
    red: str | None = None
    comparison: Comparison | None = None
    seconds: float = 0.0  # that the measurement took


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure a case."""

    device: object  # devices.Cpu or devices.Cuda
    competitors: Sequence[Competitor]
    level: str = "default"
    aa: bool = False  # the first competitor against itself, and nothing else
    extra: Callable[[object], list[Side]] = lambda case: []  # sides in other processes
    memory: bool = True
    noise: bool = True  # whether to measure the A/A cases too
    rounds: int = 0  # at most; 0: the level's
    turns: int = 1  # samples of each side in a round, of which the fastest counts


def measure(case: AttentionCase | Workload, plan: Plan) -> Result:
    """Checks a case, and times it if fastattn's result is right."""
    result = Result(case)
    try:
        open_case(result, plan)
        if result.red is None:
            _elsewhere(result, plan)
        if result.red is None:
            _memory(result, plan)
            _time(result, plan)
    except Exception as error:  # the other cases are still measured
        result.red = OUT_OF_MEMORY if is_out_of_memory(error) else _sentence(error)
        result.comparison = None
    finally:
        for side in result.sides.values():
            side.step, side.sample = None, None  # frees their tensors
            side.close()
        gc.collect()
    return result


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


# ---- opening ------------------------------------------------------------------------------------


def open_case(result: Result, plan: Plan) -> None:
    """Fills in the result's sides: each is ready and right, or has a sentence in why_not."""
    (_open_attention if isinstance(result.case, AttentionCase) else _open_workload)(result, plan)


def _open_attention(result: Result, plan: Plan) -> None:
    case, device = result.case, plan.device
    problem = Problem(case, device.name)
    result.work = problem.work()
    makers = {OURS: Problem.fastattn} | {c.name: c.forward for c in plan.competitors}
    forwards = {}
    ours = result.sides[OURS] = Side(OURS)
    for competitor in plan.competitors:
        side = result.sides[competitor.name] = Side(competitor.name)
        side.why_not = _why_not(competitor, problem, device)
    try:
        ours.backend = problem.fastattn_backend()
    except Exception as error:
        result.red = _sentence(error)
        return
    for name, make in makers.items():
        side = result.sides[name]
        if side.able:
            _prepare(
                side, problem, make, next((c for c in plan.competitors if c.name == name), None)
            )
            forwards[name] = side.step
    forwards = {name: f for name, f in forwards.items() if result.sides[name].able}
    pairs = CHECKED.get(plan.level, CHECKED_PAIRS)
    for name, found in check(problem, forwards, makers, pairs).items():
        _record(result, result.sides[name], found, problem.dtype)
    for name, forward in forwards.items():
        side = result.sides[name]
        side.step = problem.step(forward) if side.able else None
    if plan.aa:
        _against_itself(result, problem, plan.competitors[0])


def _why_not(competitor: Competitor, problem: Problem, device) -> str | None:
    why = competitor.missing(device.name) or competitor.why_not(problem)
    if why is None and problem.case.dropout and not competitor.checks_dropout:
        why = "its dropout cannot be checked against float64, so it gets no number"
    dense = competitor.dense or problem.case.dropout or problem.case.bias
    free = device.free_memory()
    if why is None and dense and free is not None and problem.dense_bytes() > 0.8 * free:
        why = (
            f"{OUT_OF_MEMORY}: it keeps {problem.dense_bytes() / 2**30:.1f} GiB of probabilities, "
            f"{free / 2**30:.1f} GiB are free"
        )
    return why


def _prepare(side: Side, problem: Problem, make: Callable, competitor: Competitor | None) -> None:
    """Puts the side's forward call into `step`, and the name of its kernel into `backend`."""
    try:
        side.step = make(problem)
        if competitor is not None:
            named = competitor.backend
            side.backend = named(problem, side.step) if named else ran(side.step)
    except Exception as error:
        side.why_not = OUT_OF_MEMORY if is_out_of_memory(error) else _sentence(error)


def _record(result: Result, side: Side, found: Errors | Exception, dtype) -> None:
    side.errors = None if isinstance(found, Exception) else found
    oom = isinstance(found, Exception) and is_out_of_memory(found)
    side.why_not = OUT_OF_MEMORY if oom else verdict(side.name, found, dtype)
    if side.name == OURS:
        result.red = side.why_not


def _against_itself(result: Result, problem: Problem, competitor: Competitor) -> None:
    """A/A: the same competitor twice, as two separately made calls."""
    first = result.sides[competitor.name]
    twin = Side(competitor.name + AGAIN, backend=first.backend, why_not=first.why_not)
    if first.able:
        twin.step = problem.step(competitor.forward(problem))
    result.sides = {competitor.name: first, twin.name: twin}


def _open_workload(result: Result, plan: Plan) -> None:
    workload = result.case
    why = workload.why_not(plan.device.name)
    if why is not None or plan.aa:
        result.red = why or "A/A runs take attention cases only"
        return
    running = Running(workload)
    result.tokens = running.built.tokens
    errors = running.check()  # before any training step, which changes the weights
    backends = {"torch": lambda: ran(running.steps["torch"]), OURS: _default_backend}
    for name in (OURS, "torch"):
        scope = running.built.scopes[name]
        result.sides[name] = Side(name, running.steps[name], scope, backends[name]())
        _record(result, result.sides[name], errors[name], DTYPES[workload.dtype])


def _default_backend() -> str:
    import torch

    x = torch.zeros(1, 1, 8, 64)
    found = fastattn.explain(x, x, x)
    return f"{found.backend}, {found.isa}" if found.isa else str(found.backend)


def _elsewhere(result: Result, plan: Plan) -> None:
    """Adds the sides of other processes, which check them there. A side with the name of a local
    one replaces it in the timing, and both must be right."""
    for side in plan.extra(result.case):
        local = result.sides.setdefault(side.name, side)
        if local is not side:
            local.sample, local.close = side.sample, side.close
            local.why_not = local.why_not or side.why_not
        if side.name == OURS:
            result.red = local.why_not


# ---- memory and time ----------------------------------------------------------------------------


def _memory(result: Result, plan: Plan) -> None:
    if not plan.memory:
        return
    for side in result.sides.values():
        if side.able and side.step is not None:
            with side.scope():
                side.memory = plan.device.peak_memory(side.step)


def _time(result: Result, plan: Plan) -> None:
    contenders = []
    for side in result.sides.values():
        if not side.able:
            continue
        if side.sample is not None:
            contenders.append(Contender(side.name, lambda: None, side.scope, side.sample))
        else:
            contenders.append(plan.device.contender(side.name, side.step, side.scope))
    if len(contenders) < 2:
        return
    rounds, seconds = LEVELS[plan.level]
    result.comparison = timing.compare(
        contenders, rounds=plan.rounds or rounds, turns=plan.turns, max_seconds=seconds
    )

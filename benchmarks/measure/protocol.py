"""One cell, measured: opened, checked against float64, its memory taken, then timed. Nothing that
is wrong gets a number; what cannot run says why and the others go on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import fastattn
from fastattn.core.work import Work

from ..cases import DTYPES, Case, Row
from ..competitors import Competitor, ran
from ..end_to_end import Running, Workload
from . import timing
from .check import CHECKED_PAIRS, Errors, check, verdict
from .devices import is_out_of_memory
from .timing import Comparison, Contender

LEVELS = {  # rounds at most, seconds of rounds a cell at most
    "quick": (11, 0.8),
    "default": (21, 3.0),
    "full": (41, 8.0),
}
CHECKED = {"quick": 1 << 21}  # scores compared with float64, where fewer than check.py's
OURS = "fastattn"
AGAIN = " again"  # A/A: the second of two equal contenders
OUT_OF_MEMORY = "out of memory"


@dataclass(slots=True)
class Side:
    """One contender on one cell: how it runs, or why it does not."""

    name: str
    step: Callable[[], object] | None = None
    scope: Callable = nullcontext
    backend: str = "unknown"
    why_not: str | None = None
    errors: Errors | None = None
    memory: int | None = None  # bytes beyond what was held, at the highest
    sample: Callable[[int], float] | None = None  # measured elsewhere (other_commit.py)
    close: Callable[[], None] = lambda: None

    @property
    def able(self) -> bool:
        return self.why_not is None


@dataclass(slots=True)
class Result:
    """A cell of the report. RED: fastattn is wrong or cannot run it; no number of speed then."""

    cell: object  # Row or Workload
    sides: dict[str, Side] = field(default_factory=dict)
    work: Work | None = None
    tokens: int | None = None
    red: str | None = None
    comparison: Comparison | None = None
    seconds: float = 0.0  # that measuring it took


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure a cell."""

    device: object  # of devices.py
    competitors: Sequence[Competitor]
    level: str = "default"
    aa: bool = False  # the first competitor against itself, and nothing else
    extra: Callable[[object], list[Side]] = lambda cell: []  # sides measured elsewhere
    memory: bool = True
    noise: bool = True  # whether A/A cells are measured too
    rounds: int = 0  # at most; 0: the level's
    turns: int = 1  # of each side in a round, the best of which counts


def measure(cell: Row | Workload, plan: Plan) -> Result:
    """Check a cell, and time it when it is right."""
    result = Result(cell)
    try:
        open_cell(result, plan)
        if result.red is None:
            _elsewhere(result, plan)
        if result.red is None:
            _memory(result, plan)
            _time(result, plan)
    except Exception as error:  # a cell that cannot run must not take the others with it
        result.red = OUT_OF_MEMORY if is_out_of_memory(error) else _sentence(error)
        result.comparison = None
    finally:
        for side in result.sides.values():
            side.step, side.sample = None, None  # their tensors go with them
            side.close()
        gc.collect()
    return result


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


# ---- opening ------------------------------------------------------------------------------------


def open_cell(result: Result, plan: Plan) -> None:
    """Fills the result's sides: able and right, or with a sentence."""
    (_open_row if isinstance(result.cell, Row) else _open_workload)(result, plan)


def _open_row(result: Result, plan: Plan) -> None:
    row, device = result.cell, plan.device
    case = Case(row, device.name)
    result.work = case.work()
    makers = {OURS: Case.fastattn} | {c.name: c.forward for c in plan.competitors}
    forwards = {}
    ours = result.sides[OURS] = Side(OURS)
    for competitor in plan.competitors:
        side = result.sides[competitor.name] = Side(competitor.name)
        side.why_not = _why_not(competitor, case, device)
    try:
        ours.backend = case.fastattn_backend()
    except Exception as error:
        result.red = _sentence(error)
        return
    for name, make in makers.items():
        side = result.sides[name]
        if side.able:
            _prepare(side, case, make, next((c for c in plan.competitors if c.name == name), None))
            forwards[name] = side.step
    forwards = {name: f for name, f in forwards.items() if result.sides[name].able}
    pairs = CHECKED.get(plan.level, CHECKED_PAIRS)
    for name, found in check(case, forwards, makers, pairs).items():
        _record(result, result.sides[name], found, case.dtype)
    for name, forward in forwards.items():
        side = result.sides[name]
        side.step = case.step(forward) if side.able else None
    if plan.aa:
        _against_itself(result, case, plan.competitors[0])


def _why_not(competitor: Competitor, case: Case, device) -> str | None:
    why = competitor.missing(device.name) or competitor.why_not(case)
    if why is None and case.row.dropout and not competitor.checks_dropout:
        why = "its dropout cannot be checked against float64, so it gets no number"
    dense = competitor.dense or case.row.dropout or case.row.bias
    free = device.free_memory()
    if why is None and dense and free is not None and case.dense_bytes() > 0.8 * free:
        why = (
            f"{OUT_OF_MEMORY}: it keeps {case.dense_bytes() / 2**30:.1f} GiB of weights, "
            f"{free / 2**30:.1f} GiB are free"
        )
    return why


def _prepare(side: Side, case: Case, make: Callable, competitor: Competitor | None) -> None:
    """The side's forward call, left in `step`, and the name of what it runs."""
    try:
        side.step = make(case)
        if competitor is not None:
            named = competitor.backend
            side.backend = named(case, side.step) if named else ran(side.step)
    except Exception as error:
        side.why_not = OUT_OF_MEMORY if is_out_of_memory(error) else _sentence(error)


def _record(result: Result, side: Side, found: Errors | Exception, dtype) -> None:
    side.errors = None if isinstance(found, Exception) else found
    oom = isinstance(found, Exception) and is_out_of_memory(found)
    side.why_not = OUT_OF_MEMORY if oom else verdict(side.name, found, dtype)
    if side.name == OURS:
        result.red = side.why_not


def _against_itself(result: Result, case: Case, competitor: Competitor) -> None:
    """A/A: one competitor twice, as two calls made alike."""
    first = result.sides[competitor.name]
    twin = Side(competitor.name + AGAIN, backend=first.backend, why_not=first.why_not)
    if first.able:
        twin.step = case.step(competitor.forward(case))
    result.sides = {competitor.name: first, twin.name: twin}


def _open_workload(result: Result, plan: Plan) -> None:
    workload = result.cell
    why = workload.why_not(plan.device.name)
    if why is not None or plan.aa:
        result.red = why or "A/A runs take rows of attention only"
        return
    running = Running(workload)
    result.tokens = running.built.tokens
    errors = running.check()  # before any step: a training step changes the weights
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
    """Sides in other processes, checked there. One with a local side's name takes its place in the
    timing; that it is right must hold for both."""
    for side in plan.extra(result.cell):
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

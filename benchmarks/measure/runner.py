"""Measures many cases, the most informative first when time is short, and shows the remaining time
on a progress bar. Ctrl-C keeps what has been measured. The A/A cases for the noise floor come last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..cases import DTYPES, AttentionCase
from ..competitors import BY_NAME
from ..suites import Case, by_information
from .machine import MEMORY, Machine, working_set
from .protocol import CHECKED, CHECKED_PAIRS, LEVELS, Plan, Result, measure
from .timing import MIN_ROUNDS

AA_CASES = 3  # cases that are compared with themselves, for the noise floor
OPENING = 0.1  # seconds to make the tensors


@dataclass
class Run:
    """The results of a run."""

    results: list[Result] = field(default_factory=list)
    aa: list[Result] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    interrupted: bool = False


class Forecast:
    """Predicts how many seconds a case takes, from its work and the machine's peak, corrected by
    the time that earlier cases took."""

    def __init__(self, machine: Machine, plan: Plan) -> None:
        self.flops, self.plan = machine.flops.get("fp32", 1e11), plan
        self.seen = [
            1.0,
            1.0,
        ]  # so that the first case, whose first calls are slow, does not decide alone

    def raw(self, case: Case) -> float:
        rounds, most = LEVELS[self.plan.level]
        if not isinstance(case, AttentionCase):
            return case.seconds + min(most, MIN_ROUNDS * case.seconds / 8)
        pairs = case.batch * case.heads * case.q_len * case.keys
        work = 4 * case.dim * pairs * (3.5 if case.backward else 1)
        once = max(2e-3, work / (0.5 * self.flops))
        slow = 4 if case.dropout or case.bias or case.dtype != "fp32" else 1.5
        contenders = 1 + slow * max(1, len(self.plan.competitors))
        timing = min(max(most, MIN_ROUNDS * contenders * once), rounds * contenders * once)
        memory = 2 * contenders * once
        checking = once * contenders + 8 * work / self.flops * min(
            1, CHECKED.get(self.plan.level, CHECKED_PAIRS) / max(pairs, 1)
        )
        return OPENING + timing + 2 * contenders * once + memory + checking

    def __call__(self, case: Case) -> float:
        return self.raw(case) * median(self.seen)

    def learn(self, case: Case, seconds: float) -> None:
        self.seen.append(seconds / self.raw(case))


class Bar:
    """The progress bar on stderr: the number of finished cases, and the predicted time left."""

    def __init__(self, cases: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("{task.fields[left]}"))  # fmt: skip
        console = Console(stderr=True)
        self.progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self.task = self.progress.add_task("", total=cases, left="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        self.progress.stop()

    def at(self, name: str, left: float) -> None:
        minutes, seconds = divmod(round(left), 60)
        self.progress.update(
            self.task, description=name[:44].ljust(44), left=f"{minutes}:{seconds:02} left"
        )

    def advance(self) -> None:
        self.progress.advance(self.task)


def run(
    cases: Sequence[Case],
    plan: Plan,
    machine: Machine,
    *,
    seconds: float | None = None,
    weak: Iterable[str] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Measures the cases and the A/A cases, within about `seconds` if given."""
    done, start = Run(), clock()
    order = list(cases) if seconds is None else by_information(cases, weak)
    try:
        machine.measure_peaks({"fp32", *(case.dtype for case in cases)}, {MEMORY})
        forecast = Forecast(machine, plan)
        aa = aa_cases(cases, forecast) if plan.noise and not plan.aa else []
        aa_plan = replace(plan, competitors=[_aa_competitor(plan)], aa=True, memory=False,
                          extra=lambda case: [], rounds=0, turns=1)  # fmt: skip
        waiting = [(plan, case) for case in order] + [(aa_plan, case) for case in aa]

        def fits(how: Plan, case: Case) -> bool:
            """Time is reserved for the A/A cases. The first case is measured in any case."""
            reserved = sum(forecast(c) for c in aa) if how is plan else 0.0
            needed = clock() - start + forecast(case) + reserved
            return seconds is None or needed <= seconds or not done.results

        with Bar(len(waiting)) as bar:
            while (chosen := next((x for x in waiting if fits(*x)), None)) is not None:
                waiting.remove(chosen)
                how, case = chosen
                left = forecast(case) + sum(forecast(c) for _, c in waiting)
                used = clock() - start
                bar.at(case.name, left if seconds is None else min(left, seconds - used))
                result = _one(case, how, machine, forecast, clock)
                (done.results if how is plan else done.aa).append(result)
                bar.advance()
        done.skipped = [case.name for how, case in waiting if how is plan]
    except KeyboardInterrupt:
        done.interrupted = True
    place = {case.name: index for index, case in enumerate(cases)}
    done.results.sort(key=lambda result: place[result.case.name])
    if plan.aa:
        done.aa = done.results
    return done


def _one(case, plan: Plan, machine: Machine, forecast: Forecast, clock) -> Result:
    began = clock()
    result = measure(case, plan)
    if result.work:
        machine.measure_peaks({"fp32"}, {working_set(result.work)}, seconds=0.03)
    result.seconds = clock() - began
    if result.red is None:
        forecast.learn(case, result.seconds)
    return result


def _aa_competitor(plan: Plan):
    """SDPA if it is one of the competitors or there is none, else the first competitor."""
    names = [competitor.name for competitor in plan.competitors]
    return BY_NAME["sdpa"] if "sdpa" in names or not names else plan.competitors[0]


def aa_cases(cases: Sequence[Case], forecast: Callable[[Case], float]) -> list[Case]:
    """A short, a medium and a long fp32 case, on which torch's times are the most stable."""
    attention = [
        c for c in cases if isinstance(c, AttentionCase) and not c.softcap and c.dtype in DTYPES
    ]
    attention = sorted((c for c in attention if c.dtype == "fp32"), key=forecast) or attention
    if len(attention) <= AA_CASES:
        return attention
    return [attention[round(share * (len(attention) - 1))] for share in (0.1, 0.4, 0.7)]

"""Many cells: in the most informative order when time is short, with the time left on a bar; what
was measured before Ctrl-C is kept. The A/A cells that give the noise floor come last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..cases import DTYPES, Row
from ..competitors import BY_NAME
from ..suites import Cell, by_information
from .machine import MEMORY, Machine, working_set
from .protocol import CHECKED, CHECKED_PAIRS, LEVELS, Plan, Result, measure
from .timing import MIN_ROUNDS

AA_CELLS = 3  # that say how far a thing seems to differ from itself
OPENING = 0.1  # seconds for tensors and the like


@dataclass
class Run:
    """What a run gave."""

    results: list[Result] = field(default_factory=list)
    aa: list[Result] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    interrupted: bool = False


class Forecast:
    """Seconds that cells will take: from their work and the machine's peak, corrected by what the
    cells so far took."""

    def __init__(self, machine: Machine, plan: Plan) -> None:
        self.flops, self.plan = machine.flops.get("fp32", 1e11), plan
        self.seen = [1.0, 1.0]  # the first cell's first calls are slow: it alone must not decide

    def raw(self, cell: Cell) -> float:
        rounds, most = LEVELS[self.plan.level]
        if not isinstance(cell, Row):
            return cell.seconds + min(most, MIN_ROUNDS * cell.seconds / 8)
        pairs = cell.batch * cell.heads * cell.q_len * cell.keys
        work = 4 * cell.dim * pairs * (3.5 if cell.backward else 1)
        once = max(2e-3, work / (0.5 * self.flops))
        slow = 4 if cell.dropout or cell.bias or cell.dtype != "fp32" else 1.5
        contenders = 1 + slow * max(1, len(self.plan.competitors))
        timing = min(max(most, MIN_ROUNDS * contenders * once), rounds * contenders * once)
        memory = 2 * contenders * once
        checking = once * contenders + 8 * work / self.flops * min(
            1, CHECKED.get(self.plan.level, CHECKED_PAIRS) / max(pairs, 1)
        )
        return OPENING + timing + 2 * contenders * once + memory + checking

    def __call__(self, cell: Cell) -> float:
        return self.raw(cell) * median(self.seen)

    def learn(self, cell: Cell, seconds: float) -> None:
        self.seen.append(seconds / self.raw(cell))


class Bar:
    """The progress bar on stderr: cells done, and the seconds that the forecast says are left."""

    def __init__(self, cells: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                   TimeElapsedColumn(), TextColumn("{task.fields[left]}"))  # fmt: skip
        console = Console(stderr=True)
        self.progress = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self.task = self.progress.add_task("", total=cells, left="")

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
    cells: Sequence[Cell],
    plan: Plan,
    machine: Machine,
    *,
    seconds: float | None = None,
    weak: Iterable[str] = (),
    clock: Callable[[], float] = time.monotonic,
) -> Run:
    """Measures the cells, within about `seconds` where given, and the A/A cells."""
    done, start = Run(), clock()
    order = list(cells) if seconds is None else by_information(cells, weak)
    try:
        machine.measure_peaks({"fp32", *(cell.dtype for cell in cells)}, {MEMORY})
        forecast = Forecast(machine, plan)
        aa = aa_cells(cells, forecast) if plan.noise and not plan.aa else []
        aa_plan = replace(plan, competitors=[_aa_competitor(plan)], aa=True, memory=False,
                          extra=lambda cell: [], rounds=0, turns=1)  # fmt: skip
        waiting = [(plan, cell) for cell in order] + [(aa_plan, cell) for cell in aa]

        def fits(how: Plan, cell: Cell) -> bool:
            """A/A cells keep their time; the first cell is measured whatever it takes."""
            reserved = sum(forecast(c) for c in aa) if how is plan else 0.0
            needed = clock() - start + forecast(cell) + reserved
            return seconds is None or needed <= seconds or not done.results

        with Bar(len(waiting)) as bar:
            while (chosen := next((x for x in waiting if fits(*x)), None)) is not None:
                waiting.remove(chosen)
                how, cell = chosen
                left = forecast(cell) + sum(forecast(c) for _, c in waiting)
                used = clock() - start
                bar.at(cell.name, left if seconds is None else min(left, seconds - used))
                result = _one(cell, how, machine, forecast, clock)
                (done.results if how is plan else done.aa).append(result)
                bar.advance()
        done.skipped = [cell.name for how, cell in waiting if how is plan]
    except KeyboardInterrupt:
        done.interrupted = True
    place = {cell.name: index for index, cell in enumerate(cells)}
    done.results.sort(key=lambda result: place[result.cell.name])
    if plan.aa:
        done.aa = done.results
    return done


def _one(cell, plan: Plan, machine: Machine, forecast: Forecast, clock) -> Result:
    began = clock()
    result = measure(cell, plan)
    if result.work:
        machine.measure_peaks({"fp32"}, {working_set(result.work)}, seconds=0.03)
    result.seconds = clock() - began
    if result.red is None:
        forecast.learn(cell, result.seconds)
    return result


def _aa_competitor(plan: Plan):
    """Torch against torch where torch is one of the sides, else the first that is there."""
    names = [competitor.name for competitor in plan.competitors]
    return BY_NAME["sdpa"] if "sdpa" in names or not names else plan.competitors[0]


def aa_cells(cells: Sequence[Cell], forecast: Callable[[Cell], float]) -> list[Cell]:
    """A short, a middle and a rather long row of fp32, which torch runs alike every time."""
    rows = [c for c in cells if isinstance(c, Row) and not c.softcap and c.dtype in DTYPES]
    rows = sorted((c for c in rows if c.dtype == "fp32"), key=forecast) or rows
    if len(rows) <= AA_CELLS:
        return rows
    return [rows[round(share * (len(rows) - 1))] for share in (0.1, 0.4, 0.7)]

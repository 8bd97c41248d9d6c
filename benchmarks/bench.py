"""`python -m fastattn bench`: fastattn beside F.scaled_dot_product_attention, row by row.

Each row (rows.py) is checked before it is timed: results and gradients against float64, where the
error of torch's math path in the same dtype sets what is allowed. A row that fails prints RED and
no number. The others are timed by timing.py and printed beside the backend that torch really chose,
the exact work and the peak of this machine. The floors are the ratios that the project asks of a
two-core AVX2 machine: information, never a test.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastattn
from fastattn import verify
from fastattn.info import cpu_name

from . import timing
from .rows import DTYPES, ROWS, Case, Row
from .timing import Comparison, Contender, Work

SCHEMA = 1
DROPOUT_SEED = 3
LEVELS = {  # rounds at most, seconds of rounds a row at most
    "quick": (11, 1.6),
    "default": (21, 6.0),
    "full": (61, 30.0),
}


# ---- correctness before speed -----------------------------------------------------------------

CHECKED_PAIRS = 1 << 25  # scores per row compared with float64; more heads than fit are sampled
RESULTS = ("out", "dq", "dk", "dv", "dbias")  # what a step returns, in this order


@dataclass(slots=True)
class Errors:
    """Against float64, relative to the largest true value; the worst of out and gradients."""

    fastattn: float = 0.0
    torch: float = 0.0
    excess: float = 0.0  # the worst of fastattn's error / what is allowed; above 1 the row is RED
    reason: str = ""  # that worst one in words
    heads: list[int] = field(default_factory=list)  # the kv heads compared

    def judge(self, name: str, found: verify.Comparison) -> None:
        """Keep the comparison nearest to its limit, by the rule that the tests use too."""
        if found.ratio >= self.excess:
            self.excess, self.reason = found.ratio, f"{name}: {found}"


def relative_error(result: Tensor, truth: Tensor) -> float:
    """max |result - truth| / max |truth|; NaN, which compares as small, counts as infinite."""
    truth = truth.detach()
    error = (result.detach().double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30)
    return error.nan_to_num(nan=float("inf")).item()


def check(case: Case) -> Errors:
    """Both contenders against torch's math path in float64, one kv head and its group at a time."""
    if case.row.dropout:
        return _check_dropout(case)
    ours, theirs = case.fastattn()(), case.torch()()
    errors = Errors(heads=_checked_heads(case.row))
    for head in errors.heads:
        judge = _judge(case, slice(head, head + 1))
        truths, rounded = _math(case, head, torch.float64), _math(case, head, case.dtype)
        for index, (name, truth) in enumerate(zip(RESULTS, truths)):
            one, other = (_heads_of(case.row, r[index], head, index) for r in (ours, theirs))
            errors.judge(name, judge.compare(name, one, truth, rounded[index]))
            errors.fastattn = max(errors.fastattn, relative_error(one, truth))
            errors.torch = max(errors.torch, relative_error(other, truth))
    return errors


def _judge(case: Case, kv_heads: slice) -> verify.Judge:
    """The tolerance rule for these kv heads; lse only sets the size of an exponent's rounding."""
    row, scale = case.row, case.row.dim**-0.5
    q, dout = (t if t is None else t.unflatten(1, (row.kv_heads, -1)) for t in (case.q, case.dout))
    k, v = case.k, case.v
    q, k, v = (t[:, kv_heads].detach() for t in (q, k, v))
    scores = scale * q.float() @ k.float().mT.unsqueeze(2)  # [B, kv heads, group, q_len, keys]
    dout = None if dout is None else dout[:, kv_heads]
    return verify.Judge(q, k, v, scale, scores.logsumexp(-1), dout)


def _checked_heads(row: Row) -> list[int]:
    """Evenly spread kv heads, the first and the last included, as many as CHECKED_PAIRS allows."""
    per_head = row.batch * (row.heads // row.kv_heads) * row.q_len * row.keys
    count = min(row.kv_heads, max(2, CHECKED_PAIRS // per_head))
    return sorted({round(i * (row.kv_heads - 1) / max(count - 1, 1)) for i in range(count)})


def _heads_of(row: Row, tensor: Tensor, kv_head: int, index: int) -> Tensor:
    """The part of result `index` (out, dq, dk, dv, dbias) that belongs to one kv head."""
    group = 1 if index in (2, 3) else row.heads // row.kv_heads
    return tensor[:, kv_head * group : (kv_head + 1) * group]


def _math(case: Case, kv_head: int, dtype: torch.dtype) -> list[Tensor]:
    """(out, gradients...) of one kv head and its group on torch's math path in `dtype`."""
    row = case.row
    parts = (_heads_of(row, t, kv_head, i + 1) for i, t in enumerate(case.inputs))
    inputs = [p.detach().to(dtype).requires_grad_(row.backward) for p in parts]
    mask = inputs[3] if row.bias else case.mask
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            *inputs[:3], mask, 0.0, row.causal, enable_gqa=row.heads != row.kv_heads
        )
        if not row.backward:
            return [out]
        dout = _heads_of(row, case.dout, kv_head, 0).to(dtype)
        return [out, *torch.autograd.grad(out, inputs, dout)]


def _check_dropout(case: Case) -> Errors:
    """Draws differ by design, so each side is held to float64 with its own draws, from one seed:
    torch to its math path (all it has with dropout on a CPU), fastattn to its reference backend."""
    row, exact = case.row, case.double()
    results = []
    for run in (
        case.fastattn(),
        _reference(exact),
        _reference(case),
        case.torch(),
        exact.torch(),
    ):
        torch.manual_seed(DROPOUT_SEED)
        results.append(run())
    errors, judge = Errors(heads=list(range(row.kv_heads))), _judge(case, slice(None))
    for name, ours, truth, rounded, theirs, their_truth in zip(RESULTS, *results):
        errors.judge(name, judge.compare(name, ours, truth, rounded))
        errors.fastattn = max(errors.fastattn, relative_error(ours, truth))
        errors.torch = max(errors.torch, relative_error(theirs, their_truth))
    return errors


def _reference(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    options = {"causal": case.row.causal, "align": "start", "dropout_p": case.row.dropout}
    return case.step(
        lambda: fastattn.attention(case.q, case.k, case.v, **options, backend="reference")
    )


# ---- one row, measured ------------------------------------------------------------------------


@dataclass(slots=True)
class Result:
    """A row of the report. RED rows carry a reason and no number of speed."""

    row: Row
    torch_backend: str
    fastattn_backend: str
    work: Work
    errors: Errors | None = None
    red: str | None = None
    comparison: Comparison | None = None


def measure(
    row: Row, level: str = "quick", on_round: Callable[[int, int], object] | None = None
) -> Result:
    """Check a row, and time it when it is right."""
    case = Case(row)
    result = Result(row, case.torch_backend(), "unknown", case.work())
    try:
        result.fastattn_backend = case.fastattn_backend()
        result.errors = check(case)
    except Exception as error:  # a row that cannot run must not take the others with it
        result.red = f"{type(error).__name__}: {error}".split("\n")[0]
        return result
    if not result.errors.excess <= 1.0:
        result.red = f"wrong {result.errors.reason}"
        return result
    rounds, seconds = LEVELS[level]
    result.comparison = timing.compare(
        [Contender("torch", case.torch()), Contender("fastattn", case.fastattn())],
        rounds=rounds,
        max_seconds=seconds,
        on_round=on_round,
    )
    return result


MEMORY = 1 << 28  # bytes: a working set past the caches


@dataclass(slots=True)
class Machine:
    """What the numbers were taken on, and the most that it can do."""

    facts: dict
    flops: dict[str, float] = field(default_factory=dict)  # by dtype
    bandwidths: dict[int, float] = field(default_factory=dict)  # by working set, powers of two

    def measure_peaks(self, dtypes: set[str], sizes: set[int], seconds: float = 0.4) -> None:
        """A peak is the most ever seen, so it is asked for again and again between the rows: one
        busy moment of the machine must not lower it."""
        for name in dtypes:
            seen = timing.peak_flops(DTYPES[name], seconds)
            self.flops[name] = max(seen, self.flops.get(name, 0.0))
        for size in sizes:
            seen = timing.peak_bandwidth(size, seconds)
            self.bandwidths[size] = max(seen, self.bandwidths.get(size, 0.0))

    def roof(self, row: Row, work: Work) -> tuple[str, float]:
        """(what bounds the work, the least seconds it can take here)."""
        compute = work.flops / max(self.flops[row.dtype], self.flops["fp32"])
        memory = work.bytes / self.bandwidths[_working_set(work)]
        return ("compute", compute) if compute >= memory else ("memory", memory)


def _working_set(work: Work) -> int:
    return min(MEMORY, 1 << max(20, (work.bytes - 1).bit_length()))


def machine_facts() -> dict:
    """The machine by name: enough to know later what a number was taken on."""
    try:
        from fastattn import _C

        isa = _C.selected_isa()
    except ImportError:
        isa = None  # no native library: fastattn ran its reference
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# ---- output -----------------------------------------------------------------------------------


def as_json(results: list[Result], machine: Machine, level: str) -> dict:
    return {
        "schema": SCHEMA,
        "machine": machine.facts,
        "peak": {
            "flops": machine.flops,
            "bandwidth_by_working_set": {str(k): v for k, v in machine.bandwidths.items()},
        },
        "level": level,
        "rows": [_row_json(result, machine) for result in results],
    }


def _row_json(result: Result, machine: Machine) -> dict:
    entry = {
        "name": result.row.name,
        "row": asdict(result.row),
        "torch_backend": result.torch_backend,
        "fastattn_backend": result.fastattn_backend,
        "work": asdict(result.work),
        "errors": asdict(result.errors) if result.errors else None,
        "red": result.red,
        "floor": result.row.floor,
    }
    if result.comparison is not None:
        ratio, seconds = result.comparison.ratio("fastattn"), result.comparison.median("fastattn")
        bound, roof = machine.roof(result.row, result.work)
        entry |= {
            "torch_ms": result.comparison.median("torch") * 1e3,
            "fastattn_ms": seconds * 1e3,
            "ratio": asdict(ratio) | {"verdict": ratio.verdict},
            "gflops": result.work.flops / seconds / 1e9,
            "gbytes": result.work.bytes / seconds / 1e9,
            "bound": bound,
            "percent_of_peak": 100 * roof / seconds,
            "comparison": result.comparison.as_dict(),
        }
    return entry


def print_table(results: list[Result], machine: Machine, console: Console) -> None:
    facts, top = machine.facts, max(machine.flops.values()) / 1e9
    console.print(
        f"[bold]{facts['cpu']}[/], {facts['threads']} of {facts['cores']} threads, "
        f"isa {facts['isa']}; torch {facts['torch']} ({facts['torch_isa']}), "
        f"fastattn {facts['fastattn']}\n"
        f"peak {top:.0f} GFLOP/s (matrix product), {machine.bandwidths[MEMORY] / 1e9:.0f} GB/s "
        "(memory). Ratio: torch's time / fastattn's, median of interleaved rounds with its 95 % "
        "interval. Asked: the floor on a two-core AVX2 machine."
    )
    table = Table(header_style="bold")
    table.add_column("work", no_wrap=True)
    table.add_column("torch ran", no_wrap=True)
    heads = ("torch ms", "fastattn ms", "ratio", "95 % interval", "asked", "rate", "% peak")
    for head in (*heads, "error f / t"):
        table.add_column(head, justify="right", no_wrap=True)
    for result, following in zip(results, [*results[1:], None], strict=True):
        last = following is None or following.row.group != result.row.group
        table.add_row(*_cells(result, machine), end_section=last)
    console.print(table)


def _cells(result: Result, machine: Machine) -> list[str]:
    row, errors = result.row, result.errors
    error = f"{errors.fastattn:.0e} / {errors.torch:.0e}" if errors else ""
    cells = [row.name, result.torch_backend]
    if result.comparison is None:
        return [*cells, "", "", "[bold red]RED[/]", "", f"{row.floor:g}", "", "", error]
    entry = _row_json(result, machine)
    ratio = result.comparison.ratio("fastattn")
    colour = {"faster": "green", "slower": "red"}.get(ratio.verdict, "yellow")
    value = "no difference" if ratio.verdict == "no difference" else f"{ratio.value:.2f}"
    compute = entry["bound"] == "compute"
    rate = f"{entry['gflops']:.0f} GFLOP/s" if compute else f"{entry['gbytes']:.1f} GB/s"
    return [
        *cells,
        f"{entry['torch_ms']:.3f}",
        f"{entry['fastattn_ms']:.3f}",
        f"[{colour}]{value}[/]",
        f"{ratio.low:.2f} to {ratio.high:.2f}",
        f"{row.floor:g}",
        rate,
        f"{entry['percent_of_peak']:.0f}",
        error,
    ]


# ---- command line -----------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastattn bench",
        description="fastattn beside torch's scaled_dot_product_attention: checked, then timed.",
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument(
        "--quick", action="store_true", help="few rounds: every row in three minutes"
    )
    level.add_argument("--full", action="store_true", help="many rounds: narrow intervals")
    parser.add_argument("--rows", metavar="REGEX", default="", help="only rows whose name matches")
    parser.add_argument("--list", action="store_true", help="name the rows and stop")
    parser.add_argument("--threads", metavar="N", type=int, help="torch threads (default: torch's)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every sample and fact too")
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads: got {args.threads}, needs at least 1")
    try:
        args.rows = re.compile(args.rows)
    except re.error as error:
        parser.error(f"--rows: {args.rows!r} is not a regular expression ({error})")
    args.level = "quick" if args.quick else "full" if args.full else "default"
    return args


def run(rows: list[Row], level: str) -> tuple[list[Result], Machine]:
    """Measure rows and peaks behind a progress bar on stderr."""
    machine, results = Machine(machine_facts()), []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("peak of this machine", total=len(rows) + 1)
        machine.measure_peaks({"fp32", *(row.dtype for row in rows)}, {MEMORY})
        progress.advance(task)
        for index, row in enumerate(rows):
            progress.update(task, description=row.name)

            def on_round(done: int, planned: int, start: int = index + 1) -> None:
                progress.update(task, completed=start + done / planned)

            results.append(measure(row, level, on_round))
            machine.measure_peaks({"fp32"}, {_working_set(results[-1].work)}, seconds=0.05)
            progress.update(task, completed=index + 2)
    return results, machine


def main(argv: list[str] | None = None) -> int:
    """0: every row right; 1: some row is RED; 2: nothing to do."""
    args = parse(argv)
    rows = [row for row in ROWS if args.rows.search(row.name)]
    if args.list:
        print("\n".join(row.name for row in rows))
        return 0
    if not rows:
        print(f"--rows: no row matches {args.rows.pattern!r}; see --list", file=sys.stderr)
        return 2
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        results, machine = run(rows, args.level)
    finally:
        torch.set_num_threads(before)
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)  # a file has no width; do not fold
    print_table(results, machine, console)
    red = [result for result in results if result.red]
    for result in red:
        console.print(f"[bold red]RED[/] {result.row.name}: {result.red}", highlight=False)
    if any(_row_json(r, machine).get("percent_of_peak", 0) > 105 for r in results):
        console.print(
            "[yellow]Some rows beat the measured peak: the machine was busy while the peak was "
            "measured, so % peak means little in this run.[/]"
        )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(as_json(results, machine, args.level), indent=1) + "\n")
        console.print(f"wrote {args.json}")
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())

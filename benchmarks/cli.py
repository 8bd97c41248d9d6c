"""`python -m fastattn bench`: fastattn compared with other implementations, checked and then timed.

parse() reads the command line, main() runs it. Next hop: suites.py (the benchmark cases),
measure/runner.py (the loop over them), measure/protocol.py (one case), report/record.py (the
result as data), report/table.py and report/page.py (the reports).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.console import Console

from fastattn.core.work import MODES

from . import competitors, suites
from .measure import devices, other_commit
from .measure.machine import Machine, machine_facts
from .measure.protocol import Plan
from .measure.runner import Run, run
from .report import history, record, table

# For the cases; the rest of --quick's 90 s and --full's 15 minutes goes to start-up and reports.
SECONDS = {"quick": 74.0, "default": None, "full": 14 * 60.0}
FILES = {"json": "bench.json", "csv": "bench.csv", "md": "bench.md", "html": "bench.html"}
OUT = Path("out")
INTERRUPTED, USAGE, FAILED = 130, 2, 1


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastattn bench",
        description="fastattn and other implementations: checked against float64, then timed.",
        epilog="exit codes:\n  0  done\n  1  a case is RED, or --fail-if found a regression\n"
        "  2  wrong arguments, or the base does not build\n"
        "  130  stopped by Ctrl-C; what has been measured is kept",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = ", ".join(dict.fromkeys([*suites.SUITES, *suites.groups()]))
    p.add_argument(
        "suite", nargs="?", metavar="SUITE", help=f"a suite or a group of cases: {known}"
    )
    which = p.add_argument_group("which cases")
    which.add_argument("--model", choices=suites.MODELS, help="the attention shapes of a model")
    which.add_argument("--sweep", choices=suites.SWEEPS, help="vary one property of --model's "
                       "first case, or of a default case")  # fmt: skip
    which.add_argument("--modes", metavar="LIST", default="", help=f"of {','.join(MODES)}; "
                       "default: each case's own")  # fmt: skip
    which.add_argument("--cases", "--rows", metavar="REGEX", default="", dest="pattern",
                       help="only cases whose name matches")  # fmt: skip
    which.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    how = p.add_argument_group("how")
    names = ",".join(competitors.BY_NAME)
    how.add_argument("--vs", metavar="LIST", help=f"competitors, of {names}; default: sdpa")
    how.add_argument("--device", choices=devices.DEVICES, help="default: cuda if there is one")
    how.add_argument("--backend", metavar="NAME", help="force fastattn's backend")
    how.add_argument("--threads", metavar="N", type=int, help="torch threads (default: torch's)")
    how.add_argument(
        "--minutes", metavar="M", type=float, help="measure the most informative cases that fit"
    )
    level = how.add_mutually_exclusive_group()
    level.add_argument("--quick", action="store_true", help="few rounds, 90 seconds in all")
    level.add_argument("--full", action="store_true", help="narrow intervals, 15 minutes in all")
    how.add_argument("--aa", action="store_true", help="A/A: the first competitor against itself")
    how.add_argument(
        "--graphs", action="store_true", help="CUDA: replay graphs instead of launching"
    )
    how.add_argument("--cold", action="store_true", help="CUDA: flush the L2 cache before a call")
    past = p.add_argument_group("before and after")
    past.add_argument(
        "--base", metavar="REF", help="also measure this git commit, in the same rounds"
    )
    past.add_argument(
        "--compare", metavar="ID", help="an earlier run: `last`, a number or a commit"
    )
    past.add_argument("--fail-if", metavar="SHARE", help="exit with 1 on a significant regression "
                      "larger than this, such as 5%%")  # fmt: skip
    past.add_argument("--history", metavar="DIR", type=Path, default=history.FOLDER,
                      help=f"where runs are kept, default: {history.FOLDER}")  # fmt: skip
    past.add_argument("--no-save", action="store_true", help="do not keep this run there")
    out = p.add_argument_group("reports", "each takes a file name, default: in out/")
    for name, default in FILES.items():
        out.add_argument(f"--{name}", metavar="FILE", type=Path, nargs="?", const=OUT / default)
    out.add_argument("--png", metavar="DIR", type=Path, nargs="?", const=OUT, help="every figure")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The checked command line. Impossible requests end with one sentence and exit code 2."""
    p = parser()
    args = p.parse_args(argv)
    args.level = "quick" if args.quick else "full" if args.full else "default"
    try:
        _check(args)
    except ValueError as error:
        p.error(str(error))
    return args


def _check(args: argparse.Namespace) -> None:
    for name, value, least in (("threads", args.threads, 1), ("minutes", args.minutes, 0.01)):
        if value is not None and not value >= least:
            raise ValueError(f"--{name}: got {value}, needs at least {least}")
    try:
        args.pattern = re.compile(args.pattern)
    except re.error as error:
        sentence = f"--cases: {args.pattern!r} is not a regular expression ({error})"
        raise ValueError(sentence) from None
    for name in FILES:
        path = getattr(args, name)
        if path is not None and path.suffix != f".{name}":
            raise ValueError(f"--{name}: {str(path)!r} does not end in .{name}")
    args.modes = [mode for mode in args.modes.split(",") if mode]
    args.device = args.device or devices.default_device()
    if args.device == "cpu" and (args.graphs or args.cold):
        raise ValueError("--graphs and --cold are for --device cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device on this machine")
    if args.backend:
        from fastattn.backends import registry

        registry.named(args.backend)
    asked = args.vs if args.vs is not None else ("" if args.base else "sdpa")
    args.competitors = competitors.named(asked) if asked else []
    if args.aa and (args.base or not args.competitors):
        raise ValueError("--aa compares a competitor with itself; leave --base out")
    if args.fail_if is not None:
        args.fail_if = history.threshold(args.fail_if)
        if not (args.base or args.compare):
            raise ValueError("--fail-if needs something to compare with: --base or --compare")
    args.cases = suites.select(
        args.suite or _default_suite(args), model=args.model, sweep=args.sweep, modes=args.modes,
        pattern=args.pattern,
    )  # fmt: skip
    if not args.cases:
        raise ValueError(f"no case matches {args.pattern.pattern!r} here; see --list")


def _default_suite(args: argparse.Namespace) -> str | None:
    """--quick leaves out whole models, each of which takes a dozen seconds."""
    return "attention" if args.quick and not (args.model or args.sweep) else None


def chosen_by(args: argparse.Namespace) -> list[str]:
    """The options that decide which case is measured and how, for the command that repeats it."""
    words = [args.suite] if args.suite else []
    for name in ("model", "sweep", "vs", "device", "backend", "threads", "base"):
        value = getattr(args, name)
        if value is not None and (name, value) != ("device", "cpu"):
            words += [f"--{name}", str(value)]
    if args.modes:
        words += ["--modes", ",".join(args.modes)]
    flags = ("quick", "full", "aa", "graphs", "cold")
    return words + [f"--{flag}" for flag in flags if getattr(args, flag)]


# ---- running ------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.list:
        print("\n".join(case.name for case in args.cases))
        return 0
    console = Console()
    if not console.is_terminal:
        console = Console(width=230)  # a file has no width: do not wrap lines
    if args.backend:
        os.environ["FASTATTN_BACKEND"] = args.backend
    if args.device == "cuda":
        device = devices.Cuda(graphs=args.graphs, cold=args.cold)
    else:
        device = devices.Cpu(threads=args.threads or 0)
    with device:
        return _measured(args, device, console)


def _measured(args, device, console: Console) -> int:
    facts = machine_facts(args.device)
    store, code = history.Store(facts, args.history), 0
    before = None
    try:
        before = store.find(args.compare) if args.compare else None
    except ValueError as error:
        console.print(f"[red]{error}[/]", highlight=False)
        code = USAGE
    machine, tree = Machine(facts), None
    if args.base:
        try:
            tree = other_commit.prepare(args.base, args.history, say=console.print)
        except ValueError as error:
            console.print(f"[red]{error}[/]", highlight=False)
            code = USAGE
            args.competitors = args.competitors or competitors.named("sdpa")
    machine.clocks["before"] = device.clocks()
    past = store.runs()
    done = _run(args, device, machine, tree, past)
    machine.clocks["after"] = device.clocks()
    machine.clocks["throttled"] = device.throttled(
        *(machine.clocks[x] for x in ("before", "after"))
    )
    data = record.as_json(
        done.results, machine, level=args.level, options=chosen_by(args), aa=done.aa,
        skipped=done.skipped, interrupted=done.interrupted,
    )  # fmt: skip
    changes = history.changes_from_base(data)
    if before is not None:
        changes += history.changes_since(data, before[1])
    _report(args, console, data, changes, store, past)
    regressed = [c for c in changes if args.fail_if is not None and c.regressed(args.fail_if)]
    for change in regressed:
        console.print(f"[bold red]REGRESSED[/] {change}", highlight=False)
    if record.reds(data) or regressed:
        code = code or FAILED
    return INTERRUPTED if done.interrupted else code


def _run(args, device, machine: Machine, tree: Path | None, past: list) -> Run:
    """One run of the cases or, with a base, one run for each pair of fresh processes."""
    seconds = args.minutes * 60 if args.minutes else SECONDS[args.level]
    plan = Plan(device, args.competitors, args.level, args.aa)
    weak = history.weak(past[-1][1]) if past and args.minutes else ()
    if tree is None:
        return run(args.cases, plan, machine, seconds=seconds, weak=weak)
    total, cases = Run(), args.cases
    for index in range(other_commit.PASSES):
        with ExitStack() as stack:
            pair = other_commit.Pair(tree, device)
            stack.callback(pair.close)
            first = index == 0
            again = Plan(device, args.competitors, args.level, extra=pair.sides,
                         memory=first, noise=first, rounds=other_commit.ROUNDS,
                         turns=other_commit.TURNS)  # fmt: skip
            share = None if seconds is None else seconds / other_commit.PASSES
            one = run(cases, again, machine, seconds=share, weak=weak)
        total = other_commit.merged(total, one) if index else one
        cases = [result.case for result in total.results]
        if one.interrupted:
            break
    return total


def _report(args, console: Console, data: dict, changes: list, store, past: list) -> None:
    """Stores the run, then prints the table and the changes, then writes the requested files."""
    if not args.no_save and data["rows"]:
        try:
            console.print(f"kept as {store.save(data)}", highlight=False)
        except OSError as error:
            console.print(f"[red]not kept in {store.folder}: {error}[/]", highlight=False)
    table.print_table(data, console)
    for change in changes:
        console.print(f"since {args.base or args.compare}: {change}", highlight=False)
    for sentence in store.warnings:
        console.print(f"[yellow]{sentence}[/]", highlight=False)
    if data["skipped"]:
        console.print(
            f"{len(data['skipped'])} cases did not fit into the time: see --minutes, --full"
        )
    if data["interrupted"]:
        console.print("[yellow]interrupted; the table has what was measured until then[/]")
    if any(s.get("percent_of_peak", 0) > 105 for e in data["rows"] for s in e["sides"].values()):
        console.print(
            "[yellow]Some cases exceed the measured peak: the machine was busy while the peak was "
            "measured, so % of peak means little in this run.[/]"
        )
    runs = [*past, ("this run", data)]
    for name, write in WRITERS.items():
        path = getattr(args, name)
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(write(data, changes, runs), encoding="utf-8")
                console.print(f"wrote {path}", highlight=False)
            except (OSError, ModuleNotFoundError) as error:
                console.print(f"[red]--{name}: {path} is not written: {error}[/]", highlight=False)
    if args.png is not None:
        from .report import figures

        for path in figures.write_pngs(data, runs, args.png):
            console.print(f"wrote {path}", highlight=False)


def _html(data: dict, changes: list, runs: list) -> str:
    from .report import page

    return page.page(data, changes, runs)


WRITERS = {
    "json": lambda data, changes, runs: json.dumps(data, indent=1) + "\n",
    "csv": lambda data, changes, runs: record.as_csv(data),
    "md": lambda data, changes, runs: table.as_markdown(data, changes) + "\n",
    "html": _html,
}


if __name__ == "__main__":
    sys.exit(main())

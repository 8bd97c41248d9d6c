"""`python -m fastattn verify`: checks every backend that runs on this machine against float64.

features.py has the calls that are checked. `verify --model` audits a user's model instead:
verify_model.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from ..backends import isa, proof, registry
from ..core.call import Call
from ..core.spec import NO_OPERANDS, Spec
from .features import DTYPES, FEATURES, QUICK, Feature, measure, truth

# The names in proof.FEATURES of the kinds of calls in FEATURES above.
PROVEN = ("call", "lengths", "gradient", "gradient of lengths")


def backends_here(gpu: bool = True) -> Iterator[tuple[str, str, str | None]]:
    """(backend, device, why it does not run there or None) for each backend on its best device.
    With gpu=False no GPU is used: a kernel that has not passed its self-tests may hang."""
    devices = ["cuda", "cpu"] if gpu and torch.cuda.is_available() else ["cpu"]
    for backend in registry.BACKENDS:
        reasons = {}
        for device in devices:
            x = torch.zeros(1, 1, 1, 64, device=device)
            call = Call(x, x, x, Spec(0.125), NO_OPERANDS)
            if backend.unsupported_reason(call):  # a backend without fp32
                x = x.bfloat16()
            reasons[device] = backend.why_not(Call(x, x, x, Spec(0.125), NO_OPERANDS))
        able = [device for device in devices if reasons[device] is None]
        device = able[0] if able else devices[-1]
        reason = reasons[device]
        if reason is None and backend.name == "cuda":
            reason = proof.why_not(torch.cuda.current_device(), PROVEN)
        yield backend.name, device, reason


@dataclass(frozen=True)
class Cell:
    """One call on one backend: its errors, or why the backend does not support it."""

    backend: str
    device: str
    feature: str
    dtype: str
    error: float | None = None
    torch_error: float | None = None
    failures: tuple[str, ...] = ()
    refused: str | None = None

    def __str__(self) -> str:
        if self.refused is not None:
            return f"[dim]{escape(self.refused)}[/]"
        if self.error is None:
            return "[red]error[/]"
        text = f"{self.error:.1e} ({self.torch_error:.1e})"
        return f"[red]{text}[/]" if self.failures else text


@dataclass(frozen=True)
class Verified:
    """The result of run(). The table shows str() of each cell."""

    cells: tuple[Cell, ...]
    not_run: dict[str, str]  # backend: why not

    @property
    def failures(self) -> list[str]:
        return [f"{c.backend}, {c.feature}, {c.dtype}: {f}" for c in self.cells for f in c.failures]

    def worst(self) -> dict[str, dict[str, tuple[float, str]]]:
        """backend -> dtype -> (largest error, the feature with that error)."""
        found: dict[str, dict[str, tuple[float, str]]] = {}
        for cell in self.cells:
            if cell.error is not None:
                dtypes = found.setdefault(cell.backend, {})
                dtypes[cell.dtype] = max(
                    dtypes.get(cell.dtype, (0.0, "")), (cell.error, cell.feature)
                )
        return found

    def as_dict(self) -> dict:
        """The result as JSON-serializable data."""
        return {
            "passed": not self.failures,
            "torch": torch.__version__,
            "isa": isa.selected(),
            "not_run": self.not_run,
            "worst": self.worst(),
            "cells": [asdict(cell) for cell in self.cells],
        }


def run(quick: bool = False, console: Console | None = None, gpu: bool = True) -> Verified:
    """Measures every backend on this machine, with a progress bar if console is a terminal."""
    features = [f for f in FEATURES if not quick or f.name in QUICK]
    dtypes = DTYPES[:2] if quick else DTYPES
    here = list(backends_here(gpu))
    calls = [
        (backend, device, feature, dtype)
        for backend, device, reason in here
        if reason is None
        for feature in features
        for dtype in dtypes
        if (backend, dtype) != ("reference", torch.float64)  # it is the truth itself
    ]
    cells = []
    hidden = console is None or not console.is_terminal
    with Progress(console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("verifying", total=len(calls))
        for call in calls:
            progress.update(task, advance=1, description=f"{call[0]}: {call[2].name}")
            cells.append(_cell(*call))
    truth.cache_clear()
    return Verified(tuple(cells), {name: reason for name, _, reason in here if reason})


def _cell(backend: str, device: str, feature: Feature, dtype: torch.dtype) -> Cell:
    names = (backend, device, feature.name, str(dtype).removeprefix("torch."))
    try:
        found = measure(feature, dtype, device, backend)
    except NotImplementedError as refusal:  # the backend does not support the call
        return Cell(*names, refused=str(refusal))
    except Exception as error:  # any other error fails this call, and the command goes on
        return Cell(*names, failures=(f"{type(error).__name__}: {error}",))
    return Cell(*names, found.error, found.torch_error, found.failures)


def verify(stream=None, quick: bool = False) -> bool:
    """Measures every backend on this machine, prints tables, and returns whether all passed."""
    console = Console(file=stream)
    if not console.is_terminal:
        console = Console(file=stream, width=120)
    found = run(quick, console)
    show(found, console)
    return not found.failures


def show(found: Verified, console: Console) -> None:
    """Prints a table for each backend, then what was not run and what failed."""
    for backend in dict.fromkeys(cell.backend for cell in found.cells):
        console.print(_table([cell for cell in found.cells if cell.backend == backend]))
    for name, reason in found.not_run.items():
        console.print(f"not run: {name}: {escape(reason)}", highlight=False)
    for backend, dtypes in found.worst().items():
        worst = ", ".join(f"{d} {e:.1e} ({feature})" for d, (e, feature) in dtypes.items())
        console.print(f"largest error of {backend}: {worst}", highlight=False)
    for failure in found.failures:
        console.print(f"[red]FAILED[/] {escape(failure)}", highlight=False)
    ran = ", ".join(dict.fromkeys(cell.backend for cell in found.cells))
    count = len(found.failures)
    verdict = f"[red]{count} checks failed[/]" if count else "[green]all passed[/]"
    console.print(f"{len(found.cells)} calls on {ran}: {verdict}", highlight=False)


def _table(cells: list[Cell]) -> Table:
    """The table of one backend: features by dtypes."""
    backend, device = cells[0].backend, cells[0].device
    runs = f", {isa.selected()}" if backend == "cpu" else ""
    table = Table(title=f"{backend} on {device}{runs}", title_justify="left")
    compared = "the exact result's, rounded" if backend == "reference" else "plain torch's"
    table.caption = f"largest error against float64, relative to the largest value ({compared})"
    table.caption_justify = "left"
    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))
    table.add_column("feature")
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    table.add_column("verdict")
    for feature in dict.fromkeys(cell.feature for cell in cells):
        by_dtype = {cell.dtype: cell for cell in cells if cell.feature == feature}
        failed = any(cell.failures for cell in by_dtype.values())
        table.add_row(
            feature,
            *(str(by_dtype.get(dtype, "")) for dtype in dtypes),
            "[red]FAILED[/]" if failed else "[green]ok[/]",
        )
    return table


def prove(console: Console, sanitize: bool) -> proof.Found:
    """Runs the self-tests of the CUDA kernels on this machine's GPUs, and prints each result."""
    machine = proof.Machine()
    if sanitize:
        if (tool := proof.sanitizer()) is None:
            raise ValueError(
                "--sanitize needs compute-sanitizer, which is in CUDA's toolkit, on PATH"
            )
        machine = proof.Sanitized(tool)

    def tell(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    return proof.prove(tell, machine)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastattn verify",
        description="Check every backend that runs on this machine against float64, or with\n"
        "--model your own model after swap(), layer by layer. On a machine with a GPU it\n"
        "begins with the self-tests of the CUDA kernels, each in a process with a time\n"
        "limit. The CUDA backend is selected automatically only for what they prove.",
        epilog="exit codes:\n  0  all passed\n  1  an error is larger than the tolerance\n"
        "  2  the model or its inputs cannot be loaded",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help="fewer options, float32 and bfloat16")
    p.add_argument("--json", metavar="FILE", type=Path, help="also write all results to FILE")
    p.add_argument("--sanitize", action="store_true", help="run the CUDA kernels' self-tests under "
                   "compute-sanitizer, which takes 20 times as long")  # fmt: skip
    model = p.add_argument_group("your own model")
    model.add_argument("--model", metavar="MODEL", help="package.module:name or file.py:name (a "
                       "module, or a function that returns one), a file of torch.save, or a "
                       "transformers hub id")  # fmt: skip
    model.add_argument("--inputs", metavar="INPUT", nargs="+", help="a file of torch.save, or "
                       "NAME=SHAPE such as x=2x50x64, or NAME=SHAPE<LIMIT for integers, "
                       "input_ids=2x128<30522")  # fmt: skip
    model.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    return p


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)
    if bool(args.model) != bool(args.inputs):
        p.error("--model and --inputs go together")
    if args.model:
        from . import model_loading, verify_model

        try:
            model = model_loading.load_model(args.model)
            inputs = model_loading.load_inputs(args.inputs)
            found = verify_model.audit(model, inputs, getattr(torch, args.dtype))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        print(found)
        passed, stored = found.passed, found.as_dict()
    else:
        console = Console()
        console = console if console.is_terminal else Console(width=120)
        try:
            proven = prove(console, args.sanitize)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        found = run(args.quick, console, gpu=not proven.hangs)
        show(found, console)
        for failure in proven.failures:
            console.print(f"[red]FAILED[/] {escape(failure)}", highlight=False)
        passed = not (found.failures or proven.failures)
        stored = found.as_dict() | {"passed": passed, "proof": proven.as_dict()}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(stored, indent=1) + "\n")
        print(f"wrote {args.json}")
    return 0 if passed else 1

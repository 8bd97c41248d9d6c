"""`python -m fastattn verify`: every backend that runs on this machine, against float64.

The rule for errors is core/tolerance.py's, which is the tests' too. `verify --model` audits a
user's model instead: verify_model.py."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from .. import masks
from ..backends import isa, proof, registry
from ..core.call import Call
from ..core.spec import NO_OPERANDS, Spec
from ..core.tolerance import Comparison, Tolerance
from ..functional import attention, varlen_attention

__all__ = ["Comparison", "Tolerance", "run", "verify"]

# ---- what is verified --------------------------------------------------------------------------


class Draw:
    """Random tensors of one call, the same for every backend: drawn on the CPU in fp64."""

    def __init__(self, dtype: torch.dtype, device: str):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return x.to(self.dtype).to(self.device)

    def bools(self, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < 0.6).to(self.device)

    def ints(self, *values) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)


@dataclass(frozen=True)
class Feature:
    """One call, of q [2, heads, q_len, head_dim], or of sequences one after the other."""

    name: str
    options: Callable[[Draw], dict] = lambda draw: {}
    heads: int = 4
    kv_heads: int = 4
    q_len: int = 150
    kv_len: int = 230
    head_dim: int = 64
    v_dim: int = 64

    def call(self, dtype: torch.dtype, device: str):
        """(function, q, k, v, options)."""
        draw = Draw(dtype, device)
        options = self.options(draw)
        if "cu_seqlens_q" in options:
            q = draw.normal(self.q_len, self.heads, self.head_dim)
            k, v = (draw.normal(self.kv_len, self.kv_heads, n) for n in (self.head_dim, self.v_dim))
            return varlen_attention, q, k, v, options
        q = draw.normal(2, self.heads, self.q_len, self.head_dim)
        k, v = (draw.normal(2, self.kv_heads, self.kv_len, n) for n in (self.head_dim, self.v_dim))
        return attention, q, k, v, options


FEATURES = (
    Feature("plain"),
    Feature("causal", lambda d: {"causal": True}),
    Feature("causal, top left", lambda d: {"causal": True, "align": "start"}),
    Feature("window", lambda d: {"window": (40, 10)}),
    Feature("bool mask", lambda d: {"mask": d.bools(2, 4, 150, 230)}),
    Feature("padding mask", lambda d: {"mask": d.bools(2, 1, 1, 230)}),
    Feature("bias", lambda d: {"bias": d.normal(1, 4, 150, 230)}),
    Feature("ALiBi", lambda d: {"alibi_slopes": d.normal(4).float().abs() / 8, "causal": True}),
    Feature("softcap", lambda d: {"softcap": 2.0}),
    Feature("sinks", lambda d: {"sinks": d.normal(4), "window": (30, 0)}),
    Feature("kv_lens", lambda d: {"kv_lens": d.ints(97, 230), "causal": True}),
    Feature(
        "documents",
        lambda d: {"document_ids": d.ints(*[0] * 33, *[1] * 80, *[5] * 37), "causal": True},
        kv_len=150,
    ),
    Feature(
        "key ranges",
        lambda d: {
            "key_ranges": masks.chunked(64, 150, offset=80, device=d.device),
            "causal": True,
        },
    ),
    Feature("dropout", lambda d: {"dropout_p": 0.2, "dropout_seed": (3, 7)}),
    Feature("grouped heads", lambda d: {"causal": True}, heads=8, kv_heads=2),
    Feature("v_dim 40, D 80", head_dim=80, v_dim=40),
    Feature("D 256", lambda d: {"causal": True}, head_dim=256, v_dim=256),
    Feature("one row, many keys", lambda d: {"causal": True}, 8, 2, 1, 2000),
    Feature("rows that see nothing", lambda d: {"causal": True}, q_len=230, kv_len=150),
    Feature(
        "packed sequences",
        lambda d: {
            "cu_seqlens_q": d.ints(0, 60, 61, 150),
            "cu_seqlens_k": d.ints(0, 60, 90, 230),
            "max_seqlen_q": 89,
            "max_seqlen_k": 140,
            "causal": True,
        },
    ),
)
QUICK = ("plain", "causal", "bool mask", "bias", "dropout", "grouped heads", "packed sequences")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- one measurement ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Measurement:
    """Errors relative to the largest value, the worst over the output, lse and all gradients."""

    error: float
    torch_error: float
    failures: tuple[str, ...]


def results_of(feature: Feature, dtype: torch.dtype, device: str, backend: str, given=None) -> dict:
    """Output, lse and gradients, computed in dtype from inputs that were rounded to `given`."""
    function, q, k, v, options = feature.call(given or dtype, device)
    tensors = {"q": q, "k": k, "v": v} | {n: options[n] for n in ("bias", "sinks") if n in options}
    leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
    q, k, v = (leaves[name] for name in "qkv")
    options |= {name: x for name, x in leaves.items() if name in options}
    out, lse = function(q, k, v, **options, return_lse=True, backend=backend)
    draw = Draw(given or dtype, device)
    dout, dlse = draw.normal(*out.shape).to(dtype), draw.normal(*lse.shape).to(lse.dtype)
    gradients = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    results = {"out": out.detach(), "lse": lse.detach()}
    results |= {f"d{name}": x for name, x in zip(leaves, gradients)}
    inputs = {name: x.detach() for name, x in leaves.items()}
    return results | {"inputs": (inputs["q"], inputs["k"], inputs["v"]), "cotangents": (dout, dlse)}


@cache
def truth(feature: Feature, dtype: torch.dtype, device: str) -> tuple[dict, dict]:
    """The results in float64, and those of plain torch in dtype, of inputs rounded to dtype."""
    want = results_of(feature, torch.float64, device, "reference", given=dtype)
    compute = torch.promote_types(dtype, torch.float32)  # halves: in fp32, rounded once
    return want, results_of(feature, compute, device, "reference", given=dtype)


def measure(feature: Feature, dtype: torch.dtype, device: str, backend: str) -> Measurement:
    got = results_of(feature, dtype, device, backend)
    inputs, cotangents = got.pop("inputs"), got.pop("cotangents")
    want, plain = truth(feature, dtype, device)
    if backend == "reference":  # it is plain torch: its yardstick is the exact result, rounded
        plain = want
    rounded = registry.BY_NAME[backend].probs_rounded
    scale = inputs[0].shape[-1] ** -0.5
    tolerance = Tolerance(*inputs, scale, want["lse"], *cotangents, probs_rounded=rounded)
    errors, torch_errors, failures = [0.0], [0.0], []
    for name, result in got.items():
        rounded = plain[name].to(result.dtype)
        comparison = tolerance.compare(name, result, want[name], rounded)
        if not comparison.passed:
            failures.append(f"{name}: {comparison}")
        finite = want[name].isfinite()
        largest = want[name][finite].abs().amax()
        for x, found in ((result, errors), (rounded, torch_errors)):
            found.append(float((x.double() - want[name])[finite].abs().amax() / largest))
    return Measurement(max(errors), max(torch_errors), tuple(failures))


# ---- the command -------------------------------------------------------------------------------


# What proof.FEATURES calls the kinds of calls that are among FEATURES above.
PROVEN = ("call", "lengths", "gradient", "gradient of lengths")


def backends_here(gpu: bool = True) -> Iterator[tuple[str, str, str | None]]:
    """(backend, device, why it does not run there) for each backend on its best device. gpu: or
    else no GPU is touched. One that has not passed its self-tests might never come back."""
    devices = ["cuda", "cpu"] if gpu and torch.cuda.is_available() else ["cpu"]
    for backend in registry.BACKENDS:
        reasons = {}
        for device in devices:
            x = torch.zeros(1, 1, 1, 64, device=device)
            if backend.unsupported_reason(
                Call(x, x, x, Spec(0.125), NO_OPERANDS)
            ):  # it has no fp32
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
    """One call on one backend: its errors, or why it was refused."""

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
    """What run() found. str() of a cell is what the table shows."""

    cells: tuple[Cell, ...]
    not_run: dict[str, str]  # backend: why not

    @property
    def failures(self) -> list[str]:
        return [f"{c.backend}, {c.feature}, {c.dtype}: {f}" for c in self.cells for f in c.failures]

    def worst(self) -> dict[str, dict[str, tuple[float, str]]]:
        """backend -> dtype -> (its largest error, the feature that has it)."""
        found: dict[str, dict[str, tuple[float, str]]] = {}
        for cell in self.cells:
            if cell.error is not None:
                dtypes = found.setdefault(cell.backend, {})
                dtypes[cell.dtype] = max(
                    dtypes.get(cell.dtype, (0.0, "")), (cell.error, cell.feature)
                )
        return found

    def as_dict(self) -> dict:
        """JSON-ready."""
        return {
            "passed": not self.failures,
            "torch": torch.__version__,
            "isa": isa.selected(),
            "not_run": self.not_run,
            "worst": self.worst(),
            "cells": [asdict(cell) for cell in self.cells],
        }


def run(quick: bool = False, console: Console | None = None, gpu: bool = True) -> Verified:
    """Measures every backend on this machine, behind a progress bar on a terminal."""
    features = [f for f in FEATURES if not quick or f.name in QUICK]
    dtypes = DTYPES[:2] if quick else DTYPES
    here = list(backends_here(gpu))
    calls = [
        (backend, device, feature, dtype)
        for backend, device, reason in here
        if reason is None
        for feature in features
        for dtype in dtypes
        if (backend, dtype) != ("reference", torch.float64)  # that is the truth
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
    except NotImplementedError as refusal:  # a backend may decline a call, with its sentence
        return Cell(*names, refused=str(refusal))
    except Exception as error:  # anything else is a failure of that call, not of the command
        return Cell(*names, failures=(f"{type(error).__name__}: {error}",))
    return Cell(*names, found.error, found.torch_error, found.failures)


def verify(stream=None, quick: bool = False) -> bool:
    """Measures every backend on this machine, prints tables, returns whether all passed."""
    console = Console(file=stream)
    if not console.is_terminal:
        console = Console(file=stream, width=120)
    found = run(quick, console)
    show(found, console)
    return not found.failures


def show(found: Verified, console: Console) -> None:
    """The tables, one a backend, what was not run, and what failed."""
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
    """Features by dtypes, of one backend."""
    backend, device = cells[0].backend, cells[0].device
    runs = f", {isa.selected()}" if backend == "cpu" else ""
    table = Table(title=f"{backend} on {device}{runs}", title_justify="left")
    yardstick = "the exact result's, rounded" if backend == "reference" else "plain torch's"
    table.caption = f"largest error against float64, relative to the largest value ({yardstick})"
    table.caption_justify = "left"
    dtypes = list(dict.fromkeys(cell.dtype for cell in cells))
    table.add_column("feature")
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    table.add_column("verdict")
    for feature in dict.fromkeys(cell.feature for cell in cells):
        row = {cell.dtype: cell for cell in cells if cell.feature == feature}
        failed = any(cell.failures for cell in row.values())
        table.add_row(
            feature,
            *(str(row.get(dtype, "")) for dtype in dtypes),
            "[red]FAILED[/]" if failed else "[green]ok[/]",
        )
    return table


def prove(console: Console, sanitize: bool) -> proof.Found:
    """The self-tests of the CUDA kernels on this machine's GPUs, told as they end."""
    machine = proof.Machine()
    if sanitize:
        if (tool := proof.sanitizer()) is None:
            raise ValueError(
                "--sanitize needs compute-sanitizer, which CUDA's toolkit has, on PATH"
            )
        machine = proof.Sanitized(tool)

    def tell(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    return proof.prove(tell, machine)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m fastattn verify",
        description="Check every backend that runs on this machine against float64, or with\n"
        "--model a model of yours, swapped, layer by layer. On a machine with a GPU it\n"
        "begins with the self-tests of the CUDA kernels, each in a process with a time\n"
        "limit; those that pass open the CUDA backend to calls that name none.",
        epilog="exit codes:\n  0  all passed\n  1  something differs more than rounding allows\n"
        "  2  the model or its inputs cannot be had",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--quick", action="store_true", help="fewer options, float32 and bfloat16")
    p.add_argument("--json", metavar="FILE", type=Path, help="write everything found there too")
    p.add_argument("--sanitize", action="store_true", help="the CUDA kernels' self-tests run under "
                   "compute-sanitizer, 20 times as slowly")  # fmt: skip
    model = p.add_argument_group("a model of yours")
    model.add_argument("--model", metavar="MODEL", help="package.module:name, file.py:name (a "
                       "module, or a function that makes one), a file of torch.save, or a "
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
        from . import verify_model

        try:
            model = verify_model.load_model(args.model)
            inputs = verify_model.load_inputs(args.inputs)
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

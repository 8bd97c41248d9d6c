"""`python -m fastattn verify`: every backend that runs on this machine, against float64.

The rule, `Judge`, is the tests' too: an error against float64 may be twice the error of plain
torch math in the same dtype (three times for gradients) plus a few roundings. It must hold for the
largest error, for the largest error of each row and for the mean error.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from . import backends
from .attention import attention, varlen_attention
from .spec import Operands, Spec

try:
    from . import _C
except ImportError:
    _C = None

# ---- the rule ----------------------------------------------------------------------------------

# How much more than plain torch's error: a factor, and roundings of the sums' terms.
FACTOR = {"result": 2.0, "gradient": 3.0}
ROUNDINGS = {
    "result": {torch.float64: 16.0, torch.float32: 4.0, torch.bfloat16: 0.25, torch.float16: 0.25},
    "gradient": {torch.float64: 16.0, torch.float32: 8.0, torch.bfloat16: 3.0, torch.float16: 3.0},
}


@dataclass(frozen=True)
class Comparison:
    """Of the checks of one tensor, the one nearest to its limit, or furthest beyond."""

    what: str
    error: float  # against float64
    torch_error: float  # plain torch math's, in the same dtype
    allowed: float

    @property
    def ratio(self) -> float:
        """error / allowed: passed up to 1."""
        return self.error / self.allowed if self.allowed else (torch.inf if self.error else 0.0)

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        return (
            f"{self.what} {self.error:.2e}, allowed {self.allowed:.2e}, "
            f"plain torch has {self.torch_error:.2e}"
        )


class Judge:
    """The rule for the results of one call, `q`, `k`, ... being its inputs.

    Beside plain torch's error it allows a few roundings of one term of each sum: a gradient may be
    a small difference of large terms, and a weight exp(score - lse) has its exponent's rounding.
    """

    def __init__(self, q, k, v, scale, lse, dout=None, dlse=None):
        weight = v.shape[-1] ** 0.5 * _size(dout) * _size(v) + _size(dlse)  # d loss / d weight
        self.dtype = q.dtype
        self.compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.rows = lse.numel()
        self.exponent = max(1.0, float(_finite(lse).abs().amax())) if _finite(lse).numel() else 1.0
        self.terms = {
            "out": _size(v),
            "lse": self.exponent,
            "dv": _size(dout),
            "dq": abs(scale) * weight * _size(k),
            "dk": abs(scale) * weight * _size(q),
            "dbias": weight,
            "dsinks": weight,
        }

    def compare(self, name: str, got: Tensor, want: Tensor, torch_math: Tensor) -> Comparison:
        """`got` against `want`, in float64; torch_math is plain torch's result in the call's dtype.

        The last dimension is a row (of dsinks [heads], each head is). NaN and infinities must stand
        where want has them.
        """
        if got.shape != want.shape:
            return _broken(f"shape {list(got.shape)}, not {list(want.shape)}")
        got, want, torch_math = (x.detach().double().cpu() for x in (got, want, torch_math))
        if want.dim() == 1:
            got, want, torch_math = (x[:, None] for x in (got, want, torch_math))
        finite = want.isfinite()
        same = (got == want) | (got.isnan() & want.isnan())
        if not torch.where(finite, got.isfinite(), same).all():
            return _broken("NaN or infinity in the wrong place")
        if want.numel() == 0:
            return Comparison("nothing", 0.0, 0.0, 0.0)
        got, want, torch_math = (torch.where(finite, x, 0.0) for x in (got, want, torch_math))
        error, plain, size = (got - want).abs(), (torch_math - want).abs(), want.abs()

        kind = "result" if name in ("out", "lse") else "gradient"
        dtype = self.compute if name == "lse" else self.dtype
        eps = max(torch.finfo(dtype).eps, torch.finfo(self.compute).eps * self.exponent)
        roundings = ROUNDINGS["result" if name == "dv" else kind][dtype] * eps
        term = self.terms[name]
        if name in ("dbias", "dsinks"):  # each sums over the rows it is shared by
            term *= max(1.0, self.rows / size[..., 0].numel()) ** 0.5
        typical = min(1.0, 1 / 16 + 2 * want.numel() ** -0.5)  # of a mean: few values have no mean
        checks = {  # error, plain torch's error, what is rounded
            "largest error": (error.max(), plain.max(), size.max() + term),
            "mean error": (error.mean(), plain.mean(), typical * (size.mean() + term)),
            "largest error of a row": (error.amax(-1), plain.amax(-1), size.amax(-1) + term),
        }
        found = []
        for what, (mine, torchs, rounded) in checks.items():
            allowed = FACTOR[kind] * torchs + roundings * rounded
            at = (mine / allowed.clamp(min=torch.finfo(torch.float64).tiny)).argmax()
            worst = (float(x.flatten()[at]) for x in (mine, torchs, allowed))
            found.append(Comparison(what, *worst))
        return max(found, key=lambda comparison: comparison.ratio)


def _broken(what: str) -> Comparison:
    return Comparison(f"{what}: error", torch.inf, 0.0, 0.0)


def _finite(x: Tensor) -> Tensor:
    return x.detach()[x.isfinite()].double()


def _size(x: Tensor | None) -> float:
    """Root mean square of the finite values."""
    x = _finite(x) if x is not None else torch.zeros(0)
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


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
    judge = Judge(*inputs, inputs[0].shape[-1] ** -0.5, want["lse"], *cotangents)
    errors, torch_errors, failures = [0.0], [0.0], []
    for name, result in got.items():
        rounded = plain[name].to(result.dtype)
        comparison = judge.compare(name, result, want[name], rounded)
        if not comparison.passed:
            failures.append(f"{name}: {comparison}")
        finite = want[name].isfinite()
        largest = want[name][finite].abs().amax()
        for x, found in ((result, errors), (rounded, torch_errors)):
            found.append(float((x.double() - want[name])[finite].abs().amax() / largest))
    return Measurement(max(errors), max(torch_errors), tuple(failures))


# ---- the command -------------------------------------------------------------------------------


def backends_here() -> Iterator[tuple[str, str, str | None]]:
    """(backend, device, why it cannot run there) for each backend on its best device."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    for row in backends.BACKENDS:
        reasons = {}
        for device in devices:
            x = torch.zeros(1, 1, 1, 64, device=device)
            reasons[device] = row.why_not(Spec(0.125), x, x, x, Operands())
        able = [device for device in devices if reasons[device] is None]
        device = able[0] if able else devices[-1]
        yield row.name, device, reasons[device]


def verify(stream=None, quick: bool = False) -> bool:
    """Measures every backend on this machine, prints tables, returns whether all passed."""
    console = Console(file=stream)
    if not console.is_terminal:
        console = Console(file=stream, width=120)
    features = [f for f in FEATURES if not quick or f.name in QUICK]
    dtypes = DTYPES[:2] if quick else DTYPES
    here = list(backends_here())
    able = [(name, device) for name, device, reason in here if reason is None]
    total = len(able) * len(features) * len(dtypes)
    failures, tables, calls = [], [], 0
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("verifying", total=total)
        for backend, device in able:
            table = _new_table(backend, device, dtypes)
            for feature in features:
                cells, failed = [], False
                for dtype in dtypes:
                    progress.update(task, advance=1, description=f"{backend}: {feature.name}")
                    if backend == "reference" and dtype == torch.float64:
                        cells.append("the truth")
                        continue
                    calls += 1
                    cell, found = _cell(feature, dtype, device, backend)
                    cells.append(cell)
                    failed |= bool(found)
                    failures += [f"{backend}, {feature.name}, {_short(dtype)}: {x}" for x in found]
                table.add_row(feature.name, *cells, "[red]FAILED[/]" if failed else "[green]ok[/]")
            tables.append(table)
    truth.cache_clear()
    for table in tables:
        console.print(table)
    for name, _, reason in here:
        if reason is not None:
            console.print(f"not run: {name}: {escape(reason)}", highlight=False)
    for failure in failures:
        console.print(f"[red]FAILED[/] {escape(failure)}", highlight=False)
    ran = ", ".join(name for name, _ in able)
    verdict = f"[red]{len(failures)} checks failed[/]" if failures else "[green]all passed[/]"
    console.print(f"{calls} calls on {ran}: {verdict}", highlight=False)
    return not failures


def _new_table(backend: str, device: str, dtypes) -> Table:
    isa = f", {_C.selected_isa()}" if backend == "cpu" and _C else ""
    table = Table(title=f"{backend} on {device}{isa}", title_justify="left")
    yardstick = "the exact result's, rounded" if backend == "reference" else "plain torch's"
    table.caption = f"largest error against float64, relative to the largest value ({yardstick})"
    table.caption_justify = "left"
    table.add_column("feature")
    for dtype in dtypes:
        table.add_column(_short(dtype), justify="right")
    table.add_column("verdict")
    return table


def _cell(feature: Feature, dtype: torch.dtype, device: str, backend: str):
    """What the table shows for one call, and the checks that failed."""
    try:
        found = measure(feature, dtype, device, backend)
    except NotImplementedError as refusal:  # a backend may decline a call, with its sentence
        return f"[dim]{escape(str(refusal))}[/]", ()
    except Exception as error:  # anything else is a failure of that call, not of the command
        return "[red]error[/]", (f"{type(error).__name__}: {error}",)
    cell = f"{found.error:.1e} ({found.torch_error:.1e})"
    return (f"[red]{cell}[/]" if found.failures else cell), found.failures


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastattn verify",
        description="Check every backend that runs on this machine against float64.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer options, float32 and bfloat16")
    return 0 if verify(quick=parser.parse_args(argv).quick) else 1

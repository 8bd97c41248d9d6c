"""`python -m fastattn info`: what this machine can run, and why it cannot run the rest.

`facts()` collects everything as plain data (`--json`), `show()` prints it, and `support_markdown()`
is the support table of docs/backends.md, made from the backends' own checks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from ..backends import build_facts, isa, proof, registry
from ..core.call import Call
from ..core.spec import Operands, Spec

ENVIRONMENT = {
    "FASTATTN_BACKEND": "forces a backend, as backend= does in a call",
    "FASTATTN_ISA": "forces an instruction set of the CPU library",
    "FASTATTN_TUNE": "1 times the Triton tile sizes near those in the table, once",
    "FASTATTN_TUNE_CACHE": "file that keeps what FASTATTN_TUNE found",
    "FASTATTN_PROOF": "file that keeps the results of verify's self-tests of the CUDA kernels",
    "FASTATTN_LOG": "1 prints each distinct choice of backend, once, to stderr",
    "FASTATTN_CPU_LIBRARY": "file of the CPU library to load (for example a sanitizer build)",
    "FASTATTN_POISON": "1 fills memory that the native code allocates with NaN, as the tests do",
    "FASTATTN_BUILD": "when building: auto, cpu, cuda, wheel, none, asan or coverage",
    "FASTATTN_CUDA_ARCHS": "when building: nvcc architectures",
    "MAX_JOBS": "when building: how many compilers run at a time",
    "OMP_NUM_THREADS": "threads of torch and of the CPU kernels",
}


# ---- collecting -------------------------------------------------------------------------------


def facts() -> dict:
    """Everything that `info` shows, as JSON-serializable data."""
    return {
        "machine": _machine(),
        "versions": _versions(),
        "isas": _isas(),
        "backends": _backends(),
        "proof": _proof(),
        "build": _build(),
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def _machine() -> dict:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": isa.features(),
        "gpus": devices,
    }


def cpu_name() -> str:
    """The CPU's model name, or what the platform module reports."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, None) or platform.processor() or platform.machine()


def _versions() -> dict[str, str | None]:
    found = {"fastattn": _version("fastattn"), "python": platform.python_version()}
    return found | {name: _version(name) for name in ("torch", "triton", "numpy")}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        module = sys.modules.get(package)
        return getattr(module, "__version__", None)


def _native():
    """The module fastattn._C, or None where it was not built."""
    try:
        from .. import _C
    except ImportError:
        return None
    return _C


def _isas() -> list[dict]:
    """Every instruction set of the CPU library, best first, with its state on this machine."""
    refused = isa.problem()
    chosen = None if refused else isa.selected()
    rows = []
    for x in isa.isas():
        if x.name == chosen:
            state = "chosen"
        elif not x.supported:
            state = f"this CPU lacks {', '.join(x.lacking)}"
        elif not x.automatic:
            state = "for tests, chosen only by FASTATTN_ISA"
        else:
            state = "could run"
        rows.append({"name": x.name, "supported": x.supported, "state": refused or state})
    return rows


def _backends() -> list[dict]:
    """Every backend, with its reason if it cannot run a plain call on any device here."""
    devices = ("cpu", "cuda")[: 1 + torch.cuda.is_available()]
    rows = []
    for backend in registry.BACKENDS:
        calls = [_sample(device, **_plain(backend)) for device in devices]
        reasons = [backend.why_not(call) for call in calls]
        reason = None if None in reasons else reasons[-1]
        rows.append({"name": backend.name, "role": backend.role, "why_not": reason})
    return rows


def _plain(backend) -> dict:
    """Options of _sample() for a plain call: fp32, or bf16 if the backend has no fp32."""
    return {} if backend.unsupported_reason(_sample()) is None else {"dtype": torch.bfloat16}


def _proof() -> dict[str, dict[str, str] | None]:
    """Results of the CUDA kernels' self-tests on each kind of GPU here; None: they have not run."""
    return {
        gpu.key: None if results is None else {name: str(x) for name, x in results.items()}
        for gpu, results in proof.here()
    }


def _build() -> dict:
    recorded = build_facts.recorded()
    if recorded is None:
        return {"missing": {"_cpu": build_facts.why_missing("_cpu")}}
    native = _native()
    return recorded | ({"module": native.build_info()} if native else {})


# ---- what each backend supports ---------------------------------------------------------------


def _one_range() -> torch.Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.int32)


SUPPORT = [  # (feature, how its call differs from a plain one)
    ("fp32", {}),
    ("bf16", {"dtype": torch.bfloat16}),
    ("fp16", {"dtype": torch.float16}),
    ("fp64", {"dtype": torch.float64}),
    ("head dim 1 to 512", {"dim": 512}),
    ("Dv differs from D", {"dim_v": 24}),
    ("grouped queries (GQA, MQA)", {"kv_heads": 1}),
    ("q_len differs from kv_len", {"kv_len": 90}),
    ("causal, aligned to the end", {"right": 0}),
    ("causal, aligned to the start", {"right": 0, "align_end": False}),
    ("window", {"left": 2, "right": 1}),
    ("bool mask", {"mask": lambda: torch.ones(1, 1, 64, 64, dtype=torch.bool)}),
    ("bias, with its gradient", {"bias": lambda: torch.zeros(1, 2, 64, 64)}),
    ("ALiBi", {"alibi_slopes": lambda: torch.ones(2)}),
    ("softcap", {"softcap": 30.0}),
    ("sinks, with their gradient", {"sinks": lambda: torch.zeros(2)}),
    ("kv_lens", {"kv_lens": lambda: torch.ones(1, dtype=torch.int32)}),
    ("document_ids", {"document_ids": lambda: torch.zeros(1, 64, dtype=torch.int32)}),
    ("key_ranges", dict.fromkeys(("key_begin", "key_end"), _one_range)),
    ("dropout", {"dropout_p": 0.1, "dropout_seed": lambda: torch.tensor([1, 0])}),
    ("packed sequences (cu_seqlens)", {"cu_seqlens_q": "packed", "cu_seqlens_k": "packed"}),
    ("paged keys and values", {"page_table": "paged", "kv_lens": "paged"}),
]


def _sample(
    device: str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    dim: int = 64,
    dim_v: int = 0,
    kv_heads: int = 2,
    kv_len: int = 64,
    **changes,
) -> Call:
    """A small call in the operators' normal form, as every backend's why_not takes it."""
    packed = {"packed": torch.tensor([0, 64], dtype=torch.int32)}
    paged = {
        "page_table": torch.zeros(1, 1, dtype=torch.int32),
        "kv_lens": torch.ones(1, dtype=torch.int32),
    }
    numbers, tensors = {}, {}
    for name, value in changes.items():
        if value == "paged":
            value = paged[name]
        elif isinstance(value, str):
            value = packed[value]
        if callable(value):
            value = value()
        if isinstance(value, torch.Tensor):
            tensors[name] = value.to(device)
        else:
            numbers[name] = value
    q = torch.zeros(1, 2, 64, dim, dtype=dtype, device=device)
    k = torch.zeros(1, kv_heads, kv_len, dim, dtype=dtype, device=device)
    v = torch.zeros(1, kv_heads, kv_len, dim_v or dim, dtype=dtype, device=device)
    return Call(q, k, v, Spec(scale=1.0, **numbers), Operands(**tensors))


def support() -> dict[str, dict[str, str | None]]:
    """feature -> backend -> why it does not support the feature, or None if it does.

    This asks only the check of the call itself, not that of the machine, so that the table is the
    same on every machine. A backend without fp32 is asked for the other features in bf16.
    """
    table: dict[str, dict[str, str | None]] = {feature: {} for feature, _ in SUPPORT}
    for backend in registry.BACKENDS:
        plain = _plain(backend)
        for feature, changes in SUPPORT:
            base = {} if feature == "fp32" else plain
            call = _sample(**(base | changes))
            table[feature][backend.name] = backend.unsupported_reason(call)
    return table


def support_markdown() -> str:
    """The support table of docs/backends.md."""
    names = [backend.name for backend in registry.BACKENDS]
    lines = [f"| | {' | '.join(names)} |", "|---|" + ":-:|" * len(names)]
    for feature, reasons in support().items():
        cells = ["yes" if reasons[name] is None else "no" for name in names]
        lines.append(f"| {feature} | {' | '.join(cells)} |")
    roles = (f"{backend.name}: {backend.role}" for backend in registry.BACKENDS)
    return "\n".join([*lines, "", f"{'; '.join(roles)}."])


# ---- printing ---------------------------------------------------------------------------------


def show(gathered: dict, console: Console) -> None:
    """Prints the facts in sections of (name, value, remark). Lines are wrapped to the width of a
    terminal; in a pipe they are not, so that whole lines can be searched."""
    sections = {
        "machine": _machine_rows(gathered),
        "instruction sets, best first": [(i["name"], i["state"]) for i in gathered["isas"]],
        "backends, best first": [_backend_row(row) for row in gathered["backends"]],
        "proof of the CUDA kernels": _proof_rows(gathered["proof"]),
        "build": _build_rows(gathered["build"]),
        "environment": _environment_rows(gathered["environment"]),
    }
    width = max(len(name) for rows in sections.values() for name, *_ in rows)
    blank = ""  # printed before every section but the first
    for title, rows in sections.items():
        if rows:
            console.print(Text(f"{blank}{title}", style="bold"), soft_wrap=True)
            blank = "\n"
        for name, value, *remark in rows:
            style = {"chosen": "green", "available": "green"}.get(value, "")
            text = Text(value, style=style).append_text(_remark(remark))
            room = max(20, console.width - width - 4)
            left = Text(f"  {name:<{width}}  ", style="cyan")
            for line in text.wrap(console, room) if console.is_terminal else [text]:
                line.rstrip()
                console.print(left + line, soft_wrap=True)
                left = Text(" " * len(left))


def _remark(remark: list[str]) -> Text:
    return Text("".join(f"  {text}" for text in remark), style="dim")


def _backend_row(row: dict) -> tuple[str, str, str]:
    return row["name"], row["why_not"] or "available", f"({row['role']})"


def _machine_rows(gathered: dict) -> list[tuple[str, str]]:
    machine, versions = gathered["machine"], gathered["versions"]
    features = machine["features"]
    if features is None:
        listed = "unknown (the native CPU library detects them, and it was not built)"
    else:
        listed = " ".join(name for name, has in features.items() if has) or "none that matter here"
    return [
        *((name, version or "not installed") for name, version in versions.items()),
        ("system", machine["system"]),
        ("CPU", f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} torch threads"),
        ("CPU features", listed),
        ("GPU", ", ".join(machine["gpus"]) or "none that torch sees"),
    ]


def _proof_rows(proofs: dict) -> list[tuple[str, str]]:
    rows = []
    for key, results in proofs.items():
        rows.append(("GPU", key if results else f"{key}: nothing yet; {proof.HOW}"))
        rows += [(f"  {name}", result) for name, result in (results or {}).items()]
    return rows


def _build_rows(build: dict) -> list[tuple[str, str]]:
    rows = [(name, f"not built: {reason}") for name, reason in build["missing"].items()]
    if built := build.get("built"):
        rows.insert(0, ("built", ", ".join(built)))
    for name in ("mode", "compiler", "flags", "torch", "nvcc_release", "platform"):
        if build.get(name):
            rows.append((name, str(build[name])))
    return rows


def _environment_rows(environment: dict) -> list[tuple[str, str, str]]:
    return [(name, value or "-", ENVIRONMENT[name]) for name, value in environment.items()]


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m fastattn info`: status 1 where FASTATTN_ISA lets no kernel run."""
    parser = argparse.ArgumentParser(
        prog="python -m fastattn info",
        description="What this machine can run, and why it cannot run the rest.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="everything, as JSON")
    form.add_argument("--markdown", action="store_true", help="the support table, as Markdown")
    options = parser.parse_args(argv)
    if options.markdown:
        print(support_markdown())
        return 0
    if options.json:
        print(json.dumps(facts(), indent=2))
    if problem := isa.problem():
        print(problem, file=sys.stderr)
        return 1
    if not options.json:
        console = Console()
        with console.capture() as page:  # rich would exit with 1 if the pipe is closed
            show(facts(), console)
        print(page.get(), end="")
    return 0

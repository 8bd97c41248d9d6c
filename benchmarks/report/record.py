"""A measured run as plain data: --json writes it, the history stores it, reports are made from it.

schema   2
machine, clocks, peak, noise, options, level, interrupted, skipped
rows     one entry per case: name, group, row (the AttentionCase), mode, work, formula, red, floor,
         command, tokens, sides, versus, ...
         sides: each contender's kernel, error, memory, time and rates; versus: the ratio to each
"""

from __future__ import annotations

import csv
import io
import shlex
from dataclasses import asdict, is_dataclass

from fastattn.core.work import FORMULAS

from ..cases import AttentionCase
from ..measure.machine import Machine
from ..measure.protocol import AGAIN, OURS, Result, Side
from ..measure.timing import Noise, Ratio, noise_floor, quantile

SCHEMA = 2
SPECIAL = frozenset(r".+*?()[]{}|^$" + "\\")  # of regular expressions


def as_json(
    results: list[Result],
    machine: Machine,
    *,
    level: str,
    options: list[str],
    aa: list[Result] = (),
    skipped: list[str] = (),
    interrupted: bool = False,
) -> dict:
    """The whole run. `options` is the command line that selected its cases."""
    noise = noise_floor([ratio_again(r) for r in aa if r.comparison is not None])
    return {
        "schema": SCHEMA,
        **machine.as_dict(),
        "level": level,
        "options": options,
        "noise": asdict(noise),
        "interrupted": interrupted,
        "skipped": list(skipped),
        "rows": [entry_json(result, machine, options) for result in results],
    }


def ratio_again(result: Result) -> Ratio:
    """The ratio of an A/A case: the second of the two equal sides against the first."""
    first, second = result.comparison.samples
    return result.comparison.ratio(second, baseline=first)


def noise_of(data: dict) -> Noise:
    return Noise(**data["noise"])


def entry_json(result: Result, machine: Machine, options: list[str]) -> dict:
    case, work = result.case, result.work
    timed = result.comparison is not None and result.red is None
    entry = {
        "name": case.name,
        "group": case.group,
        "mode": case.mode,
        "dtype": case.dtype,
        "row": asdict(case) if isinstance(case, AttentionCase) and is_dataclass(case) else None,
        "work": asdict(work) if work else None,
        "formula": FORMULAS[case.mode] if work else None,
        "tokens": result.tokens,
        "red": result.red,
        "floor": case.floor,
        "command": command(case.name, options),
        "seconds": result.seconds,
        "sides": {n: _side_json(s, result, machine, timed) for n, s in result.sides.items()},
        "versus": {},
        "comparison": result.comparison.as_dict() if timed else None,
    }
    if timed:
        base = OURS if OURS in result.comparison.samples else next(iter(result.comparison.samples))
        for name in result.comparison.samples:
            if name != base:
                ratio = result.comparison.ratio(base, baseline=name)
                if name.endswith(AGAIN):
                    ratio = ratio_again(result)
                entry["versus"][name] = asdict(ratio) | {"verdict": ratio.verdict}
    return entry


def base_and_others(entry: dict) -> tuple[dict, list[str]]:
    """The side that the others are compared with, which is fastattn or the first side of an A/A
    run, and the names of the others."""
    names = list(entry["sides"])
    twins = any(name.endswith(AGAIN) for name in names)
    base = names[0] if twins and OURS not in names else OURS
    return entry["sides"].get(base, {}), [name for name in names if name != base]


def _side_json(side: Side, result: Result, machine: Machine, timed: bool) -> dict:
    entry = {
        "backend": side.backend,
        "why_not": side.why_not,
        "errors": asdict(side.errors) if side.errors else None,
        "memory": side.memory,
    }
    if not (timed and side.able and side.name in result.comparison.samples):
        return entry
    samples = result.comparison.samples[side.name]
    seconds = result.comparison.median(side.name)
    entry |= {
        "ms": seconds * 1e3,
        "ms_p20": quantile(samples, 0.2) * 1e3,
        "ms_p80": quantile(samples, 0.8) * 1e3,
    }
    if result.tokens:
        entry["tokens_per_s"] = result.tokens / seconds
    if result.work:
        dtype, work = result.case.dtype, result.work
        bound, roof = machine.roof(dtype, work)
        entry |= {
            "tflops": work.flops / seconds / 1e12,
            "gbytes": work.bytes / seconds / 1e9,
            "bound": bound,
            "percent_of_matmul": 100 * work.flops / seconds / machine.peak_flops(dtype),
            "percent_of_copy": 100 * work.bytes / seconds / machine.peak_bytes(work),
            "percent_of_peak": 100 * roof / seconds,
        }
    return entry


def command(name: str, options: list[str]) -> str:
    """The command line that measures this case again, and nothing else."""
    escaped = "".join(f"\\{c}" if c in SPECIAL else c for c in name)
    words = ["python", "-m", "fastattn", "bench", *options, "--cases", f"^{escaped}$"]
    return shlex.join(words)


# ---- what all reports use -----------------------------------------------------------------------


def primary(entry: dict) -> str | None:
    """The competitor of an entry's headline ratio: the first that was timed."""
    return next(iter(entry["versus"]), None)


def slower(data: dict) -> list[tuple[dict, str, dict]]:
    """(entry, competitor, ratio) of every case on which fastattn is slower, the slowest first."""
    found = [
        (entry, name, ratio)
        for entry in data["rows"]
        for name, ratio in entry["versus"].items()
        if ratio["verdict"] == "slower" and not name.endswith(AGAIN)
    ]
    return sorted(found, key=lambda item: item[2]["value"])


def reds(data: dict) -> list[dict]:
    return [entry for entry in data["rows"] if entry["red"]]


def rate(side: dict) -> str:
    """The side's rate, in the unit of what bounds the work."""
    if "tokens_per_s" in side:
        return f"{side['tokens_per_s']:.0f} tokens/s"
    if "tflops" not in side:
        return ""
    if side["bound"] == "memory":
        return f"{side['gbytes']:.1f} GB/s"
    return f"{side['tflops']:.3g} TFLOP/s" if side["tflops"] >= 1 else \
        f"{side['tflops'] * 1e3:.0f} GFLOP/s"  # fmt: skip


def said(ratio: dict) -> str:
    """The ratio as text, or "no difference"."""
    return "no difference" if ratio["verdict"] == "no difference" else f"{ratio['value']:.2f}"


def title(data: dict) -> str:
    """The machine and the versions in one line."""
    facts = data["machine"]
    what = facts.get("gpu") or facts["cpu"]
    return (
        f"{what}, {facts['threads']} threads, fastattn on {facts['isa']}, torch {facts['torch']} "
        f"on {facts['torch_isa']}; {facts['date'][:10]}"
    )


RATES = ("tokens_per_s", "tflops", "gbytes", "percent_of_matmul", "percent_of_copy")
COLUMNS = (  # of the CSV
    *("name", "versus", "backend", "why_not", "verdict", "ratio", "low", "high", "p20", "p80"),
    *("ms", "fastattn_ms", "fastattn_backend", *RATES, "memory", "fastattn_memory"),
    *("error", "fastattn_error", "red", "command"),
)


def as_csv(data: dict) -> str:
    """One line for each entry and competitor; an entry without a competitor has one line too. Rates
    are fastattn's."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for entry in data["rows"]:
        ours = entry["sides"].get(OURS, {})
        for name in [name for name in entry["sides"] if name != OURS] or [None]:
            side, ratio = entry["sides"].get(name, {}), entry["versus"].get(name, {})
            line = {key: entry[key] for key in ("name", "red", "command")} | {"versus": name}
            line |= {key: side.get(key) for key in ("backend", "why_not", "ms", "memory")}
            line |= {key: ratio.get(key) for key in ("verdict", "low", "high", "p20", "p80")}
            line |= {key: ours.get(key) for key in RATES} | {"ratio": ratio.get("value")}
            line |= {f"fastattn_{key}": ours.get(key) for key in ("ms", "backend", "memory")}
            for prefix, one in (("", side), ("fastattn_", ours)):
                line[f"{prefix}error"] = (one.get("errors") or {}).get("largest")
            writer.writerow(line)
    return out.getvalue()

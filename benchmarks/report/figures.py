"""The report's figures, drawn with matplotlib from a run's data: SVG for the page (page.py), PNG
files on request. Each figure is narrow enough for a phone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean

import matplotlib
from fastattn.benchmarks.demo.report import INK, MUTED, STYLE, WIDTH, plain
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm, to_hex
from matplotlib.figure import Figure

from ..cases import LABELS, AttentionCase
from ..suites import variant
from .history import BASE
from .record import OURS
from .table import headline

COLOURS = {OURS: "#0b7a75", "sdpa": "#8a94a6", "torch": "#8a94a6", "math": "#c9a227",
           "flex": "#6f4fa0", "flash_attn": "#b3541e", "xformers": "#3b6fb6", "eager": "#b56576",
           BASE: "#3b6fb6"}  # fmt: skip
DTYPE_COLOURS = {"fp32": "#0b7a75", "bf16": "#3b6fb6", "fp16": "#b3541e"}
DIVERGING = LinearSegmentedColormap.from_list("ratio", ["#b3261e", "#fbf7ef", "#0b7a75"])
NORM = TwoSlopeNorm(0.0, -1.5, 3.5)  # of log2(ratio)


def _timed(data: dict) -> list[dict]:
    """The entries of attention cases that were timed."""
    return [
        e for e in data["rows"] if e["row"] and e["versus"] and "ms" in e["sides"].get(OURS, {})
    ]


def keys_of(entry: dict) -> int:
    return entry["row"]["kv_len"] or entry["row"]["q_len"]


def by_variant(data: dict) -> dict[tuple, list[dict]]:
    """Entries grouped by everything but their length, shortest first."""
    found: dict[tuple, list[dict]] = {}
    for entry in sorted(_timed(data), key=keys_of):
        found.setdefault(variant(AttentionCase(**entry["row"])), []).append(entry)
    return found


def variant_name(key: tuple) -> str:
    group, dtype, mode, dim, options, (batch, _, _) = key
    shown = [f"B{batch}"] if batch > 1 else []
    words = [group, dtype, LABELS[mode], *shown, f"D{dim}", *(o for o in options if o != group)]
    return " ".join(words)


# ---- one figure each ----------------------------------------------------------------------------


def speed(data: dict) -> Iterator[tuple[str, Figure]]:
    """FLOP/s over the number of keys, one figure for each variant. Only visible pairs count."""
    for key, entries in by_variant(data).items():
        if len(entries) < 2:
            continue
        figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
        axes = figure.subplots()
        sides = dict.fromkeys(name for e in entries for name in e["sides"])
        for name in sides:
            points = [(keys_of(e), e["sides"][name]) for e in entries if name in e["sides"]]
            points = [(x, side) for x, side in points if "tflops" in side]
            if points:
                xs, rates = zip(*((x, side["tflops"] * 1e3) for x, side in points))
                colour = COLOURS.get(name, MUTED)
                axes.plot(xs, rates, "o-", color=colour, label=name, markersize=4)
        lengths = [keys_of(e) for e in entries]
        axes.set(title=textwrap.fill(variant_name(key), 32), xscale="log", xlabel="keys",
                 ylabel="GFLOP/s, visible")  # fmt: skip
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.xaxis.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
        yield f"speed-{len(lengths)}-{variant_name(key).replace(' ', '-')}", figure


def heat(entry: dict) -> tuple[str, str, str]:
    """(text, its colour, its background) of an entry's ratio to its first competitor."""
    ratio = headline(entry)
    behind = DIVERGING(NORM(math.log2(ratio["value"])))
    light = sum(part * x**2.2 for part, x in zip((0.213, 0.715, 0.072), behind)) > 0.18
    text = "=" if ratio["verdict"] == "no difference" else f"{ratio['value']:.1f}"
    return text, "#000" if light else "#fff", to_hex(behind)


def heat_map(data: dict) -> Figure | None:
    """Every variant's ratio to its first competitor, by length."""
    table = by_variant(data)
    lengths = sorted({keys_of(e) for entries in table.values() for e in entries})
    if not table:
        return None
    figure = Figure(figsize=(max(4.7, 2.2 + 0.52 * len(lengths)), 1.0 + 0.27 * len(table)),
                    layout="constrained")  # fmt: skip
    axes = figure.subplots()
    logs = [[math.nan] * len(lengths) for _ in table]
    for y, entries in enumerate(table.values()):
        for entry in entries:
            x, (text, colour, _) = lengths.index(keys_of(entry)), heat(entry)
            logs[y][x] = math.log2(headline(entry)["value"])
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=colour)
    edges = [[n - 0.5 for n in range(count + 1)] for count in (len(lengths), len(table))]
    axes.pcolormesh(*edges, logs, cmap=DIVERGING, norm=NORM)
    axes.invert_yaxis()
    axes.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=8)
    axes.set_yticks(range(len(table)), [variant_name(key) for key in table], fontsize=8)
    axes.set(xlabel="keys; = is no difference")
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return figure


def roofline(data: dict) -> Figure | None:
    """FLOP/s over arithmetic intensity, with the roofline of this machine."""
    entries = [e for e in _timed(data) if e["work"]["bytes"]]
    peak, reached = data["peak"]["flops"], data["peak"]["bandwidth_by_working_set"]
    if not entries or not peak or not reached:
        return None
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    intensity = [e["work"]["flops"] / e["work"]["bytes"] for e in entries]
    low, high = 0.7 * min(intensity), 1.5 * max(intensity)
    top, slope = max(peak.values()) / 1e9, reached[max(reached, key=int)] / 1e9
    ridge = top / slope
    xs = sorted({low, high, min(max(ridge, low), high)})
    axes.plot(xs, [min(top, slope * x) for x in xs], color=INK, linewidth=1.2)
    for dtype, colour in DTYPE_COLOURS.items():
        points = [(x, e["sides"][OURS]["tflops"] * 1e3) for x, e in zip(intensity, entries)
                  if e["dtype"] == dtype]  # fmt: skip
        if points:
            axes.plot(*zip(*points), "o", color=colour, label=dtype, markersize=4, alpha=0.85)
    axes.set(title="Roofline of this machine", xscale="log", yscale="log",
             xlabel="visible FLOP per byte", ylabel="GFLOP/s, fastattn")  # fmt: skip
    plain(axes.yaxis)
    axes.legend(fontsize=8)
    return figure


def _against(data: dict, title: str, unit: str, value: Callable[[dict], float | None]):
    """fastattn's value over the first competitor's, one point per case. Below the line fastattn's
    is smaller."""
    points = []
    for entry in _timed(data):
        other = next(iter(entry["versus"]))
        pair = value(entry["sides"][other]), value(entry["sides"][OURS])
        if all(pair):
            points.append((*pair, entry["dtype"]))
    if not points:
        return None
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    axes = figure.subplots()
    ends = [f(x for p in points for x in p[:2]) for f in (min, max)]
    axes.plot(ends, ends, color=INK, linewidth=1)
    for dtype, colour in DTYPE_COLOURS.items():
        some = [p[:2] for p in points if p[2] == dtype]
        if some:
            axes.plot(*zip(*some), "o", color=colour, label=dtype, markersize=4, alpha=0.85)
    axes.set(title=title, xscale="log", yscale="log", xlabel=f"the other's, {unit}",
             ylabel=f"fastattn's, {unit}")  # fmt: skip
    axes.legend(fontsize=8)
    return figure


def memory(data: dict) -> Figure | None:
    return _against(data, "Peak memory beyond the inputs:\nlower is better", "MB",
                    lambda side: (side.get("memory") or 0) / 1e6)  # fmt: skip


def error(data: dict) -> Figure | None:
    return _against(data, "Largest error against float64", "relative",
                    lambda side: (side.get("errors") or {}).get("largest"))  # fmt: skip


def history(runs: list[tuple[str, dict]]) -> Figure | None:
    """The geometric mean of each group's ratios in every run."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for x, (_, data) in enumerate(runs):
        groups: dict[str, list[float]] = {}
        for entry in data["rows"]:
            ratio = headline(entry) if BASE not in entry["versus"] else None
            if ratio:
                groups.setdefault(entry["group"], []).append(math.log(ratio["value"]))
        for group, logs in groups.items():
            lines.setdefault(group, []).append((x, math.exp(fmean(logs))))
    if len(runs) < 2 or not lines:
        return None
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    axes = figure.subplots()
    palette = matplotlib.colormaps["tab20"]
    for index, (group, points) in enumerate(lines.items()):
        axes.plot(*zip(*points), "o-", markersize=3, linewidth=1.2, label=group,
                  color=palette(index % 20))  # fmt: skip
    axes.axhline(1.0, color=INK, linewidth=1)
    names = [run.split("_")[-1][:7] for run, _ in runs]
    step = max(1, len(runs) // 8)
    axes.set_xticks(range(0, len(runs), step), names[::step], rotation=45, ha="right", fontsize=8)
    axes.set(title="Mean ratio of each group, run by run", yscale="log", ylabel="ratio")
    plain(axes.yaxis)
    figure.legend(fontsize=7, ncols=3, loc="outside lower center")
    return figure


def drawn(data: dict, runs: list[tuple[str, dict]]) -> dict[str, Figure]:
    """Every figure for which there is data, in the page's order."""
    single = {"heat-map": heat_map(data), **dict(speed(data)), "roofline": roofline(data),
              "memory": memory(data), "error": error(data), "history": history(runs)}  # fmt: skip
    return {name: figure for name, figure in single.items() if figure is not None}


def write_pngs(data: dict, runs: list[tuple[str, dict]], folder: Path) -> list[Path]:
    """Writes every figure as a PNG file into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, figure in drawn(data, runs).items():
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=200)
    return written

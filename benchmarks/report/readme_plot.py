"""The README's plot: torch's time divided by fastattn's, one line for each kind of call.

readme_table.py draws it from the runs in benchmarks/results/ into docs/ratios.svg. Its colours are
legible on light and dark pages, and its background is transparent. Its description contains the
numbers that it was drawn from, so that no matplotlib is needed to tell whether it is up to date.
"""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable

COLOURS, TEXT = ("#12a39a", "#5b8def"), "#7d8797"


Ranges = dict[str, dict[str, list[float]]]  # {instruction set: {kind: [least, greatest ratio]}}


def numbers(reports: list[dict], group_of: Callable, ratio_of: Callable) -> Ranges:
    """The plotted numbers. A kind of call with a RED case is left out."""
    found: Ranges = {}
    for report in reports:
        kinds: dict[str, list[float | None]] = {}
        for entry in report["rows"]:
            ratio = ratio_of(entry)
            kinds.setdefault(", ".join(group_of(entry)), []).append(ratio and ratio["value"])
        found[report["machine"]["isa"]] = {
            kind: [round(min(values), 2), round(max(values), 2)]
            for kind, values in kinds.items()
            if None not in values
        }
    return found


def described(data: Ranges) -> str:
    """The numbers as text, as the plot's description contains them."""
    return json.dumps(data, separators=(",", ":"))


def is_of(svg: str, data: Ranges) -> bool:
    """Whether the plot was drawn from these numbers."""
    return html.escape(described(data), quote=False) in svg


def draw(data: Ranges) -> str:
    """The plot as the text of an SVG file. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(kind for part in data.values() for kind in part))
    style = {"svg.fonttype": "none", "svg.hashsalt": "fastattn", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        # Narrow, with each name above its lines, so that it fits a phone.
        figure = Figure(figsize=(5.2, 0.37 * len(kinds) + 0.9), layout="constrained")
        axes = figure.subplots()
        for n, (isa, part) in enumerate(data.items()):
            for kind, ends in part.items():
                y = kinds.index(kind) + 0.3 + 0.2 * n
                axes.plot(ends, [y, y], "o-", color=COLOURS[n], linewidth=2, markersize=4)
            axes.plot([], [], "o-", color=COLOURS[n], label=isa, markersize=4)
        for y, kind in enumerate(kinds):
            axes.text(1.03, y, kind, va="center", fontsize=8, color=TEXT)
        axes.axvline(1.0, color=TEXT, linewidth=1.2)
        axes.set(xscale="log", xlim=(0.98, 25), ylim=(len(kinds) - 0.1, -0.6),
                 xlabel="torch's time / fastattn's; the line at 1 is torch")  # fmt: skip
        axes.set_xticks([1, 1.5, 2, 3, 5, 10, 20], ["1", "1.5", "2", "3", "5", "10", "20"])
        axes.xaxis.minorticks_off()
        axes.set_yticks([])
        axes.grid(axis="x", color=TEXT, alpha=0.25)
        axes.tick_params(colors=TEXT, length=0, labelsize=8)
        axes.xaxis.label.set(color=TEXT, fontsize=9)
        for spine in axes.spines.values():
            spine.set_visible(False)
        figure.legend(frameon=False, labelcolor=TEXT, fontsize=9, loc="outside upper left", ncols=2)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True,
                       metadata={"Date": None, "Description": described(data)})  # fmt: skip
    return file.getvalue()

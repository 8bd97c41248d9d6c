"""The demo's report: one table on the terminal, demo.json, and demo.html with its figures inside.

All three are made from the data that main.run() returns, which demo.json contains.
"""

from __future__ import annotations

import io
import json
import re
from html import escape
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rich.console import Console
from rich.table import Table

COLOURS = {"torch": "#8a94a6", "fastattn": "#0b7a75"}
DARK = {  # each colour of pages and figures: its CSS name and its value in a dark scheme
    "#ffffff": ("paper", "#14181f"),
    "#1d2433": ("ink", "#e4e8ef"),
    "#5c677d": ("muted", "#9aa5b8"),
    "#e6e9ef": ("grid", "#2c3440"),
    "#0b7a75": ("teal", "#3fbdb3"),
    "#b3261e": ("red", "#ff8f85"),
    "#7a6a1f": ("olive", "#d9c36a"),
    "#6f4fa0": ("violet", "#ab8fe0"),
    "#3b6fb6": ("blue", "#7fadf0"),
    "#b3541e": ("rust", "#e39263"),
}
WIDTH = 3.9  # inches of a figure: a phone shows it at its own size
KINDS = ("encode", "attention", "attention, training", "fine-tuning step")  # of timings
INK, MUTED, GRID = "#1d2433", "#5c677d", "#e6e9ef"
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "fastattn",  # the same data gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
}


# ---- shared by the table and the page ---------------------------------------------------------


def answers(data: dict) -> list[tuple[str, str, str, str]]:
    """(what, torch, fastattn, verdict) of the comparison of results."""
    agreed, trained, ran = data["agreement"], data["training"], data["attention"]
    same = sum(found["same"] for found in data["search"])
    count = len(data["search"])
    return [
        (
            "attention ran on (inference / training)",
            " / ".join(ran["torch"].values()),
            " / ".join(ran["fastattn"].values()),
            "",
        ),
        (
            f"embedding error against float64, {agreed['checked_texts']} texts",
            f"{agreed['error']['torch']:.1e}",
            f"{agreed['error']['fastattn']:.1e}",
            _right(agreed["right"]),
        ),
        (
            f"difference between the two, {agreed['texts']} texts",
            "",
            f"{agreed['largest_difference']:.1e}",
            f"least cosine {agreed['smallest_cosine']:.7f}",
        ),
        (
            "nearest docstrings of the queries",
            "",
            f"{same} of {count} the same",
            _right(same == count),
        ),
        (
            "fine-tuning loss, no dropout",
            f"{trained['loss']['torch']:.6f}",
            f"{trained['loss']['fastattn']:.6f}",
            f"float64: {trained['loss']['float64']:.6f}",
        ),
        (
            "gradient error against float64, relative",
            f"{trained['gradient_error']['torch']:.1e}",
            f"{trained['gradient_error']['fastattn']:.1e}",
            _right(trained["right"]),
        ),
    ]


def _right(right: bool) -> str:
    return "right" if right else "WRONG"


def speeds(data: dict) -> list[tuple[str, str, str, str]]:
    """(what, torch ms, fastattn ms, verdict) of every timing. If a result is wrong, no numbers."""
    rows = []
    for timing in _in_order(data):
        what = f"{timing['what']}, {timing['shape']} tokens"
        if data["right"]:
            ms = timing["ms"]
            rows.append((what, _ms(ms["torch"]), _ms(ms["fastattn"]), _ratio(timing["ratio"])))
        else:
            rows.append((what, "", "", "no number: the results above are wrong"))
    return rows


def _in_order(data: dict) -> list[dict]:
    return sorted(data["timings"], key=lambda t: (KINDS.index(t["what"]), t["tokens"]))


def _ms(value: float) -> str:
    return f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms"


def _ratio(ratio: dict) -> str:
    interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    if ratio["verdict"] == "no difference":
        return f"no difference ({interval})"
    return f"{ratio['value']:.2f} x ({interval})"


def print_table(data: dict, console: Console) -> None:
    facts = data["machine"]
    table = Table(
        title="fastattn in MiniLM: the same answers, how fast",
        caption=f"{facts['cpu']}, {facts['threads']} threads, torch {facts['torch']}, "
        f"isa {facts['isa']}. Ratios: torch's time / fastattn's, 95 % interval.",
        header_style="bold",
    )
    table.add_column("what")
    for head in ("torch", "fastattn"):
        table.add_column(head, justify="right")
    table.add_column("torch / fastattn")
    for rows in (answers(data), speeds(data)):
        for what, torch, ours, verdict in rows:
            table.add_row(what, torch, ours, f"[{_colour(verdict)}]{verdict}[/]")
        table.add_section()
    console.print(table)


def _colour(verdict: str) -> str:
    if verdict.startswith(("WRONG", "no number")):
        return "bold red"
    if verdict.startswith("no difference"):
        return "yellow"
    number = re.match(r"[\d.]+ x", verdict)
    if number:
        return "green" if float(number[0][:-2]) > 1 else "red"
    return "green" if verdict == "right" else "default"


# ---- figures ----------------------------------------------------------------------------------


def latency(data: dict) -> Figure:
    """Times over the length of the longest text in the batch."""
    kinds = [k for k in KINDS[:-1] if any(t["what"] == k for t in data["timings"])]
    figure = Figure(figsize=(WIDTH, 2.1 * len(kinds)), layout="constrained")
    for axes, kind in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds):
        points = [t for t in _in_order(data) if t["what"] == kind]
        lengths = [t["tokens"] for t in points]
        for side, colour in COLOURS.items():
            times = [t["ms"][side] for t in points]
            axes.plot(lengths, times, "o-", color=colour, label=side, markersize=4)
        axes.set(title=kind, xscale="log", yscale="log", xlabel="tokens", ylabel="ms a batch")
        axes.set_xticks(lengths, [str(n) for n in lengths])
        axes.xaxis.minorticks_off()
        plain(axes.yaxis)
    figure.axes[0].legend()
    return figure


def ratios(data: dict) -> Figure:
    """Every ratio with its interval; left of the line fastattn is slower."""
    timings = _in_order(data)[::-1]
    figure = Figure(figsize=(WIDTH, 0.8 + 0.36 * len(timings)), layout="constrained")
    axes = figure.subplots()
    left = axes.get_yaxis_transform()  # x in axes coordinates, y in data coordinates
    axes.axvline(1.0, color=INK, linewidth=1)
    for y, timing in enumerate(timings):
        ratio = timing["ratio"]
        sure = ratio["verdict"] != "no difference"
        colour = COLOURS["fastattn"] if sure else COLOURS["torch"]
        axes.plot([ratio["low"], ratio["high"]], [y, y], color=colour, linewidth=3, alpha=0.45)
        axes.plot(ratio["value"], y, "o", color=colour, markersize=5)
        name = f"{timing['what']}, {timing['shape']} tokens"  # above: no room beside
        behind = {"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.5}
        axes.text(0, y + 0.3, name, transform=left, fontsize=8.5, va="bottom", bbox=behind)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_ylim(-0.5, len(timings))
    axes.set(xscale="log", xlabel="torch's time / fastattn's, 95 % interval;\ngrey: no difference")
    plain(axes.xaxis)
    return figure


def differences(data: dict) -> Figure:
    """The difference of the two embeddings of each text."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    values = [v * 1e7 for v in data["agreement"]["difference_by_text"]]
    axes.hist(values, bins=24, range=(0, max(*values, 1e-3)), color=COLOURS["fastattn"])
    axes.set(
        title="Embeddings: fastattn - torch",
        xlabel="largest difference of a component, 1e-7",
        ylabel="texts",
    )
    axes.grid(axis="x", visible=False)
    return figure


def losses(data: dict) -> Figure:
    """Losses of the timed steps. Dropout differs between the sides, but the descent should not."""
    figure = Figure(figsize=(WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    for side, colour in COLOURS.items():
        values = data["training"]["losses"][side]
        axes.plot(range(1, len(values) + 1), values, "o-", color=colour, label=side, markersize=4)
    axes.set(title="Fine-tuning with dropout 0.1", xlabel="step", ylabel="loss")
    axes.legend()
    return figure


FIGURES = {"differences": differences, "losses": losses, "ratios": ratios, "latency": latency}
SPEED_FIGURES = ("ratios", "latency")


def plain(axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, written as numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element. Its ids contain its name, so that a page can have several,
    and its colours are the page's CSS variables, so that they follow the page's scheme."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub("#[0-9a-f]{6}\\b", lambda hit: _variable(hit[0]), text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)


def _variable(colour: str) -> str:
    return f"var(--{DARK[colour][0]})" if colour in DARK else colour


# ---- the page ---------------------------------------------------------------------------------

LIGHTS = "; ".join(f"--{name}: {light}" for light, (name, _) in DARK.items())
DARKS = "; ".join(f"--{name}: {dark}" for name, dark in DARK.values())
CSS = (
    f"""
:root {{ color-scheme: light dark; {LIGHTS} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARKS} }} }}
"""
    + """
body { margin: 2.5rem auto; max-width: 62rem; padding: 0 1.25rem; color: var(--ink);
       background: var(--paper); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word }
h1 { font-size: 1.7rem; margin: 0 0 .3rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem }
p, li { max-width: 46rem } .muted, figcaption { color: var(--muted); font-size: .9rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--grid);
         vertical-align: top }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.good { color: var(--teal); font-weight: 600 } .bad { color: var(--red); font-weight: 600 }
figure { margin: 1rem 0 } svg { width: 100%; max-width: 32rem; height: auto }
.pair { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: flex-start;
        margin: 1.2rem 0 }
.pair figure { flex: 1 1 20rem; margin: 0 }
.wide { overflow-x: auto }
@media (max-width: 40rem) { /* a phone: each row of a table becomes a card with labelled cells */
  body { margin: 1rem auto; padding: 0 .7rem; font-size: 15px }
  table, tbody { display: block } .head { display: none }
  tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 0 .7rem;
       padding: .5rem 0; border-bottom: 1px solid var(--grid) }
  td { border: 0; padding: .05rem 0 } td:first-child { grid-column: 1 / -1 }
  td.whole { grid-column: 1 / -1 } td:empty { display: none }
  .number { text-align: left; white-space: normal }
  td[data-label]::before { content: attr(data-label) " "; color: var(--muted); font-weight: 400 }
}
"""
)


def page(data: dict) -> str:
    """A self-contained HTML document."""
    facts, agreed, trained = data["machine"], data["agreement"], data["training"]
    with matplotlib.rc_context(STYLE):
        drawn = {
            name: svg(draw(data), name)
            for name, draw in FIGURES.items()
            if data["right"] or name not in SPEED_FIGURES
        }
    speed_figures = (drawn[name] for name in SPEED_FIGURES if name in drawn)
    machine = (
        f"{facts['cpu']}, {facts['threads']} threads, ISA {facts['isa']}; torch {facts['torch']}, "
        f"fastattn {facts['fastattn']}, Python {facts['python']}; {facts['date']}"
    )
    steps = len(trained["losses"]["fastattn"])
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>fastattn demo</title><style>{CSS}</style></head>
<body>
<h1>fastattn in a pretrained encoder</h1>
<p>all-MiniLM-L6-v2 embedded {agreed["texts"]} docstrings of Python's standard library
({agreed["tokens"]} tokens, {agreed["padding"]:.0%} padding) and took {steps} fine-tuning steps,
with torch's attention and with fastattn's. The model and its code are the same:
<code>with fastattn.override_sdpa():</code> is the whole change.</p>
<p class="muted">{escape(machine)}</p>
<h2>The same answers</h2>
{_table(answers(data))}
<div class="pair"><figure>{drawn["differences"]}</figure><figure>{drawn["losses"]}
<figcaption>Each side draws its own dropout; both start from the same weights.</figcaption>
</figure>
</div>
<h2>How fast</h2>
<p>Interleaved rounds in one process. A ratio is formed inside each round; the interval is that of
the ratios' median. Where it includes 1.00 there is no difference. <i>Attention</i> is the call
alone, on the real tensors and padding masks of the first layer; <i>attention, training</i> runs it
forward and backward with dropout 0.1.</p>
<div class="pair">{"".join(f"<figure>{figure}</figure>" for figure in speed_figures)}</div>
{_table(speeds(data))}
<h2>Nearest docstrings</h2>
{"".join(_found(found) for found in data["search"])}
</body>
</html>
"""


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = []
    for what, torch, ours, verdict in rows:
        colour = _colour(verdict)
        shade = {"green": "good", "red": "bad", "bold red": "bad"}.get(colour, "")
        lines.append(
            f"<tr><td>{escape(what)}</td>"
            f'<td class="number" data-label="torch">{escape(torch)}</td>'
            f'<td class="number" data-label="fastattn">{escape(ours)}</td>'
            f'<td class="whole {shade}">{escape(verdict)}</td></tr>'
        )
    heads = "".join(f'<th class="number">{side}</th>' for side in ("torch", "fastattn"))
    head = f'<tr class="head"><th></th>{heads}<th></th></tr>'
    return f'<div class="wide"><table>{head}{"".join(lines)}</table></div>'


def _found(found: dict) -> str:
    hits = "".join(
        f"<li><code>{escape(hit['name'])}</code> {escape(hit['summary'])} "
        f'<span class="muted">{hit["score"]:.3f}</span></li>'
        for hit in found["nearest"]
    )
    same = "both sides find the same" if found["same"] else "the two sides differ"
    return (
        f'<p><b>{escape(found["query"])}</b> <span class="muted">{same}</span></p><ol>{hits}</ol>'
    )


def write(data: dict, folder: Path) -> list[Path]:
    """Writes demo.json and demo.html into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        folder / "demo.json": json.dumps(data, indent=1) + "\n",
        folder / "demo.html": page(data),
    }
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)

"""The report: one self-contained HTML file that also fits a phone. Wrong and slower cases come
first."""

from __future__ import annotations

from html import escape

import matplotlib
from fastattn.benchmarks.demo.report import CSS, STYLE, svg

from . import figures
from .record import base_and_others, rate, reds, said, slower, title
from .table import EXPLAINED, header, megabytes

STYLE_OF_PAGE = (
    CSS
    + """
@media (min-width: 40rem) { body { max-width: 76rem } }
th, td { padding-right: .5rem } td.whole { white-space: normal; min-width: 5rem }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem }
.grid figure { margin: 0 }
table { font-size: .85rem } td.name { min-width: 13rem }
code { font-size: .78rem; word-break: break-all } details { margin: .3rem 0 }
.same { color: var(--olive); font-weight: 600 }
.heat td, .heat th { padding: .15rem .3rem; border: 1px solid var(--paper) }
.heat .cell { text-align: center; border-radius: .2rem }
@media (max-width: 40rem) { /* the lengths of a variant side by side */
  .heat tr:not(.head) { display: flex; flex-wrap: wrap; gap: .2rem }
  .heat td.name { flex: 0 0 100%; box-sizing: border-box }
  .heat .cell { flex: 0 0 3.1rem }
  .heat .cell[data-label]::before { display: block; color: inherit; font-size: .7rem }
}
"""
)
SHADES = {"faster": "good", "slower": "bad", "no difference": "same"}
OTHERS = ("roofline", "memory", "error", "history")


def page(data: dict, changes: list = (), runs: list[tuple[str, dict]] = ()) -> str:
    """The whole document for a run. `runs` has the earlier runs and this one."""
    with matplotlib.rc_context(STYLE):
        drawn = {n: svg(f, _identifier(n)) for n, f in figures.drawn(data, list(runs)).items()}
    drawn.pop("heat-map", None)  # the page has it as a table, which can wrap on a phone
    speeds = [text for name, text in drawn.items() if name.startswith("speed-")]
    others = [text for name, text in drawn.items() if name in OTHERS]
    head = "".join(f'<p class="muted">{escape(line)}</p>' for line in header(data)[1:])
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>fastattn bench</title><style>{STYLE_OF_PAGE}</style></head>
<body>
<h1>fastattn benchmark</h1>
<p>{escape(title(data))}</p>
{head}
{_first(data, changes)}
<h2>Ratios by variant and length</h2>
<p class="muted">The time of each case's first competitor divided by fastattn's, by number of keys.
Above 1 fastattn is faster; = means no difference.</p>
{_heat(data)}
{_figures("Speed by sequence length", speeds)}
{_figures("The machine, memory, error, history", others)}
<h2>All cases</h2>
<p class="muted">{escape(EXPLAINED)}</p>
{_table(data)}
</body>
</html>
"""


def _identifier(name: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "-" for c in name)


def _figures(heading: str, drawn: list[str]) -> str:
    if not drawn:
        return ""
    figures = "".join(f"<figure>{figure}</figure>" for figure in drawn)
    return f'<h2>{heading}</h2>\n<div class="grid">{figures}</div>'


def _heat(data: dict) -> str:
    """figures.heat_map() as a table."""
    table = figures.by_variant(data)
    lengths = sorted({figures.keys_of(e) for entries in table.values() for e in entries})
    heads = "".join(f'<th class="cell">{n}</th>' for n in lengths)
    lines = [f'<tr class="head"><th></th>{heads}</tr>']
    for key, entries in table.items():
        cells = dict.fromkeys(lengths, "<td></td>")
        for entry in entries:
            text, colour, behind = figures.heat(entry)
            n = figures.keys_of(entry)
            cells[n] = (f'<td class="cell" data-label="{n}" style="color: {colour}; '
                        f'background: {behind}">{text}</td>')  # fmt: skip
        name = escape(figures.variant_name(key))
        lines.append(f'<tr><td class="name">{name}</td>{"".join(cells.values())}</tr>')
    return f'<div class="wide"><table class="heat">{"".join(lines)}</table></div>'


def _first(data: dict, changes: list) -> str:
    """Wrong cases, slower cases, and changes."""
    parts = []
    for entry in reds(data):
        text = f"<b>{escape(entry['name'])}</b>: {escape(entry['red'])}"
        parts.append(f'<li class="bad">RED {text}</li>')
    for entry, name, ratio in slower(data):
        interval = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
        parts.append(
            f'<li><b>{escape(entry["name"])}</b> <span class="bad">{ratio["value"]:.2f}</span> '
            f"({interval}) against {escape(name)}</li>"
        )
    listed = f"<ul>{''.join(parts)}</ul>" if parts else "<p>None of the measured cases.</p>"
    text = f"<h2>Slower or wrong</h2>{listed}"
    if changes:
        shown = sorted(changes, key=lambda change: change.value)
        items = "".join(f"<li>{escape(str(change))}</li>" for change in shown)
        text += f"<h2>Changed</h2><ul>{items}</ul>"
    if data["skipped"]:
        names = "".join(f"<li>{escape(name)}</li>" for name in data["skipped"])
        count = len(data["skipped"])
        text += (
            f"<details><summary>{count} cases did not fit into the time</summary>{names}</details>"
        )
    if data["interrupted"]:
        text += '<p class="bad">The run was interrupted; below is what was measured until then.</p>'
    return text


HEADS = (
    "case",
    "ratio",
    "95 %",
    "20-80",
    "against",
    "its ms",
    "ms",
    "rate",
    "% peak",
    "MB",
    "error",
)


def _table(data: dict) -> str:
    slow = {entry["name"] for entry, _, _ in slower(data)} | {e["name"] for e in reds(data)}
    entries = sorted(data["rows"], key=lambda entry: entry["name"] not in slow)
    pairs = [(entry, other) for entry in entries for other in base_and_others(entry)[1] or [""]]
    lines = "".join(_line(entry, other) for entry, other in pairs)
    heads = "".join(f"<th{' class=number' * (n > 0)}>{h}</th>" for n, h in enumerate(HEADS))
    head = f'<tr class="head">{heads}</tr>'
    return f'<div class="wide"><table>{head}{lines}</table></div>'


def _line(entry: dict, other: str) -> str:
    ours, side = base_and_others(entry)[0], entry["sides"].get(other, {})
    ratio, errors, verdict, shade = entry["versus"].get(other), ours.get("errors"), "", ""
    if entry["red"]:
        verdict, shade = "RED", "bad"
    elif ratio is None:
        verdict = side.get("why_not") or "not timed"
    else:
        verdict, shade = said(ratio), SHADES[ratio["verdict"]]
    timed = ratio is not None and not entry["red"]
    ran = "" if side.get("backend", other) in (other, "unknown") else f" ({side['backend']})"
    numbers = [
        f"{ratio['low']:.2f} to {ratio['high']:.2f}" if timed else "",
        f"{ratio['p20']:.2f} to {ratio['p80']:.2f}" if timed else "",
        other + ran,
        f"{side['ms']:.3f}" if "ms" in side else "",
        f"{ours['ms']:.3f}" if "ms" in ours else "",
        rate(ours),
        f"{ours['percent_of_peak']:.0f}" if "percent_of_peak" in ours else "",
        f"{megabytes(ours)} / {megabytes(side)}" if timed else "",
        f"{errors['largest']:.0e}" if errors else "",
    ]
    repeat = f"<details><summary>{escape(entry['name'])}</summary>"
    repeat += f"<code>{escape(entry['command'])}</code></details>"
    cells = [
        f'<td class="name">{repeat}</td>',
        f'<td class="number whole {shade}" data-label="ratio">{escape(verdict)}</td>',
    ]
    cells += [
        f'<td class="number" data-label="{head}">{escape(text)}</td>'
        for head, text in zip(HEADS[2:], numbers)
    ]
    return f"<tr>{''.join(cells)}</tr>"

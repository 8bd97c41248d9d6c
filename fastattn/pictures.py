"""Pictures of a recording: a matplotlib figure (Recording.plot), and HTML for notebooks and for the
page of `python -m fastattn inspect`.

HTML needs nothing but a browser: a map is a small PNG of opacities, used as a mask of the page's
own colour, so that it follows a dark scheme; plots are SVG drawn with the page's colours.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .records import Record

ROWS = {  # statistics of rows that are drawn by depth: title and unit
    "entropy": ("Entropy", "nats"),
    "max": ("Largest probability", ""),
    "max_logit": ("Largest logit", ""),
    "sink_mass": ("Mass on the sink", ""),
    "diagonal_mass": ("Mass on the diagonal", ""),
}
FIRST = ("Mass on the first token", "")
LIGHT = {"paper": "#ffffff", "ink": "#1d2433", "muted": "#5c677d", "grid": "#e6e9ef",
         "teal": "#0b7a75", "wash": "#f4f6f9"}  # fmt: skip
DARK = {"paper": "#14181f", "ink": "#e4e8ef", "muted": "#9aa5b8", "grid": "#2c3440",
        "teal": "#3fbdb3", "wash": "#1b212b"}  # fmt: skip


def _variables(colours: dict[str, str]) -> str:
    return "; ".join(f"--{name}: {colour}" for name, colour in colours.items())


CSS = (
    f"""
.fastattn {{ {_variables(LIGHT)} }}
@media (prefers-color-scheme: dark) {{ .fastattn {{ {_variables(DARK)} }} }}
"""
    + """
.fastattn { color: var(--ink); background: var(--paper); font: 16px/1.55 system-ui, sans-serif }
.fastattn .muted, .fastattn figcaption { color: var(--muted); font-size: .9rem }
.fastattn figure { margin: 0 } .fastattn svg { width: 100%; height: auto; display: block }
.fastattn .plots { display: grid; gap: 1.2rem 2rem; margin: 1rem 0;
                   grid-template-columns: repeat(auto-fit, minmax(min(100%, 13.5rem), 1fr)) }
.fastattn .layer { display: grid; grid-template-columns: 4.5rem 1fr; gap: .2rem .7rem;
                   align-items: start; margin: .5rem 0 }
.fastattn .maps { display: grid; grid-template-columns: repeat(auto-fill, minmax(3.4rem, 1fr));
                  gap: .35rem }
.fastattn .map { aspect-ratio: 1; background: var(--wash); border: 1px solid var(--grid) }
.fastattn .map i { display: block; width: 100%; height: 100%; background: var(--teal);
                   image-rendering: pixelated; mask-size: 100% 100%; -webkit-mask-size: 100% 100% }
.fastattn svg text { font: 11px system-ui, sans-serif; fill: var(--muted) }
.fastattn svg .title { font-size: 13px; font-weight: 600; fill: var(--ink) }
.fastattn svg .line { stroke: var(--teal); stroke-width: 2; fill: none }
.fastattn svg .dot { fill: var(--muted); opacity: .55 } .fastattn svg .mean { fill: var(--teal) }
.fastattn svg .grid { stroke: var(--grid); stroke-width: 1 }
@media (max-width: 40rem) { .fastattn .layer { grid-template-columns: 1fr } }
"""
)


# ---- what is drawn -------------------------------------------------------------------------------


def by_depth(records: Sequence[Record]) -> dict[str, tuple[tuple[str, str], list[Tensor]]]:
    """{statistic: ((title, unit), the mean of each head [heads] for every call)}, of those that all
    calls have."""
    found = {}
    for name, title in ROWS.items():
        if records and all(name in record for record in records):
            means = [_mean_of_heads(record[name]) for record in records]
            if any(bool(x.any()) for x in means):
                found[name] = (title, means)
    if records and all("col_mass" in record for record in records):
        means = [r["col_mass"][..., 0].float().mean(0) / _rows(r) for r in records]
        found["first_mass"] = (FIRST, [x.detach().cpu() for x in means])
    return found


def _mean_of_heads(x: Tensor) -> Tensor:
    """The mean over examples and rows, of rows that see a key: [heads]."""
    x = x.detach().float().cpu()
    real = x.isfinite()
    return torch.where(real, x, 0.0).sum((0, 2)) / real.sum((0, 2)).clamp(min=1)


def _rows(record: Record) -> float:
    """The rows of an example; without a statistic of rows, the mass on all keys, which is as much
    where there is no sink."""
    rows = next((x.shape[2] for name, x in record.items() if name in ROWS), None)
    return rows or float(record["col_mass"].float().sum(-1).mean().clamp(min=1e-30))


def maps_of(record: Record) -> Tensor | None:
    """The pooled map of each head, the mean over examples, [heads, n, n]; None: not recorded."""
    names = [name for name in record if name.startswith("pooled")]
    return record[names[-1]].detach().float().mean(0).cpu() if names else None


def label(record: Record, index: int) -> str:
    return f"layer {record.layer}" if record.layer is not None else f"call {index}"


# ---- HTML ----------------------------------------------------------------------------------------


def fragment(records: Sequence[Record]) -> str:
    """A recording as HTML, for a notebook."""
    lines = "".join(
        f"<li>{escape(record.name or '(model)')} <span class='muted'>"
        f"{escape(', '.join(record) or 'no statistics')}</span></li>"
        for record in records[:100]
    )
    more = f"<li class='muted'>and {len(records) - 100} more</li>" if len(records) > 100 else ""
    return (
        f"<style>{CSS}</style><div class='fastattn'><b>{len(records)} attention calls</b>"
        f"{plots(records)}{maps(records)}<details><summary>calls</summary><ol>{lines}{more}</ol>"
        "</details></div>"
    )


def plots(records: Sequence[Record]) -> str:
    """The statistics of rows by depth, a figure each."""
    drawn = "".join(f"<figure>{_svg(*x)}</figure>" for x in by_depth(records).values())
    return f"<div class='plots'>{drawn}</div>" if drawn else ""


def maps(records: Sequence[Record]) -> str:
    """The pooled maps, a row of heads for each call."""
    lines = []
    for index, record in enumerate(records):
        heads = maps_of(record)
        if heads is not None:
            cells = "".join(
                f"<div class='map' title='{escape(record.name)} head {n}'>{image(x)}</div>"
                for n, x in enumerate(heads)
            )
            lines.append(
                f"<div class='layer'><div class='muted'>{label(record, index)}</div>"
                f"<div class='maps'>{cells}</div></div>"
            )
    return "".join(lines)


def image(x: Tensor) -> str:
    """A map [n, m] as an element: the square root of each value over the largest, as opacity."""
    x = (x / x.max().clamp(min=1e-30)).clamp(0, 1).sqrt()
    uri = f"data:image/png;base64,{base64.b64encode(_png((x * 255).round().byte())).decode()}"
    return f"<i style='mask-image:url({uri});-webkit-mask-image:url({uri})'></i>"


def _png(alpha: Tensor) -> bytes:
    """A PNG of black pixels with these opacities, uint8 [rows, columns]."""
    rows, columns = alpha.shape
    grey_alpha = torch.stack([torch.zeros_like(alpha), alpha], -1).flatten(1)
    lines = b"".join(b"\0" + bytes(row) for row in grey_alpha.tolist())
    header = struct.pack(">IIBBBBB", columns, rows, 8, 4, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 260, 180, 40, 30, 36


def _svg(title: tuple[str, str], heads: list[Tensor]) -> str:
    """The means of heads as dots by depth, and the line of their mean."""
    name, unit = title
    values = [float(x) for one in heads for x in one]
    low, high, step = _ticks(min(0.0, *values), max(values))
    across, down = _WIDTH - _LEFT - 12, _HEIGHT - _TOP - _BOTTOM

    def x_of(n: int) -> float:
        return _LEFT + across * (n + 0.5) / len(heads)

    def y_of(value: float) -> float:
        return _TOP + down * (1 - (value - low) / (high - low))

    shown = f"{name}, {unit}" if unit else name
    parts = [f"<text class='title' x='0' y='14'>{escape(shown)}</text>"]
    for n in range(round((high - low) / step) + 1):
        value, y = low + n * step, y_of(low + n * step)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH - 12}' y1='{y:.1f}' "
                     f"y2='{y:.1f}'/><text x='{_LEFT - 6}' y='{y + 4:.1f}' "
                     f"text-anchor='end'>{value:.4g}</text>")  # fmt: skip
    every = max(1, math.ceil(len(heads) / 12))
    for n, one in enumerate(heads):
        dots = "".join(f"<circle class='dot' cx='{x_of(n):.1f}' cy='{y_of(float(v)):.1f}' r='2.6'/>"
                       for v in one)  # fmt: skip
        parts.append(dots)
        if n % every == 0:
            parts.append(f"<text x='{x_of(n):.1f}' y='{_HEIGHT - 20}' text-anchor='middle'>{n}"
                         "</text>")  # fmt: skip
    means = [(x_of(n), y_of(float(one.mean()))) for n, one in enumerate(heads)]
    parts.append("<polyline class='line' points='"
                 + " ".join(f"{x:.1f},{y:.1f}" for x, y in means) + "'/>")  # fmt: skip
    parts += (f"<circle class='mean' cx='{x:.1f}' cy='{y:.1f}' r='3.4'/>" for x, y in means)
    parts.append(f"<text x='{_LEFT + across / 2:.0f}' y='{_HEIGHT - 4}' text-anchor='middle'>"
                 "call, in the model's order</text>")  # fmt: skip
    box = f"viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='{escape(shown)}'"
    return f"<svg {box}>{''.join(parts)}</svg>"


def _ticks(low: float, high: float) -> tuple[float, float, float]:
    """(lowest, highest, step) of about four round steps around a range."""
    span = max(high - low, 1e-6)
    raw = span / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


# ---- matplotlib ----------------------------------------------------------------------------------


def figure(records: Sequence[Record], path: Any = None) -> Figure:
    """What was recorded as one figure: plots by depth above, maps by layer and head below."""
    try:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ImportError(
            "rec.plot() draws with matplotlib: pip install 'fastattn[plot]'; a notebook shows the "
            "recording without it"
        ) from error
    depth = list(by_depth(records).values())
    grids = [(label(r, n), maps_of(r)) for n, r in enumerate(records)]
    grids = [(name, heads) for name, heads in grids if heads is not None]
    if not depth and not grids:
        raise ValueError(
            "nothing was recorded that can be drawn; accepted are the statistics "
            f"{', '.join(ROWS)}, col_mass and pooled:N"
        )
    columns = max((len(heads) for _, heads in grids), default=1)
    width = max(2.8 * len(depth), 0.9 * columns)
    side = min(width / columns, 1.6) + 0.2  # of a map, with the name of its layer
    heights = ([2.4] if depth else []) + ([side * len(grids)] if grids else [])
    drawn = Figure(figsize=(width, sum(heights) + 0.3), layout="constrained")
    parts = drawn.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    if depth:
        for axes, ((name, unit), heads) in zip(parts[0].subplots(1, len(depth), squeeze=False)[0],
                                               depth):  # fmt: skip
            for n, one in enumerate(heads):
                axes.plot([n] * len(one), one.numpy(), ".", color="#5c677d", alpha=0.5)
            means = [float(one.mean()) for one in heads]
            axes.plot(range(len(heads)), means, "o-", color=LIGHT["teal"], markersize=4)
            axes.set_title(f"{name}, {unit}" if unit else name, fontsize=10, loc="left")
            axes.set_xlabel("call", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.spines[["top", "right"]].set_visible(False)
    if grids:
        shades = LinearSegmentedColormap.from_list("fastattn", [LIGHT["wash"], LIGHT["teal"]])
        cells = parts[-1].subplots(len(grids), columns, squeeze=False)
        for line, (name, heads) in zip(cells, grids):
            for axes in line:
                axes.set_axis_off()
            for axes, x in zip(line, heads):
                axes.imshow(x.sqrt().numpy(), cmap=shades, vmin=0, interpolation="nearest")
            line[0].set_title(name, fontsize=8, loc="left")
    if path is not None:
        drawn.savefig(path, dpi=150)
    return drawn

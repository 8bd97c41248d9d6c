"""A run's data as a table on the terminal, and as Markdown for a pull request."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .record import base_and_others, noise_of, primary, rate, reds, said, slower, title

COLOURS = {"faster": "green", "slower": "red", "no difference": "yellow"}


def header(data: dict) -> list[str]:
    """The machine and versions that were measured, one line each."""
    facts, peak, clocks = data["machine"], data["peak"], data["clocks"]
    top = max(peak["flops"].values(), default=0.0) / 1e9
    reached = peak["bandwidth_by_working_set"]
    memory = reached[max(reached, key=int)] / 1e9 if reached else 0.0
    commit = facts["commit"][:10] if facts.get("commit") else "no git checkout"
    load = facts.get("load")
    lines = [
        title(data),
        f"fastattn {facts['fastattn']}, {commit}{' (dirty)' if facts.get('dirty') else ''}; "
        f"Python {facts['python']}; seed {facts.get('seed')}"
        + (f"; load before {load[0]:.2f}" if load else "")
        + (
            f"; driver {driver}"
            if (driver := clocks.get("before", {}).get("driver_version"))
            else ""
        ),
        f"peak {top:.0f} GFLOP/s (matrix product), {memory:.0f} GB/s (memory)",
        _clock_line(clocks),
        f"noise floor: {noise_of(data)}" if data["noise"]["cells"] else "noise floor: not measured",
    ]
    return [line for line in lines if line]


def _clock_line(clocks: dict) -> str:
    if not clocks:
        return ""
    before, after = clocks.get("before", {}), clocks.get("after", {})
    mhz = [x.get("mhz") or x.get("clocks.sm") for x in (before, after)]
    shown = f"clock {mhz[0]} MHz before, {mhz[1]} after" if all(mhz) else "clocks unknown"
    throttled = clocks.get("throttled")
    return f"{shown}; {'THROTTLED: ' + throttled if throttled else 'not throttled'}"


EXPLAINED = (
    "ratio: the other's time / fastattn's, median of the rounds' ratios with its 95 % interval; "
    "20-80: the 20th and 80th percentiles of the rounds' ratios; target: the ratio to SDPA that "
    "the project aims for on a two-core AVX2 machine; % mm, % copy: share of the measured matrix "
    "product and copy; MB: peak memory beyond the inputs; error: largest and mean, relative "
    "to the largest value in float64; f: fastattn"
)


COLUMNS = (  # of the terminal's table, and the least width of the terminal that shows each
    *(("case", 0), ("against", 0), ("its ms", 0), ("ms", 0), ("ratio", 0), ("95 % interval", 0)),
    *(("20-80", 200), ("target", 160), ("rate", 120), ("% mm", 140), ("% copy", 140)),
    *(("MB f / other", 170), ("error f / other", 200)),
)


def print_table(data: dict, console: Console) -> None:
    lines = header(data)
    console.print(f"[bold]{lines[0]}[/]", highlight=False)
    for line in lines[1:]:
        style = "[red]" if "THROTTLED" in line else "[default]"
        console.print(f"{style}{line}[/]", highlight=False)
    for text in todo(data):
        console.print(f"[red]{text}[/]", highlight=False)
    shown = [i for i, (_, least) in enumerate(COLUMNS) if console.width >= least]
    table = Table(header_style="bold", caption=EXPLAINED, caption_justify="left")
    for index in shown:
        fold = {"overflow": "fold"} if index == 0 else {"no_wrap": True}
        table.add_column(COLUMNS[index][0], justify="left" if index < 2 else "right", **fold)
    entries = data["rows"]
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        lines = _lines(entry)
        for cells in lines:
            last = following is None or following["group"] != entry["group"]
            table.add_row(*(cells[i] for i in shown), end_section=last and cells is lines[-1])
    console.print(table)
    for text in not_timed(data):
        console.print(text, markup=False, highlight=False)
    for entry in reds(data):
        console.print(f"[bold red]RED[/] {entry['name']}: ", end="", highlight=False)
        console.print(entry["red"], markup=False, highlight=False)


def todo(data: dict) -> list[str]:
    """The cases on which fastattn is slower, the slowest first."""
    return [
        f"slower than {name}: {entry['name']}: {ratio['value']:.2f} "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}]".replace("[", "(").replace("]", ")")
        for entry, name, ratio in slower(data)
    ]


def _lines(entry: dict) -> list[list[str]]:
    """An entry's lines in the table, one for each competitor."""
    (ours, others), lines = base_and_others(entry), []
    target = f"{entry['floor']:g}" if entry["floor"] else ""
    for index, name in enumerate(others or [""]):
        side, ratio = entry["sides"].get(name, {}), entry["versus"].get(name)
        label = entry["name"] if index == 0 else ""
        against = name + (f" ({side['backend']})" if side.get("backend", name) != name else "")
        if entry["red"]:
            lines.append([label, against, "", "", "[bold red]RED[/]", *[""] * 8])
        elif ratio is None:
            lines.append([label, name, "", "", "[dim]not timed[/]", *[""] * 8])
        else:
            colour, first = COLOURS[ratio["verdict"]], index == 0
            lines.append(
                [
                    label,
                    against,
                    f"{side['ms']:.3f}",
                    f"{ours['ms']:.3f}" if ours else "",
                    f"[{colour}]{said(ratio)}[/]",
                    f"{ratio['low']:.2f} to {ratio['high']:.2f}",
                    f"{ratio['p20']:.2f}-{ratio['p80']:.2f}",
                    target if name == "sdpa" else "",
                    rate(ours) if first else "",
                    f"{ours['percent_of_matmul']:.0f}" if first and "bound" in ours else "",
                    f"{ours['percent_of_copy']:.0f}" if first and "bound" in ours else "",
                    f"{megabytes(ours)} / {megabytes(side)}",
                    f"{_error(ours)} / {_error(side)}",
                ]
            )
    return lines


def not_timed(data: dict) -> list[str]:
    """Each reason why a contender was not timed, once, with the number of cases."""
    counts: dict[tuple[str, str], int] = {}
    for entry in data["rows"]:
        for name, side in entry["sides"].items():
            if side["why_not"] and not entry["red"]:
                key = (name, side["why_not"])
                counts[key] = counts.get(key, 0) + 1
    return [f"not timed: {n}: {why} ({count} cases)" for (n, why), count in counts.items()]


def megabytes(side: dict) -> str:
    return "?" if side.get("memory") is None else f"{side['memory'] / 1e6:.1f}"


def _error(side: dict) -> str:
    errors = side.get("errors") or {}
    shown = [f"{errors[key]:.0e}" for key in ("largest", "mean") if errors.get(key) is not None]
    return ", ".join(shown) or "?"


# ---- Markdown -----------------------------------------------------------------------------------


def as_markdown(data: dict, changes: list = ()) -> str:
    """For a pull request: slower cases and changes come first; all cases are folded away."""
    lines = [f"**{title(data)}**", "", *(f"- {line}" for line in header(data)[1:]), ""]
    for heading, texts in (
        ("Wrong, so not timed", [f"{e['name']}: {e['red']}" for e in reds(data)]),
        ("Slower", todo(data)),
        ("Changed", [str(change) for change in changes]),
        ("Not timed", not_timed(data)),
        ("Skipped for lack of time", data["skipped"]),
    ):
        if texts:
            lines += [f"{heading}:", "", *(f"- {text}" for text in texts), ""]
    lines += ["<details><summary>All cases, with 95 % intervals</summary>", ""]
    return "\n".join([*lines, *every_entry(data["rows"]), "", "</details>"])


def every_entry(entries: list[dict]) -> list[str]:
    lines = [
        "| case | against | its ms | fastattn ms | ratio | interval | % of peak | MB | error |",
        "|---|---|--:|--:|--:|:-:|--:|--:|--:|",
    ]
    for entry in entries:
        ours, name = base_and_others(entry)[0], entry["name"]
        for other in entry["versus"] or ["red" if entry["red"] else ""]:
            if entry["red"] or not other:
                lines.append(f"| {name} | | | | {'RED' if entry['red'] else ''} | | | | |")
                continue
            side, ratio = entry["sides"][other], entry["versus"][other]
            peak = f"{ours['percent_of_peak']:.0f}" if "percent_of_peak" in ours else ""
            ran = "" if side["backend"] == other else f" ({side['backend']})"
            ours_ms = f"{ours['ms']:.3f}" if ours else ""
            lines.append(
                f"| {name} | {other}{ran} | {side['ms']:.3f} | {ours_ms} | {said(ratio)} "
                f"| {ratio['low']:.2f} to {ratio['high']:.2f} | {peak} | {megabytes(ours)} "
                f"| {_error(ours)} |"
            )
    return lines


def headline(entry: dict) -> dict | None:
    """The ratio to the case's first competitor."""
    name = primary(entry)
    return entry["versus"][name] if name else None

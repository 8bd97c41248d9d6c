"""Rewrites the generated tables: python -m fastattn.benchmarks.report.readme_table [--check]

    support  what each backend supports, as the backends themselves report it (fastattn/cli/info.py)
    speed    the runs in benchmarks/results/ (python -m fastattn bench --json FILE)

A table is the text between <!-- NAME:begin --> and <!-- NAME:end --> in a page of docs/. The
README's plot of the same runs, docs/ratios.svg, is redrawn too (readme_plot.py). --check writes
nothing and exits with 1 if a table or the plot is out of date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import readme_plot
from .history import load
from .record import said, title

ROOT = Path(__file__).resolve().parents[2]
PAGES = {  # with generated tables
    ROOT / "docs" / "backends.md": ("support",),
    ROOT / "docs" / "performance.md": ("speed",),
}
PLOT = ROOT / "docs" / "ratios.svg"
RESULTS = ROOT / "benchmarks" / "results"
GROUPS = {
    "dense": "dense",
    "train": "dense, training",
    "half": "half precision",
    "decode": "decode, one query, 32 heads on 8",
    "dropout": "dropout 0.1, training",
    "bias": "learned bias, training",
    "window": "window of 256 at S 4096",
    "padding": "key-padding mask, half padded",
    "short": "short, S 16 to 64, batch 64",
    "alibi": "ALiBi, causal",
    "documents": "4 packed documents, causal",
    "chunk": "chunks of 1024 tokens, causal",
    "endtoend": "whole models",
}


def replace(text: str, name: str, table: str) -> str:
    """`text` with `table` between the markers of `name`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the page needs {begin} and {end}, once each")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{table}\n{end}{after}"


def stored_reports(folder: Path = RESULTS) -> list[dict]:
    """The runs that `bench --json` wrote into the folder, newest first. Other files are ignored."""
    paths = sorted(folder.glob("*.json"))
    reports = [load(path) for path in paths if '"schema"' in path.read_text()]
    return sorted(reports, key=lambda report: report["machine"]["date"], reverse=True)


def speed_markdown(reports: list[dict]) -> str:
    """For each run, a short table of ranges, then all cases with their intervals."""
    if not reports:
        return "No measured results in benchmarks/results/ yet: `make bench` on your machine."
    lines = [
        "Ratio: the time of `F.scaled_dot_product_attention` / fastattn's (of the model in plain "
        "torch, for whole models), medians of interleaved runs in one process."
    ]
    for report in reports:
        lines += ["", f"**{title(report)}**", "", *_summary(report["rows"]), ""]
        lines += ["<details><summary>All cases, with 95 % intervals</summary>", ""]
        lines += [*_every_entry(report["rows"]), "", "</details>"]
    return "\n".join(lines)


def _against_torch(entry: dict) -> tuple[dict | None, str]:
    """(the ratio to torch, the kernel that torch ran)."""
    name = next((name for name in ("sdpa", "torch") if name in entry["sides"]), None)
    return entry["versus"].get(name), entry["sides"].get(name, {}).get("backend", "")


def _summary(entries: list[dict]) -> list[str]:
    lines = ["| work | dtype | pass | ratio, least to most | torch ran |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for entry in entries:
        groups.setdefault(_group(entry), []).append(entry)
    for (work, dtype, which), entries in groups.items():
        found = [_against_torch(entry) for entry in entries]
        values = sorted(ratio["value"] for ratio, _ in found if ratio)
        ratio = "RED"  # a wrong case has no speed, and neither has its group
        if len(values) == len(entries):
            least, most = f"{values[0]:.2f}", f"{values[-1]:.2f}"
            ratio = least if least == most else f"{least} to {most}"
        ran = ", ".join(sorted({ran for _, ran in found}))
        lines.append(f"| {work} | {dtype} | {which} | {ratio} | {ran} |")
    return lines


PASSES = {"fwd": "forward", "bwd": "backward", "fwdbwd": "forward + backward"}


def _group(entry: dict) -> tuple[str, str, str]:
    case = entry["row"]
    work = GROUPS.get(entry["group"], entry["group"])
    if case is None:  # a whole model is its own kind
        return entry["name"], entry["dtype"], "step" if entry["mode"] == "fwdbwd" else "forward"
    if case["group"] in ("dense", "train", "half"):
        work += f", D {case['dim']}, {'causal' if case['causal'] else 'full'}"
    return work, case["dtype"], PASSES[case["mode"]]


def _every_entry(entries: list[dict]) -> list[str]:
    lines = [
        "| case | torch ran | torch ms | fastattn ms | ratio | interval | % of peak |",
        "|---|---|--:|--:|--:|:-:|--:|",
    ]
    for entry in entries:
        ratio, ran = _against_torch(entry)
        if ratio is None:
            lines.append(f"| {entry['name']} | {ran} | | | {'RED' if entry['red'] else ''} | | |")
            continue
        ours = entry["sides"]["fastattn"]
        theirs = entry["sides"].get("sdpa") or entry["sides"]["torch"]
        peak = f"{ours['percent_of_peak']:.0f}" if "percent_of_peak" in ours else ""
        lines.append(
            f"| {entry['name']} | {ran} | {theirs['ms']:.3f} | {ours['ms']:.3f} "
            f"| {said(ratio)} | {ratio['low']:.2f} to {ratio['high']:.2f} | {peak} |"
        )
    return lines


def plotted(reports: list[dict]) -> dict:
    """The numbers that the README's plot shows of these runs."""
    return readme_plot.numbers(reports, _group, lambda entry: _against_torch(entry)[0])


def generated(text: str, names: tuple[str, ...]) -> str:
    """A page's text with the named tables generated again."""
    from fastattn.cli.info import (
        support_markdown,  # imports torch, which speed_markdown does not need
    )

    tables = {
        "support": support_markdown,
        "speed": lambda: speed_markdown(stored_reports()),
    }
    for name in names:
        text = replace(text, name, tables[name]())
    return text


def main(argv: list[str] | None = None) -> int:
    """Rewrites the pages, or checks them."""
    parser = argparse.ArgumentParser(prog="python -m fastattn.benchmarks.report.readme_table")
    parser.add_argument(
        "--check", action="store_true", help="only report whether all are up to date"
    )
    options = parser.parse_args(argv)
    stale = {}
    try:
        for page, names in PAGES.items():
            old = page.read_text()
            new = generated(old, names)
            if new != old:
                stale[page] = new
        data = plotted(stored_reports())
        if not PLOT.exists() or not readme_plot.is_of(PLOT.read_text(), data):
            stale[PLOT] = "" if options.check else readme_plot.draw(data)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.check:
        for page in stale:
            print(f"{page.relative_to(ROOT)} is out of date")
        return int(bool(stale))
    for page, text in stale.items():
        page.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Rewrites the generated tables of README.md: python -m fastattn.benchmarks.readme_table [--check]

    support  what each backend can run, asked of the backends (fastattn/info.py)
    speed    the reports in benchmarks/results/ (python -m fastattn bench --json FILE)

A table lives between <!-- NAME:begin --> and <!-- NAME:end -->; what is between is replaced.
--check writes nothing and exits with 1 when a table is not what it should be.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1  # of the reports that benchmarks/bench.py writes
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
}


def replace(text: str, name: str, table: str) -> str:
    """`text` with what stands between the markers of `name` replaced by `table`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"README.md needs {begin} and {end}, once each")
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{table}\n{end}{after}"


def stored_reports(folder: Path = RESULTS) -> list[dict]:
    """The reports of this schema, newest first."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    reports = [report for report in reports if report.get("schema") == SCHEMA]
    return sorted(reports, key=lambda report: report["machine"]["date"], reverse=True)


def speed_markdown(reports: list[dict]) -> str:
    """For each report a short table of ranges, then every row with its interval."""
    if not reports:
        return "No measured results in benchmarks/results/ yet: `make bench` on your machine."
    lines = [
        "Ratio: the time of `F.scaled_dot_product_attention` / fastattn's, medians of interleaved "
        "runs in one process."
    ]
    for report in reports:
        facts = report["machine"]
        title = (
            f"{facts['cpu']}, {facts['threads']} threads, fastattn on {facts['isa']}, torch "
            f"{facts['torch']} on {facts['torch_isa']}; {facts['date'][:10]}"
        )
        lines += ["", f"**{title}**", "", *_summary(report["rows"]), ""]
        lines += ["<details><summary>Every row, with 95 % intervals</summary>", ""]
        lines += [*_every_row(report["rows"]), "", "</details>"]
    return "\n".join(lines)


def _summary(rows: list[dict]) -> list[str]:
    lines = ["| work | dtype | pass | ratio, least to most | torch ran |", "|---|---|---|---|---|"]
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for entry in rows:
        groups.setdefault(_group(entry), []).append(entry)
    for (work, dtype, which), entries in groups.items():
        values = sorted(e["ratio"]["value"] for e in entries if not e["red"])
        ratio = "RED"  # a row that computed something wrong has no speed, nor has its group
        if len(values) == len(entries):
            least, most = f"{values[0]:.2f}", f"{values[-1]:.2f}"
            ratio = least if least == most else f"{least} to {most}"
        ran = ", ".join(sorted({e["torch_backend"] for e in entries}))
        lines.append(f"| {work} | {dtype} | {which} | {ratio} | {ran} |")
    return lines


def _group(entry: dict) -> tuple[str, str, str]:
    row = entry["row"]
    work = GROUPS.get(row["group"], row["group"])
    if row["group"] in ("dense", "train", "half"):
        work += f", D {row['dim']}, {'causal' if row['causal'] else 'full'}"
    return work, row["dtype"], "forward + backward" if row["backward"] else "forward"


def _every_row(rows: list[dict]) -> list[str]:
    lines = [
        "| row | torch ran | torch ms | fastattn ms | ratio | interval | % of peak |",
        "|---|---|--:|--:|--:|:-:|--:|",
    ]
    for e in rows:
        if e["red"]:
            lines.append(f"| {e['name']} | {e['torch_backend']} | | | RED | | |")
            continue
        ratio = e["ratio"]
        value = "no difference" if ratio["verdict"] == "no difference" else f"{ratio['value']:.2f}"
        lines.append(
            f"| {e['name']} | {e['torch_backend']} | {e['torch_ms']:.3f} | {e['fastattn_ms']:.3f} "
            f"| {value} | {ratio['low']:.2f} to {ratio['high']:.2f} | {e['percent_of_peak']:.0f} |"
        )
    return lines


def generated(text: str) -> str:
    """README's text with every generated table as it should be."""
    from fastattn.info import support_markdown  # imports torch, which speed_markdown does not need

    text = replace(text, "support", support_markdown())
    return replace(text, "speed", speed_markdown(stored_reports()))


def main(argv: list[str] | None = None) -> int:
    """Rewrites README.md, or checks it."""
    parser = argparse.ArgumentParser(prog="python -m fastattn.benchmarks.readme_table")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    options = parser.parse_args(argv)
    old = README.read_text()
    new = generated(old)
    if options.check:
        print("README.md is up to date" if new == old else "README.md's tables are out of date")
        return int(new != old)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make size`: line budgets, so that files stay readable.

A source file has at most 500 lines (the target is 400) and 100 columns. Prints the number of lines
and the longest file of each folder. Exits with 1 and names the files if any is over the budget."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_LINES, MAX_COLUMNS = 500, 100
FOLDERS = ("fastattn", "kernels", "csrc", "benchmarks", "tests", "examples")
SUFFIXES = {".py", ".h", ".cpp", ".inl", ".cu", ".cuh"}


def sources(root: Path = ROOT) -> list[Path]:
    """Every source file, relative to the root."""
    found = list(root.glob("*.py"))
    for folder in FOLDERS:
        found += [p for p in (root / folder).rglob("*") if p.suffix in SUFFIXES]
    return sorted(path.relative_to(root) for path in found)


def over_budget(root: Path = ROOT) -> list[str]:
    """One sentence for each file that is too long or too wide."""
    problems = []
    for path in sources(root):
        lines = (root / path).read_text().splitlines()
        if len(lines) > MAX_LINES:
            problems.append(f"{path} has {len(lines)} lines, the budget is {MAX_LINES}")
        wide = [n for n, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS]
        if wide:
            problems.append(f"{path}:{wide[0]} is wider than {MAX_COLUMNS} columns")
    return problems


def main() -> int:
    """Prints the table, then the files over budget."""
    counts = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    print(f"{'folder':<12}{'files':>6}{'lines':>8}   longest file")
    for folder in sorted({path.parts[0] for path in counts}):
        inside = {path: n for path, n in counts.items() if path.parts[0] == folder}
        longest = max(inside, key=inside.__getitem__)
        total = sum(inside.values())
        print(f"{folder:<12}{len(inside):>6}{total:>8}   {longest} ({inside[longest]})")
    print(f"{'all':<12}{len(counts):>6}{sum(counts.values()):>8}")
    problems = over_budget()
    for problem in problems:
        print(f"over budget: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

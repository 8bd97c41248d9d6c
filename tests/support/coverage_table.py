"""`make coverage`: how many lines of the kernels and of the package the tests ran.

Reads gcov's counts of the CPU library and of the emulator, and coverage.py's of Python, from
build/coverage. Prints a row for each folder, and writes one for each file, with the lines that did
not run, to out/coverage.txt.

Only lines that were compiled count: templates that nothing instantiates, and what the emulator
leaves to a GPU, do not. A line that is compiled several times, for each instruction set and each
template argument, counts once, and ran where any of them did; rows below csrc/cpu show one
instruction set each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "csrc/cpu", "csrc/cuda", "kernels", "fastattn")
HEAD = f"{'':<28}{'lines':>8}{'run':>8}{'share':>9}"

Lines = dict[tuple[str, int], bool]  # (file relative to the root, line): whether it ran


# ---- reading -----------------------------------------------------------------------------------


def of_gcov(document: dict, root: Path = ROOT) -> Lines:
    """The lines below root in the output of `gcov --json-format` for one compiled file."""
    found: Lines = {}
    for file in document["files"]:
        path = os.path.relpath(root / file["file"], root)  # it may be absolute, or contain ..
        if not path.startswith(".."):
            for line in file["lines"]:
                merge(found, {(path, line["line_number"]): line["count"] > 0})
    return found


def of_object(counts: Path) -> Lines:
    """The lines of one object file. A library leaves counts of all its objects, of those that did
    not run too, so an object without them is an older build's, or was in no library loaded."""
    command = ["gcov", "--json-format", "--stdout", str(counts)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0 or "version '" in done.stderr:  # from another GCC
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    return of_gcov(json.loads(done.stdout))


def of_python(data: Path) -> Lines:
    """The lines of the package's statements, from the data file of each process."""
    import coverage  # installed by make coverage

    measured = coverage.Coverage(data_file=str(data), config_file=False)
    measured.combine([str(data.parent)], keep=True)
    found: Lines = {}
    for path in sorted([*ROOT.glob("kernels/**/*.py"), *ROOT.glob("fastattn/**/*.py")]):
        _, statements, _, missing, _ = measured.analysis2(str(path))
        name = str(path.relative_to(ROOT))
        found |= {(name, n): n not in missing for n in statements}
    return found


def merge(into: Lines, more: Lines) -> None:
    for line, ran in more.items():
        into[line] = into.get(line, False) or ran


# ---- the tables --------------------------------------------------------------------------------


def inside(lines: Lines, folder: str) -> Lines:
    """The lines below a folder, without those of folders that have their own row."""
    rows = [x for x in FOLDERS if x.startswith(f"{folder}/")]
    skipped = tuple(f"{x}/" for x in rows)
    return {
        (path, n): ran
        for (path, n), ran in lines.items()
        if path.startswith(f"{folder}/") and not path.startswith(skipped or "\n")
    }


def row(name: str, lines: Lines) -> str:
    ran = sum(lines.values())
    share = f"{100 * ran / len(lines):.2f}%" if lines else "-"
    return f"{name:<28}{len(lines):>8}{ran:>8}{share:>9}"


def by_folder(lines: Lines, isas: dict[str, Lines]) -> list[str]:
    """A row for each of FOLDERS, and for each instruction set's part of csrc/cpu."""
    rows = [HEAD]
    for folder in FOLDERS:
        rows.append(row(folder, inside(lines, folder)))
        if folder == "csrc/cpu":
            rows += [row(f"  {isa}", inside(isas[isa], folder)) for isa in sorted(isas)]
    return rows


def ranges(numbers: list[int]) -> str:
    """3-5, 8"""
    runs = groupby(enumerate(sorted(numbers)), lambda x: x[1] - x[0])
    ends = [[n for _, n in run] for _, run in runs]
    return ", ".join(f"{x[0]}-{x[-1]}" if len(x) > 1 else str(x[0]) for x in ends)


def by_file(lines: Lines) -> list[str]:
    rows = [f"{HEAD}  lines that did not run"]
    for path, group in groupby(sorted(lines), lambda line: line[0]):
        of_file = {line: lines[line] for line in group}
        missed = ranges([n for (_, n), ran in of_file.items() if not ran])
        rows.append(f"{row(path, of_file)}  {missed}".rstrip())
    return rows


def main(folder: Path) -> None:
    lines, isas = of_python(folder / "python"), {}
    for counts in sorted(folder.glob("*/*.gcda")):
        found = of_object(counts)
        merge(lines, found)
        if isa := counts.name.partition("_isa_")[2]:
            isas[isa.partition(".")[0]] = found
    (ROOT / "out").mkdir(exist_ok=True)
    (ROOT / "out/coverage.txt").write_text("\n".join(by_file(lines)) + "\n")
    print("\n".join(by_folder(lines, isas)))
    print("of each file: out/coverage.txt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""The table of `make coverage`: which lines count, when a line has run, and the row it belongs
to."""

from __future__ import annotations

from pathlib import Path

import coverage_table

ROOT = Path("/somewhere/fastattn")


def document(**lines: list[tuple[int, int]]) -> dict:
    """What gcov says of one object file: (line, count) of csrc/cpu/score.inl and of others."""
    paths = {"score": "csrc/cpu/score.inl", "spec": f"{ROOT}/csrc/cuda/../spec.h"}
    paths["torch"] = "/usr/include/torch.h"
    return {
        "files": [
            {"file": paths[name], "lines": [{"line_number": n, "count": x} for n, x in found]}
            for name, found in lines.items()
        ]
    }


def test_a_line_that_is_compiled_twice_counts_once_and_ran_where_any_of_them_did():
    found = coverage_table.of_gcov(document(score=[(3, 0), (3, 7), (4, 0), (4, 0)]), ROOT)
    assert found == {("csrc/cpu/score.inl", 3): True, ("csrc/cpu/score.inl", 4): False}
    coverage_table.merge(found, {("csrc/cpu/score.inl", 4): True, ("csrc/cpu/score.inl", 5): False})
    assert [ran for _, ran in sorted(found.items())] == [True, True, False]
    coverage_table.merge(found, {("csrc/cpu/score.inl", 3): False})
    assert found["csrc/cpu/score.inl", 3]


def test_files_have_one_name_each_and_others_sources_none():
    found = coverage_table.of_gcov(document(spec=[(1, 1)], torch=[(1, 1)]), ROOT)
    assert found == {("csrc/spec.h", 1): True}


def test_rows_of_folders_and_of_files():
    avx2 = {("csrc/cpu/score.inl", n): n < 3 for n in range(1, 5)}
    lines = {
        **avx2,
        **{("csrc/cpu/score.inl", n): True for n in (1, 2, 3, 4)},
        **{("csrc/cpu/vec.inl", n): n in (2, 7) for n in (2, 3, 4, 5, 7, 9)},
        ("csrc/spec.h", 1): True,
        ("fastattn/core/spec.py", 1): False,
    }
    rows = coverage_table.by_folder(lines, {"avx2": avx2})
    cells = {" ".join(row[:28].split()): row[28:].split() for row in rows[1:]}
    assert cells == {
        "csrc": ["1", "1", "100.00%"],  # excludes csrc/cpu, which has its own row
        "csrc/cpu": ["10", "6", "60.00%"],
        "avx2": ["4", "2", "50.00%"],
        "csrc/cuda": ["0", "0", "-"],
        "kernels": ["0", "0", "-"],
        "fastattn": ["1", "0", "0.00%"],
    }
    rows = {row.split()[0]: row.split("%")[1].strip() for row in coverage_table.by_file(lines)[1:]}
    assert rows == {
        "csrc/cpu/score.inl": "",
        "csrc/cpu/vec.inl": "3-5, 9",
        "csrc/spec.h": "",
        "fastattn/core/spec.py": "1",
    }

"""Every example, uninterrupted and killed, in one process and in two: the same results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
from example_runs import SIZES

SCRIPT = Path(__file__).parents[1] / "support/example_matrix.py"


def check(folder: Path, *words: str) -> list[str]:
    """The output lines of support/example_matrix.py, all of which must say that the runs are
    equal."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *words], capture_output=True, text=True,
        timeout=3000, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)
    return done.stdout.splitlines()


def test_two_processes_that_were_killed(tmp_path):
    """A slice of the list below."""
    words = "distill --way fsdp --kill save"
    assert len(check(tmp_path / "runs", *words.split())) == 2


@pytest.mark.long
@pytest.mark.parametrize("name", [*SIZES, "finetune_bert --trainer hf"])
def test_every_example_in_every_way(name, tmp_path):
    if name.startswith("finetune_bert"):
        pytest.importorskip("transformers")
    assert len(check(tmp_path / "runs", name)) == (9 if "hf" in name else 12)

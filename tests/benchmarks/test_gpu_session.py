"""`make gpu` (benchmarks/gpu_session.py): it survives its stages, and always writes a report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fastattn.benchmarks import gpu_session
from fastattn.benchmarks.gpu_session import Stage

from fastattn.core import limited

PASS = Stage("fine", ("-c", "print('noise'); print('12 passed')"), 60)
FAIL = Stage("wrong", ("-c", "print('one line'); raise SystemExit('E  assert 1 == 2')"), 60)
CRASH = Stage("falls", ("-c", "import os; print('at x', flush=True); os.abort()"), 60)
HANG = Stage("hangs", ("-uc", "import time; print('test_that_hangs'); time.sleep(63)"), 3)


def report(out: Path) -> dict[str, dict]:
    stages = json.loads((out / "report.json").read_text())["stages"]
    assert all(
        f"| {x['stage']} | {x['state']} |" in (out / "report.md").read_text() for x in stages
    )
    return {x["stage"]: x for x in stages}


def test_every_stage_is_reached_and_reported(tmp_path):
    told = []
    gpu_session.run([PASS, FAIL, HANG, CRASH, PASS], tmp_path / "new/out", told.append)
    found = report(tmp_path / "new/out")
    states = {name: x["state"] for name, x in found.items()}
    assert states == {"fine": "passed", "wrong": "failed", "hangs": "hung", "falls": "crashed"}
    assert found["fine"]["said"] == "12 passed"
    assert found["wrong"]["said"] == "one line\nE  assert 1 == 2"
    assert "test_that_hangs" in found["hangs"]["said"] and "at x" in found["falls"]["said"]
    assert (tmp_path / "new/out/fine.txt").read_text() == "noise\n12 passed\n"
    assert any("hangs: hung" in text for text in told)
    names = {"report.json", "report.md", "fine.txt", "wrong.txt", "hangs.txt", "falls.txt"}
    assert {p.name for p in (tmp_path / "new/out").iterdir()} == names


@pytest.mark.parametrize("state", ["stuck", "failed"])
def test_what_ends_the_session_is_said_of_the_rest(tmp_path, monkeypatch, state):
    outcome = limited.Outcome(state if state == "stuck" else "ended", 1, 1.0, "no GPU")
    monkeypatch.setattr(limited, "run", lambda *a, **k: outcome)
    gpu_session.run([Stage("first", (), 1, vital=True), PASS], tmp_path, lambda text: None)
    found = report(tmp_path)
    assert found["first"]["state"] == state and found["fine"]["state"] == "not run"
    assert "'first'" in found["fine"]["said"]


def test_a_session_that_is_killed_has_its_report(tmp_path):
    code = (
        "import sys; from pathlib import Path; "
        "from fastattn.benchmarks.gpu_session import Stage, run\n"
        f"run([Stage('fine', {PASS.arguments!r}, 60), Stage('hangs', {HANG.arguments!r}, 60)], "
        "Path(sys.argv[1]))"
    )
    session = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        last = tmp_path / "report.md"  # the second of the two files that are written
        for _ in range(1200):
            if last.exists() and "| hangs | running |" in last.read_text():
                break
            time.sleep(0.05)
        assert {n: x["state"] for n, x in report(tmp_path).items()} == {
            "fine": "passed", "hangs": "running",
        }  # fmt: skip
    finally:
        session.send_signal(signal.SIGINT)  # like Ctrl-C: the running stage ends with the session
        session.wait(60)


def test_it_begins_with_the_proof_and_names_what_exists():
    stages = gpu_session.stages(Path("out/gpu"))
    assert [s.name for s in stages[:2]] == ["gpu", "verify"] and stages[0].vital
    assert "verify" in stages[1].arguments
    for stage in stages:
        for argument in stage.arguments:
            assert not argument.startswith("tests/") or (gpu_session.ROOT / argument).exists()
    assert len({stage.name for stage in stages}) == len(stages)


def test_bad_stage_is_named(capsys):
    with pytest.raises(SystemExit):
        gpu_session.main(["--skip", "dance"])
    assert "--skip dance: there are gpu, verify" in capsys.readouterr().err


def test_where_there_is_no_gpu_it_says_so(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "fastattn.benchmarks.gpu_session", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 1, run.stderr
    found = report(tmp_path)
    assert "sees no CUDA device here" in found["gpu"]["said"]
    assert {x["state"] for n, x in found.items() if n != "gpu"} == {"not run"}


def test_the_stages_tests_are_there():
    root = gpu_session.ROOT
    assert [path for path in gpu_session.TESTS if not (root / path).exists()] == []

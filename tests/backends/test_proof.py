"""The proof of the CUDA kernels (fastattn/backends/proof.py), tested with a simulated machine:
steps that pass, fail, crash and hang, and the consequences."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pretended
import pytest
import torch
from pretended import ENDS, GPU, SCRIPTS, Pretended, closed, prove

from fastattn.backends import library, proof
from fastattn.backends.proof import FEATURES, STEPS, Machine, Result
from fastattn.cli import verify
from fastattn.core import limited

file = pytest.fixture(autouse=True)(pretended.file)

# ---- the table ---------------------------------------------------------------------------------


def test_steps_need_earlier_ones_and_open_what_there_is():
    from fastattn.backends import proof_steps

    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names) and set(names) == set(proof_steps.STEPS)
    for n, step in enumerate(STEPS):
        assert set(step.needs) <= set(names[:n]) and step.limit >= 60
    opened = {name for steps in FEATURES.values() for name in steps}
    needed = set(opened)
    for step in reversed(STEPS):
        needed |= set(step.needs) if step.name in needed else set()
    assert needed == set(names), "a step that opens nothing"


def test_the_page_has_the_table():
    page = (Path(__file__).resolve().parents[2] / "docs/backends.md").read_text()
    for step in STEPS:
        shows = step.shows + (" (9.0)" if step.hopper else "")
        needs = f" {', '.join(step.needs)}" if step.needs else ""
        assert f"| {step.name} | {shows} |{needs} |" in page


# ---- how steps end -----------------------------------------------------------------------------


def test_all_pass_and_everything_is_open(file):
    found, machine, told = prove()
    assert found.failures == [] and not found.hangs and machine.ran == [s.name for s in STEPS]
    assert all(x.state == "passed" for x in found.proofs[GPU.key].values())
    assert closed(*FEATURES) is None
    assert GPU.key in told[0] and len(told) == 1 + len(STEPS)
    assert list(file.parent.iterdir()) == [file], "nothing but the file is left"


@pytest.mark.parametrize("how", ENDS)
def test_what_fails_is_named_and_stays_off(how):
    """Steps that depend on it are not run; independent ones are, and open their calls."""
    state, said = ENDS[how]
    start = time.monotonic()
    found, machine, _ = prove(backward=how)
    assert time.monotonic() - start < 60
    results = found.proofs[GPU.key]
    assert (results["backward"].state, results["backward"].reason) == (state, said)
    assert found.failures == [f"CUDA kernels on {GPU.key}: backward {state}: {said}"]
    for name in ("orders", "graphs of gradients", "gradients of lengths"):
        assert results[name].state == "not run" and name not in machine.ran
    assert results["orders"].reason == "it needs 'backward'"
    assert closed("call", "lengths", "pages", "float8") is None
    assert said in closed("call", "gradient") and "'backward'" in closed("gradient")
    assert "it needs 'orders'" in closed("gradient of lengths")


def test_a_first_step_that_fails_closes_everything():
    found, machine, _ = prove(driver="fail")
    assert machine.ran == ["driver"] and len(found.failures) == 1
    assert all(closed(feature) for feature in FEATURES)


def test_of_a_step_that_hangs_nothing_stays_behind(tmp_path):
    """Not even the processes that it has started."""
    mine = tmp_path / "children"
    script = f"trap '' TERM; sleep 62 & echo $! > {mine}; echo $$ >> {mine}; sleep 62"
    outcome = limited.run(["/bin/sh", "-c", script], 1)
    assert outcome.state == "hung" and outcome.code is None
    for pid in map(int, mine.read_text().split()):
        for _ in range(100):  # init may take a while to reap it
            state = Path(f"/proc/{pid}/stat")
            if not state.exists() or state.read_text().split(")")[1].split()[0] == "Z":
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"{pid} lives")


def test_a_process_that_cannot_be_killed_is_not_waited_for(monkeypatch):
    """Like a process that waits for a GPU; then nothing else may use the GPUs."""
    spared = []
    monkeypatch.setattr(limited, "GRACE", 0.1)
    monkeypatch.setattr(os, "killpg", lambda group, number: spared.append(group))
    other = replace(GPU, name="another one", index=1)
    try:
        found, machine, _ = prove(loops="hang", gpus=(GPU, other))
    finally:
        monkeypatch.undo()
        for group in spared:
            os.killpg(group, signal.SIGKILL)
    results = found.proofs[GPU.key]
    assert found.hangs and results["loops"].state == "stuck" and machine.ran[-1] == "loops"
    assert "could not be killed" in results["loops"].reason
    assert "the process of 'loops' still has the GPU" in results["all shapes"].reason
    assert other.key not in found.proofs


def test_what_is_for_hopper_alone_is_left_out_elsewhere():
    ampere = replace(GPU, capability=(8, 0))
    found, machine, _ = prove(gpus=(ampere,))
    results = found.proofs[ampere.key]
    assert results["tensor maps"].state == results["float8"].state == "not for this GPU"
    assert found.failures == [] and results["one tile"].state == "passed"
    assert "float8" not in machine.ran and "tensor maps" not in machine.ran


# ---- what is remembered ------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"name": "NVIDIA B"}, {"driver": "1"}, {"build": "f"}], ids=str)
def test_a_proof_is_of_one_gpu_driver_and_build(monkeypatch, change):
    prove()
    assert closed("call") is None
    monkeypatch.setattr(proof, "gpu_of", lambda index: replace(GPU, **change))
    proof.forget()
    assert "nothing has proven them on this GPU, driver and build yet" in closed("call")
    assert "python -m fastattn verify" in proof.missing(0)


DAMAGED = (
    "", "{", "[]", "null", "3", '{"gpus": []}', '{"gpus": {"KEY": 3}}', "\x00\x01", "[" * 100000,
    '{"gpus": {"KEY": {"steps": []}}}', '{"gpus": {"KEY": {}}}',
)  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_proves_nothing_and_is_replaced(file, text):
    file.parent.mkdir()
    file.write_text(text.replace("KEY", GPU.key))
    assert closed("call")
    prove()
    assert closed("call") is None


def test_a_damaged_step_has_not_passed(file):
    prove()
    stored = json.loads(file.read_text())
    stored["gpus"][GPU.key]["steps"]["graphs"] = {"state": "passed"}
    file.write_text(json.dumps(stored))
    proof.forget()
    assert "'graphs' on this GPU, driver and build: not run" in closed("call")


def test_proofs_of_others_are_kept(file):
    other = replace(GPU, name="NVIDIA B")
    prove(gpus=(other,))
    prove(backward="fail")
    assert set(json.loads(file.read_text())["gpus"]) == {other.key, GPU.key}
    assert proof.load(other)["backward"].state == "passed"
    assert proof.load(GPU)["backward"].state == "failed"


def test_where_nothing_can_be_kept_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("FASTATTN_PROOF", str(tmp_path / "taken/proof.json"))
    found, machine, _ = prove()
    assert len(machine.ran) == len(STEPS) and not found.hangs
    assert "cannot be kept in a file, so it opens nothing" in found.failures[0]


def test_a_run_that_is_cut_off_has_shown_what_it_has(monkeypatch):
    prove()  # an earlier proof no longer counts after kernels may have crashed the machine

    class Cut(Pretended):
        def command(self, step, gpu):
            if step.name == "loops":
                raise KeyboardInterrupt
            return super().command(step, gpu)

    with pytest.raises(KeyboardInterrupt):
        proof.prove(lambda text: None, Cut())
    known = proof.load(GPU)
    assert known["one tile"].state == "passed" and known["loops"].state == "started"
    assert "'all shapes' on this GPU, driver and build: not run" in closed("call")


def test_the_file_is_where_caches_are(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTATTN_PROOF")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert proof.store() == tmp_path / "fastattn/proof.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert proof.store() == Path("/somewhere/.cache/fastattn/proof.json")


@pytest.mark.parametrize(
    "line",
    ["NVIDIA UNIX x86_64 Kernel Module  580.65.06  Thu Oct 19 18:56:32 UTC 2023",
     "NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs@x-1.2)  Sun"],
)  # fmt: skip
def test_the_drivers_version(monkeypatch, line):
    text = f"NVRM version: {line}\nGCC version:  gcc version 12.3.0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert proof.driver.__wrapped__() == "580.65.06"


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """verify.main() on such a machine: (exit status, its JSON, its output, what run() received)."""
    ran = []

    def run(quick, console, gpu=True):
        ran.append(gpu)
        return verify.Verified((), {})

    def main(*options, **how):
        monkeypatch.setattr(verify, "run", run)
        monkeypatch.setattr(proof, "Machine", lambda: Pretended(**how))
        where = tmp_path / "verify.json"
        status = verify.main(["--quick", "--json", str(where), *options])
        return status, json.loads(where.read_text()), capsys.readouterr().out, ran[-1]

    return main


def test_verify_proves_first_and_its_json_has_it(command):
    status, stored, printed, gpu = command()
    assert status == 0 and stored["passed"] and gpu
    steps = stored["proof"]["gpus"][GPU.key]
    assert list(steps) == [s.name for s in STEPS] and steps["driver"]["state"] == "passed"
    for step in STEPS:
        assert f"{step.name}: passed: 3 calls" in printed


def test_verify_fails_with_a_step(command):
    status, stored, printed, gpu = command(lengths="crash")
    assert status == 1 and not stored["passed"] and gpu
    assert f"FAILED CUDA kernels on {GPU.key}: lengths crashed: SIGSEGV" in printed
    assert stored["proof"]["gpus"][GPU.key]["pages"]["reason"] == "it needs 'lengths'"


def test_verify_touches_no_gpu_whose_driver_hangs(command):
    status, stored, printed, gpu = command(problem="the driver hangs", gpus=())
    assert status == 1 and not gpu and stored["proof"]["problem"] == "the driver hangs"
    assert "FAILED CUDA kernels: the driver hangs" in printed


def test_a_machine_without_a_gpu_has_nothing_to_prove():
    """Without a loaded library, no process is started either."""
    if library.CUDA is not None:
        pytest.skip("the CUDA library is loaded here")
    assert Machine().gpus() == ([], library.cuda_fault())
    assert list(proof.here()) == []


def test_a_driver_that_hangs_is_asked_in_a_process_of_its_own(monkeypatch):
    class Slow(Machine):
        limit = 1

        def python(self, *arguments):
            return ["/bin/sh", "-c", SCRIPTS["hang"]]

    monkeypatch.setattr(library, "CUDA", object())
    gpus, problem = Slow().gpus()
    assert gpus == [] and problem == (
        "asking the driver for its GPUs hung: it did not end within 1 s and was killed"
    )


def test_a_driver_that_is_too_old_for_torch_is_named(monkeypatch, capsys):
    from fastattn.backends import proof_steps

    problem = "the NVIDIA driver serves CUDA up to 12.2, and this library needs a driver for 13.0"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(library, "cuda_problem", lambda index: problem)
    assert proof_steps.main(["gpus"]) == 1
    said = capsys.readouterr().out.strip()

    class Old(Machine):
        def python(self, *arguments):
            return ["/bin/sh", "-c", f"echo '{said}'; exit 1"]

    monkeypatch.setattr(library, "CUDA", object())
    assert Old().gpus() == ([], f"asking the driver for its GPUs failed: {problem}")
    monkeypatch.setattr(library, "cuda_problem", lambda index: "there is no NVIDIA driver here")
    assert proof_steps.main(["gpus"]) == 0 and capsys.readouterr().out.strip() == "[]"


def test_gpus_are_asked_once_for_each_kind(monkeypatch):
    listed = [{"name": n, "capability": [9, 0], "driver": "1", "build": "b", "index": i}
              for i, n in enumerate("AABA")]  # fmt: skip

    class Four(Machine):
        def python(self, *arguments):
            return ["/bin/echo", json.dumps(listed)]

    monkeypatch.setattr(library, "CUDA", object())
    gpus, problem = Four().gpus()
    assert problem is None and [(g.name, g.index) for g in gpus] == [("A", 0), ("B", 2)]
    assert gpus[0].capability == (9, 0)


def test_compute_sanitizer_runs_the_same_steps(monkeypatch, capsys):
    command = proof.Sanitized("/tools/compute-sanitizer").command(STEPS[0], GPU)
    plain = Machine().command(STEPS[0], GPU)
    assert command == ["/tools/compute-sanitizer", "--error-exitcode", "86", *plain]
    assert plain[-3:] == ["driver", "--device", "0"]
    failed = proof.result_of(limited.Outcome("ended", 86, 1.0, "passed: 3\n= 2 errors"), 9)
    assert failed == Result("failed", 1.0, "= 2 errors")
    monkeypatch.setattr(proof, "sanitizer", lambda: None)
    assert verify.main(["--sanitize"]) == 2
    assert "needs compute-sanitizer" in capsys.readouterr().err


# ---- the steps, as processes -------------------------------------------------------------------


def test_a_step_is_a_command():
    run = subprocess.run(
        [sys.executable, "-m", "fastattn.backends.proof_steps", "driver", "--device", "cpu"],
        capture_output=True, text=True,
    )  # fmt: skip
    if library.NATIVE_MISSING:
        assert run.returncode == 1 and run.stdout.strip().startswith("failed: the native CPU")
    else:
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip().splitlines()[-1].startswith("passed: ")


def test_without_warnings_the_table_of_features_is_asked_as_it_stands():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for feature in FEATURES:
            assert "python -m fastattn verify" in closed(feature)

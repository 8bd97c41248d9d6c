"""The benchmark's command line, its reports, its history, and another commit in the same rounds.

No test here asserts a time.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import shlex
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_data import FACTS, SMALL, TINY, example, machine, result
from fastattn.benchmarks import cli, suites
from fastattn.benchmarks.competitors import named
from fastattn.benchmarks.measure import devices, other_commit, protocol, runner, worker
from fastattn.benchmarks.report import history, record, table
from fastattn.benchmarks.report.history import Change, Store
from rich.console import Console

import fastattn

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script.:DeprecationWarning")
HISTOGRAM = ["--benchmark-histogram={folder}/histogram"] * bool(importlib.util.find_spec("pygal"))
CASES = (TINY["plain"], TINY["window"], TINY["decode"])


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """Three cases, the shortest rounds, and a separate folder for the history."""
    for level in protocol.LEVELS:
        monkeypatch.setitem(protocol.LEVELS, level, (6, 0.0))
    monkeypatch.setattr(devices, "peak_flops", lambda dtype, seconds, device: 1e11)
    monkeypatch.setattr(devices, "peak_bandwidth", lambda size, seconds, device: 1e10)
    for suite in ("all", "attention"):
        monkeypatch.setitem(suites.SUITES, suite, lambda: CASES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the command line ---------------------------------------------------------------------------


def test_main_prints_and_writes(tiny, capsys):
    threads = torch.get_num_threads()
    flags = ["--quick", "--threads", "1", "--vs", "sdpa,eager,flash_attn"]
    files = ["--json", "new/bench.json", "--csv", "new/bench.csv", "--md", "new/bench.md"]
    assert cli.main([*flags, *files]) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    for case in CASES:
        assert case.name in printed
    for word in ("noise floor: A/A ratios differ", "seed 20", "CUDA devices only", "kept as"):
        assert word in printed
    data = history.load(tiny / "new/bench.json")
    assert data["level"] == "quick" and data["machine"]["threads"] == 1
    assert {"commit", "dirty", "load", "seed", "isa", "triton", "date"} <= data["machine"].keys()
    assert set(data["clocks"]) == {"before", "after", "throttled"}
    assert data["noise"]["cells"] == 2  # the fp32 cases
    for entry, case in zip(data["rows"], CASES, strict=True):
        assert entry["name"] == case.name and entry["floor"] == case.floor and entry["red"] is None
        ours, sdpa = entry["sides"]["fastattn"], entry["sides"]["sdpa"]
        assert sdpa["backend"] == "flash" and entry["sides"]["eager"]["backend"] == "math"
        ratio = entry["versus"]["sdpa"]
        assert ratio["low"] <= ratio["p20"] <= ratio["value"] <= ratio["p80"] <= ratio["high"]
        seconds = ours["ms"] / 1e3
        assert ours["tflops"] == pytest.approx(entry["work"]["flops"] / seconds / 1e12)
        assert ours["percent_of_matmul"] == pytest.approx(ours["tflops"] * 1e12 / 1e11 * 100)
        assert ours["percent_of_copy"] == pytest.approx(ours["gbytes"] * 1e9 / 1e10 * 100)
        assert ours["percent_of_peak"] == pytest.approx(
            max(ours["percent_of_matmul"], ours["percent_of_copy"])
        )
        assert "per visible pair" in entry["formula"]
        assert len(entry["comparison"]["samples_s"]["sdpa"]) == 6
    lines = list(csv.DictReader(io.StringIO((tiny / "new/bench.csv").read_text())))
    assert len(lines) == 9 and lines[0]["versus"] == "sdpa" and float(lines[0]["ratio"]) > 0
    assert "<details>" in (tiny / "new/bench.md").read_text()


def test_the_command_of_a_row_measures_that_row(tiny, capsys):
    assert cli.main(["attention", "--cases", "window", "--vs", "eager", "--json"]) == 0
    (entry,) = history.load(tiny / "out/bench.json")["rows"]
    words = shlex.split(entry["command"])
    assert words[:4] == ["python", "-m", "fastattn", "bench"]
    args = cli.parse(words[4:])
    assert [case.name for case in args.cases] == [entry["name"]]
    assert [c.name for c in args.competitors] == ["eager"]


@pytest.mark.parametrize("case", suites.CASES[::7], ids=lambda case: case.name)
def test_commands_match_one_case_exactly(case):
    words = shlex.split(record.command(case.name, ["attention"]))
    assert [case.name for case in cli.parse(words[4:]).cases] == [case.name]


def test_main_lists(tiny, capsys):
    assert cli.main(["--cases", "window", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [TINY["window"].name]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--cases", "no such"], "no case matches 'no such'"),
        (["--rows", "no such"], "no case matches 'no such'"),  # as stored commands spell it
        (["--cases", "("], "is not a regular expression"),
        (["--threads", "0"], "--threads: got 0, needs at least 1"),
        (["--minutes", "0"], "--minutes: got 0.0, needs at least"),
        (["--vs", "fa3"], "--vs: 'fa3' is not known"),
        (["--modes", "sideways"], "--modes: 'sideways' is not known"),
        (["nonsense"], "suite: 'nonsense' is not known"),
        (["dense", "--sweep", "batch"], "both choose cases"),
        (["--model", "bert-large"], "invalid choice: 'bert-large'"),
        (["--fail-if", "5%"], "--fail-if needs something to compare with"),
        (["--base", "HEAD", "--fail-if", "soon"], "--fail-if: got 'soon', accepted is a share"),
        (["--json", "dense"], "--json: 'dense' does not end in .json"),
        (["--cold", "--device", "cpu"], "--graphs and --cold are for --device cuda"),
        (["--backend", "tpu"], "backend is 'tpu'; accepted are"),
        (["--aa", "--base", "HEAD"], "leave --base out"),
        (["--quick", "--full"], "not allowed with"),
    ],
)
def test_main_refuses_in_one_sentence(arguments, says, tiny, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert says in said.splitlines()[-1] and "Traceback" not in said


def wrong(*args, **kwargs):
    return F.scaled_dot_product_attention(*args, **kwargs) + 1.0


def test_main_fails_when_a_row_is_red(tiny, monkeypatch, capsys):
    monkeypatch.setattr(fastattn, "scaled_dot_product_attention", wrong)
    assert cli.main(["--quick", "--json"]) == 1
    printed = capsys.readouterr().out
    assert f"RED {TINY['plain'].name}: wrong out" in printed
    red, good, _ = history.load(tiny / "out/bench.json")["rows"]
    assert red["red"].startswith("wrong out") and good["red"] is None
    assert red["comparison"] is None and red["versus"] == {}
    assert not {"ms", "tflops", "gbytes"} & red["sides"]["fastattn"].keys()


def test_ctrl_c_keeps_what_is_measured(tiny, monkeypatch, capsys):
    whole = runner.measure

    def until_the_second(case, plan):
        if case is CASES[1]:
            raise KeyboardInterrupt
        return whole(case, plan)

    monkeypatch.setattr(runner, "measure", until_the_second)
    assert cli.main(["--json"]) == 130
    assert "interrupted; the table has what was measured" in capsys.readouterr().out
    data = history.load(tiny / "out/bench.json")
    assert data["interrupted"] and [e["name"] for e in data["rows"]] == [CASES[0].name]
    ((_, kept),) = Store(data["machine"]).runs()
    assert kept == data


def test_aa_compares_torch_with_torch(tiny, capsys):
    assert cli.main(["--aa", "--json"]) == 0
    data = history.load(tiny / "out/bench.json")
    assert data["noise"]["cells"] == 3
    assert all(list(entry["versus"]) == ["sdpa again"] for entry in data["rows"])
    assert "of 3 comparisons" in (printed := capsys.readouterr().out) and "not timed" not in printed


def test_a_report_that_cannot_be_written_costs_nothing_else(tiny, capsys):
    (tiny / "file").write_text("")
    assert cli.main(["--json", "file/bench.json", "--csv", "bench.csv"]) == 0
    printed = capsys.readouterr().out
    assert "--json: file/bench.json is not written" in printed and (tiny / "bench.csv").exists()


# ---- the time there is --------------------------------------------------------------------------


def test_a_budget_takes_the_most_informative_cases(monkeypatch):
    """If every case takes ten seconds, five cases and one A/A case fit into a minute."""
    now, measured = [0.0], []

    def take_ten(case, plan):
        now[0] += 10.0
        measured.append(case)
        return result(case, fastattn=1e-3, sdpa=2e-3)

    monkeypatch.setattr(runner, "measure", take_ten)
    monkeypatch.setattr(runner.Machine, "measure_peaks", lambda *args, **kwargs: None)
    monkeypatch.setattr(runner, "AA_CASES", 1)
    monkeypatch.setattr(runner, "aa_cases", lambda cases, forecast: [SMALL])
    monkeypatch.setattr(runner.Forecast, "raw", lambda self, case: 10.0)
    plan = protocol.Plan(devices.Cpu(), named("sdpa"), "quick")
    done = runner.run(suites.CASES, plan, machine(), seconds=60.0, clock=lambda: now[0])
    assert len(done.results) == 5 and len(done.aa) == 1 and now[0] == 60.0
    best = suites.by_information(suites.CASES)[:5]
    assert {r.case for r in done.results} == set(best)
    assert [r.case for r in done.results] == [case for case in suites.CASES if case in best]
    assert len(done.skipped) == len(suites.CASES) - 5


def test_a_forecast_learns_from_what_cells_took():
    plan = protocol.Plan(devices.Cpu(), named("sdpa"), "default")
    forecast = runner.Forecast(machine(), plan)
    small, large = (replace(SMALL, q_len=n) for n in (64, 4096))
    assert forecast(large) > forecast(small) > 0
    before = forecast(large)
    for _ in range(3):
        forecast.learn(small, 2 * forecast.raw(small))
    assert forecast(large) == pytest.approx(2 * before)
    assert all(forecast(case) > 0 for case in suites.select())


# ---- reports ------------------------------------------------------------------------------------


def test_what_is_slower_comes_first():
    data = example()
    ((entry, name, ratio),) = record.slower(data)
    assert (entry["dtype"], name) == ("bf16", "sdpa") and ratio["value"] == pytest.approx(0.5, 0.1)
    text = table.as_markdown(data, [Change("case", "base", 0.8, 0.7, 0.9)])
    wrong, slow, changed = (text.index(w) for w in ("Wrong, so", "Slower:", "Changed:"))
    assert wrong < slow < changed < text.index("<details>")
    assert "case: slower, 25.0% more time (0.70 to 0.90, by base)" in text
    assert "no difference" in text and "| RED |" in text
    assert "THROTTLED: it got hot" in text and "0123456789 (dirty)" in text


@pytest.mark.parametrize("width", [100, 150, 230])
def test_tables_fit_their_terminal(width):
    console = Console(record=True, width=width, file=io.StringIO())
    table.print_table(example(), console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for words in ("slower than sdpa", "RED", "no difference", "2.0"):
        assert words in text


def test_history_is_appended_and_never_lost(tmp_path):
    store, data = Store(FACTS, tmp_path), example()
    first, second = store.save(data), store.save(data)
    assert [p.name for p in (first, second)] == [
        "0001_0123456789-dirty.json",
        "0002_0123456789-dirty.json",
    ]
    assert store.find("last")[0] == second.stem
    assert store.find("1")[0] == store.find(first.stem)[0] == first.stem
    assert store.find("012345")[0] == second.stem
    with pytest.raises(ValueError, match="no run '7'"):
        store.find("7")
    before = first.read_bytes()
    (store.folder / "0003_broken.json").write_text('{"schema": 2, "rows"')
    (store.folder / "0004_old.json").write_text('{"schema": 1}')
    (store.folder / "0005_list.json").write_text("[]")
    (store.folder / "0006_half.json").write_text('{"schema": 2}')
    assert [runner for runner, _ in store.runs()] == [first.stem, second.stem]
    assert len(store.warnings) == 4 and "0003_broken.json cannot be read as a run" in \
        store.warnings[0]  # fmt: skip
    assert store.save(data).name.startswith("0007_")
    assert first.read_bytes() == before and (store.folder / "0003_broken.json").exists()
    with pytest.raises(ValueError, match="no run of this machine"):
        Store({**FACTS, "cores": 64}, tmp_path).find("last")


def test_two_writers_get_two_numbers(tmp_path):
    data = example()
    writers = [threading.Thread(target=Store(FACTS, tmp_path).save, args=(data,)) for _ in range(8)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    runs = Store(FACTS, tmp_path).runs()
    assert len({runner for runner, _ in runs}) == 8 and all(found == data for _, found in runs)


def test_changes_are_the_ratios_change():
    """torch takes twice as long in the second run, and so does fastattn: nothing has changed."""
    case = SMALL
    make = lambda ours, theirs: record.as_json(  # noqa: E731
        [result(case, fastattn=ours, sdpa=theirs)], machine(), level="quick", options=[]
    )
    before = make(1e-3, 2e-3)
    (same,) = history.changes_since(make(2e-3, 4e-3), before)
    assert same.verdict == "no difference" and same.value == pytest.approx(1.0)
    (slow,) = history.changes_since(make(1.2e-3, 2e-3), before)
    assert slow.verdict == "slower" and slow.value == pytest.approx(1 / 1.2)
    assert slow.regressed(0.05) and slow.regressed(0.19) and not slow.regressed(0.21)
    assert history.changes_since(make(1e-3, 2e-3), {"rows": []}) == []
    assert history.weak(make(2e-3, 1e-3)) == [case.name] and history.weak(before) == []


@pytest.mark.parametrize("text, value", [("5%", 0.05), ("0.05", 0.05), (" 12.5 % ", 0.125)])
def test_thresholds(text, value):
    assert history.threshold(text) == pytest.approx(value)


def test_compare_and_fail_if(tiny, monkeypatch, capsys):
    """The second run is slower by construction, and --fail-if sets the exit code."""
    slowdown = [1.0]

    def fixed(case, plan):
        return result(case, fastattn=1e-3 * slowdown[0], sdpa=2e-3)

    monkeypatch.setattr(runner, "measure", fixed)
    assert cli.main(["--compare", "last"]) == 2  # nothing to compare with, which it reports
    assert "no run of this machine" in capsys.readouterr().out
    slowdown[0] = 1.02
    assert cli.main(["--compare", "last", "--fail-if", "5%"]) == 0
    slowdown[0] = 1.3
    assert cli.main(["--compare", "1", "--fail-if", "5%", "--no-save"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("REGRESSED") == 3 and "30.0% more time" in printed
    assert cli.main(["--compare", "1", "--no-save"]) == 0


# ---- another commit -----------------------------------------------------------------------------


def test_a_worker_serves_a_row_and_says_what_is_wrong(monkeypatch):
    from dataclasses import asdict

    served = worker.Served()
    request = {"attention": asdict(TINY["causal"]), "device": "cpu", "threads": 1}
    answer = served.open(request)
    assert answer["why_not"] is None and 0 < answer["errors"]["excess"] <= 1
    assert served.sample({"repeats": 3})["ns"] > 0
    assert served.close({}) == {}
    monkeypatch.setattr(fastattn, "scaled_dot_product_attention", wrong)
    assert "wrong out" in served.open(request)["why_not"]
    answers = io.StringIO()
    worker.serve([json.dumps({"op": "sample", "repeats": 1})], answers)
    assert "error" in json.loads(answers.getvalue())


class SlowTree:
    """In place of other_commit.Pair: two processes with simulated clocks, one of them slower."""

    slowdown, why_not = 1.0, None

    def __init__(self, tree, device) -> None:
        pass

    def sides(self, case):
        def sampled(seconds):
            calls = iter(range(10**6))
            return lambda repeats: repeats * seconds * 1e9 * (1 + 0.01 * (next(calls) % 5))

        times = {protocol.OURS: 3e-3 * self.slowdown, "base": 3e-3}
        sides = [protocol.Side(n, backend="cpu", sample=sampled(t)) for n, t in times.items()]
        sides[1].why_not = self.why_not
        return sides

    def close(self) -> None:
        pass


@pytest.mark.parametrize("slowdown, code", [(1.0, 0), (1.1, 1), (0.9, 0)])
def test_base_in_the_same_rounds(slowdown, code, tiny, monkeypatch, capsys):
    monkeypatch.setattr(other_commit, "prepare", lambda ref, folder, say: tiny)
    monkeypatch.setattr(other_commit, "Pair", SlowTree)
    monkeypatch.setattr(SlowTree, "slowdown", slowdown)
    assert cli.main(["--base", "main", "--fail-if", "5%", "--json"]) == code
    assert capsys.readouterr().out.count("REGRESSED") == (3 if code else 0)
    data = history.load(tiny / "out/bench.json")
    for entry in data["rows"]:
        assert entry["versus"]["base"]["value"] == pytest.approx(1 / slowdown, rel=0.03)
        assert entry["comparison"]["rounds"] == 6 * other_commit.PASSES


def test_a_wrong_base_gets_no_number(tiny, monkeypatch):
    monkeypatch.setattr(other_commit, "prepare", lambda ref, folder, say: tiny)
    monkeypatch.setattr(other_commit, "Pair", SlowTree)
    monkeypatch.setattr(SlowTree, "why_not", "wrong out: far off")
    assert cli.main(["--base", "main", "--vs", "sdpa", "--json"]) == 0
    for entry in history.load(tiny / "out/bench.json")["rows"]:
        assert list(entry["versus"]) == ["sdpa"]
        assert entry["sides"]["base"]["why_not"] == "wrong out: far off"


def test_a_base_that_is_none_is_said_and_the_run_goes_on(tiny, monkeypatch, capsys):
    def fails(ref, folder, say):
        raise ValueError("--base: main (0123) does not build: no compiler")

    monkeypatch.setattr(other_commit, "prepare", fails)
    assert cli.main(["--base", "main", "--json"]) == 2
    assert "does not build: no compiler" in capsys.readouterr().out
    assert all("sdpa" in e["versus"] for e in history.load(tiny / "out/bench.json")["rows"])


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A git checkout with two commits; the first one's setup.py fails."""
    if shutil.which("git") is None:
        pytest.skip("git is not on this machine")
    root = tmp_path / "repository"
    (root / "fastattn").mkdir(parents=True)
    for name in ("NAME", "EMAIL"):
        for who in ("AUTHOR", "COMMITTER"):
            monkeypatch.setenv(f"GIT_{who}_{name}", "somebody")

    def git(*arguments):
        subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)

    git("init", "-q")
    for text in ("raise SystemExit('no such kernel')", "print('built')"):
        (root / "setup.py").write_text(text)
        (root / "csrc.txt").write_text(text)
        git("add", "setup.py", "csrc.txt")
        git("commit", "-q", "-m", "a commit")
    return root


def test_worktrees_are_built_once_and_failures_are_sentences(repository, tmp_path):
    said = []
    with pytest.raises(ValueError, match="'nowhere' names no commit of this repository"):
        other_commit.prepare("nowhere", tmp_path / "kept", repository, said.append)
    with pytest.raises(ValueError, match=r"HEAD~1 \(\w{10}\) does not build: no such kernel"):
        other_commit.prepare("HEAD~1", tmp_path / "kept", repository, said.append)
    tree = other_commit.prepare("HEAD", tmp_path / "kept", repository, said.append)
    assert (tree / "setup.py").read_text() == "print('built')" and len(said) == 2
    assert other_commit.prepare("HEAD", tmp_path / "kept", repository, said.append) == tree
    assert len(said) == 2  # not built a second time
    with pytest.raises(ValueError, match="needs fastattn to run from a git checkout"):
        other_commit.prepare("HEAD", tmp_path / "kept", tmp_path / "repository" / "fastattn")


def test_a_worker_that_dies_leaves_a_sentence(tmp_path):
    """The tree contains no fastattn that could be imported."""
    (tmp_path / "fastattn").mkdir()
    (tmp_path / "fastattn/__init__.py").write_text("raise SystemExit('broken tree')")
    process = other_commit.Worker(tmp_path)
    try:
        side = process.side("base", SMALL, devices.Cpu(threads=1))
        assert "broken tree" in side.why_not
    finally:
        process.close()


def test_two_trees_in_two_processes(tmp_path):
    """This checkout compared with itself, through real processes."""
    root = Path(fastattn.__file__).resolve().parents[1]
    process = other_commit.Worker(root)
    try:
        side = process.side("base", SMALL, devices.Cpu(threads=1), "abc ")
        assert side.why_not is None and side.backend.startswith("abc ") and side.sample(2) > 0
        side.close()
        with pytest.raises(RuntimeError, match="TypeError"):
            process.ask("sample", repeats=1)
    finally:
        process.close()
    assert process.process.returncode == 0


# ---- pytest-benchmark ---------------------------------------------------------------------------


def test_pytest_benchmark_saves_and_compares(tmp_path):
    """Two runs of three cases are stored with the kernel and the ratio, then compared."""
    pytest.importorskip("pytest_benchmark")
    root = Path(fastattn.__file__).resolve().parents[1]
    if not (root / "benchmarks" / "test_speed.py").exists():
        pytest.skip("the suite is not beside this package")
    some = "vit-l-fp32-fwd-B8 or alone/causal] or alone/packed]"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "-k", some, "--threads", "1"]
    command += ["-p", "no:cacheprovider", f"--benchmark-storage=file://{tmp_path}"]
    for extra in (["--benchmark-autosave"], ["--benchmark-compare", *HISTOGRAM]):
        extra = [word.format(folder=tmp_path) for word in extra]
        done = subprocess.run([*command, *extra], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "(0001" in done.stdout
    (stored,) = tmp_path.rglob("0001_*.json")
    found = {b["name"]: b for b in json.loads(stored.read_text())["benchmarks"]}
    assert len(found) == 4
    ours = next(b for name, b in found.items() if "fastattn" in name)
    assert ours["extra_info"]["ratio"]["low"] <= ours["extra_info"]["ratio"]["high"]
    assert {"backend", "tflops", "memory", "error", "percent_of_peak"} <= ours["extra_info"].keys()
    assert any("sdpa" in name and b["extra_info"]["backend"] == "flash" for name, b in
               found.items())  # fmt: skip
    if HISTOGRAM:
        assert list(tmp_path.glob("histogram*.svg"))

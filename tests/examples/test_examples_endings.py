"""How a run of an example ends, and what the next run finds in its folder."""

from __future__ import annotations

import errno
import importlib
import json
import math
import os
import resource
import signal
import sys
import traceback
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("tokenizers")
from example_runs import EXAMPLES, SIZES, arguments, run, write_sources

sys.path.insert(0, str(EXAMPLES))

import command_line
import common
import files

from fastattn.models import GPT, CheckpointError


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A small folder of Python files, the same on every machine."""
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def ends(monkeypatch, capsys):
    """ends(name, arguments) is (exit status, what an example's run wrote to stderr)."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def ends(name: str, words: list[str]) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"examples/{name}.py", *words])
        monkeypatch.setattr(sys, "orig_argv", ["python", *sys.argv])
        with pytest.raises(SystemExit) as stop:
            command_line.run(importlib.import_module(name).main)
        return stop.value.code, capsys.readouterr().err

    yield ends
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
        signal.signal(number, handler)


# ---- options -----------------------------------------------------------------------------------


def kinds() -> dict[str, type]:
    """The options of each example."""
    found = {}
    for name in SIZES:
        if name == "finetune_bert":
            pytest.importorskip("transformers")
        module = importlib.import_module(name)
        found[name] = next(
            x
            for x in vars(module).values()
            if isinstance(x, type)
            and issubclass(x, common.Options)
            and x.__module__ == module.__name__
        )
    return found


def test_every_number_has_a_range_that_holds_its_default():
    for name, kind in kinds().items():
        for f in fields(kind):
            accepts = f.metadata["accepts"]
            if f.type in ("int", "float"):
                assert isinstance(accepts, command_line.Range), (name, f.name)
                assert f.default in accepts, (name, f.name)
                wrong = [x for x in (math.nan, math.inf, -math.inf, -5) if x in accepts]
                assert not wrong, (name, f.name)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--clip -1", "--clip is -1.0; accepted is 0 or more"),
        ("--compare -1", "--compare is -1; accepted is 0 or more"),
        ("--sample -3", "--sample is -3; accepted is 0 or more"),
        ("--warmup -5", "--warmup is -5; accepted is 0 or more"),
        ("--lr nan", "--lr is nan; accepted is above 0"),
        ("--dropout 1", "--dropout is 1.0; accepted is 0 or more and below 1"),
        ("--seed -1", "--seed is -1; accepted is 0 to 4294967295"),
        ("--steps " + "9" * 400 + " --batch 0", "--batch is 0; accepted is 1 or more"),
        ("--compile nonesuch", "--compile is nonesuch; accepted are"),
        ("--fres", "unrecognized arguments: --fres"),
    ],
)
def test_options_out_of_range(words, sentence, ends):
    status, shown = ends("pretrain_gpt", words.split())
    assert status == 2 and sentence in shown


def test_options_that_a_program_gives_are_checked_too():
    task = common.Task(GPT(vocab_size=9, dim=8, heads=2, layers=1, max_len=8), batch=lambda n: {})
    with pytest.raises(ValueError, match="--clip is -1; accepted is 0 or more"):
        common.train(task, common.Options(out="unused", clip=-1))


@pytest.mark.parametrize("name", SIZES)
def test_help_keeps_the_lines_of_the_docstring(name, capsys):
    if name == "finetune_bert":
        pytest.importorskip("transformers")
    module = importlib.import_module(name)
    with pytest.raises(SystemExit):
        module.main(["--help"])
    shown = capsys.readouterr().out
    assert module.__doc__.strip() in shown
    assert "default: )" not in shown and "(0 or more; default: 20)" in shown.replace("50", "20")


# ---- endings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number, status, words",
    [(signal.SIGINT, 130, "stopped by Ctrl-C"), (signal.SIGTERM, 143, "stopped by SIGTERM")],
)
def test_signals_end_in_a_sentence_and_the_command(
    number, status, words, tmp_path, sources, ends, monkeypatch
):
    step = common.Stepper.step

    def signalled(self, index):
        if index == 3:
            os.kill(os.getpid(), number)
        return step(self, index)

    given = arguments("pretrain_gpt", tmp_path / "a b", sources, "--fresh")
    with monkeypatch.context() as patch:
        patch.setattr(common.Stepper, "step", signalled)
        found, shown = ends("pretrain_gpt", given)
    assert found == status
    first, second = shown.splitlines()
    command = "the same command goes on: python examples/pretrain_gpt.py "
    assert first == words and second.startswith(command)
    assert "--fresh" not in second and f"--out '{tmp_path}/a b'" in second
    assert os.listdir(tmp_path / "a b/checkpoints") == ["step-00000002.pt"]
    given.remove("--fresh")
    again = importlib.import_module("pretrain_gpt").main(given)[0]
    assert again.losses == run("pretrain_gpt", tmp_path / "straight", sources)[0].losses


def test_mistakes_end_in_their_sentence(tmp_path, sources, ends):
    (tmp_path / "file").write_text("")
    cases = {
        "--vocabulary is 9; accepted is at least": ["--vocabulary", "9"],
        "which is no folder": ["--data", str(tmp_path / "nowhere")],
        "file cannot be written: ": ["--out", str(tmp_path / "file")],
        "--prompt has 40 tokens; accepted are fewer": ["--prompt", "#%" * 20],
        "--batch is 4; it must be a multiple": ["--accumulate", "3"],
    }
    for sentence, words in cases.items():
        given = arguments("pretrain_gpt", tmp_path / "out", sources, *words)
        status, shown = ends("pretrain_gpt", given)
        assert status == 1 and sentence in shown and "Traceback" not in shown


def _process(rank: int, name: str, words: list[str], folder: Path) -> int:
    """Forks a process, one of two, that writes its errors to folder/rank; its pid."""
    child = os.fork()
    if child:
        return child
    status: object = "an exception"
    with (folder / str(rank)).open("w") as sys.stderr:
        try:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
            dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
            sys.argv = [f"examples/{name}.py", *words]
            command_line.run(importlib.import_module(name).main)
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
    os._exit(status if isinstance(status, int) else 99)


def test_a_mistake_of_two_processes(tmp_path, sources):
    """The first process reports it; the other reports it too, or that the first has ended."""
    gone = "process 1: another process has ended or cannot be reached: "
    cases = {
        "--vocabulary 9": ("--vocabulary is 9; accepted is at least", gone),
        "--accumulate 3": ("--batch is 4; it must be", "process 1: --batch is 4; it must be"),
    }
    for n, (words, sentences) in enumerate(cases.items()):
        folder = tmp_path / str(n)
        folder.mkdir()
        given = arguments("pretrain_gpt", folder / "out", sources, *words.split())
        children = [_process(rank, "pretrain_gpt", given, folder) for rank in range(2)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        shown = [(folder / str(rank)).read_text() for rank in range(2)]
        assert statuses == [1, 1], shown
        for text, sentence in zip(shown, sentences):
            assert text.startswith(sentence) and len(text.splitlines()) == 1


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(json.JSONDecodeError):
        command_line.run(lambda argv: json.loads("{"))
    signal.signal(signal.SIGTERM, before)


def test_a_full_disk(tmp_path, sources, ends):
    """A limit on file sizes stands in for a full disk: both are errors of write()."""
    straight = run("pretrain_gpt", tmp_path / "straight", sources)[0]
    given = arguments("pretrain_gpt", tmp_path / "full", sources)
    size = (straight.folder.parent / "checkpoints/step-00000006.pt").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
    try:
        status, shown = ends("pretrain_gpt", given)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    path = tmp_path / "full/checkpoints/step-00000002.pt"
    assert status == 1
    assert f"{path} cannot be written: {os.strerror(errno.EFBIG)}" in shown
    assert "the same command goes on: python examples/pretrain_gpt.py --steps 6" in shown
    assert os.listdir(path.parent) == []
    assert run("pretrain_gpt", tmp_path / "full", sources)[0].losses == straight.losses


def test_whatever_a_library_makes_of_a_full_disk(tmp_path):
    path = tmp_path / "x"
    full = Path("/dev/full").open
    with pytest.raises(OSError, match="No space left"), files.writing(path), full("wb") as file:
        torch.save({"x": torch.ones(9)}, file)
    with pytest.raises(OSError, match="x cannot be written: No space"), files.writing(path):
        raise Exception("No space left")  # as tokenizers raises it
    with pytest.raises(KeyboardInterrupt), files.writing(path):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos")  # as torch.save's end does


# ---- one folder ---------------------------------------------------------------------------------


def test_two_runs_in_one_folder(tmp_path, sources, ends):
    given = arguments("pretrain_gpt", tmp_path, sources)
    reading, writing = os.pipe()
    waiting, ending = os.pipe()
    child = os.fork()
    if child == 0:  # another process, which uses the folder until it is told to end
        with files.own(tmp_path, fresh=False):
            os.write(writing, b"x")
            os.read(waiting, 1)
            os._exit(0)
    os.read(reading, 1)
    try:
        status, shown = ends("pretrain_gpt", given)
        assert status == 1 and len(shown.splitlines()) == 2
        assert f"{tmp_path} is in use by another run, process {child};" in shown
        assert os.listdir(tmp_path) == [".lock"]
    finally:
        os.write(ending, b"x")
        os.waitpid(child, 0)
    assert len(run("pretrain_gpt", tmp_path, sources)[0].losses) == 6
    assert (tmp_path / ".lock").read_text() == ""


def test_fresh_forgets_the_tokenizer_and_half_written_files(tmp_path, sources):
    def vocabulary() -> int:
        return json.loads((tmp_path / "model/config.json").read_text())["vocab_size"]

    size = "--vocabulary", "400"
    run("pretrain_gpt", tmp_path, sources, *size)
    assert vocabulary() == 400
    with pytest.raises(CheckpointError, match=r"vocabulary 300 \(was 400\); give its options "
                       r"\(--vocabulary 400\)"):  # fmt: skip
        run("pretrain_gpt", tmp_path, sources)
    half = tmp_path / "checkpoints/.step-00000008.pt.0123456789abcdef.tmp"
    half.write_text("")
    other = tmp_path / "checkpoints/.mine.tmp"
    other.write_text("")
    run("pretrain_gpt", tmp_path, sources, "--fresh")
    assert vocabulary() == 300
    assert other.exists() and not half.exists()
    for path in (tmp_path / "checkpoints").glob("step-*.pt"):  # also when nothing has started
        path.unlink()
    run("pretrain_gpt", tmp_path, sources, *size)
    assert vocabulary() == 400


def test_more_steps_of_a_finished_run(tmp_path, sources, capsys):
    first = run("pretrain_gpt", tmp_path, sources)[0].losses
    more = run("pretrain_gpt", tmp_path, sources, "--steps", "9")[0].losses
    assert more[:6] == first and len(more) == 9
    assert "step-00000006.pt, where a run of 6 steps ended" in capsys.readouterr().out
    (tmp_path / "checkpoints/step-00000009.pt").unlink()  # as if killed after step 8
    assert run("pretrain_gpt", tmp_path, sources, "--steps", "9")[0].losses == more
    with pytest.raises(CheckpointError, match=r"steps 6 \(was 9\)"):
        run("pretrain_gpt", tmp_path, sources)
    (tmp_path / "checkpoints/step-00000009.pt").unlink()
    with pytest.raises(CheckpointError, match=r"steps 12 \(was 9\)"):  # it is not finished
        run("pretrain_gpt", tmp_path, sources, "--steps", "12")


@pytest.mark.parametrize("name", SIZES)
def test_equal_runs_write_equal_files(name, tmp_path, sources):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        run(name, folder, sources)
    found = [
        {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in folders
    ]
    assert found[0].keys() == found[1].keys()
    different = {path for path, content in found[0].items() if found[1][path] != content}
    assert {Path(path).name for path in different} <= {"log.jsonl"}  # which has speeds

"""finetune_bert.py with transformers' Trainer: the options have the same meaning as without it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from example_runs import EXAMPLES, run, write_sources

sys.path.insert(0, str(EXAMPLES))

import with_trainer

from fastattn.models import CheckpointError


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A small folder of labelled texts, the same on every machine."""
    return write_sources(tmp_path_factory.mktemp("sources"))


def train(out: Path, sources: Path, *more: str):
    return run("finetune_bert", out, sources, "--trainer", "hf", *more)[0]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, sources):
    torch.set_num_threads(1)
    return train(tmp_path_factory.mktemp("straight"), sources)


def same_weights(*results) -> bool:
    a, b = (load_file(result.folder / "model.safetensors") for result in results)
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def test_a_kill_during_a_save_is_passed_over(tmp_path, sources, straight, monkeypatch, capsys):
    """Killed before Trainer wrote its state, the last file of a checkpoint. The run then continues
    from the checkpoint before, and on to more steps."""

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        save = with_trainer.ExactTrainer._save_rng_state

        def at_step_4(self, folder):
            save(self, folder)
            if self.state.global_step == 4:
                Path(folder, with_trainer.STATE).write_text('{"global_step": 4, "lo')
                raise Killed

        patch.setattr(with_trainer.ExactTrainer, "_save_rng_state", at_step_4)
        with pytest.raises(Killed):
            train(tmp_path, sources)
    again = train(tmp_path, sources)
    shown = capsys.readouterr().out
    assert "checkpoint-4 is not whole (" in shown and "going on from" in shown
    assert "trainer/checkpoint-2" in shown
    assert again.losses == straight.losses and same_weights(again, straight)
    finished = train(tmp_path, sources)
    assert finished.losses == straight.losses and finished.evaluation == straight.evaluation
    assert same_weights(finished, straight)
    with pytest.raises(CheckpointError, match=r"lr 0.1 \(was 0.0002\); give its options"):
        train(tmp_path, sources, "--lr", "0.1")
    more = train(tmp_path, sources, "--steps", "8").losses
    assert more[:6] == straight.losses and len(more) == 8


def test_the_options_of_the_plain_loop(tmp_path, sources, straight):
    """Evaluation changes nothing, a step has --batch rows however it is split, the log is the same,
    and --fresh starts over."""
    pytest.importorskip("tensorboard")
    shutil.copytree(straight.folder.parent / "trainer", tmp_path / "a/trainer")
    often = train(tmp_path / "a", sources, "--eval-every", "1", "--fresh", "--tensorboard")
    assert often.losses == straight.losses and same_weights(often, straight)
    assert list((tmp_path / "a/tensorboard").glob("events*"))
    lines = list(map(json.loads, (tmp_path / "a/log.jsonl").read_text().splitlines()))
    assert [line["step"] for line in lines if "eval" in line] == [1, 2, 3, 4, 5, 6]
    plain = run("finetune_bert", tmp_path / "b", sources, "--dropout", "0")[0]
    theirs = train(tmp_path / "c", sources, "--dropout", "0")
    parts = train(tmp_path / "d", sources, "--dropout", "0", "--accumulate", "2")
    assert parts.losses == pytest.approx(theirs.losses, rel=1e-5)
    # the same rows and schedule; only AdamW's second beta is Trainer's own
    assert theirs.losses[0] == pytest.approx(plain.losses[0], rel=1e-6)
    assert theirs.losses == pytest.approx(plain.losses, rel=0.01)
    rates = [[json.loads(x).get("lr") for x in (tmp_path / n / "log.jsonl").open()] for n in "bc"]
    assert rates[0] == rates[1]


def test_what_trainer_does_not_do(tmp_path, sources):
    with pytest.raises(ValueError, match="--parallel is fsdp; accepted with --trainer hf is ddp"):
        train(tmp_path, sources, "--parallel", "fsdp")
    with pytest.raises(ValueError, match="--batch is 4; it must be a multiple"):
        train(tmp_path, sources, "--accumulate", "3")

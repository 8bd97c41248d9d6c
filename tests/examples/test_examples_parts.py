"""The rows of a step, split into micro-batches and over processes, train the examples' models
equally."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytest.importorskip("tokenizers")
from example_runs import EXAMPLES, SIZES, run, write_sources

sys.path.insert(0, str(EXAMPLES))

import common
import pretrain_bert


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A small folder of Python files, the same on every machine."""
    return write_sources(tmp_path_factory.mktemp("sources"))


MORE = {  # no dropout, which draws for each part; a teacher whose maps differ from the student's
    "finetune_bert": ("--dropout", "0"),
    "distill": ("--teacher-steps", "30"),
}


def alike(losses):
    """Equal up to rounding, of the losses or of the teacher's maps, whose distances are 1e-3."""
    return pytest.approx(losses, rel=1e-5, abs=3e-7)


@pytest.mark.parametrize("name", SIZES)
def test_accumulation_changes_nothing(name, tmp_path, sources):
    """Rows have more or fewer masked words, and texts are long or short."""
    more = MORE.get(name, ())
    whole, _ = run(name, tmp_path / "whole", sources, *more)
    parts, _ = run(name, tmp_path / "parts", sources, *more, "--accumulate", "2")
    assert parts.losses == alike(whole.losses)


def _two(rank: int, names: list[str], out: Path, sources: Path) -> None:
    """One process of two that train these examples."""
    torch.set_num_threads(1)
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    dist.init_process_group("gloo", f"file://{out}/store", rank=rank, world_size=2)
    for name in names:
        run(name, out / name, sources, *MORE.get(name, ()), "--accumulate", "2")
    dist.destroy_process_group()


def test_two_processes_weigh_every_mean_alike(tmp_path, sources):
    """Rows with few and with many masked words, texts short and long: each target counts once."""
    names = ["pretrain_bert", "distill"]
    mp.spawn(_two, (names, tmp_path, sources), nprocs=2)
    for name in names:
        alone, _ = run(name, tmp_path / "alone" / name, sources, *MORE.get(name, ()))
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if "loss" in line]
        assert losses == alike(alone.losses)


def test_a_part_without_anything_to_guess_counts_for_nothing():
    """Rows with 0, 1, 2 and 12 masked words, in 1, 2 and 4 micro-batches: the same weights after a
    step."""
    tokenizer = SimpleNamespace(get_vocab_size=lambda: 30)
    options = pretrain_bert.BERTOptions(
        out="unused", batch=4, layers=1, dim=16, heads=2, length=12, clip=0.0
    )
    ids = torch.randint(5, 30, (4, 12))
    words = torch.arange(12) < torch.tensor([[0], [1], [2], [12]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones(4, 12, dtype=torch.bool),
        "token_type_ids": torch.zeros_like(ids),
        "labels": ids.masked_fill(~words, -100),
        "next_sentence_label": torch.tensor([0, 1, 1, 1]),
    }
    data = SimpleNamespace(tokenizer=tokenizer, fingerprint="", batch=lambda *_: batch)
    data.training = data.held_out = None
    found = []
    for parts in (1, 2, 4):
        task = pretrain_bert.build(options, data)
        want = task.model(**batch).loss.item()
        step = common.Stepper(task, replace(options, accumulate=parts)).step(30)
        assert step["loss"] == pytest.approx(want, rel=1e-5)
        found.append([step["grad_norm"], *task.model.parameters()])
    for other in found[1:]:
        assert other[0] == pytest.approx(found[0][0], rel=1e-5)
        for x, y in zip(other[1:], found[0][1:]):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_means_and_weights_of_different_names():
    task = common.Task(None, batch=None, loss=lambda *_: {"words": 1.0}, weight=lambda rows: 2)
    with pytest.raises(ValueError, match="loss has words and its weight loss; their names"):
        common.share_of_loss(task, None, {}, {})

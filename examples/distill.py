"""Distils a small classifier from a larger one: its outputs and its attention maps.

    python examples/distill.py                             # minutes on two cores

A teacher learns to tell docstrings from comments; then a student a fraction of its size learns from
the teacher alone, never from a label: its probabilities at a temperature (Hinton et al.,
arXiv:1503.02531) and the attention maps of its last layer (MiniLM, arXiv:2002.10957).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from command_line import COUNT, NONE_OR_MORE, POSITIVE, Options, Range, option, parse, run
from common import Batch, Result, Task, beside, device, run_folder, train
from corpus import (
    CLS,
    PAD,
    SEP,
    SPECIAL,
    Labelled,
    docstring_or_comment,
    fingerprint,
    pad,
    pick,
    read_labelled,
    run_tokenizer,
    scores,
)
from cost import Clock, Cost, report
from rich.console import Console
from torch import Tensor, nn

from fastattn.core.call import Call
from fastattn.distillation import attention_transfer_loss, relation
from fastattn.models import BERT


@dataclass
class DistillOptions(Options):
    out: str = option("runs/distill", "folder of this run: checkpoints, log, model", free=True)
    data: str = option("", ".csv or .jsonl with text and label; none: docstring or comment")
    examples: int = option(4000, "labelled texts to take; 0: all", NONE_OR_MORE)
    steps: int = option(300, "optimizer steps of the student", COUNT)
    teacher_steps: int = option(200, "optimizer steps of the teacher", COUNT)
    teacher: str = option("", "folder of a trained teacher, as this example leaves it")
    batch: int = option(32, "texts of a step, over all processes and accumulation", COUNT)
    length: int = option(48, "tokens of a text, at most", Range(least=3))
    layers: int = option(2, "the student's blocks; the teacher has twice as many", COUNT)
    dim: int = option(64, "the student's vectors; the teacher's are twice as long", COUNT)
    heads: int = option(4, "attention heads of both, whose maps are compared one by one", COUNT)
    temperature: float = option(2.0, "the outputs' temperature", POSITIVE)
    maps: float = option(1.0, "weight of the attention maps beside the outputs", NONE_OR_MORE)


class Data:
    """Texts as token lists, and the tokenizer that made them."""

    def __init__(self, options: DistillOptions) -> None:
        pairs = read_labelled(Path(options.data)) if options.data else docstring_or_comment(6.0)
        self.texts = Labelled.split(pairs, options.seed, options.examples)
        texts = [text for text, _ in self.texts.train]
        tokenizer = run_tokenizer(options.out, texts, 2048, SPECIAL, lower=True)
        self.vocabulary = tokenizer.get_vocab_size()
        self.train, self.test = (
            [
                ([CLS, *encoded.ids[: options.length - 2], SEP], label)
                for encoded, (_, label) in zip(tokenizer.encode_batch([t for t, _ in rows]), rows)
            ]
            for rows in (self.texts.train, self.texts.test)
        )
        self.fingerprint = fingerprint(pairs)

    @staticmethod
    def batch(rows: list[tuple[list[int], int]]) -> Batch:
        ids = pad([ids for ids, _ in rows])
        labels = torch.tensor([label for _, label in rows])
        return {"input_ids": ids, "attention_mask": ids != PAD, "labels": labels}


class LastLayer:
    """Keeps the queries and keys of a BERT's last layer, call after call; the call itself goes on
    as it was. The loss needs no more: it never makes the S x S attention weights."""

    def __init__(self, model: BERT) -> None:
        self.layer = model.blocks[-1].attn
        self.attend, self.layer.attend = self.layer.attend, self
        self.q = self.k = self.kv_lens = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        self.q, self.k, self.kv_lens = q, k, options["kv_lens"]
        return self.attend(q, k, v, **options)

    def relation(self) -> Call:
        return relation(self.q, self.k, kv_lens=self.kv_lens)


def bert(options: DistillOptions, data: Data, size: int) -> BERT:
    """`size` times the size of the student."""
    torch.manual_seed(options.seed + size)
    return BERT(
        vocab_size=data.vocabulary, max_len=options.length, dim=options.dim * size,
        heads=options.heads, layers=options.layers * size, head="classification",
        num_labels=len(data.texts.names), attention=options.attention,
    )  # fmt: skip


def classifier(model: nn.Module, options: DistillOptions, data: Data) -> Task:
    """Learning from labels."""

    def batch(step: int) -> Batch:
        rows = pick(len(data.train), step, options.batch, options.seed).tolist()
        return data.batch([data.train[i] for i in rows])

    def evaluate(model) -> dict[str, float]:
        guesses, labels = [], []
        for i in range(0, len(data.test), 64):
            inputs = beside(model, data.batch(data.test[i : i + 64]))
            labels.append(inputs.pop("labels"))
            guesses.append(model(**inputs).logits.argmax(-1))
        return scores(torch.cat(guesses), torch.cat(labels), len(data.texts.names))

    return Task(model, batch=batch, evaluate=evaluate, data=data.fingerprint)


def build(options: DistillOptions, data: Data, folder: Path) -> Task:
    """Learning from the teacher in `folder`."""
    teacher = BERT.from_pretrained(folder, attention=options.attention)
    teacher.to(device()).requires_grad_(False)
    student = bert(options, data, 1)
    for name in ("heads", "num_labels", "vocab_size"):  # what their outputs and maps have in common
        has, wanted = (getattr(model.config, name) for model in (teacher, student))
        if has != wanted:
            raise ValueError(f"--teacher has {name} {has} and the student {wanted}; accepted is a "
                             "teacher with as many heads, of the same data")  # fmt: skip
    theirs, ours = LastLayer(teacher), LastLayer(student)
    hot = options.temperature

    def loss(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        with torch.no_grad():
            wanted = (teacher(**inputs).logits / hot).log_softmax(-1)
        found = (model(**inputs).logits / hot).log_softmax(-1)
        outputs = F.kl_div(found, wanted, reduction="batchmean", log_target=True) * hot**2
        maps = attention_transfer_loss(
            theirs.relation(), ours.relation(), rows=batch["attention_mask"]
        )
        return {"texts": outputs, "maps": options.maps * maps}

    def weight(batch: Batch) -> dict[str, float]:
        return {"texts": len(batch["input_ids"]), "maps": int(batch["attention_mask"].sum())}

    def time_attention(model: nn.Module, clock: Clock) -> None:  # the maps are no part of it
        clock.watch(model)
        ours.layer.attend, ours.attend = ours, clock.timed(ours.attend)

    task = classifier(student, options, data)
    task.loss, task.weight, task.time_attention = loss, weight, time_attention
    return task


def main(argv: list[str] | None = None) -> tuple[Result, Cost | None]:
    options = parse(DistillOptions, __doc__, argv)
    with run_folder(options):
        return _main(options, Console(highlight=False))


def _main(options: DistillOptions, console: Console) -> tuple[Result, Cost | None]:
    data = Data(options)
    folder = Path(options.teacher)
    if not options.teacher:
        own = replace(options, out=f"{options.out}/teacher", steps=options.teacher_steps)
        learned = train(classifier(bert(own, data, 2), own, data), own)
        folder = learned.folder
    task = build(options, data, folder)
    result = train(task, options)
    if result.losses:
        for name, where in {"teacher": folder, "student": result.folder}.items():
            model = BERT.from_pretrained(where)  # whole: FSDP has left the task's in pieces
            with torch.no_grad():
                found = task.evaluate(model)
            shown = "  ".join(f"{key} {x:.3f}" for key, x in found.items())
            console.print(f"{name}: {model.num_parameters():,} parameters  {shown}")
    return result, report(lambda changed: build(changed, data, folder), options, console)


if __name__ == "__main__":
    run(main)

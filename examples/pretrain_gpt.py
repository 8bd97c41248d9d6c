"""Pretrains a GPT on code: Python's standard library, or any folder.

    python examples/pretrain_gpt.py                        # minutes on two cores
    python examples/pretrain_gpt.py --data src --steps 2000 --bf16
    torchrun --nproc-per-node 2 examples/pretrain_gpt.py --parallel fsdp

A byte-pair tokenizer is trained on the spot. Files of any length are packed into rows without
padding, and document_ids keep each file to itself. Killed? The same command goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from command_line import COUNT, NONE_OR_MORE, POSITIVE, SHARE, Options, Range, option, parse, run
from common import Batch, Result, Task, beside, run_folder, train
from corpus import Packed, fingerprint, read_folder, run_tokenizer
from cost import Cost, report
from rich.console import Console

from fastattn.models import GPT
from fastattn.signals import AttentionSignals, qk_clip

END = 0  # the token after each document, <|end|>


@dataclass
class GPTOptions(Options):
    out: str = option("runs/gpt", "folder of this run: checkpoints, log, model", free=True)
    lr: float = option(2e-3, "highest learning rate, reached after --warmup", POSITIVE)
    data: str = option("", "folder of text to learn; none: Python's standard library")
    megabytes: float = option(2.0, "how much of it", POSITIVE)
    vocabulary: int = option(2048, "tokens", COUNT)
    length: int = option(256, "tokens of a row", Range(least=2))
    layers: int = option(4, "transformer blocks", COUNT)
    dim: int = option(128, "size of a token's vector", COUNT)
    heads: int = option(4, "attention heads", COUNT)
    kv_heads: int = option(2, "heads of keys and values", COUNT)
    dropout: float = option(0.0, "dropout", SHARE)
    signals: int = option(0, "steps between logs of attention's statistics; 0: none", NONE_OR_MORE)
    qk_clip: float = option(
        0.0, "bound on attention's logits at these steps; 0: none", NONE_OR_MORE
    )
    prompt: str = option("def ", "what the sample at the end begins with", free=True)
    sample: int = option(64, "tokens of the sample; 0: none", NONE_OR_MORE, free=True)


class Data:
    """The tokenizer and the packed rows, a tenth of the documents kept for evaluation."""

    def __init__(self, options: GPTOptions) -> None:
        texts = read_folder(options.data, options.megabytes)
        self.tokenizer = run_tokenizer(options.out, texts, options.vocabulary, ["<|end|>"])
        documents = [torch.tensor([*e.ids, END]) for e in self.tokenizer.encode_batch(texts)]
        held_out = max(1, len(documents) // 10)
        if len(documents) == 1:
            half = len(documents[0]) // 2
            documents = [documents[0][:half], documents[0][half:]]
        self.rows = Packed(documents[held_out:], options.length, options.seed)
        self.held_out = Packed(documents[:held_out], options.length, options.seed)
        self.fingerprint = fingerprint(texts)
        self.prompt = self.tokenizer.encode(options.prompt).ids or [END]
        if options.sample and len(self.prompt) >= options.length:
            raise ValueError(f"--prompt has {len(self.prompt)} tokens; accepted are fewer than "
                             f"--length {options.length}, so that one can follow")  # fmt: skip


def predicted(batch: Batch) -> int:
    """Tokens that the loss is a mean over: all but the first of each document in a row."""
    ids = batch["document_ids"]
    return int((ids[:, 1:] == ids[:, :-1]).sum())


def flops(model: GPT, batch: Batch) -> float:
    """Of forward and backward: 6 for each weight of a matrix and token, and 12 * dim for each
    visible pair of tokens and layer (PaLM, arXiv:2204.02311, appendix B, with exact pairs)."""
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    ids = batch["document_ids"]
    pairs = 0
    for row in ids:
        lengths = row.unique_consecutive(return_counts=True)[1]
        pairs += int((lengths * (lengths + 1) // 2).sum())
    return 6 * matrices * ids.numel() + 12 * model.config.dim * model.config.layers * pairs


def build(options: GPTOptions, data: Data) -> Task:
    torch.manual_seed(options.seed)
    model = GPT(
        vocab_size=data.tokenizer.get_vocab_size(), max_len=options.length, dim=options.dim,
        heads=options.heads, kv_heads=options.kv_heads, layers=options.layers,
        dropout=options.dropout, attention=options.attention, eos_token_id=END,
    )  # fmt: skip

    def evaluate(model) -> dict[str, float]:
        batches = range(min(4, -(-data.held_out.rows // options.batch)))
        total = weight = 0.0
        for index in batches:
            rows = min(options.batch, data.held_out.rows)
            batch = beside(model, data.held_out.batch(index, rows))
            part = predicted(batch)
            total += model(**batch, skip_logits=True).loss.item() * part
            weight += part
        return {"eval_loss": total / weight}

    task = Task(
        model,
        batch=lambda step: data.rows.batch(step, options.batch),
        loss=lambda model, batch: model(**batch, skip_logits=True).loss,
        weight=predicted,
        evaluate=evaluate,
        flops=lambda batch: flops(model, batch),
        data=data.fingerprint,
    )
    if options.signals:
        watch_attention(task, options)
    return task


def watch_attention(task: Task, options: GPTOptions) -> None:
    """Logits, entropy and mass on the first token of each layer go into the log, with warnings, and
    QK-clip bounds the logits (docs/training_signals.md)."""
    for name, x in (("compile", options.compile), ("parallel", options.parallel == "fsdp"),
                    ("attention", options.attention != "fastattn")):  # fmt: skip
        if x:
            raise ValueError(f"--signals is {options.signals} and --{name} "
                             f"{getattr(options, name)}; accepted with it is 0")  # fmt: skip
    signals = AttentionSignals(task.model, every=options.signals)

    def before_step(step: int) -> None:
        signals.step = step  # also of a run that goes on from a checkpoint

    def after_step() -> dict[str, float]:
        if not signals.max_logits:
            return {}
        if options.qk_clip:
            qk_clip(task.model, signals.max_logits, options.qk_clip)
        return signals.last

    task.before_step, task.after_step = before_step, after_step


def write(folder: Path, data: Data, options: GPTOptions) -> str:
    """How the trained model continues the prompt."""
    model = GPT.from_pretrained(folder)
    ids = torch.tensor([data.prompt])
    room = min(options.sample, options.length - ids.shape[1])
    generator = torch.Generator().manual_seed(options.seed)
    new = model.generate(ids, room, temperature=0.8, top_k=50, top_p=0.95, generator=generator)
    return data.tokenizer.decode(new[0].tolist())


def main(argv: list[str] | None = None) -> tuple[Result, Cost | None]:
    options = parse(GPTOptions, __doc__, argv)
    console = Console(highlight=False)
    with run_folder(options):
        data = Data(options)
        result = train(build(options, data), options)
        if options.sample and result.losses:
            console.print(write(result.folder, data, options), markup=False)
        return result, report(
            lambda changed: build(replace(changed, signals=0), data), options, console
        )


if __name__ == "__main__":
    run(main)

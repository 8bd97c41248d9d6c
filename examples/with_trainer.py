"""transformers' Trainer in place of the loop in common.py: it has the same options, log and
lock, and also continues exactly from its last complete checkpoint."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from command_line import Options
from common import (
    Result,
    Task,
    first_process_first,
    identity,
    learning_rate,
    processes,
    rows_of_a_pass,
)
from corpus import pick, scores
from files import Log, check_identity, writing
from rich.console import Console
from safetensors import safe_open
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from fastattn.core.files import replace_file

STATE = "trainer_state.json"  # Trainer writes it last


class Checkpoints:
    """out/trainer/checkpoint-N, which Trainer writes, and run.json, which says whose they are."""

    def __init__(self, folder: Path, asked: dict[str, Any]) -> None:
        self.folder, self.identity, self.note = folder, asked, folder / "run.json"

    def latest(self, say: Callable[[str], None]) -> tuple[int, Path | None]:
        """(step, path) of the newest that is whole; what is not is said. (0, None): there is none.

        Raises CheckpointError where it is another run's.
        """
        paths = [p for p in self.folder.glob("checkpoint-*") if p.name[11:].isdecimal()]
        for path in sorted(paths, key=lambda path: int(path.name[11:]), reverse=True):
            step, problem = int(path.name[11:]), self._problem(path)
            if problem:
                say(f"{path} is not whole ({problem}); it is passed over")
                continue
            saved = json.loads(self.note.read_text()) if self.note.exists() else {}
            check_identity(path, self.identity, saved, step == saved.get("steps"))
            return step, path
        return 0, None

    def begin(self) -> None:
        """Records which run the checkpoints from here on belong to."""
        text = json.dumps(self.identity, indent=2, sort_keys=True) + "\n"
        with writing(self.note):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.note, lambda path: path.write_text(text))

    @staticmethod
    def _problem(path: Path) -> str:
        """What is wrong with a checkpoint whose writing may have been interrupted, or ""."""
        try:
            if json.loads((path / STATE).read_text())["global_step"] != int(path.name[11:]):
                return f"{STATE} is of another step"
            for file in (*path.glob("*.pt"), *path.glob("*.pth")):
                with zipfile.ZipFile(file) as archive:
                    if archive.testzip() is not None:
                        return f"{file.name} does not match its checksum"
            with safe_open(path / "model.safetensors", "pt"):
                return ""
        except Exception as error:  # whatever a broken file makes of its readers
            return str(error)


class ExactTrainer(Trainer):
    """A Trainer whose training depends on nothing but its options.

    Rows come in the order that they are given in; evaluations take none of training's random
    numbers; a step's loss is the mean over its parts, which Trainer adds up where a model takes any
    keyword, as BERT does; and no process still writes when the first ends a checkpoint with STATE.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)  # Report prints

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng():
            return super().evaluate(*args, **kwargs)

    def _save_rng_state(self, folder: str) -> None:
        super()._save_rng_state(folder)
        if processes() > 1:
            dist.barrier()

    def _save_checkpoint(self, *args: Any) -> None:
        with writing(Path(self.args.output_dir)):
            super()._save_checkpoint(*args)


class Report(TrainerCallback):
    """Sets the learning rate, writes out/log.jsonl and prints, like the loop in common.py. Stops
    the run at a loss that is not a number, before Trainer saves the result."""

    def __init__(self, log: Log | None, options: Options, say: Callable[[str], None]) -> None:
        self.log, self.options, self.say = log, options, say
        self.evaluation: dict[str, float] = {}

    def on_step_begin(self, arguments, state, control, optimizer, **_: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.global_step, self.options)

    def on_log(self, arguments, state, control, logs: dict[str, float], **_: Any) -> None:
        step = state.global_step
        if "loss" in logs:
            values = {"loss": logs["loss"], "grad_norm": logs.get("grad_norm", 0.0)}
            values["lr"] = learning_rate(step - 1, self.options)
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(
                    f"the loss is {values['loss']} at step {step}; the last checkpoint is "
                    "untouched; try a lower --lr with another --out or --fresh"
                )
            if self.log is not None:
                self.log.write(step, values)
            if step % self.options.log_every == 0 or step == self.options.steps:
                self.say(f"step {step}/{self.options.steps}  loss {values['loss']:.4f}")

    def on_evaluate(self, arguments, state, control, metrics: dict[str, float], **_: Any) -> None:
        self.evaluation = evaluation(metrics)
        if self.log is not None:
            self.log.write(state.global_step, {"eval": self.evaluation})
        shown = "  ".join(f"{name} {x:.4g}" for name, x in self.evaluation.items())
        self.say(f"step {state.global_step}: {shown}")


def evaluation(metrics: dict[str, float]) -> dict[str, float]:
    """Adds the task's results to Trainer's."""
    return {name: metrics[f"eval_{name}"] for name in ("accuracy", "f1")}


def train_with_trainer(task: Task, options: Options, data: Any) -> Result:
    """Trains the task's model as common.train() would, and raises what that raises.

    data: with train and test, lists of rows; collate(rows), the batch of some; and texts.names, the
    names of the labels.
    """
    if options.parallel == "fsdp":
        raise ValueError(
            "--parallel is fsdp; accepted with --trainer hf is ddp: --trainer plain shards weights"
        )
    rows = rows_of_a_pass(options)
    out = Path(options.out)
    chief = os.environ.get("RANK", "0") == "0"
    say = partial(Console(quiet=not chief, highlight=False, soft_wrap=True).print, markup=False)
    checkpoints = Checkpoints(out / "trainer", identity(options, task.data))
    with first_process_first() as first:
        done, path = checkpoints.latest(say)
        if first:
            checkpoints.begin()
    if path is not None:
        say(f"going on from {path}")
    set_seed(options.seed)

    def metrics(found) -> dict[str, float]:
        logits, labels = map(torch.as_tensor, found)
        return scores(logits.argmax(-1), labels, len(data.texts.names))

    arguments = TrainingArguments(
        output_dir=str(checkpoints.folder), max_steps=options.steps, seed=options.seed,
        gradient_accumulation_steps=options.accumulate, learning_rate=options.lr,
        lr_scheduler_type="constant", weight_decay=options.weight_decay, bf16=options.bf16,
        max_grad_norm=options.clip, logging_steps=1, logging_nan_inf_filter=False,
        save_steps=options.save_every, save_total_limit=2, eval_strategy="steps",
        eval_steps=options.eval_every, per_device_eval_batch_size=64, report_to=[],
        torch_compile_backend=options.compile or None, disable_tqdm=True, log_level="error",
        use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False,
        ddp_backend="gloo" if processes() > 1 and not torch.cuda.is_available() else None,
    )  # fmt: skip
    # without torchrun, Trainer cuts a batch over all GPUs of the machine
    arguments.per_device_train_batch_size = rows // max(1, arguments.n_gpu)
    order = pick(len(data.train), 0, options.steps * options.batch, options.seed).tolist()
    report = Report(Log(out / "log.jsonl", done, options.tensorboard) if chief else None,
                    options, say)  # fmt: skip
    trainer = ExactTrainer(
        task.model, arguments, data_collator=data.collate, compute_metrics=metrics,
        train_dataset=[data.train[i] for i in order], eval_dataset=data.test, callbacks=[report],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if path is None else str(path))
    if not report.evaluation:  # a finished run: nothing is new to its log
        trainer.remove_callback(report)
        report.evaluation = evaluation(trainer.evaluate())
    if chief:
        with writing(out / "model"):
            trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out / "model")
    if processes() > 1:
        dist.barrier()
    return Result(report.log.losses() if chief else [], report.evaluation, out / "model")

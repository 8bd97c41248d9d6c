"""What the training examples share: a task, one step of it, the loop.

An example brings a Task: a model, `batch(step)` and how to evaluate. Everything random in step n
(its batch, its dropout) is a function of (seed, n, rank), so a run that was killed goes on from its
last checkpoint exactly as if nothing had happened: run the same command again. One process needs
nothing else; several come from `torchrun --nproc-per-node N examples/x.py --parallel ddp` (or
fsdp), and read and write the same checkpoints.
"""

from __future__ import annotations

import atexit
import math
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from command_line import Options, mistaken
from cost import Clock
from fastattn.benchmarks.measure.devices import peak_flops
from files import Checkpoints, Log, own, writing
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from fastattn.models.checkpoint import CheckpointError, match

Batch = dict[str, Tensor]

# ---- a task, and one step of it ----------------------------------------------------------------


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).loss


def rows(batch: Batch) -> int:
    """How many rows a batch has."""
    return len(next(iter(batch.values())))


@dataclass
class Task:
    """What an example brings.

    batch(step) gives all rows of a step, over all processes: a pure function of the step. Every
    tensor in it has the rows first. loss(model, rows) is a mean over weight(rows) things; or
    several means by name, which are added, and weight(rows) says of each over how many things it
    is. So a step's means are over all its rows, however it is cut into parts and processes.
    evaluate(model) gives numbers to log; its batches it moves itself, with beside().
    """

    model: nn.Module
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor | dict[str, Tensor]] = _loss
    weight: Callable[[Batch], float | dict[str, float]] = rows
    tokens: Callable[[Batch], int] = lambda batch: batch["input_ids"].numel()
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None
    flops: Callable[[Batch], float] | None = None  # of a step, forward and backward: for MFU
    data: str = ""  # a fingerprint: a checkpoint made with other data is refused
    time_attention: Callable[[nn.Module, Clock], None] = lambda model, clock: clock.watch(model)
    before_step: Callable[[int], object] = lambda step: None
    after_step: Callable[[], dict[str, float]] = dict  # after the optimizer's; numbers to log


def share_of_loss(task: Task, model: nn.Module, piece: Batch, whole: Batch) -> Tensor:
    """The weight of some rows' loss in a step: each mean is weighted by its share of the
    targets, so that the parts add up to the means over all targets of the step."""
    means, counts, totals = (
        x if isinstance(x, dict) else {"loss": x}
        for x in (task.loss(model, piece), task.weight(piece), task.weight(whole))
    )
    if means.keys() != counts.keys():
        raise ValueError(f"the task's loss has {', '.join(means)} and its weight "
                         f"{', '.join(counts)}; their names must be the same")  # fmt: skip
    return sum(mean * (counts[name] / max(1, totals[name])) for name, mean in means.items())


def learning_rate(step: int, options: Options) -> float:
    """Linear warm-up, then a cosine to a tenth of the peak at the last step."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = (step - options.warmup) / max(1, options.steps - options.warmup)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))


def processes() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rows_of_a_pass(options: Options) -> int:
    """How many rows a process takes at once. Raises ValueError unless all parts are equally
    large."""
    if options.batch % (processes() * options.accumulate):
        raise ValueError(
            f"--batch is {options.batch}; it must be a multiple of processes x --accumulate = "
            f"{processes()} x {options.accumulate}"
        )
    return options.batch // (processes() * options.accumulate)


def device() -> torch.device:
    """This process's device: its own GPU if the machine has any, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    here, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if here >= count:
        raise ValueError(f"--nproc-per-node is {os.environ['LOCAL_WORLD_SIZE']}; accepted is at "
                         f"most {count}, a process for each GPU of the machine")  # fmt: skip
    return torch.device("cuda", here)


def beside(model: nn.Module, batch: Batch) -> Batch:
    """The batch on the model's device."""
    place = next(model.parameters()).device
    return {name: x.to(place) for name, x in batch.items()}


def _world() -> tuple[int, int]:
    """(rank, processes) of torchrun's group, joined at the first call; (0, 1) without torchrun."""
    if processes() == 1:
        return 0, 1
    if not dist.is_initialized():
        place = device()
        if place.type == "cuda":
            torch.cuda.set_device(place)  # where barriers wait and peaks are measured
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


@contextmanager
def run_folder(options: Options):
    """Locks options.out for this run, see files.own; of several processes the first holds the
    lock."""
    with own(Path(options.out), options.fresh) if _world()[0] == 0 else nullcontext():
        yield


@contextmanager
def first_process_first():
    """Rank 0 runs the block alone, since it may write files; then the other ranks run it."""
    rank, world = _world()
    if rank > 0:
        dist.barrier()
    yield rank == 0
    if world > 1 and rank == 0:
        dist.barrier()


class Stepper:
    """The model, wrapped as the options say, its optimizer, and one step of training."""

    def __init__(self, task: Task, options: Options) -> None:
        if mistake := mistaken(options):
            raise ValueError(mistake)
        self.task, self.options = task, options
        self.rank, self.world = _world()
        rows_of_a_pass(options)
        self.device = device()
        self.bare = self.model = task.model.to(self.device)
        if options.compile:
            self.bare.compile(backend=options.compile)
        if self.world > 1:
            self.model = self._shard() if options.parallel == "fsdp" else self._replicate()
        groups = [
            {"params": [p for p in self.model.parameters() if p.dim() > 1]},
            {"params": [p for p in self.model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, lr=options.lr, betas=(0.9, 0.95), weight_decay=options.weight_decay
        )

    def _replicate(self) -> nn.Module:
        return nn.parallel.DistributedDataParallel(self.model)

    def _shard(self) -> nn.Module:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in list(self.model.modules()):  # every layer of every stack is gathered apart
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    fully_shard(layer, mesh=mesh)
        model = fully_shard(self.model, mesh=mesh)
        if hasattr(model, "generate"):  # it too needs the weights whole
            register_fsdp_forward_method(model, "generate")
        return model

    @contextmanager
    def _synchronised(self, last: bool):
        """Synchronises gradients between processes only in the last micro-batch of a step."""
        if self.world > 1 and self.options.parallel == "fsdp":
            self.model.set_requires_gradient_sync(last)
        elif self.world > 1 and not last:
            with self.model.no_sync():
                yield
            return
        yield

    def step(self, index: int) -> dict[str, float]:
        """Trains on step `index`; its loss over all processes, gradient norm and learning rate."""
        options, task = self.options, self.task
        self.model.train()
        torch.manual_seed((options.seed * 1_000_003 + index) * 1009 + self.rank)
        lr = learning_rate(index, options)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        task.before_step(index)
        whole = beside(self.bare, task.batch(index))
        share = self.world * options.accumulate
        loss = torch.zeros((), device=self.device)
        for part in range(options.accumulate):
            first = self.rank * options.accumulate + part
            piece = {name: x[first::share] for name, x in whole.items()}
            with self._synchronised(part == options.accumulate - 1):
                with self._autocast():
                    part_loss = share_of_loss(task, self.model, piece, whole)
                (part_loss * self.world).backward()  # gradients are averaged over the processes
            loss += part_loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), options.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.world > 1:
            dist.all_reduce(loss)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        values = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr, **task.after_step()}
        values["tokens"] = task.tokens(whole)
        values["flops"] = task.flops(whole) if task.flops else 0.0
        return values

    def _autocast(self):
        return (
            torch.autocast(self.device.type, torch.bfloat16) if self.options.bf16 else nullcontext()
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """The results of the task's evaluate(), in eval mode."""
        self.model.eval()
        with self._autocast():
            return self.task.evaluate(self.model) if self.task.evaluate else {}

    # ---- its state, the same whatever the number of processes -----------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint contains besides the step: whole tensors on the CPU (rank 0 saves
        them)."""
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        model, optimizer = get_state_dict(self.model, self.optimizer, options=whole)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any], what: str) -> None:
        """Takes state()'s result, after checking that it fits."""
        match(self.bare.state_dict(), state["model"], what)
        self._check_optimizer(state["optimizer"], what)
        whole = StateDictOptions(full_state_dict=True)
        try:
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=whole,
            )
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise CheckpointError(f"{what} has no state of this optimizer: {error}") from error

    def _check_optimizer(self, saved: dict[str, Any], what: str) -> None:
        """Checks that every parameter has a state: torch would accept a missing one and restart
        it."""
        names = {name for name, p in self.bare.named_parameters() if p.requires_grad}
        try:
            grouped = {name for group in saved["param_groups"] for name in group["params"]}
            good = grouped == set(saved["state"]) == names
        except (LookupError, TypeError):
            good = False
        if not good:
            raise CheckpointError(f"{what} has no state of this model's optimizer")


# ---- the loop ---------------------------------------------------------------------------------


@dataclass
class Result:
    """The result of train()."""

    losses: list[float]  # of every step, those before a resumption included; rank 0 only
    evaluation: dict[str, float]
    folder: Path  # out/model, for from_pretrained


def identity(options: Options, data: str) -> dict[str, Any]:
    """What the results of a run depend on; data: the fingerprint of its data."""
    chosen = {f.name: getattr(options, f.name) for f in fields(options) if not f.metadata["free"]}
    return chosen | {"data": data}


def train(task: Task, options: Options) -> Result:
    """Trains from the last checkpoint in options.out to options.steps and saves out/model.

    A finished run goes on to a larger options.steps, from there on along that number's schedule.

    Raises CheckpointError where the folder holds another run's checkpoints or none that can be
    read, OSError where it cannot be written or another process trains in it, and FloatingPointError
    at a loss that is not a number; none touches a checkpoint.
    """
    stepper = Stepper(task, options)
    with run_folder(options):
        return _train(stepper, task, options)


def _train(stepper: Stepper, task: Task, options: Options) -> Result:
    out, chief = Path(options.out), stepper.rank == 0
    console = Console(quiet=not chief, highlight=False, soft_wrap=True)
    say = partial(console.print, markup=False)
    checkpoints = Checkpoints(out / "checkpoints", identity(options, task.data))
    with first_process_first():
        found = checkpoints.latest(say)
    done = 0
    if found is not None:
        content, path = found
        stepper.load(content, path)
        done = content["step"]
        steps = content["identity"]["steps"]
        longer = f", where a run of {steps} steps ended" if steps < options.steps else ""
        say(f"going on from {path}{longer}")
    del found
    log = Log(out / "log.jsonl", done, options.tensorboard) if chief else None
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    peak = 0.0  # FLOP/s, the best seen in any of its measurements
    evaluation: dict[str, float] = {}
    with _Display(console, options, done) as display:
        for step in range(done + 1, options.steps + 1):
            if task.flops and chief and (not peak or step % options.eval_every == 1):
                peak = max(peak, stepper.world * peak_flops(dtype))
            began = time.perf_counter()
            values = stepper.step(step - 1)
            seconds = time.perf_counter() - began
            if not math.isfinite(values["loss"]):
                last = checkpoints.paths()[-1:] or ["none"]
                raise FloatingPointError(
                    f"the loss is {values['loss']} at step {step}; the last checkpoint, {last[0]}, "
                    "is untouched; try a lower --lr with another --out or --fresh"
                )
            values["tokens_per_second"] = values.pop("tokens") / seconds
            flops = values.pop("flops")
            values |= {"mfu": flops / seconds / peak} if peak else {}
            if chief:
                log.write(step, values)
            display.step(step, values)
            if step % options.eval_every == 0 or step == options.steps:
                evaluation = stepper.evaluate()
                if chief and evaluation:
                    log.write(step, {"eval": evaluation})
                    say(f"step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in evaluation.items()))
            if step % options.save_every == 0 or step == options.steps:
                state = stepper.state()
                if chief:
                    checkpoints.save(step, state)
                del state
    state = stepper.state()
    if chief:
        with writing(out / "model"):
            task.model.save_pretrained(out / "model", state_dict=state["model"])
    if stepper.world > 1:
        dist.barrier()
    evaluation = evaluation or stepper.evaluate()
    return Result(log.losses() if chief else [], evaluation, out / "model")


class _Display:
    """A progress bar on a terminal, otherwise a line now and then."""

    def __init__(self, console: Console, options: Options, done: int) -> None:
        self.console, self.every, self.steps = console, options.log_every, options.steps
        self.recent: deque[dict[str, float]] = deque(maxlen=options.log_every)
        columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")]
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console)
        self.bar.disable = console.quiet or not console.is_terminal
        self.row = self.bar.add_task("", total=options.steps, completed=done)

    def __enter__(self) -> _Display:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def step(self, step: int, values: dict[str, float]) -> None:
        self.recent.append(values)
        speed = median(v["tokens_per_second"] for v in self.recent)
        text = f"loss {values['loss']:.4f}  {speed:,.0f} tokens/s"
        if "mfu" in values:
            text += f"  MFU {median(v['mfu'] for v in self.recent):.0%}"
        self.bar.update(self.row, completed=step, description=text)
        if self.bar.disable and (step % self.every == 0 or step == self.steps):
            self.console.print(f"step {step}/{self.steps}  {text}")

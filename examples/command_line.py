"""An example's command line: options with what they accept, and how a run ends.

A user's mistake, a full disk, Ctrl-C and SIGTERM end in a sentence and, where the run can go on, in
the command that does it; of several processes, those that another's end takes along say just that.
Anything else is a fault of the example and keeps its traceback; python -X dev shows one for every
ending.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import sys
import traceback
from argparse import ArgumentParser, BooleanOptionalAction, RawDescriptionHelpFormatter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
import torch.distributed as dist

import fastattn

# ---- options: a dataclass is the command line --------------------------------------------------


@dataclass(frozen=True)
class Range:
    """The numbers that an option accepts. No range includes infinity or nan."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf  # accepted are larger ones
    below: float = math.inf  # accepted are smaller ones

    def __contains__(self, x: float) -> bool:
        finite = -math.inf < x < math.inf  # of an integer of any size
        return finite and self.least <= x <= self.most and self.above < x < self.below

    def __str__(self) -> str:
        words = {"above": self.above, "below": self.below}
        found = [f"{word} {x:g}" for word, x in words.items() if math.isfinite(x)]
        if math.isfinite(self.least) and math.isfinite(self.most):
            found.insert(0, f"{self.least:.10g} to {self.most:.10g}")
        elif math.isfinite(self.least):
            found.insert(0, f"{self.least:g} or more")
        return " and ".join(found)


COUNT = Range(least=1)
NONE_OR_MORE = Range(least=0)
POSITIVE = Range(above=0)
SHARE = Range(least=0, below=1)


def option(
    default: Any, text: str, accepts: Range | tuple[str, ...] = (), *, free: bool = False
) -> Any:
    """A field of Options. accepts: a number's range, or a word's choices.

    free: a resumed run may change it, because no number depends on it.
    """
    return field(default=default, metadata={"help": text, "free": free, "accepts": accepts})


@dataclass
class Options:
    """The options that all examples share; each example adds its own."""

    out: str = option("", "folder of this run: checkpoints, log, model", free=True)
    fresh: bool = option(False, "delete what a run left in --out and start over", free=True)
    steps: int = option(200, "optimizer steps", COUNT)
    batch: int = option(16, "rows of a step, over all processes and accumulation", COUNT)
    accumulate: int = option(1, "forward passes that a step's rows are cut into", COUNT)
    lr: float = option(1e-3, "highest learning rate, reached after --warmup", POSITIVE)
    warmup: int = option(20, "steps of linear warm-up; a cosine to a tenth follows", NONE_OR_MORE)
    weight_decay: float = option(0.1, "AdamW's, on matrices only", NONE_OR_MORE)
    clip: float = option(1.0, "largest gradient norm; 0 does not clip", NONE_OR_MORE)
    bf16: bool = option(False, "autocast to bfloat16")
    compile: str = option("", "torch.compile backend, for example inductor", free=True)
    attention: str = option("fastattn", "whose attention", ("fastattn", "torch"))
    parallel: str = option("ddp", "under torchrun", ("ddp", "fsdp"), free=True)
    seed: int = option(0, "of everything random", Range(0, 2**32 - 1))
    threads: int = option(0, "CPU threads; 0 leaves torch's number", NONE_OR_MORE, free=True)
    save_every: int = option(50, "steps between checkpoints", COUNT, free=True)
    eval_every: int = option(100, "steps between evaluations", COUNT, free=True)
    log_every: int = option(10, "steps between printed lines", COUNT, free=True)
    tensorboard: bool = option(False, "also write out/tensorboard", free=True)
    compare: int = option(
        10, "steps to compare the cost of attention on; 0: none", NONE_OR_MORE, free=True
    )


O = TypeVar("O", bound=Options)


def flag(name: str) -> str:
    """The option as the command line spells it."""
    return "--" + name.replace("_", "-")


def setting(name: str, value: Any) -> str:
    """The words that give the option this value, quoted for a shell."""
    if isinstance(value, bool):
        return flag(name) if value else flag("no_" + name)
    return f"{flag(name)} {shlex.quote(str(value))}"


def parse(kind: type[O], text: str, argv: list[str] | None) -> O:
    """The command line as an Options; `text` is the example's docstring."""
    parser = ArgumentParser(
        description=text, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False
    )
    types = get_type_hints(kind)
    for f in fields(kind):
        accepts, isa = f.metadata["accepts"], types[f.name]
        more: dict[str, Any] = {"action": BooleanOptionalAction}
        if isa is not bool:
            more = {"type": isa, "choices": None if isinstance(accepts, Range) else accepts or None}
        notes = [str(accepts)] if isinstance(accepts, Range) else []
        notes += [f"default: {f.default}"] if f.default != "" and isa is not bool else []
        action = parser.add_argument(flag(f.name), default=f.default, **more)
        # set afterwards, because some versions of Python add to a boolean's
        action.help = f.metadata["help"] + (f" ({'; '.join(notes)})" if notes else "")
    options = kind(**vars(parser.parse_args(argv)))
    mistake = mistaken(options)
    if mistake:
        parser.error(mistake)
    if options.threads:
        torch.set_num_threads(options.threads)
    return options


def mistaken(options: Options) -> str:
    """A sentence about the first option that is not accepted, or ""."""
    for f in fields(options):
        accepts, x = f.metadata["accepts"], getattr(options, f.name)
        if isinstance(accepts, Range) and x not in accepts:
            return f"{flag(f.name)} is {x}; accepted is {accepts}"
    if not options.out:
        return "--out is empty; accepted is a folder's name"
    if options.compile:
        known = torch.compiler.list_backends(exclude_tags=())
        if options.compile not in known:
            return f"--compile is {options.compile}; accepted are {', '.join(known)}"
    return ""


# ---- how a run ends ----------------------------------------------------------------------------


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. It unwinds what Ctrl-C unwinds."""


class Alone(Exception):
    """Another process cannot be reached, most likely because it has ended."""


ENDINGS = {  # what is the user's or the machine's doing: its exit status, and whether to go on
    Terminated: (128 + signal.SIGTERM, True),
    KeyboardInterrupt: (128 + signal.SIGINT, True),
    OSError: (1, True),
    FloatingPointError: (1, False),
    ValueError: (1, False),
    ImportError: (1, False),
    Alone: (1, False),
}
SENTENCES = {Terminated: "stopped by SIGTERM", KeyboardInterrupt: "stopped by Ctrl-C"}


def same_command() -> str:
    """The given command line without --fresh, which continues from the last checkpoint."""
    words = [word for word in sys.orig_argv if word != "--fresh"]
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's own words are not known here
        nodes = os.environ["GROUP_WORLD_SIZE"]
        words = [
            *("torchrun", *(["--nnodes", nodes] if nodes != "1" else [])),
            *("--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]),
            *words[words.index(sys.argv[0]) :],
        ]
    return shlex.join(words)


def _ours(error: Exception) -> bool:
    """Whether code of the examples or of fastattn raised it, so that its message is for users."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    folders = (Path(__file__).parent, Path(fastattn.__file__).parent)
    return any(Path(frame.f_code.co_filename).is_relative_to(folder) for folder in folders)


@contextmanager
def _together():
    """A failed collective counts as Alone. gloo's errors have no class, but name their source
    file."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo/transport/" in str(error):
            why = str(error).partition("\n")[0].partition(". ")[0]
            raise Alone(f"another process has ended or cannot be reached: {why}") from error
        raise


def run(main: Callable[[list[str]], object]) -> None:
    """Runs main() with the command line. Ends with SystemExit and a sentence if main() fails."""
    rank = os.environ.get("RANK", "0")

    def stop(number: int, frame: object) -> None:
        raise Terminated

    if rank == "0":  # the others die of it at once, and say nothing
        signal.signal(signal.SIGTERM, stop)
    try:
        with _together():
            main(sys.argv[1:])
    except tuple(ENDINGS) as error:
        if sys.flags.dev_mode or (isinstance(error, ValueError) and not _ours(error)):
            raise
        for number in (signal.SIGINT, signal.SIGTERM):  # which torchrun sends again
            signal.signal(number, signal.SIG_IGN)
        kind = next(kind for kind in ENDINGS if isinstance(error, kind))
        status, goes_on = ENDINGS[kind]
        lines = [SENTENCES.get(kind) or str(error)]
        if goes_on:
            lines.append(f"the same command goes on: {same_command()}")
        if rank == "0":
            print(*lines, sep="\n", file=sys.stderr)
        elif kind not in SENTENCES:
            print(f"process {rank}: {lines[0]}", file=sys.stderr)
        raise SystemExit(status) from None

"""Every example, straight and killed, in one process and in two: the same in the end.

    python tests/support/example_matrix.py FOLDER [EXAMPLE ...] [--way WAY] [--kill KILL]

prints a line for each. The runs are forks of this process, which imports torch once and computes
nothing itself, because forks of one that has run autograd cannot.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import traceback
from argparse import ArgumentParser
from pathlib import Path

import torch
import torch.distributed as dist
from example_runs import EXAMPLES, SIZES, arguments, write_sources
from safetensors.torch import load_file

sys.path.insert(0, str(EXAMPLES))

TRAINER = "finetune_bert --trainer hf"
NAMES = (*SIZES, TRAINER)
WAYS = {
    "one": (1, ()),
    "accumulate": (1, ("--accumulate", "2")),
    "ddp": (2, ("--parallel", "ddp")),
    "fsdp": (2, ("--parallel", "fsdp")),
}
KILLS = ("step", "save")
MORE = {  # no dropout, which draws for each part; a teacher whose maps differ from the student's
    "finetune_bert": ("--dropout", "0"),
    "distill": ("--teacher-steps", "30"),
}


def arm(kill: str, after: int) -> None:
    """Kills this process in an optimizer's step, or after torch.save, which the examples and
    Trainer use for their optimizers, has written a part."""
    steps, optimizer_step, save = [0], torch.optim.AdamW.step, torch.save

    def step(self, *args, **options):
        steps[0] += 1
        if kill == "step" and steps[0] == after + 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return optimizer_step(self, *args, **options)

    def half(content, file, *args, **options):
        if kill == "save" and steps[0] == after:
            with open(file, "wb") if isinstance(file, (str, Path)) else file as out:
                out.write(b"PK" * 500)
                out.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return save(content, file, *args, **options)

    torch.optim.AdamW.step, torch.save = step, half


def start(name: str, words: list[str], log: Path, rank: int, processes: int, kill: str) -> int:
    """The pid of a forked process that runs the example and writes its output to `log`."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        torch.set_num_threads(1)
        if processes > 1:
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            os.environ |= {**ranks, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
            store = f"file://{log}.store"
            dist.init_process_group("gloo", store, rank=rank, world_size=processes)
        if kill:
            arm(kill, 4 + (30 if name == "distill" else 0))
        importlib.import_module(name).main(words)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def launch(name: str, words: list[str], log: Path, processes: int, kill: str = "") -> str:
    """Runs an example, which must be killed if `kill` says so and succeed otherwise; returns its
    output. As under torchrun, a process that fails takes the others with it."""
    left = {start(name, words, log, rank, processes, kill) for rank in range(processes)}
    statuses = []
    while left:
        child, status = os.wait()
        left.discard(child)
        statuses.append(os.waitstatus_to_exitcode(status))
        if statuses[-1]:
            for other in left:
                os.kill(other, signal.SIGKILL)
    Path(f"{log}.store").unlink(missing_ok=True)
    if -signal.SIGKILL not in statuses if kill else any(statuses):
        raise SystemExit(f"{log} ended with {statuses}:\n{log.read_text()}")
    return log.read_text()


def result(out: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(the loss of every step, the weights)."""
    lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    return torch.tensor(losses, dtype=torch.float64), load_file(out / "model/model.safetensors")


def apart(a: Path, b: Path) -> tuple[float, float]:
    """The largest difference between two runs' losses, and between their weights."""
    (losses, weights), (others, theirs) = result(a), result(b)
    assert len(losses) == len(others) == 6 and weights.keys() == theirs.keys()
    found = max((x - theirs[name]).abs().max().item() for name, x in weights.items())
    return (losses - others).abs().max().item(), found


def same(text: str, limits: tuple[float, float], a: Path, b: Path) -> bool:
    """Whether two runs differ by at most (losses', weights') limits; prints a line."""
    found = apart(a, b)
    right = all(x <= limit for x, limit in zip(found, limits))
    numbers = "losses {:.1e}, weights {:.1e} apart".format(*found)
    print(f"{'same' if right else 'DIFFERENT'}  {text}: {numbers}", flush=True)
    return right


def check(name: str, way: str, kills: list[str], folder: Path, first: Path) -> bool:
    """Whether an example, trained in this way, is the run in `first`, killed or not.

    Another way is the same sums in another order, so its losses may be 1e-5 apart; a weight whose
    gradient is all rounding may have AdamW's step of the other sign, so they may be 4e-3 apart. A
    run that was killed, and goes on in the same way, must be equal.
    """
    script, *own = name.split()
    processes, more = WAYS[way]
    out = first.parent.parent / way
    out.mkdir(parents=True)
    more = (*own, *MORE.get(script, ()), *more)

    def words(place: str) -> list[str]:
        return arguments(script, out / place, folder / "sources", *more)

    launch(script, words("straight"), out / "straight.txt", processes)
    good = same(f"{name}, {way}", (1e-5, 4e-3), out / "straight", first)
    for kill in kills:
        log = out / f"{kill}.txt"
        launch(script, words(kill), log, processes, kill)
        assert not (out / kill / "model").exists()
        assert "going on from" in launch(script, words(kill), log, processes)
        text = f"{name}, {way}, killed in a {kill}"
        good &= same(text, (0, 0), out / kill, out / "straight")
    return good


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("examples", nargs="*", default=NAMES)
    parser.add_argument("--way", action="append", choices=WAYS)
    parser.add_argument("--kill", action="append", choices=KILLS)
    given = parser.parse_args()
    (given.folder / "sources").mkdir(parents=True)
    write_sources(given.folder / "sources")
    ways, kills = given.way or list(WAYS), given.kill or KILLS
    good = True
    for name in given.examples:
        importlib.import_module(name.split()[0])
        for way in ways:
            if (name, way) != (TRAINER, "fsdp"):  # which is refused
                first = given.folder / name.replace(" ", "") / ways[0] / "straight"
                good &= check(name, way, kills, given.folder, first)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

"""`bench --base REF`: another commit, built in a git worktree of its own, in the same interleaved
rounds. Each side is a process (worker.py) that computes with its own tree; the parent asks them in
turn for samples. Fresh processes are started PASSES times, because where a process happens to lie
in memory is worth some percent too, and rounds of one pair cannot see it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..cases import Row
from ..report.history import BASE
from .check import Errors
from .machine import ROOT, git, is_checkout
from .protocol import OURS, Side
from .runner import Run

PASSES = 3
TURNS = 5  # of each side in a round, the best of which counts
ROUNDS = 401  # a pass at most; the level's seconds are the real limit: a regression of some percent
# on a busy machine needs all the rounds that the time holds
# Each thread on a core of its own, the same ones in both processes. Left to the system on a busy
# machine, one process's threads were seen to share a core for all its life: 2.6 times the time.
PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
NATIVE = ("*.so", "_build.json")  # of a built fastattn/


def prepare(
    ref: str, folder: Path, root: Path = ROOT, say: Callable[[str], object] = print
) -> Path:
    """The built worktree of `ref`, made where it is not there yet. ValueError, one sentence, where
    there is no such commit or it does not build."""
    if not is_checkout(root):
        raise ValueError("--base needs fastattn to run from a git checkout, and this one does not")
    commit = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", root=root)
    if not commit:
        raise ValueError(f"--base: {ref!r} names no commit of this repository")
    tree = (folder / "base" / commit[:12]).resolve()
    if (tree / "built").exists():
        return tree
    if tree.exists():  # from a run that was stopped
        git("worktree", "remove", "--force", str(tree), root=root)
        shutil.rmtree(tree, ignore_errors=True)
    tree.parent.mkdir(parents=True, exist_ok=True)
    git("worktree", "prune", root=root)
    if git("worktree", "add", "--detach", str(tree), commit, root=root) is None:
        raise ValueError(f"--base: git makes no worktree of {ref!r} at {tree}")
    _build(ref, commit, tree, root, say)
    (tree / "built").touch()
    return tree


def _build(ref: str, commit: str, tree: Path, root: Path, say) -> None:
    same = git("diff", "--quiet", commit, "--", "csrc", "setup.py", root=root) is not None
    built = [path for pattern in NATIVE for path in (root / "fastattn").glob(pattern)]
    if same and built:
        for path in built:
            shutil.copy2(path, tree / "fastattn" / path.name)
        return
    say(f"building {ref} ({commit[:10]}): minutes, once")
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    run = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if run.returncode != 0:
        said = (run.stderr.strip() or run.stdout.strip() or "no output").splitlines()[-1]
        raise ValueError(f"--base: {ref} ({commit[:10]}) does not build: {said}")


class Worker:
    """A process of worker.py and the pipe to it."""

    def __init__(self, tree: Path) -> None:
        script = Path(__file__).with_name("worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(tree)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the parent's to handle
            env={**PINNED, **os.environ},
        )

    def ask(self, op: str, **arguments) -> dict:
        """The answer to one request; RuntimeError, one sentence, when there is none."""
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            said = self.process.stderr.read().strip().splitlines()
            raise RuntimeError(f"its process ended: {said[-1] if said else 'without a word'}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def side(self, name: str, cell, device, label: str = "") -> Side:
        """The cell opened and checked in the process, as a side that samples there."""
        what = {"row": asdict(cell)} if isinstance(cell, Row) else {"workload": cell.name}
        side = Side(name)
        try:
            answer = self.ask("open", device=device.name, threads=device.threads, **what)
        except RuntimeError as error:
            side.why_not = str(error)
            return side
        side.backend = f"{label}{answer['backend']}"
        side.errors = Errors(**answer["errors"]) if answer["errors"] else None
        side.why_not = answer["why_not"]
        side.sample = lambda repeats: self.ask("sample", repeats=repeats)["ns"]
        side.close = lambda: self._quietly("close")
        return side

    def _quietly(self, op: str) -> None:
        if self.process.poll() is None:
            self.ask(op)

    def close(self) -> None:
        """Ends the process."""
        if self.process.poll() is None:
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Pair:
    """This tree's process and the other commit's, for one pass."""

    def __init__(self, tree: Path, device) -> None:
        self.device, self.label = device, f"{tree.name[:10]} "
        self.workers = {OURS: Worker(ROOT), BASE: Worker(tree)}

    def sides(self, cell) -> list[Side]:
        labels = {OURS: "", BASE: self.label}
        return [w.side(n, cell, self.device, labels[n]) for n, w in self.workers.items()]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def merged(first: Run, second: Run) -> Run:
    """Both passes' rounds, cell by cell. What is wrong in one pass is wrong."""
    by_name = {result.cell.name: result for result in second.results}
    for result in first.results:
        other = by_name.get(result.cell.name)
        if other is None:  # the second pass was stopped, or had no time for it
            continue
        result.red = result.red or other.red
        for name, side in other.sides.items():
            mine = result.sides.setdefault(name, side)
            mine.why_not = mine.why_not or side.why_not
        if result.comparison is None or other.comparison is None:
            result.comparison = result.comparison or other.comparison
        elif result.comparison.samples.keys() == other.comparison.samples.keys():
            result.comparison = result.comparison.merged(other.comparison)
        result.seconds += other.seconds
    return Run(first.results, first.aa, first.skipped, first.interrupted or second.interrupted)

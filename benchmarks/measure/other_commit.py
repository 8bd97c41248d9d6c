"""`bench --base REF`: measures another commit, built in its own git worktree, in the same
interleaved rounds. Each side is a process (worker.py) that imports fastattn from its own tree; the
parent alternates between them for samples. The processes are restarted PASSES times, because the
memory layout of a process alone changes its speed by some percent, which the rounds of one pair of
processes cannot show."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ..cases import AttentionCase
from ..report.history import BASE
from .check import Errors
from .machine import ROOT, git, is_checkout
from .protocol import OURS, Side
from .runner import Run

PASSES = 3
TURNS = 5  # samples of each side in a round, of which the fastest counts
# Rounds of a pass at most. The level's seconds are the real limit: to see a regression of some
# percent on a busy machine takes as many rounds as fit into the time.
ROUNDS = 401
# Pins each thread to its own core, the same cores in both processes. Without this, on a busy
# machine, the threads of one process sometimes shared a core for its whole life and took 2.6 times
# as long.
PINNED = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
NATIVE = ("*.so", "_build.json")  # the built files in fastattn/


def prepare(
    ref: str, folder: Path, root: Path = ROOT, say: Callable[[str], object] = print
) -> Path:
    """The built worktree of `ref`, which is made if it does not exist. Raises ValueError with one
    sentence if there is no such commit or if it does not build."""
    if not is_checkout(root):
        raise ValueError("--base needs fastattn to run from a git checkout, and this one does not")
    commit = git("rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", root=root)
    if not commit:
        raise ValueError(f"--base: {ref!r} names no commit of this repository")
    tree = (folder / "base" / commit[:12]).resolve()
    if (tree / "built").exists():
        return tree
    if tree.exists():  # left by an interrupted run
        git("worktree", "remove", "--force", str(tree), root=root)
        shutil.rmtree(tree, ignore_errors=True)
    tree.parent.mkdir(parents=True, exist_ok=True)
    git("worktree", "prune", root=root)
    if git("worktree", "add", "--detach", str(tree), commit, root=root) is None:
        raise ValueError(f"--base: git could not make a worktree of {ref!r} at {tree}")
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
    say(f"building {ref} ({commit[:10]}), once; this takes minutes")
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
            start_new_session=True,  # only the parent handles Ctrl-C
            env={**PINNED, **os.environ},
        )

    def ask(self, op: str, **arguments) -> dict:
        """The answer to one request. Raises RuntimeError with one sentence if there is none."""
        try:
            self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.close()
            said = self.process.stderr.read().strip().splitlines()
            raise RuntimeError(
                f"its process ended: {said[-1] if said else 'it printed no message'}"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def side(self, name: str, case, device, label: str = "") -> Side:
        """Opens and checks the case in the process, and returns a side that samples there."""
        what = (
            {"attention": asdict(case)}
            if isinstance(case, AttentionCase)
            else {"workload": case.name}
        )
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

    def sides(self, case) -> list[Side]:
        labels = {OURS: "", BASE: self.label}
        return [w.side(n, case, self.device, labels[n]) for n, w in self.workers.items()]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def merged(first: Run, second: Run) -> Run:
    """The rounds of both passes, case by case. A case that is wrong in either pass is RED."""
    by_name = {result.case.name: result for result in second.results}
    for result in first.results:
        other = by_name.get(result.case.name)
        if other is None:  # the second pass was interrupted or had no time left
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

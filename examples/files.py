"""The files of a run, its checkpoints and its log: one run's alone, whole whatever is interrupted,
and equal byte for byte where the runs are equal (but for the log's speeds)."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import threading
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from command_line import setting

from fastattn.core.files import replace_file
from fastattn.models.checkpoint import CheckpointError

PARTS = {"step": int, "identity": dict, "model": dict, "optimizer": dict}  # of a checkpoint
KEEP = 2  # checkpoints: the newest, and the one before in case the newest cannot be read
STARTED = ("checkpoints/step-*.pt", "trainer/checkpoint-*")  # of which a run that goes on has one
LEFT = (*STARTED, "trainer/run.json", "tokenizer.json")  # by a run, what another begins without
PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")  # replace_file's, of a process that was killed
LOCK = ".lock"

# ---- a folder ----------------------------------------------------------------------------------

_held: set[tuple[Path, int]] = set()  # folders that a thread of this process has locked


@contextmanager
def own(out: Path, fresh: bool):
    """`out` for this thread alone, made if it is missing and without what killed runs left half
    written; fresh: without what they left at all. A second call inside does nothing.

    The lock is the kernel's on out/.lock, so it ends with the process, however that ends. Raises
    OSError, naming the process that has the folder.
    """
    key = (out.resolve(), threading.get_ident())
    if key in _held:
        yield
        return
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file = (out / LOCK).open("a+")
    with file:
        _lock(file, out)
        _held.add(key)
        try:
            tidy(out, fresh)
            yield
        finally:
            _held.discard(key)
            file.truncate(0)


def _lock(file, out: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise BlockingIOError(
            f"{out} is in use by another run, process {file.read() or 'unknown'}; give another "
            "--out, or wait until it has ended"
        ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()


def tidy(out: Path, fresh: bool) -> None:
    """Removes files that were left half written and, with `fresh`, everything of an earlier run."""
    for folder in (out, out / "checkpoints", out / "model"):
        for path in folder.glob(".*.tmp"):
            if PARTIAL.fullmatch(path.name):
                path.unlink()
    for path in [path for pattern in LEFT if fresh for path in out.glob(pattern)]:
        if path.is_dir() and path.parent.name == "trainer":
            shutil.rmtree(path)
        elif not path.is_dir():  # which no other of ours is
            path.unlink()


def started(out: Path) -> bool:
    """Whether a run in `out`, or the one of the teacher in it, has written a checkpoint."""
    return any(any(out.glob(f"{place}{name}")) for place in ("", "teacher/") for name in STARTED)


@contextmanager
def writing(path: Path):
    """Turns errors of writing, from any library, into an OSError with a sentence."""
    try:
        yield
    except Exception as error:
        root: BaseException | None = error
        while not isinstance(root, (OSError, KeyboardInterrupt, type(None))):
            root = root.__cause__ or root.__context__
        if isinstance(root, KeyboardInterrupt):  # torch.save makes another error of it
            raise root from None
        why = (root and root.strerror) or str(error).partition("\n")[0]
        raise OSError(f"{path} cannot be written: {why}") from error


# ---- checkpoints -------------------------------------------------------------------------------


def check_identity(
    what: object, asked: dict[str, Any], saved: dict[str, Any], finished: bool
) -> None:
    """CheckpointError where `what` is another run's; more steps of a finished run are the same's.

    asked, saved: the options that numbers depend on, and the fingerprint of the data.
    """
    names = [n for n in asked if saved.get(n) != asked[n]]
    if not names or (finished and names == ["steps"] and asked["steps"] > saved["steps"]):
        return
    changes = ", ".join(f"{n} {asked[n]} (was {saved.get(n)})" for n in names)
    options = " ".join(setting(n, saved[n]) for n in names if n in saved and n != "data")
    raise CheckpointError(
        f"{what} is another run's: {changes}; give its options{f' ({options})' if options else ''}"
        ", another --out, or --fresh to delete it"
    )


class Checkpoints:
    """out/checkpoints/step-N.pt: written atomically; the newest KEEP are kept."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))

    def clear(self) -> None:
        """Deletes all checkpoints."""
        self._delete(self.paths())

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"step": step, "identity": self.identity, **state}
        path = self.folder / f"step-{step:08d}.pt"

        def write(temporary: Path) -> None:  # by name, torch writes that name into the file
            with temporary.open("wb") as file:
                torch.save(whole, file)

        with writing(path):
            replace_file(path, write)
        self._delete(self.paths()[:-KEEP])

    @staticmethod
    def _delete(paths: list[Path]) -> None:
        for path in paths:
            if not path.is_dir():  # which none of ours is
                path.unlink(missing_ok=True)

    def latest(self, say: Callable[[str], None]) -> tuple[dict[str, Any], str] | None:
        """(content, path) of the newest that can be read; what cannot is said. None: there is none.

        Raises CheckpointError where all are corrupted, or the newest is another run's.
        """
        paths = self.paths()
        for path in reversed(paths):
            try:
                content = self._read(path)
            except CheckpointError as error:
                say(f"{error}{'; the one before it is tried' if path != paths[0] else ''}")
                continue
            saved = content["identity"]
            check_identity(path, self.identity, saved, content["step"] == saved.get("steps"))
            return content, str(path)
        if paths:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be read; --fresh starts over"
            )
        return None

    @staticmethod
    def _read(path: Path) -> dict[str, Any]:
        try:
            with zipfile.ZipFile(path) as archive:
                bad = archive.testzip()
            if bad is not None:
                raise ValueError(f"{bad} does not match its checksum")
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a broken file makes of its readers
            raise CheckpointError(f"{path} is corrupted or cut short: {error}") from error
        for name, kind in PARTS.items():
            if not isinstance(content, dict) or not isinstance(content.get(name), kind):
                raise CheckpointError(f"{path} is no checkpoint of a run: it has no {name}")
        if path.name != f"step-{content['step']:08d}.pt":
            raise CheckpointError(f"{path} holds step {content['step']}, and not its name's")
        return content


class Log:
    """out/log.jsonl: one line a step or evaluation; lines after `step` are taken back.

    With tensorboard, out/tensorboard too.
    """

    def __init__(self, path: Path, step: int, tensorboard: bool = False) -> None:
        self.path, self.board = path, None
        kept = self._until(path, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            replace_file(path, lambda temporary: temporary.write_text(kept))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("--tensorboard needs: pip install tensorboard") from error
            self.board = SummaryWriter(str(path.with_name("tensorboard")), purge_step=step + 1)

    @staticmethod
    def _until(path: Path, step: int) -> str:
        """The lines up to a step; a kill may have cut the last one."""
        if step == 0 or not path.exists():
            return ""
        try:
            lines = path.read_text("utf-8").splitlines(keepends=True)
            whole = [line for line in lines if line.endswith("\n")]
            return "".join(line for line in whole if json.loads(line)["step"] <= step)
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is no log of a run ({error}); delete it to go on without the losses that "
                "it held, or give --fresh to start over"
            ) from error

    def write(self, step: int, values: dict[str, Any]) -> None:
        with writing(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board is not None:
            for name, x in (values | values.get("eval", {})).items():
                if not isinstance(x, dict):
                    self.board.add_scalar(name, x, step)
            self.board.flush()

    def losses(self) -> list[float]:
        """The loss of every step so far."""
        lines = map(json.loads, self.path.read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

"""The files of a run, its checkpoints and its log: whole whatever is interrupted."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastattn.files import replace_file
from fastattn.models.checkpoint import CheckpointError

PARTS = {"step": int, "identity": dict, "model": dict, "optimizer": dict}  # of a checkpoint
KEEP = 2  # checkpoints: the newest, and the one before in case the newest cannot be read


class Checkpoints:
    """out/checkpoints/step-N.pt: written whole or not at all, the newest KEEP kept."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity

    def paths(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.pt"))

    def clear(self) -> None:
        """Deletes them all."""
        self._delete(self.paths())

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = {"step": step, "identity": self.identity, **state}
        replace_file(self.folder / f"step-{step:08d}.pt", lambda path: torch.save(whole, path))
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
            names = [n for n in self.identity if saved.get(n) != self.identity[n]]
            if names:
                changes = ", ".join(f"{n} {self.identity[n]} (was {saved.get(n)})" for n in names)
                raise CheckpointError(
                    f"{path} is another run's: {changes}; give its options, another --out, or "
                    "--fresh to delete it"
                )
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
        with self.path.open("a") as file:
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

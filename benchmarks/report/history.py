"""Earlier runs on this machine, and what changed since.

Each run is a file .fastattn_bench/<machine>/<number>_<commit>.json, written once and never changed
or deleted. A file that cannot be read is skipped with a warning.

Two runs are compared by the ratio of a case to the same competitor, because an absolute time
depends on the state of the machine, and torch's time in the same rounds depends on it equally."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..measure.machine import machine_id
from ..measure.protocol import AGAIN
from .record import SCHEMA

FOLDER = Path(".fastattn_bench")
BASE = "base"  # the name of the side that runs another commit (measure/other_commit.py)


class Store:
    """The runs of one machine. `warnings` has a sentence for each skipped file."""

    def __init__(self, facts: dict, root: Path = FOLDER) -> None:
        self.root, self.folder = root, root / machine_id(facts)
        self.warnings: list[str] = []

    def runs(self) -> list[tuple[str, dict]]:
        """(id, data) of every readable run, oldest first."""
        self.warnings, found = [], []
        for path in sorted(self.folder.glob("*.json")):
            if not re.match(r"\d+_", path.name):
                continue
            try:
                found.append((path.stem, load(path)))
            except ValueError as error:
                self.warnings.append(str(error))
        return found

    def find(self, name: str) -> tuple[str, dict]:
        """A run by `last`, its number, its id, or a prefix of its commit."""
        runs = self.runs()
        if not runs:
            raise ValueError(f"--compare {name}: no run of this machine is in {self.folder}")
        if name == "last":
            return runs[-1]
        for run, data in reversed(runs):
            number, _, commit = run.partition("_")
            if name == run or commit.startswith(name) or name.lstrip("0") == number.lstrip("0"):
                return run, data
        known = ", ".join(run for run, _ in runs[-5:])
        raise ValueError(f"--compare: no run {name!r} in {self.folder}; the last are {known}")

    def save(self, data: dict) -> Path:
        """Stores a run under the next free number, even if other processes store runs meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = [int(path.name.split("_")[0]) for path in self.folder.glob("[0-9]*_*.json")]
        commit = (data["machine"].get("commit") or "none")[:10]
        dirty = "-dirty" if data["machine"].get("dirty") else ""
        number = max(numbers, default=0) + 1
        text = json.dumps(data, separators=(",", ":")) + "\n"
        while True:
            path = self.folder / f"{number:04d}_{commit}{dirty}.json"
            taken = [p for p in self.folder.glob(f"{number:04d}_*") if p != path]
            try:
                if taken:
                    raise FileExistsError
                handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                number += 1
                continue
            with os.fdopen(handle, "w") as file:
                file.write(text)
            return path


def load(path: Path) -> dict:
    """A stored run. Raises ValueError with one sentence if the file is not one."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a run: {str(error).splitlines()[0]}") from None
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path} has schema {schema}, this version reads {SCHEMA}")
    missing = [key for key in ("machine", "rows", "noise", "peak") if key not in data]
    if missing:
        raise ValueError(f"{path} is not a complete run: it lacks {', '.join(missing)}")
    return data


# ---- what changed -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Change:
    """How much faster a case is than before, with an interval: above 1 it is faster."""

    name: str
    against: str  # the competitor that both runs have, or "base"
    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        if self.low > 1.0:
            return "faster"
        return "slower" if self.high < 1.0 else "no difference"

    def regressed(self, threshold: float) -> bool:
        """Whether it is significantly slower and takes more than 1 + threshold times as long."""
        return self.verdict == "slower" and self.value < 1 / (1 + threshold)

    def __str__(self) -> str:
        amount = f"{abs(1 / self.value - 1):.1%} more time" if self.value < 1 else \
            f"{1 - 1 / self.value:.1%} less time"  # fmt: skip
        shown = self.verdict if self.verdict == "no difference" else f"{self.verdict}, {amount}"
        return f"{self.name}: {shown} ({self.low:.2f} to {self.high:.2f}, by {self.against})"


def changes_since(new: dict, old: dict) -> list[Change]:
    """The changes of cases that both runs timed against the same competitor. Each ratio's interval
    covers 95 %, so the quotient's, from the outer ends of both, covers at least 90 %."""
    before = {entry["name"]: entry for entry in old["rows"]}
    changes = []
    for entry in new["rows"]:
        for name, ratio in entry["versus"].items():
            then = before.get(entry["name"], {}).get("versus", {}).get(name)
            if then and name != BASE and not name.endswith(AGAIN):
                low, high = ratio["low"] / then["high"], ratio["high"] / then["low"]
                value = ratio["value"] / then["value"]
                changes.append(Change(entry["name"], name, value, low, high))
    return changes


def changes_from_base(data: dict) -> list[Change]:
    """The changes from the commit that was measured in the same rounds."""
    return [
        Change(entry["name"], BASE, ratio["value"], ratio["low"], ratio["high"])
        for entry in data["rows"]
        if (ratio := entry["versus"].get(BASE))
    ]


def threshold(text: str) -> float:
    """--fail-if: "5%" or "0.05" is 0.05."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(%?)\s*", text)
    value = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= value < 10:
        raise ValueError(f"--fail-if: got {text!r}, accepted is a share such as 5% or 0.05")
    return value


def weak(data: dict | None) -> list[str]:
    """Names of the cases that were not faster than every competitor: worth measuring first."""
    entries = data["rows"] if data else []
    return [
        e["name"] for e in entries if any(r["verdict"] != "faster" for r in e["versus"].values())
    ]

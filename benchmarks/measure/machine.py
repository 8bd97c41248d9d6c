"""The measured machine: names, versions, clocks, load, and its peak FLOP/s and bandwidth."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

import fastattn
from fastattn.backends import isa, registry
from fastattn.cli.info import cpu_name
from fastattn.core.work import Work

from ..cases import DTYPES, SEED
from . import devices

MEMORY = 1 << 28  # bytes: a working set larger than the caches
ROOT = Path(fastattn.__file__).resolve().parents[1]


def machine_facts(device: str = "cpu") -> dict:
    """Hardware, versions and commit: enough to know later what a number was measured on."""
    return {
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "isa": None if isa.problem() else isa.selected(),  # None: the reference ran
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "backends": [backend.name for backend in registry.BACKENDS],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": version("triton"),
        "fastattn": fastattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": SEED,
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        **revision(),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """Git's output, or None if git is missing or fails."""
    try:
        run = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def is_checkout(root: Path = ROOT) -> bool:
    """Whether the package is imported from the top folder of its own git checkout."""
    top = git("rev-parse", "--show-toplevel", root=root)
    return top is not None and Path(top).resolve() == root.resolve()


def revision() -> dict:
    """{"commit", "dirty"}, both None unless fastattn runs from a git checkout."""
    if not is_checkout():
        return {"commit": None, "dirty": None}
    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}


def machine_id(facts: dict) -> str:
    """A name shared by machines that are alike, whose results may be compared."""
    what = facts["gpu"] or facts["cpu"]
    exact = [facts["cpu"], facts["gpu"], facts["cores"], facts["threads"], facts["isa"]]
    word = re.sub(r"[^a-z0-9]+", "-", what.lower()).strip("-")
    return f"{word}-{hashlib.sha1(repr(exact).encode()).hexdigest()[:6]}"


@dataclass(slots=True)
class Machine:
    """Facts, and the peaks seen so far."""

    facts: dict
    flops: dict[str, float] = field(default_factory=dict)  # by dtype
    bandwidths: dict[int, float] = field(default_factory=dict)  # by working set, powers of two
    clocks: dict = field(default_factory=dict)  # before, after, throttled

    def measure_peaks(self, dtypes: set[str], sizes: set[int], seconds: float = 0.4) -> None:
        """Keeps the highest peaks. They are measured repeatedly, between the cases, so that one
        busy moment of the machine does not lower them."""
        device = self.facts.get("device", "cpu")
        for name in dtypes:
            seen = devices.peak_flops(DTYPES[name], seconds, device)
            self.flops[name] = max(seen, self.flops.get(name, 0.0))
        for size in sizes:
            seen = devices.peak_bandwidth(size, seconds, device)
            self.bandwidths[size] = max(seen, self.bandwidths.get(size, 0.0))

    def peak_flops(self, dtype: str) -> float:
        """The dtype's own peak, or fp32's if that is higher."""
        return max(self.flops[dtype], self.flops["fp32"])

    def peak_bytes(self, work: Work) -> float:
        return self.bandwidths[working_set(work)]

    def roof(self, dtype: str, work: Work) -> tuple[str, float]:
        """(what bounds the work, "compute" or "memory"; the least seconds it can take here)."""
        compute = work.flops / self.peak_flops(dtype)
        memory = work.bytes / self.peak_bytes(work)
        return ("compute", compute) if compute >= memory else ("memory", memory)

    def as_dict(self) -> dict:
        bandwidths = {str(size): seen for size, seen in self.bandwidths.items()}
        return {
            "machine": self.facts,
            "clocks": self.clocks,
            "peak": {"flops": self.flops, "bandwidth_by_working_set": bandwidths},
        }


def working_set(work: Work) -> int:
    """The work's bytes, rounded up to a power of two."""
    return min(MEMORY, 1 << max(20, (work.bytes - 1).bit_length()))

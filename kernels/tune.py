"""Autotuning, only on request: FASTATTN_TUNE=1 times variations of a table's Config on this
GPU, once for each kernel, dtype and head dimensions, and remembers the fastest. Next: config.py.

The results are stored in $FASTATTN_TUNE_CACHE, by default ~/.cache/fastattn/tuned.json, and used
while FASTATTN_TUNE is set. During the capture of a CUDA graph the table's Config is used.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from ..core.files import replace_file
from .config import Config


def requested() -> bool:
    return os.environ.get("FASTATTN_TUNE", "0") not in ("", "0")


def choose(kind: str, dtype, dims: tuple, default: Config, run: Callable[[Config], object]):
    """The Config for kernel `kind`: the default, or, on request, the fastest near it for run."""
    if not requested() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return default
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreter"
    name = f"{gpu}, Triton {triton.__version__}, {kind}, {dtype}, {'x'.join(map(str, dims))}"
    known = _load()
    if name not in known:
        times = {config: seconds for config in (default, *neighbours(default))
                 if (seconds := _time(config, run)) is not None}  # fmt: skip
        if not times:
            return default
        known[name] = list(min(times, key=times.get))
        _save(known)
    return Config(*known[name])


def neighbours(config: Config) -> Iterator[Config]:
    """Configs with half or twice a tile size or the warps, a stage less or more, or without TMA."""
    for block in (config.block_q // 2, config.block_q * 2):
        if 16 <= block <= 256:
            yield config._replace(block_q=block)
    for block in (config.block_kv // 2, config.block_kv * 2):
        if 16 <= block <= 256:
            yield config._replace(block_kv=block)
    for warps in (config.warps // 2, config.warps * 2):
        if 1 <= warps <= 16:
            yield config._replace(warps=warps)
    for stages in (config.stages - 1, config.stages + 1):
        if stages >= 1:
            yield config._replace(stages=stages)
    if config.tma:
        yield config._replace(tma=False)


def _time(config: Config, run: Callable[[Config], object]) -> float | None:
    """Seconds of a run; None where the GPU has too few resources for it or it does not compile."""
    try:
        return triton.testing.do_bench(lambda: run(config), warmup=5, rep=30, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return None


# ---- the stored results -------------------------------------------------------------------------


def _path() -> Path:
    named = os.environ.get("FASTATTN_TUNE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "fastattn" / "tuned.json"


def _load() -> dict:
    try:
        known = json.loads(_path().read_text())
        if all(len(Config(*stored)) == len(Config._fields) for stored in known.values()):
            return known
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    warnings.warn(f"{_path()} is not a file of tuned configs; it will be replaced", stacklevel=2)
    return {}


def _save(known: dict) -> None:
    """Replaces the file atomically, because another process may be reading it."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda whole: whole.write_text(json.dumps(known, indent=1)))

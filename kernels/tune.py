"""Autotuning, only on request: FASTATTN_TUNE=1 times the neighbours of a table's row on this GPU,
once for each kernel, dtype and head dimensions, and remembers the fastest. Next: config.py.

What was found is kept in $FASTATTN_TUNE_CACHE, by default ~/.cache/fastattn/tuned.json, and used
while FASTATTN_TUNE is set. Inside a CUDA graph's capture the table's row runs.
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
        times = {row: seconds for row in (default, *neighbours(default))
                 if (seconds := _time(row, run)) is not None}  # fmt: skip
        if not times:
            return default
        known[name] = list(min(times, key=times.get))
        _save(known)
    return Config(*known[name])


def neighbours(row: Config) -> Iterator[Config]:
    """Half and twice each tile size, half and twice the warps, a stage less and more."""
    for block in (row.block_q // 2, row.block_q * 2):
        if 16 <= block <= 256:
            yield row._replace(block_q=block)
    for block in (row.block_kv // 2, row.block_kv * 2):
        if 16 <= block <= 256:
            yield row._replace(block_kv=block)
    for warps in (row.warps // 2, row.warps * 2):
        if 1 <= warps <= 16:
            yield row._replace(warps=warps)
    for stages in (row.stages - 1, row.stages + 1):
        if stages >= 1:
            yield row._replace(stages=stages)
    if row.tma:
        yield row._replace(tma=False)


def _time(row: Config, run: Callable[[Config], object]) -> float | None:
    """Seconds of a run; None where the GPU lacks what the row needs, or it does not compile."""
    try:
        return triton.testing.do_bench(lambda: run(row), warmup=5, rep=30, return_mode="median")
    except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError):
        return None


# ---- what is remembered -------------------------------------------------------------------------


def _path() -> Path:
    named = os.environ.get("FASTATTN_TUNE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "fastattn" / "tuned.json"


def _load() -> dict:
    try:
        known = json.loads(_path().read_text())
        if all(len(Config(*row)) == len(Config._fields) for row in known.values()):
            return known
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError):
        pass
    warnings.warn(f"{_path()} is not a file of tuned configs; it will be replaced", stacklevel=2)
    return {}


def _save(known: dict) -> None:
    """Whole or not at all: another process may read it."""
    path = _path()
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda whole: whole.write_text(json.dumps(known, indent=1)))

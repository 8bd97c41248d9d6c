"""A model in a folder: model.safetensors, and config.json as a readable copy of its configuration.

model.safetensors is the whole model: it contains the configuration and a checksum, and is written
atomically, so an interrupted save leaves the previous one. config.json is for people and tools;
where it differs, the configuration in model.safetensors is used, with a warning.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.files import replace_file

WEIGHTS, CONFIG = "model.safetensors", "config.json"
SHOWN = 4  # names in an error message


class CheckpointError(ValueError):
    """A folder does not contain the expected model: missing, corrupted, or another model."""


def save(
    folder: str | os.PathLike[str], state: Mapping[str, Tensor], config: dict[str, Any]
) -> None:
    """Writes `state` and `config` into `folder`, which is created if missing.

    Args:
        state: tensors by name; they are copied to the CPU, and must not share memory.
        config: JSON-serializable values by name.

    Raises:
        CheckpointError: `folder` is a file.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; accepted is a folder, or a name for a new one")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous() for name, x in state.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    about = {"format": "pt", "config": text, "config_crc32": _crc32(text)}
    about["crc32"] = checksum(tensors)

    def write(path: Path) -> None:
        save_file(tensors, path, about)
        _sort_about(path)

    replace_file(folder / WEIGHTS, write)
    replace_file(folder / CONFIG, lambda path: path.write_text(text))


def _sort_about(path: Path) -> None:
    """Sorts the metadata of a .safetensors file in place, so that equal models give equal files;
    safetensors writes it in the order of a hash table."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # always so; a header may be padded with spaces
            file.seek(8)
            file.write(text.ljust(size))


def load(folder: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, config) from a folder that save() wrote, with its checksums verified.

    For a model.safetensors of another program, without a configuration, config.json must exist;
    without a checksum, nothing is verified.

    Raises:
        CheckpointError: a file is missing or corrupted.
    """
    from safetensors import safe_open

    path = Path(folder) / WEIGHTS
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:  # e.g. a folder without read permission
        raise CheckpointError(f"{folder} cannot be read: {error}") from error
    if not there:
        raise CheckpointError(f"{folder} has no {WEIGHTS}; accepted is a folder that "
                              "save_pretrained wrote")  # fmt: skip
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = checksum(state)
    except Exception as error:  # a broken file may raise anything
        raise CheckpointError(f"{path} is corrupted or cut short: {error}") from error
    saved = about.get("config")
    if about.get("crc32", found) != found or (
        saved is not None and about.get("config_crc32", _crc32(saved)) != _crc32(saved)
    ):
        raise CheckpointError(f"{path} is corrupted: its bytes do not match its checksum")
    return state, _config(path.with_name(CONFIG), saved)


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """CRC-32 over the bytes of all tensors in the order of their names; 8 hexadecimal digits."""
    crc = 0
    for name in sorted(tensors):
        flat = tensors[name].contiguous().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy() if flat.numel() else b"", crc)
    return f"{crc:08x}"


def _crc32(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def _config(path: Path, saved: str | None) -> dict[str, Any]:
    """The configuration saved with the weights, or that of config.json if there is none."""
    if saved is None:
        if not path.exists():
            raise CheckpointError(f"{path} is missing, and {WEIGHTS} contains no configuration")
        return _parsed(path, None)
    config = _parsed(path.with_name(WEIGHTS), saved)
    try:
        edited = _parsed(path, None)
    except CheckpointError:  # config.json is a copy, and may be missing
        edited = None
    if isinstance(edited, dict) and edited != config:
        names = sorted(n for n in edited.keys() | config.keys() if edited.get(n) != config.get(n))
        changes = ", ".join(f"{n} = {edited.get(n)!r}, saved {config.get(n)!r}" for n in names)
        warnings.warn(
            f"{path} differs from what {WEIGHTS} was saved with ({changes}); the saved values are "
            "used; to change them, pass them to from_pretrained by name",
            stacklevel=4,
        )
    return config


def _parsed(path: Path, text: str | None) -> dict[str, Any]:
    """The configuration as a dict, from `text`, or from the file `path` if text is None."""
    try:
        config = json.loads(path.read_text("utf-8") if text is None else text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"the configuration in {path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"the configuration in {path} is a {type(config).__name__}; accepted "
                              "is an object of names and values")  # fmt: skip
    return config


def match(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Raises CheckpointError, naming names and shapes, unless `state` fits `expected` exactly.

    Call it before anything is copied, so that a model that does not fit stays unchanged.
    """
    problems = []
    missing = [name for name in expected if not isinstance(state.get(name), Tensor)]
    surplus = [name for name in state if name not in expected]
    shapes = [
        f"{name} is {list(state[name].shape)} and the model's {list(x.shape)}"
        for name, x in expected.items()
        if isinstance(state.get(name), Tensor) and state[name].shape != x.shape
    ]
    for names, say in ((missing, "lacks"), (surplus, "also has"), (shapes, "has other shapes:")):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            problems.append(f"{say} {', '.join(names[:SHOWN])}{more}")
    if problems:
        raise CheckpointError(f"{what} does not fit the model: it {'; it '.join(problems)}")

"""The model and the inputs that `verify --model ... --inputs ...` names."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import torch
from torch import nn


def load_model(text: str) -> nn.Module:
    """The module that `--model` names.

    A file of torch.save is unpickled, which can run any code: pass only files that you trust.

    Raises:
        ValueError: there is no such module, or it cannot be loaded.
    """
    place, _, name = text.rpartition(":")
    path = Path(place or text)
    try:
        if path.suffix == ".py" and path.exists():
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            thing = getattr(module, name)
        elif path.exists() and path.is_file():
            thing = torch.load(path, weights_only=False, map_location="cpu")
        elif place and _importable(place):
            thing = getattr(importlib.import_module(place), name)
        else:
            thing = _from_hub(text)
    except ValueError:
        raise
    except Exception as error:
        sentence = str(error).split("\n")[0]
        raise ValueError(f"--model: {text!r} cannot be loaded: {sentence}") from error
    if not isinstance(thing, nn.Module) and callable(thing):
        thing = thing()
    if not isinstance(thing, nn.Module):
        raise ValueError(f"--model: {text!r} gives a {type(thing).__name__}, not a module")
    return thing


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _from_hub(name: str) -> nn.Module:
    if not _importable("transformers"):
        raise ValueError(
            f"--model: {name!r} is neither a file nor an importable module:name; for a hub id, "
            "install the package transformers"
        )
    from transformers import AutoModel

    return AutoModel.from_pretrained(name)


INPUT = re.compile(r"(\w+)=(\d+(?:x\d+)*)(?:<(\d+))?")


def load_inputs(words: list[str]) -> dict | tuple:
    """The inputs that `--inputs` describes: a file of torch.save with a tensor, a tuple or a dict;
    or NAME=SHAPE for normal random values and NAME=SHAPE<LIMIT for random integers in [0, LIMIT),
    from a fixed seed. Raises ValueError for anything else."""
    if len(words) == 1 and "=" not in words[0]:
        try:
            found = torch.load(words[0], weights_only=True, map_location="cpu")
        except Exception as error:
            sentence = str(error).split("\n")[0]
            raise ValueError(f"--inputs: {words[0]!r} cannot be loaded: {sentence}") from error
        return found if isinstance(found, (dict, tuple)) else (found,)
    draw, inputs = torch.Generator().manual_seed(0), {}
    for word in words:
        match = INPUT.fullmatch(word)
        if match is None:
            raise ValueError(
                f"--inputs: got {word!r}; accepted are a file, NAME=SHAPE such as x=2x50x64, and "
                "NAME=SHAPE<LIMIT such as input_ids=2x128<30522"
            )
        name, shape, limit = match.groups()
        shape = tuple(map(int, shape.split("x")))
        inputs[name] = (
            torch.randint(int(limit), shape, generator=draw)
            if limit
            else torch.randn(shape, generator=draw, dtype=torch.float64)
        )
    return inputs

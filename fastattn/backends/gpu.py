"""Where Triton's kernels run, and how operators import them. kernels/ has the kernels; importing
fastattn imports neither these nor Triton."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import re

import torch

TRITON = 3, 5  # the oldest version that the kernels are tested with
OLDEST_GPU = 8, 0  # the first with bfloat16; 99 KiB of shared memory a block


def constant(function):
    """torch.compiler.assume_constant_result, without its import of torch._dynamo."""
    function._dynamo_marked_constant = True
    return function


@constant
@functools.cache
def triton_missing() -> str | None:
    """The reason why Triton cannot be used in this process, or None."""
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "Triton is not installed (pip install triton)"
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < TRITON:
        return f"Triton is {version}; accepted is {TRITON[0]}.{TRITON[1]} or newer"
    return None


@constant
@functools.cache
def gpu_missing(index: int) -> str | None:
    """The reason why Triton's kernels do not run on GPU `index`, or None."""
    if missing := triton_missing():
        return missing
    if torch.version.hip is None and torch.cuda.get_device_capability(index) < OLDEST_GPU:
        name = torch.cuda.get_device_name(index)
        return f"{name} is older than compute capability {OLDEST_GPU[0]}.{OLDEST_GPU[1]}"
    return None


def interpreting() -> bool:
    """Whether Triton interprets its kernels, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def launcher(module: str, name: str):
    """Function `name` of kernels/<module>.py, imported at the first call."""

    def launch(*arguments):
        try:
            kernels = importlib.import_module(f"fastattn.kernels.{module}")
        except ImportError as error:
            raise RuntimeError(f"fastattn: {name} needs Triton: {error}") from error
        return getattr(kernels, name)(*arguments)

    return launch

"""What every test shares: one thread, fixed seeds, and the mark `native` (needs the C++ code).
Triton's kernels are interpreted where there is no GPU, which is decided as they are imported."""

from __future__ import annotations

import os
import random

import numpy
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fastattn  # noqa: F401  defines the operators and loads the native library


def native_is_built() -> bool:
    """Whether the C++ library has registered the operators' CPU kernels."""
    operator = "fastattn::flash_attn_fwd"
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU")
    except RuntimeError:  # no such operator
        return False


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "native: needs the C++ library, skipped without it")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if native_is_built():
        return
    skip = pytest.mark.skip(reason="the C++ library (fastattn/_cpu*.so) is not built")
    for item in items:
        if item.get_closest_marker("native"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_start():
    """One thread and the same seeds for each test; a test that wants more threads asks for them."""
    torch.set_num_threads(1)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)

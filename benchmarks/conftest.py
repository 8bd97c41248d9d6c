"""Options of `pytest benchmarks`, and the path to tests/support/cases.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests/support"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, help="torch threads (default: torch's)")


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest):
    """Fixes the number of threads for the whole test."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("--threads") or before)
    yield
    torch.set_num_threads(before)

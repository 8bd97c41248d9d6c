"""Runs a file of cases as two processes that can communicate."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def assert_right(cases: str, timeout: float = 240) -> None:
    """tests/support/`cases` succeeds in both processes and prints "right"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name(cases)],
            env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs):
        assert rank.returncode == 0 and "right" in output.splitlines(), output[-3000:]

"""Runs a command that may hang, in its own process group and with a time limit. Nothing waits past
that limit, because a process that waits for a GPU may survive SIGKILL.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

GRACE = 5.0  # seconds until a killed process must have ended
TAIL = 4000  # bytes at the end of the output that are kept


@dataclass(frozen=True)
class Outcome:
    """How a command ended: it "ended" by itself, "crashed" by a signal, "hung" until the time limit
    and was killed, or is "stuck": it hung and could not be killed."""

    state: str
    code: int | None  # exit status, or after a crash the signal's number
    seconds: float
    tail: str  # the end of stdout and stderr together

    def last_line(self) -> str:
        return next((x.strip() for x in reversed(self.tail.splitlines()) if x.strip()), "")


def run(command: list[str], limit: float, log: Path | None = None, **environment) -> Outcome:
    """Runs `command` for `limit` seconds at most; its output goes to the file `log`, if any."""
    with open(log, "w+b") if log else tempfile.TemporaryFile() as output:
        start = time.monotonic()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, env={**os.environ, **environment},
        )  # fmt: skip
        try:
            code = process.wait(limit)
            state = "ended" if code >= 0 else "crashed"
        except subprocess.TimeoutExpired:
            state, code = _kill(process), None
        except BaseException:  # Ctrl-C does not reach the command's process group
            _kill(process)
            raise
        seconds = time.monotonic() - start
        output.seek(max(0, os.fstat(output.fileno()).st_size - TAIL))
        tail = output.read().decode(errors="replace")
    return Outcome(state, abs(code) if code is not None else None, seconds, tail)


def _kill(process: subprocess.Popen) -> str:
    os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        return "stuck"
    return "hung"

"""Atomic writing of files: a reader sees the old file or the whole new one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write(temporary) and then renames, so that `path` is the old file or the whole new one.

    The temporary file is beside `path` under a new random name, so that threads and processes never
    share one and no link is followed. write may replace the file (safetensors does, with one that
    other users cannot read), so its permissions are set again. It is flushed to disk before the
    rename, and removed if anything fails.
    """
    temporary, mode = _new_file(path)
    try:
        write(temporary)
        os.chmod(temporary, mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _new_file(beside: Path) -> tuple[Path, int]:
    """A new empty file and its permissions, which the umask decides as for any file. (Those of the
    module tempfile are readable by their owner only.)"""
    while True:
        path = beside.with_name(f".{beside.name}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        return path, mode

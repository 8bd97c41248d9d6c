"""A file that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """write(temporary) and then one rename, so that `path` is the old file or the whole new one.

    The temporary file is beside `path` under a name of its own that nothing had, so that threads
    and processes never share one and no link is followed; write may replace it (safetensors does,
    by a file that others cannot read), so it gets its permissions again. It is flushed to the disk
    before the rename, and removed when anything fails.
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
    """An empty file that did not exist, and its permissions. tempfile's would be closed to others:
    here the umask decides, as for any file."""
    while True:
        path = beside.with_name(f".{beside.name}.{secrets.token_hex(8)}.tmp")
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            continue
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        return path, mode

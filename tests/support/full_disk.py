"""Simulate a disk that becomes full while files are written."""

from __future__ import annotations

import builtins
import errno
import os
from pathlib import Path
from typing import Any

import pytest


class FullDisk:
    """Limits the total number of bytes that can be written to files.

    Args:
        num_bytes: free space.
    """

    def __init__(self, num_bytes: int) -> None:
        self.room = num_bytes

    def open(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Open a file like the builtin `open`."""
        opened = builtins.open(file, mode, *args, **kwargs)  # noqa: SIM115 (the caller closes it)
        if set("wa") & set(mode):
            write = opened.write

            def write_what_fits(text: Any) -> int:
                size = len(text.encode()) if isinstance(text, str) else len(text)
                if size > self.room:
                    write(text[: self.room])
                    opened.flush()
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.room -= size
                return write(text)

            opened.write = write_what_fits
        return opened


def fill_disk(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Limit the total number of bytes that can be written through `Path.open`."""
    disk, real = FullDisk(num_bytes), Path.open

    def open_path(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return real(path, mode, *args, **kwargs) if "b" in mode else disk.open(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_path)

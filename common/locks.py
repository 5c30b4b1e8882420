"""Locks between processes of one machine: a file that one of them holds (POSIX only).

The system releases a lock when its holder ends, however it ends; no lock is left behind.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

__all__ = ["is_locked", "lock_file", "take_lock"]


def take_lock(handle: int) -> None:
    """Take the lock of an open file; closing the file releases it.

    Raises:
        BlockingIOError: another process, or another handle in this one, holds it.
        OSError: the file system has no locks.
    """
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def lock_file(path: Path) -> IO[str]:
    """Take the lock of a file, which is created if need be; closing the result releases it.

    Raises:
        BlockingIOError: another process, or another handle in this one, holds it.
        OSError: the file cannot be written.
    """
    file = open(path, "w")  # noqa: SIM115
    try:
        take_lock(file.fileno())
    except BaseException:
        file.close()
        raise
    return file


def is_locked(path: Path) -> bool:
    """Whether somebody holds the lock; a file that is not there, or not readable, has no lock."""
    try:
        with open(path) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

"""Small helpers for files that must survive a power cut."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

__all__ = ["file_digest", "sync_file", "sync_folder", "write_synced"]


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, read a piece at a time."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make the content of a file durable that somebody else wrote."""
    sync_folder(path)  # the same two calls


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and fsync it; for files in a folder that nothing refers to yet."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

"""Folders whose names survive a power cut, and what they hold."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from prunecast.compression.release.files import sync_folder

__all__ = ["folder_bytes", "keep_only", "make_folder"]


def make_folder(path: Path) -> None:
    """Create a folder and its parents, each one's name durable in its own parent.

    A file that is fsynced inside a folder is still lost with it when the folder's name is not.

    Raises:
        OSError: the file system refuses.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Remove the files of a folder that are not in `names`; a missing folder is empty.

    Raises:
        OSError: the file system refuses.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 when there is none."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())

"""Files that survive a power cut: written whole or not at all, known by their digest, and locked.

The system releases a lock when its holder ends, however it ends; no lock is left behind.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = [
    "StorageError",
    "cache_folder",
    "exposure",
    "file_digest",
    "folder_bytes",
    "is_locked",
    "keep_only",
    "lock_file",
    "lock_open",
    "make_folder",
    "remove_abandoned",
    "replacing",
    "replacing_all",
    "sync",
    "take_lock",
    "write_atomically",
    "write_new",
    "write_synced",
]


_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}")


class StorageError(ValueError):
    """A file is missing, damaged or cannot be written."""


def cache_folder(name: str) -> Path:
    """``$XDG_CACHE_HOME/prunecast/NAME``, by default under ``~/.cache``; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prunecast" / name


# -- reading --------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file, read a piece at a time.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exposure(path: Path, *, group: bool = False, own: bool = True) -> str | None:
    """What is wrong with the permissions of a file that holds a secret; None: nothing.

    Args:
        path: of a file that is there.
        group: whether its group may read it.
        own: judge only a file of this user, as OpenSSH does; for what root or a container hands
            over, they have decided.

    Raises:
        OSError: there is no such file.
    """
    found = path.stat()
    if os.name != "posix" or (own and found.st_uid != os.getuid()):
        return None
    wrong = found.st_mode & (0o037 if group else 0o077)
    mode = 640 if group else 600
    return f"{path} can be read by others: chmod {mode} {path}" if wrong else None


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 when there is none."""
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


# -- replacing a file -----------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replace `path` by what the block writes: temporary file, fsync, rename, fsync of the folder.

    A crash at any moment leaves either the old file or the new one, never a mixture; so does an
    exception in the block.

    Yields:
        An empty file beside `path`, to be written.

    Raises:
        StorageError: the file system refuses; the old file is untouched.
    """
    with replacing_all([path]) as (temporary,):
        yield temporary


@contextmanager
def replacing_all(paths: Sequence[Path], outdated: Collection[Path] = ()) -> Iterator[list[Path]]:
    """Replace several files together, as `replacing` does one: no rename before the last fsync.

    Args:
        paths: in the order in which they appear. The last one, which is to say that the others are
            there, appears once their names are durable.
        outdated: files beside them that are removed before the first appears, if they are there:
            what would make old and new files look whole when the renames are cut off.

    Yields:
        An empty file beside each path, to be written.

    Raises:
        StorageError: the file system refuses; the old files are untouched unless it was a rename.
    """
    paths = [Path(path) for path in paths]
    path = paths[-1]
    made: list[Path] = []
    temporaries: list[Path] = []
    handles: list[int] = []
    try:
        try:
            for path in paths:
                path.parent.mkdir(parents=True, exist_ok=True)
                ours, handle = _temporary(path, made)
                handles.append(handle)
                temporaries.append(ours)
            yield temporaries
            for temporary in temporaries:
                sync(temporary)
            for path in outdated:
                path.unlink(missing_ok=True)
            _sync_folders(outdated)
            for path, temporary in zip(paths, temporaries, strict=True):
                if path == paths[-1]:
                    _sync_folders(paths[:-1])
                os.replace(temporary, path)
        except BaseException:
            for temporary in made:
                temporary.unlink(missing_ok=True)
            raise
        finally:
            for handle in handles:
                os.close(handle)
        _sync_folders(paths[-1:])
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error


def _sync_folders(paths: Collection[Path]) -> None:
    for folder in {path.parent for path in paths}:
        sync(folder)


def _temporary(path: Path, made: list[Path]) -> tuple[Path, int]:
    """A new file beside `path`, and a handle that holds its lock as long as it is written.

    Its name is in `made` before it is there: a signal may end the command at any moment.
    """
    while True:
        # opened by hand and not by tempfile, so that the file gets the user's usual permissions
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        made.append(temporary)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            take_lock(handle)
        except BlockingIOError:  # `remove_abandoned` was quicker
            os.close(handle)
            continue
        except OSError:  # a file system without locks, where nothing is taken for abandoned
            return temporary, handle
        if temporary.exists():
            return temporary, handle
        os.close(handle)


def remove_abandoned(folder: Path, names: Collection[str] | None = None) -> None:
    """Remove what `replacing` left in a folder when it was killed; what is being written stays.

    Args:
        folder: need not be there.
        names: of the files that were to be replaced; None for a folder that is the caller's alone.
    """
    for path in folder.glob(".*"):
        found = _TEMPORARY.fullmatch(path.name)
        if found is None or not (names is None or found[1] in names):
            continue
        with suppress(OSError):
            handle = os.open(path, os.O_WRONLY | os.O_NOFOLLOW)
            try:
                take_lock(handle)
                path.unlink()
            finally:
                os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, see `replacing`.

    Raises:
        StorageError: the file system refuses; the old file is untouched.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


# -- files and folders that nothing refers to yet -------------------------------------------------


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable.

    Raises:
        OSError: the file system refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and fsync it; its name is durable once its folder is synced.

    Raises:
        OSError: the file system refuses.
    """
    with open(path, "wb") as file:
        _write(file.fileno(), data)


def write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write and fsync a file that is not there yet, with the given permissions from the start.

    Raises:
        FileExistsError: it is there.
        OSError: the file system refuses.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        _write(handle, data)
    finally:
        os.close(handle)


def _write(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
    os.fsync(handle)


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
    sync(path.parent)


def keep_only(folder: Path, names: Collection[str]) -> None:
    """Remove the files of a folder that are not in `names`; a missing folder is empty.

    Raises:
        OSError: the file system refuses.
    """
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()


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
    return lock_open(open(path, "w"))


def lock_open(file: IO[str]) -> IO[str]:
    """Take the lock of an open file, as `take_lock` does; it is closed when that fails."""
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

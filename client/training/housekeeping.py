"""The folder in which the nodes of a machine keep their jobs: who uses what, and what goes first.

    <root>/<job>/name                of a job that has one
    <root>/<job>/<node id>/          of one node in one job, see `prunecast.client.training.store`
    <root>/<job>/<node id>/finished  where the server said that the job is at its end

A node's folder is as old as its last message: its time is set with every one, whether anything is
written or not. As long as a message is handled, its process holds a shared lock on the folder,
which the system releases however the process ends. Who removes a folder takes the lock alone, looks
again, and renames it before it is emptied; who meets such a folder makes a new one. So many
processes may start together in one root, and none loses what it uses.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prunecast.common.files import cache_folder, folder_bytes, remove_abandoned
from prunecast.compression.flower import job_id

__all__ = [
    "NAME",
    "STALE_SECONDS",
    "Kept",
    "default_root",
    "enter",
    "folder_of",
    "forget",
    "kept_bytes",
    "kept_in",
    "make",
    "make_room",
    "remove",
    "say_finished",
    "tidy",
]

STALE_SECONDS = 30 * 24 * 3600
"""After which a folder that no message used is taken for one of a run long over."""
NAME = "name"
_FINISHED = "finished"
_GONE = ".gone-"  # before a folder that is being emptied
_TRIES = 50
_PAUSE_SECONDS = 0.01
_LONGEST_NAME = 200  # characters of a job's name that are read


def default_root() -> Path:
    """``$PRUNECAST_STORE``, else ``prunecast/nodes`` in the user's cache directory."""
    if explicit := os.environ.get("PRUNECAST_STORE"):
        return Path(explicit)
    return cache_folder("nodes")


def folder_of(root: Path, job: int | str, node_id: int) -> Path:
    """What one node keeps in one job.

    Args:
        root: directory for all jobs and nodes of this machine.
        job: its name, or Flower's run id.
        node_id: Flower's node id.
    """
    return root / job_id(job) / str(node_id)


def kept_bytes(root: Path, job: int | str, node_id: int) -> int:
    """Bytes of the files of one node in one job; 0 where it kept none."""
    return folder_bytes(folder_of(root, job, node_id))


def forget(root: Path, job: int | str, node_id: int, *, residuals: bool) -> None:
    """Remove what a node keeps between messages; it goes on as one whose disk was lost.

    Args:
        root: directory for all jobs and nodes of this machine.
        job: its name, or Flower's run id.
        node_id: Flower's node id; none of its messages may be under way.
        residuals: also what its updates dropped, and not only the versions it holds.
    """
    folder = folder_of(root, job, node_id)
    if residuals:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.glob("*.model"):
        path.unlink(missing_ok=True)


# -- one's own folder -----------------------------------------------------------------------------


def enter(folder: Path) -> int | None:
    """Make a node's folder if need be, note that it is used, and hold its lock.

    Returns:
        An open handle, whose end releases the lock; None where the file system has no locks, or the
        folder is there and cannot be opened.

    Raises:
        OSError: it is not there and cannot be made.
    """
    for _ in range(_TRIES):
        make(folder)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # another process has removed it since
            continue
        except OSError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                with suppress(OSError):  # where nothing can be written, nobody removes it
                    os.utime(folder)
                return handle
            os.close(handle)
        except BlockingIOError:  # it is about to be removed
            os.close(handle)
            time.sleep(_PAUSE_SECONDS)
        except FileNotFoundError:
            os.close(handle)
        except OSError:
            os.close(handle)
            return None
    return None


def make(folder: Path) -> None:
    """Make a node's folder, whatever other processes make or remove meanwhile.

    Raises:
        OSError: the file system refuses.
    """
    for left in reversed(range(_TRIES)):
        try:
            # what a node drops from its updates says something of its data: owner only
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            return
        except FileNotFoundError:  # the job's folder was empty, and is gone again
            if not left:
                raise


def say_finished(folder: Path, finished: bool) -> None:
    """Note what the server says: whether a job is at its end, so that its files may go."""
    with suppress(OSError):
        if finished:
            (folder / _FINISHED).touch()
        else:
            (folder / _FINISHED).unlink(missing_ok=True)


# -- those of all ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """What one node keeps in one job.

    Attributes:
        folder: where.
        job: name of the job; Flower's run id of one that has none.
        size: bytes of its files.
        used: when the last message came, in seconds since 1970.
        finished: whether the server said that the job is at its end.
        in_use: whether a message is being handled, by a process that is alive.
    """

    folder: Path
    job: str
    size: int
    used: float
    finished: bool
    in_use: bool

    @property
    def node(self) -> str:
        """Flower's node id."""
        return self.folder.name

    def is_left(self, seconds: float = STALE_SECONDS) -> bool:
        """Whether its job is over, or no message came for so long."""
        return not self.in_use and (self.finished or time.time() - self.used > seconds)


def kept_in(root: Path) -> list[Kept]:
    """What the nodes of a machine keep, that which was used longest ago first.

    Args:
        root: directory for all jobs and nodes of this machine; need not be there.

    Raises:
        OSError: it cannot be read.
    """
    found = [_look(folder) for folder in _folders(root)]
    return sorted((kept for kept in found if kept is not None), key=lambda kept: kept.used)


def _folders(root: Path) -> Iterator[Path]:
    for job in filter(_is_job, _entries(root)):
        yield from _nodes(job)


def _nodes(job: Path) -> list[Path]:
    """The folders of a job's nodes; none where the job is another user's, who keeps it closed."""
    with suppress(OSError):
        return list(filter(_is_node, _entries(job)))
    return []


# nobody here makes a link: what one leads to is not the store's to count or remove


def _is_job(path: Path) -> bool:
    named = path.name.isdigit() or path.name.startswith("job-")
    return named and not path.is_symlink()


def _is_node(path: Path) -> bool:
    return path.name.isdigit() and path.is_dir() and not path.is_symlink()


def _entries(folder: Path) -> list[Path]:
    """What is in a folder; nothing where there is none, or not any more."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _look(folder: Path) -> Kept | None:
    """What is to be said of a node's folder; None where it is gone."""
    try:
        used, size = folder.stat().st_mtime, folder_bytes(folder)
        finished = (folder / _FINISHED).exists()
    except OSError:
        return None
    return Kept(folder, _name_of(folder.parent), size, used, finished, _is_in_use(folder))


def _name_of(job: Path) -> str:
    try:
        with open(job / NAME, encoding="utf-8", errors="replace") as file:
            return file.read(_LONGEST_NAME) or job.name
    except OSError:
        return job.name


def _is_in_use(folder: Path) -> bool:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no locks on this file system
        return False
    finally:
        os.close(handle)
    return False


def remove(kept: Kept) -> bool:
    """Remove what a node keeps in a job, unless a message came since, or is being handled.

    Returns:
        Whether it is gone.
    """
    try:
        handle = os.open(kept.folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    gone = kept.folder.parent / f"{_GONE}{secrets.token_hex(8)}"
    try:
        if not _lock_alone(handle, kept) or kept.folder.stat().st_mtime > kept.used:
            return False
        os.rename(kept.folder, gone)
    except OSError:
        return not kept.folder.exists()
    finally:
        os.close(handle)
    shutil.rmtree(gone, ignore_errors=True)
    _remove_if_empty(kept.folder.parent)
    return True


def _lock_alone(handle: int, kept: Kept) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # without locks, age is all there is to go by
        locked = isinstance(error, BlockingIOError) or error.errno == errno.EWOULDBLOCK
        return not locked and time.time() - kept.used > STALE_SECONDS
    return True


def _remove_if_empty(job: Path) -> None:
    """Remove a job's folder once none of its nodes keeps anything."""
    with suppress(OSError):
        if all(path.name == NAME for path in _entries(job)):
            (job / NAME).unlink(missing_ok=True)
            job.rmdir()


def tidy(root: Path, keep: Path) -> None:
    """Remove what jobs that are over left, and what killed processes left half done.

    Args:
        root: directory for all jobs and nodes of this machine.
        keep: a job's folder, that is in use.
    """
    with suppress(OSError):  # another node of this machine does the same at the same time
        for job in filter(_is_job, _entries(root)):
            for left in job.glob(f"{_GONE}*"):
                shutil.rmtree(left, ignore_errors=True)
            remove_abandoned(job)
            if job == keep:
                continue
            for folder in _nodes(job):
                kept = _look(folder) if _may_be_left(folder) else None
                if kept is not None and kept.is_left():
                    remove(kept)
            if _age(job) > STALE_SECONDS:
                _remove_if_empty(job)


def _age(folder: Path) -> float:
    """Seconds since a folder was used; 0 where it is gone."""
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0.0


def _may_be_left(folder: Path) -> bool:
    """A first look, since there may be thousands, and what they keep takes time to add up."""
    return _age(folder) > STALE_SECONDS or os.path.exists(folder / _FINISHED)


def make_room(root: Path, keep: Path, most: int, more: int) -> bool:
    """Remove what was used longest ago, until so many bytes more are within a quota.

    Args:
        root: directory for all jobs and nodes of this machine.
        keep: a job's folder, that stays whatever it takes.
        most: bytes of the quota.
        more: bytes that are to be written.

    Returns:
        Whether there is room now.
    """
    try:
        everything = kept_in(root)
    except OSError:  # what others keep cannot be known, nor removed
        everything = [kept for kept in map(_look, _nodes(keep)) if kept is not None]
    total = sum(kept.size for kept in everything) + more
    for kept in sorted(everything, key=lambda kept: (not kept.finished, kept.used)):
        if total <= most:
            break
        if kept.folder.parent != keep and not kept.in_use and remove(kept):
            total -= kept.size
    return total <= most

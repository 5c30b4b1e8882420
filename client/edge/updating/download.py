"""Verified downloads that resume where they were interrupted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from tuf.api.exceptions import DownloadError, DownloadHTTPError

from prunecast.client.edge.errors import ContentMissing, ContentRefused, NetworkError, StateError
from prunecast.client.edge.updating.transport import AskLater, Fetcher
from prunecast.common.files import file_digest, make_folder, sync
from prunecast.compression.release.manifest import FileRef

__all__ = ["download"]

_PATIENCE = 60.0  # seconds that a server may ask for between two attempts


def download(
    fetcher: Fetcher,
    url: str,
    ref: FileRef,
    path: Path,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
    attempts: int = 4,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Fetch `url` to `path` and check it against `ref`; a file that is there already is kept.

    An interrupted download leaves ``<path>.part``, and the next attempt, in this process or a
    later one, asks only for the rest. Never more than ``ref.length`` bytes are written.

    Args:
        fetcher: the network.
        url: where the file is.
        ref: its digest and length, from signed metadata.
        path: where it goes.
        on_bytes: called with the number of bytes of every piece received.
        attempts: how often a broken connection is retried.
        wait: sleeps for so many seconds between attempts.

    Raises:
        ContentRefused: longer or shorter than `ref` says, or with another digest.
        ContentMissing: the server does not have it.
        NetworkError: not reachable; the part is kept.
        StateError: the disk refuses.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        if path.is_file() and file_digest(path) == ref.sha256:
            return
        make_folder(path.parent)
        resumed = _fill(fetcher, url, ref, part, on_bytes, attempts, wait)
        if file_digest(part) != ref.sha256:
            part.unlink()
            if not resumed:
                raise ContentRefused(f"{url} is not the file that was signed: digest differs")
            # the kept part may have been damaged on disk: once more, from the beginning
            _fill(fetcher, url, ref, part, on_bytes, attempts, wait)
            if file_digest(part) != ref.sha256:
                part.unlink()
                raise ContentRefused(f"{url} is not the file that was signed: digest differs")
        os.replace(part, path)
        sync(path.parent)
    except OSError as error:
        raise StateError(f"cannot write {path}: {error.strerror or error}") from error


def _fill(
    fetcher: Fetcher,
    url: str,
    ref: FileRef,
    part: Path,
    on_bytes: Callable[[int], None],
    attempts: int,
    wait: Callable[[float], None],
) -> bool:
    """Complete `part`; returns whether it began with bytes of an earlier attempt."""
    if part.is_symlink() or (part.exists() and part.stat().st_size > ref.length):
        part.unlink()
    resumed = _size(part) > 0
    whole = not resumed  # whether every byte of the part came in this call
    for attempt in range(1, attempts + 1):
        problem: DownloadError
        pause = 0.25 * 2**attempt
        try:
            _append(fetcher, url, ref, part, on_bytes)
        except AskLater as error:
            if error.seconds > _PATIENCE:
                raise NetworkError(f"{error}; what has come is kept") from error
            pause, problem = max(pause, error.seconds), error
        except DownloadHTTPError as error:
            if error.status_code == 416:  # the server's file ends where the part does, or before
                if whole:
                    raise _short(url, _size(part), ref) from error
                part.unlink(missing_ok=True)
                whole = True
            elif error.status_code < 500:
                raise ContentMissing(f"cannot download: {error}") from error
            problem = error
        except DownloadError as error:
            problem = error
        else:
            if _size(part) == ref.length:
                return resumed
            if attempt == attempts:  # every time, and without any error: the file is too short
                raise _short(url, _size(part), ref)
            problem = DownloadError("ended early")
        if attempt < attempts:
            wait(pause)
    raise NetworkError(f"cannot download after {attempts} attempts: {problem}") from problem


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _short(url: str, size: int, ref: FileRef) -> ContentRefused:
    return ContentRefused(
        f"{url} ended early: the server has {size} of the {ref.length} bytes that were signed; "
        "its copy is truncated: copy the repository there again"
    )


def _append(
    fetcher: Fetcher, url: str, ref: FileRef, part: Path, on_bytes: Callable[[int], None]
) -> None:
    held = _size(part)
    if held == ref.length:
        part.touch()
        return
    stream = fetcher.open(url, held)
    with open(part, "r+b" if part.exists() else "w+b") as file:
        file.truncate(stream.start)
        file.seek(stream.start)
        size = stream.start
        try:
            for chunk in stream.chunks:
                on_bytes(len(chunk))
                size += len(chunk)
                if size > ref.length:
                    raise ContentRefused(
                        f"{url} is longer than the {ref.length} bytes that were signed"
                    )
                file.write(chunk)
        except ContentRefused:
            file.truncate(0)
            raise
        except DownloadError:
            raise
        except OSError as error:
            raise DownloadError(f"connection to {url} broke: {error}") from error
        finally:
            file.flush()
            os.fsync(file.fileno())

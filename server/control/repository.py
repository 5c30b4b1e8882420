"""What devices may have of the release repository: its live releases, its public files."""

from __future__ import annotations

import threading
from pathlib import Path

from grpc import StatusCode

from prunecast.server.control.errors import Refused
from prunecast.server.fleet.model import Release
from prunecast.server.repository import RepositoryReader
from prunecast.server.repository.serving.files import FilePart, family, open_public

__all__ = ["LiveReleases", "open_file"]


def open_file(repository: Path, name: str, offset: int, *, most_bytes: int) -> FilePart:
    """Open a public file of a repository.

    Args:
        repository: its folder.
        name: as devices name it, such as ``blobs/SHA256``; only names that a repository makes.
        offset: first byte wanted.
        most_bytes: refuse files that are larger.

    Returns:
        The file from `offset` on.

    Raises:
        Refused: no name that a repository makes; no file of this name; it has more than
            `most_bytes`; or `offset` lies behind its end.
        OSError: the file is there and cannot be opened.
    """
    if family(name) is None:
        raise Refused(
            StatusCode.INVALID_ARGUMENT, f"{name[:120]!r} is no file of a release repository"
        )
    try:
        descriptor, size = open_public(repository, name)
    except FileNotFoundError as error:
        raise Refused(StatusCode.NOT_FOUND, f"the repository has no {name}") from error
    part = FilePart(descriptor, offset, size - offset)
    if size <= most_bytes and offset <= size:
        return part
    part.close()
    if size > most_bytes:
        raise Refused(
            StatusCode.FAILED_PRECONDITION,
            f"{name} has {size} bytes, more than the {most_bytes} that come this way: "
            "get it from the repository's web server",
        )
    raise Refused(StatusCode.OUT_OF_RANGE, f"{name} has {size} bytes, there is no byte {offset}")


class LiveReleases:
    """Callable that gives the live releases; cheap while the repository stays as it is.

    Args:
        repository: its folder.

    Raises:
        RepositoryCorrupt: no repository there, or it is damaged.
    """

    def __init__(self, repository: Path) -> None:
        self._reader = RepositoryReader(repository)
        self._lock = threading.Lock()
        self._stamp: tuple[int, int, int] | None = None
        self._releases: tuple[Release, ...] = ()
        self()

    def __call__(self) -> tuple[Release, ...]:
        """The releases, by name and number.

        Raises:
            RepositoryCorrupt: the repository is damaged.
        """
        # every publication replaces this file, as the last one
        found = (self._reader.path / "metadata" / "timestamp.json").stat()
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        with self._lock:
            if stamp != self._stamp:
                listed = self._reader.releases()
                self._releases = tuple(Release(e.name, e.version) for e in listed)
                self._stamp = stamp
            return self._releases

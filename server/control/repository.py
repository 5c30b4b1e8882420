"""What devices may have of the release repository: its live releases, its public files."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from prunecast.common.fleet_protocol import CHUNK_BYTES
from prunecast.server.control.errors import BadPath, FileTooLarge, NoSuchFile, OffsetBehindEnd
from prunecast.server.fleet.model import Release
from prunecast.server.repository import RepositoryReader
from prunecast.server.repository.serving.files import family, open_public

__all__ = ["LiveReleases", "OpenFile", "open_file"]


@dataclass
class OpenFile:
    """A file that is open at an offset; a context manager.

    Attributes:
        descriptor: of the file.
        length: of the whole file in bytes.
        offset: of the next chunk.
    """

    descriptor: int
    length: int
    offset: int

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)

    def read(self) -> bytes:
        """The next chunk; empty at the end."""
        data = os.pread(self.descriptor, min(CHUNK_BYTES, self.length - self.offset), self.offset)
        self.offset += len(data)
        return data


def open_file(repository: Path, name: str, offset: int, *, most_bytes: int) -> OpenFile:
    """Open a public file of a repository.

    Args:
        repository: its folder.
        name: as devices name it, such as ``blobs/SHA256``; only names that a repository makes.
        offset: first byte wanted.
        most_bytes: refuse files that are larger.

    Raises:
        BadPath: no name that a repository makes.
        NoSuchFile: it has no file of this name.
        OSError: the file is there and cannot be opened.
        FileTooLarge: it has more than `most_bytes`.
        OffsetBehindEnd: the offset lies behind its end.
    """
    if family(name) is None:
        raise BadPath(f"{name[:120]!r} is no file of a release repository")
    try:
        descriptor, size = open_public(repository, name)
    except FileNotFoundError as error:
        raise NoSuchFile(f"the repository has no {name}") from error
    try:
        if size > most_bytes:
            raise FileTooLarge(
                f"{name} has {size} bytes, more than the {most_bytes} that come this way: "
                "get it from the repository's web server"
            )
        if offset > size:
            raise OffsetBehindEnd(f"{name} has {size} bytes, there is no byte {offset}")
    except BaseException:
        os.close(descriptor)
        raise
    return OpenFile(descriptor, size, offset)


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

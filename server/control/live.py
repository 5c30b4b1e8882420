"""The live releases of a repository, read again only when it has changed."""

from __future__ import annotations

import threading
from pathlib import Path

from prunecast.server.fleet import Release
from prunecast.server.repository import RepositoryReader

__all__ = ["LiveReleases"]


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

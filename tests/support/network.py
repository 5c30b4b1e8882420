"""A repository's folder as a network that tests can tamper with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tuf.api.exceptions import DownloadError, DownloadHTTPError

from prunecast.client.edge.updating.transport import Fetcher, Stream

__all__ = ["Network"]


@dataclass
class Network(Fetcher):
    """A repository's folder as a network.

    Attributes:
        folder: what is served.
        replaced: content by path that takes the place of the real one; None answers 404.
        cut: by path, after how many bytes the connection breaks, once.
        endless: paths whose content goes on for ever.
        asked: every request: path and offset.
    """

    folder: Path
    replaced: dict[str, bytes | None] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    endless: set[str] = field(default_factory=set)
    asked: list[tuple[str, int]] = field(default_factory=list)
    down: bool = False

    def open(self, url: str, offset: int = 0) -> Stream:
        path = unquote(urlsplit(url).path).lstrip("/")
        self.asked.append((path, offset))
        if self.down:
            raise DownloadError("no route")
        file = self.folder / path
        data = self.replaced.get(path, file.read_bytes() if file.is_file() else None)
        if data is None:
            raise DownloadHTTPError(f"{url} answered 404", 404)
        return Stream(offset, self._chunks(path, data[offset:]))

    def _chunks(self, path: str, data: bytes) -> Iterator[bytes]:
        if path in self.endless:
            yield data
            while True:
                yield bytes(1 << 16)
        limit = self.cut.pop(path, None)
        yield from (data[i : i + 64] for i in range(0, len(data[:limit]), 64))
        if limit is not None:
            raise DownloadError("connection broke")

"""Compressed files (``.pcc``): one or more parts, one after the other. See ``docs/files.md``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from prunecast.common.bounds import byte_limit, too_large
from prunecast.compression.codec import (
    CodecError,
    LimitExceeded,
    Limits,
    Outline,
    outline_payload,
    payload_length,
)
from prunecast.compression.files import FileTooLarge, UnreadableFile
from prunecast.compression.files.contents import content_hint, reading
from prunecast.compression.files.parts import ESCAPED, MOST_NAME, FilePart, open_part
from prunecast.compression.files.tensors import FileSpec, FileTensor, TensorFile

__all__ = [
    "PART_BYTES",
    "Archive",
    "describe_payloads",
    "open_archive",
    "plan_parts",
    "read_payloads",
]

PART_BYTES = 1 << 25
"""Parts hold tensors of up to so many bytes together, or one larger tensor."""
_PART_TENSORS = 1 << 14
_START = 16  # bytes that hold a payload's length


class Archive(TensorFile):
    """A compressed file whose tensors are decoded when asked for, one part in memory at a time.

    Attributes:
        steps: name to lattice step, of the quantised tensors.
        places: offset and length of every part.
        part_of: name to number of the part that holds it.
        limits: what it was opened with.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.steps: dict[str, float] = {}
        self.places: list[tuple[int, int]] = []
        self.part_of: dict[str, int] = {}
        self.limits = limits
        self._last: tuple[int, FilePart] | None = None
        super().__init__(path, "pcc", {}, self._decoded)
        self._read_parts()

    def _decoded(self, name: str) -> FileTensor:
        number = self.part_of[name]
        if self._last is None or self._last[0] != number:
            self._last = None  # before another is read
            offset, nbytes = self.places[number]
            with reading(self.path), open(self.path, "rb") as file:
                file.seek(offset)
                payload = file.read(nbytes)
            self._last = (number, self._open(payload))
        try:
            return self._last[1].load(name)
        except UnreadableFile as error:
            raise UnreadableFile(f"{self.path}: {error}") from error

    def _open(self, payload: bytes) -> FilePart:
        try:
            return open_part(payload, self.limits)
        except LimitExceeded as error:
            raise FileTooLarge(
                f"{self.path}: {error}; allow more if you trust it (--max-bytes)"
            ) from error
        except CodecError as error:
            raise UnreadableFile(f"{self.path} cannot be decoded: {error}") from error
        except UnreadableFile as error:
            raise UnreadableFile(f"{self.path}: {error}") from error

    def _read_parts(self) -> None:
        """Read what every part says of itself, and check that they belong together."""
        offset, total, count = 0, 0, 1
        for number, payload in enumerate(read_payloads(self.path)):
            self._last = None  # before another is opened
            part = self._open(payload)
            if not number:
                count, self.metadata, self.graph = part.count, part.metadata, part.graph
            if part.count != count or part.number != number:
                raise UnreadableFile(f"{self.path}: its parts are not those of one file, in order")
            for name, spec in part.specs.items():
                if name in self.specs:
                    raise UnreadableFile(f"{self.path}: tensor {name!r} is in two parts")
                self.specs[name] = spec
                self.part_of[name] = number
                total += spec.nbytes
            self.steps |= part.steps
            if total > self.limits.decoded_bytes:
                limit = self.limits.decoded_bytes
                raise FileTooLarge(f"{self.path}: {too_large('its tensors take', limit)}")
            self.places.append((offset, len(payload)))
            self._last = (number, part)
            offset += len(payload)
        if len(self.places) != count:
            raise UnreadableFile(f"{self.path} is cut off: {len(self.places)} of {count} parts")


def read_payloads(path: Path) -> Iterator[bytes]:
    """Yield the payloads of a compressed file; each is checked only for its stated length.

    Raises:
        UnreadableFile: missing, empty, cut off, or no compressed file.
    """
    with reading(path), open(path, "rb") as file:
        size = path.stat().st_size
        if not size:
            raise UnreadableFile(f"{path} is empty")
        while file.tell() < size:
            yield _next(path, file, size)


def _next(path: Path, file: IO[bytes], size: int) -> bytes:
    start = file.tell()
    try:
        length = payload_length(file.read(_START))
    except CodecError as error:
        where = f" (at byte {start})" if start else ""
        hint = "" if start else content_hint(path)
        raise UnreadableFile(f"{path} is not a compressed file{where}: {error}{hint}") from error
    if length < 1 or length > size - start:
        raise UnreadableFile(f"{path} is cut off: {length} bytes should follow byte {start}")
    file.seek(start)
    return file.read(length)


def describe_payloads(path: Path) -> list[Outline]:
    """Return what every payload of a file says of itself, also of those that need a context.

    Raises:
        UnreadableFile: missing, damaged, cut off, or no file of payloads.
    """
    path = Path(path)
    outlines = []
    for payload in read_payloads(path):
        try:
            outlines.append(outline_payload(payload, Limits(payload_bytes=len(payload))))
        except CodecError as error:
            raise UnreadableFile(f"{path} cannot be decoded: {error}") from error
    return outlines


def open_archive(path: Path, *, max_bytes: int | None = None) -> Archive:
    """Open a compressed file.

    Args:
        path: a ``.pcc`` file, or any file of codec payloads that need no context.
        max_bytes: most bytes that its tensors may take together; default 1 GiB, or 64 times the
            file's size if that is more.

    Raises:
        UnreadableFile: missing, damaged, cut off, or no compressed file.
        FileTooLarge: its tensors exceed `max_bytes`.
    """
    return Archive(Path(path), _limits(Path(path), max_bytes))


def _limits(path: Path, max_bytes: int | None) -> Limits:
    with reading(path):
        size = path.stat().st_size
    most = byte_limit(size, max_bytes)
    free = Limits().free_bytes if max_bytes is None else max_bytes
    return Limits(
        payload_bytes=size,
        name_bytes=MOST_NAME + len(ESCAPED),
        elements=most,
        decoded_bytes=most,
        free_bytes=free,
        levels=max(Limits().levels, most >> 8),
    )


def plan_parts(specs: Mapping[str, FileSpec], part_bytes: int = PART_BYTES) -> list[list[str]]:
    """Split tensors into the names of each part, in order."""
    parts: list[list[str]] = [[]]
    held = 0
    for name, spec in specs.items():
        size = max(spec.nbytes, 4 * spec.size)  # as the codec's limits count
        if len(parts[-1]) >= _PART_TENSORS or (parts[-1] and held + size > part_bytes):
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += size
    return parts

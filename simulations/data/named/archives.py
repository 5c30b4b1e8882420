"""Files inside of packages, read where they lie: nothing is unpacked, nothing is run.

Each member that is wanted has a size and a digest, which are known beforehand; what an archive
states is only compared with them. No more is inflated than what is wanted, and a little.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from prunecast.simulations.data.named.definition import Member
from prunecast.simulations.kinds import DataError

__all__ = ["check_member", "read_members"]

_SLACK = 1 << 24  # bytes that a tar archive may inflate to beyond what is wanted of it
_XZ_MEMORY = 1 << 28  # bytes, of its dictionary
_CHUNK = 1 << 20
_BAD = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, OSError, EOFError),
    *(NotImplementedError, ValueError, LookupError, RuntimeError, MemoryError),
)


def read_members(path: Path, members: Sequence[Member]) -> dict[str, bytes]:
    """The bytes of some files of an archive, by path, in the order of `members`.

    Args:
        path: of a ``.whl`` (a zip file), a ``.tgz`` or a ``.deb``.
        members: that are wanted.

    Raises:
        DataError: the archive is damaged or inflates to too much, or a member is missing, no plain
            file, or has another size or digest.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix == ".whl":
                found = _zip(file, members)
            elif path.suffix == ".deb":
                found = _tar(_debian(file), members)
            else:
                with gzip.GzipFile(fileobj=file) as stream:
                    found = _tar(stream, members)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error.__cause__
    except _BAD as error:
        raise DataError(f"{path} cannot be read as an archive ({error}): fetch it again") from error
    for member in members:
        if member.path not in found:
            raise DataError(f"{path} holds no {member.path}: it is another version of the package")
        check_member(member, found[member.path], str(path))
    return {member.path: found[member.path] for member in members}


def check_member(member: Member, content: bytes, where: str) -> None:
    """Raise `DataError` where a file has not the size and digest that are known of it."""
    digest = hashlib.sha256(content).hexdigest()
    if len(content) != member.nbytes or digest != member.sha256:
        raise DataError(
            f"{where}: {member.path} is another file ({len(content):,} bytes, SHA-256 {digest}) "
            f"than the one that is known ({member.nbytes:,} bytes, SHA-256 {member.sha256})"
        )


def _zip(file: IO[bytes], members: Sequence[Member]) -> dict[str, bytes]:
    found = {}
    with zipfile.ZipFile(file) as archive:
        held = {info.filename: info for info in archive.infolist()}
        for member in members:
            info = held.get(member.path)
            if info is None:
                continue
            if info.file_size != member.nbytes:
                raise DataError(
                    f"{member.path} has {info.file_size:,} bytes, not {member.nbytes:,}"
                )
            # zipfile inflates other methods in one piece, however little was asked for
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise DataError(f"{member.path} is compressed by method {info.compress_type}")
            with archive.open(info) as stream:
                found[member.path] = stream.read(member.nbytes + 1)
    return found


class _Bounded:
    """The bytes that a decompressor gives, and `DataError` beyond a limit."""

    def __init__(self, stream: Any, limit: int) -> None:
        self._stream, self._limit, self._left = stream, limit, limit

    def read(self, count: int) -> bytes:
        piece: bytes = self._stream.read(count)
        self._left -= len(piece)
        if self._left < 0:
            raise DataError(f"it inflates to more than {self._limit:,} bytes")
        return piece


def _tar(stream: Any, members: Sequence[Member]) -> dict[str, bytes]:
    """Members of a stream that cannot seek; it ends with the last one that is wanted."""
    wanted = {member.path: member for member in members}
    found: dict[str, bytes] = {}
    bounded: Any = _Bounded(stream, sum(m.nbytes for m in members) + _SLACK)
    with tarfile.open(fileobj=bounded, mode="r|") as archive:
        for info in archive:
            name = info.name.removeprefix("./")
            member = wanted.get(name)
            if member is None or name in found:
                continue
            inner = archive.extractfile(info) if info.isreg() else None
            if inner is None:
                raise DataError(f"{name} is no plain file")
            if info.size != member.nbytes:
                raise DataError(f"{name} has {info.size:,} bytes, not {member.nbytes:,}")
            found[name] = inner.read()
            if len(found) == len(wanted):
                break
    return found


class _Xz:
    """What an ``.xz`` stream holds; a read gives no more than is asked for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._inflating = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def read(self, count: int) -> bytes:
        while not self._inflating.eof:
            wanting = self._inflating.needs_input
            given = self._file.read(_CHUNK) if wanting else b""
            if wanting and not given:
                raise EOFError("it is cut off")
            if piece := self._inflating.decompress(given, count):
                return piece
        return b""


def _debian(file: IO[bytes]) -> _Xz:
    """The files of a Debian package: ``data.tar.xz`` in an ar archive, see deb(5) and ar(5)."""
    if file.read(8) != b"!<arch>\n":
        raise DataError("it is no Debian package")
    while len(head := file.read(60)) == 60:
        name, size = head[:16].decode("latin1").strip().rstrip("/"), int(head[48:58])
        if name == "data.tar.xz":
            return _Xz(file)
        if size < 0:
            raise DataError("it is damaged")
        file.seek(size + size % 2, 1)
    raise DataError("it holds no data.tar.xz")

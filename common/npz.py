"""Archives of arrays (``.npz``), read without pickle and without believing what they state.

numpy and `zipfile` inflate a bzip2 or LZMA member in one piece, whatever of it was asked for, and
allocate what a header promises. Here sizes are added up before anything is inflated, and no member
gives more bytes than it stated.
"""

from __future__ import annotations

import bz2
import io
import lzma
import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.bounds import byte_limit, disk_bytes, too_large

__all__ = ["NpzArchive", "NpzError", "NpzMember", "NpzTooLarge"]

# What zipfile, its decompressors and numpy's header parser (a tokenizer and literal_eval) raise.
_BAD = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, OSError, EOFError, NotImplementedError),
    *(ValueError, LookupError, ArithmeticError, TypeError, AttributeError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, MemoryError),
)
_LONGEST_HEADER = 10_000  # bytes, as numpy accepts; without looking it would read 4 GiB of it
_LARGEST_DICTIONARY = 1 << 26  # bytes, of the highest preset
_CHUNK = 1 << 20
_LOCAL_HEADER = 30  # bytes, before a member's name
_ENCRYPTED = 1


class NpzError(ValueError):
    """A file is no readable archive of plain arrays."""


class NpzTooLarge(NpzError):
    """The arrays of an archive exceed the limit."""


@dataclass(frozen=True)
class NpzMember:
    """What an archive states of an array.

    Attributes:
        dtype: never of Python objects.
        shape: without negative dimensions.
        fortran: whether the values lie in Fortran's order.
        start: bytes of the header.
    """

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    fortran: bool
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class NpzArchive:
    """An archive whose arrays are read when asked for.

    Args:
        source: a file, or the content of one.
        max_bytes: most bytes of all arrays together, see `prunecast.common.bounds.byte_limit`.

    Attributes:
        members: what it states of each array, by name, in the archive's order.

    Raises:
        NpzTooLarge: the arrays exceed `max_bytes`.
        NpzError: missing, damaged, no archive of arrays, or one of Python objects.
    """

    def __init__(self, source: Path | bytes, *, max_bytes: int | None = None) -> None:
        self._source = source
        self._label = "" if isinstance(source, bytes) else f"{source}: "
        self.members: dict[str, NpzMember] = {}
        self._entries: dict[str, zipfile.ZipInfo] = {}  # the directory is read once, not for each
        with self._opened() as file:
            size = len(source) if isinstance(source, bytes) else disk_bytes(source)
            limit = byte_limit(size, max_bytes)
            entries = zipfile.ZipFile(file).infolist()
            if sum(info.file_size for info in entries) > limit:
                raise NpzTooLarge(too_large("it inflates to", limit))
            for info in entries:
                name = info.filename.removesuffix(".npy")
                if name == info.filename:
                    raise NpzError(f"{info.filename!r} is not an array")
                if name in self.members:
                    raise NpzError(f"it holds {name!r} twice")
                try:
                    self.members[name] = _described(_Inflated(file, info), info.file_size)
                except NpzError as error:
                    raise type(error)(f"array {name!r} {error}") from None
                self._entries[name] = info

    def read(self, name: str) -> NDArray[Any]:
        """One array, in the dtype and order of the file.

        Raises:
            KeyError: there is none of that name.
            NpzError: it is damaged.
        """
        member = self.members[name]
        info = self._entries[name]
        with self._opened() as file:
            stream = _Inflated(file, info)
            head = stream.read(member.start)
            flat = np.empty(member.nbytes, np.uint8)
            crc, at = zlib.crc32(head), 0
            while at < flat.size:
                piece = stream.read(min(_CHUNK, flat.size - at))
                if not piece:
                    raise NpzError(f"array {name!r} is cut off")
                flat[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                crc, at = zlib.crc32(piece, crc), at + len(piece)
            if stream.read(1):
                raise NpzError(f"array {name!r} holds more than it states")
            if crc != info.CRC:
                raise NpzError(f"array {name!r} is damaged: its checksum differs")
            order: Any = "F" if member.fortran else "C"
            return flat.view(member.dtype).reshape(member.shape, order=order)

    def read_all(self) -> dict[str, NDArray[Any]]:
        """All arrays by name.

        Raises:
            NpzError: one is damaged.
        """
        return {name: self.read(name) for name in self.members}

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        try:
            source = self._source
            if isinstance(source, Path) and source.exists() and not source.is_file():
                raise NpzError("no regular file")  # reading a pipe would wait for ever
            with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
                yield file
        except NpzError as error:
            raise type(error)(f"{self._label}{error}") from error.__cause__
        except _BAD as error:
            if isinstance(error, OSError) and error.strerror:
                raise NpzError(f"{self._label}{error.strerror}") from error
            what = self._label.removesuffix(": ") or "it"
            raise NpzError(f"{what} is not a readable .npz archive: {error}") from error


class _Inflated:
    """The bytes of a member; none of its decompressors gives more at a time than is asked for."""

    def __init__(self, file: IO[bytes], info: zipfile.ZipInfo) -> None:
        if info.flag_bits & _ENCRYPTED:
            raise NpzError("is encrypted")
        file.seek(info.header_offset)
        local = file.read(_LOCAL_HEADER)
        if len(local) < _LOCAL_HEADER or not local.startswith(b"PK\x03\x04"):
            raise NpzError("is damaged: it does not begin where the archive says")
        names = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        file.seek(names, io.SEEK_CUR)
        self._file, self._left = file, info.compress_size
        self._pending = b""
        self._inflate: Callable[[int], bytes]
        if info.compress_type == zipfile.ZIP_STORED:
            self._inflate = self._raw
        elif info.compress_type == zipfile.ZIP_DEFLATED:
            deflated = zlib.decompressobj(-zlib.MAX_WBITS)
            self._inflate = lambda count: self._deflated(deflated, count)
        elif info.compress_type == zipfile.ZIP_BZIP2:
            unpacker = bz2.BZ2Decompressor()
            self._inflate = lambda count: self._unpacked(unpacker, count)
        elif info.compress_type == zipfile.ZIP_LZMA:
            raw = self._lzma()
            self._inflate = lambda count: self._unpacked(raw, count)
        else:
            raise NpzError(
                f"is compressed by method {info.compress_type}, which is not read: save it with "
                "numpy.savez or numpy.savez_compressed"
            )

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; fewer at the end alone."""
        parts, missing = [], count
        while missing and (piece := self._inflate(missing)):
            parts.append(piece)
            missing -= len(piece)
        return b"".join(parts)

    def _raw(self, count: int) -> bytes:
        piece = self._file.read(min(count, self._left, _CHUNK))
        self._left -= len(piece)
        return piece

    def _deflated(self, stream: Any, count: int) -> bytes:
        while not stream.eof:
            given = stream.unconsumed_tail or self._raw(_CHUNK)
            if piece := stream.decompress(given, count):
                return bytes(piece)
            if not given:
                break
        return b""

    def _unpacked(self, stream: Any, count: int) -> bytes:
        while not stream.eof:
            given = self._pending or (self._raw(_CHUNK) if stream.needs_input else b"")
            self._pending = b""
            if piece := stream.decompress(given, count):
                return bytes(piece)
            if not given and stream.needs_input:
                break
        return b""

    def _lzma(self) -> lzma.LZMADecompressor:
        """The decoder that a member's first bytes describe (APPNOTE.TXT, 5.8.8)."""
        head = self._raw(9)
        dictionary = int.from_bytes(head[5:9], "little")
        if len(head) < 9 or head[2:4] != b"\x05\x00" or head[4] >= 9 * 5 * 5:
            raise NpzError("is damaged: its LZMA properties are wrong")
        if dictionary > _LARGEST_DICTIONARY:
            raise NpzTooLarge(f"needs an LZMA dictionary of {dictionary:,} bytes")
        rest, lc = divmod(head[4], 9)
        pb, lp = divmod(rest, 5)
        chosen = {"id": lzma.FILTER_LZMA1, "dict_size": dictionary, "lc": lc, "lp": lp, "pb": pb}
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[chosen])


def _described(stream: _Inflated, size: int) -> NpzMember:
    """What the header at the beginning of a member of `size` bytes states."""
    magic = stream.read(np.lib.format.MAGIC_LEN)
    version = np.lib.format.read_magic(io.BytesIO(magic))
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise NpzError(f"is of the unknown format {version}")
    prefix = stream.read(2 if version == (1, 0) else 4)
    length = int.from_bytes(prefix, "little")
    if length > _LONGEST_HEADER:
        raise NpzError(f"has a header of {length:,} bytes")
    header = stream.read(length)
    read: Any = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0  # 3.0 is 2.0 in UTF-8
        header = header.decode("utf-8" if version == (3, 0) else "latin1").encode("latin1")
    shape, fortran, dtype = read(io.BytesIO(prefix + header))
    start = len(magic) + len(prefix) + length
    if dtype.hasobject:
        raise NpzError(
            "holds Python objects, that is a pickle, which may run code and is never loaded: "
            "convert it to numbers, array.astype('float32') say, or leave it out"
        )
    if any(n < 0 for n in shape) or not dtype.itemsize:
        raise NpzError("has a negative dimension, or elements without bytes")
    member = NpzMember(dtype, tuple(map(int, shape)), bool(fortran), start)
    if member.nbytes != size - start:
        raise NpzError(
            f"declares {dtype}{list(shape)} in a member of {size:,} bytes: it is damaged"
        )
    return member

"""The format of MNIST and its successors, and folders of it."""

from __future__ import annotations

import dataclasses
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray

from prunecast.common.bounds import byte_limit, disk_bytes
from prunecast.simulations.data import DataError, DataSource, Examples
from prunecast.simulations.kinds import Range, ScenarioError

__all__ = ["Idx", "gunzip", "pictures", "read_idx"]

# third byte of the magic number: how an element is stored, big endian
_DTYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_CHUNK = 1 << 20
# (images, labels) as they are called everywhere, with a dot instead of the dash in some places
_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


def read_idx(content: bytes, label: str) -> NDArray[Any]:
    """The array of an IDX file, in the machine's byte order (yann.lecun.com/exdb/mnist).

    Args:
        content: of the file, inflated; the array shares no memory with it.
        label: of the file, for messages.

    Raises:
        DataError: it is none, or holds fewer or more bytes than it states.
    """
    known = len(content) >= 4 and not any(content[:2]) and content[2] in _DTYPES
    if not known or len(content) < (start := 4 + 4 * content[3]):
        raise DataError(f"{label} is no IDX file: its first bytes are {content[:4].hex(' ')}")
    dtype = np.dtype(_DTYPES[content[2]])
    shape = tuple(int(n) for n in np.frombuffer(content[4:start], ">u4"))
    stated = math.prod(shape) * dtype.itemsize
    if stated != len(content) - start:
        raise DataError(
            f"{label} states {stated:,} bytes and holds {len(content) - start:,}: it is damaged, "
            "fetch it again"
        )
    found = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return found.astype(dtype.newbyteorder("="))


def gunzip(content: bytes, limit: int, label: str) -> bytes:
    """The bytes of a gzip file, which may be in several parts; bytes that are none as they are.

    Raises:
        DataError: damaged, or more than `limit` bytes.
    """
    if not content.startswith(b"\x1f\x8b"):
        return content
    parts: list[bytes] = []
    left = limit
    try:
        while content:
            inflating = zlib.decompressobj(16 + zlib.MAX_WBITS)
            while not inflating.eof:
                piece = inflating.decompress(content, min(_CHUNK, left + 1))
                content = inflating.unconsumed_tail
                if not piece and not content and not inflating.eof:
                    raise DataError(f"{label} is cut off: fetch it again")
                left -= len(piece)
                if left < 0:
                    raise DataError(f"{label} inflates to more than {limit:,} bytes")
                parts.append(piece)
            content = inflating.unused_data.lstrip(b"\0")
    except zlib.error as error:
        raise DataError(f"{label} is damaged ({error}): fetch it again") from error
    return b"".join(parts)


def pictures(values: NDArray[Any]) -> NDArray[np.float32]:
    """Grey images (n, height, width) of bytes as (n, 1, height, width) float32 in [0, 1]."""
    return np.asarray(values, np.float32)[:, None] / np.float32(255)


@dataclass(frozen=True)
class Idx(DataSource):
    """A folder with the four files of MNIST, or of a data set in its format; gzipped or not.

    Images of bytes become (1, height, width) float32 in [0, 1].

    Attributes:
        path: of the folder; ``t10k-`` files are needed for ``held_out = "test"`` alone.
        max_bytes: most bytes of one file, inflated; by default 1 GiB, or 64 times the file.
    """

    path: str = ""
    max_bytes: Annotated[int | None, Range(1)] = None

    def check(self, key: str) -> None:
        """A folder is named."""
        if not self.path:
            remedy = f"source = 'idx' reads a folder that holds {_FILES['train'][0]}: name it"
            raise ScenarioError(f"{key}.path", "is missing", remedy)

    def located(self, folder: Path) -> Self:
        """The folder is looked for in that of the scenario file."""
        return dataclasses.replace(self, path=str(folder / self.path))

    def read(self) -> Examples:
        """The ``train-`` files."""
        return self._part("train")

    def read_test(self) -> Examples:
        """The ``t10k-`` files."""
        return self._part("test")

    def _part(self, part: str) -> Examples:
        images, labels = (self._array(name) for name in _FILES[part])
        if images.dtype == np.uint8 and images.ndim == 3:
            images = pictures(images)
        if labels.ndim != 1:
            raise DataError(f"{self.path}: {_FILES[part][1]} is {labels.ndim}-dimensional, not 1")
        return Examples({"x": images}, labels.astype(np.int64))

    def _array(self, name: str) -> NDArray[Any]:
        folder, dotted = Path(self.path), name.replace("-idx", ".idx")
        for path in (folder / end for plain in (name, dotted) for end in (plain, plain + ".gz")):
            if not path.is_file():
                continue
            try:
                limit = byte_limit(disk_bytes(path), self.max_bytes)
                if path.stat().st_size > limit:
                    raise DataError(f"{path} has more than {limit:,} bytes: raise data.max_bytes")
                return read_idx(gunzip(path.read_bytes(), limit, str(path)), str(path))
            except OSError as error:
                raise DataError(f"cannot read {path} ({error.strerror or error})") from error
        raise DataError(
            f"{folder} holds no {name} (or {name}.gz): name the folder with the files by data.path"
        )

"""General-purpose compressors, on the integers' bytes and on a bitmap or gaps of the non-zeros."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np

from .coder import Absent, Array
from .streams import StreamCoder, narrow

__all__ = ["bitmap_coder", "gap_coder", "zlib_coder", "zstd_coder"]

Pack = Callable[[bytes], bytes]


def _zstd(level: int) -> tuple[Pack, Pack, str]:
    try:
        import zstandard
    except ImportError as error:
        raise Absent("pip install zstandard") from error
    writer, reader = zstandard.ZstdCompressor(level=level), zstandard.ZstdDecompressor()
    library = ".".join(map(str, zstandard.ZSTD_VERSION))
    return writer.compress, reader.decompress, f"zstandard {zstandard.__version__} ({library})"


def _plain(name: str, settings: str, pack: Pack, unpack: Pack) -> StreamCoder:
    return StreamCoder(
        name,
        settings,
        lambda a: pack(a.tobytes()),
        lambda data, dtype, n: np.frombuffer(unpack(data), dtype),
    )


def zlib_coder() -> StreamCoder:
    """Deflate at its default level, as every platform has it."""
    return _plain(
        "zlib -6",
        f"zlib {zlib.ZLIB_RUNTIME_VERSION}, level 6",
        lambda data: zlib.compress(data, 6),
        zlib.decompress,
    )


def zstd_coder(level: int) -> StreamCoder:
    """Zstandard on the integers' bytes."""
    pack, unpack, version = _zstd(level)
    return _plain(f"zstd -{level}", f"{version}, level {level}", pack, unpack)


def bitmap_coder() -> StreamCoder:
    """One bit for each position, then the non-zeros; zstd -19 over both."""
    pack, unpack, version = _zstd(19)

    def encode(q: Array) -> bytes:
        values = narrow(q[q != 0])
        raw = np.packbits(q != 0).tobytes() + values.tobytes()
        return bytes([values.itemsize]) + pack(raw)

    def decode(data: bytes, dtype: np.dtype[np.generic], n: int) -> Array:
        raw = unpack(data[1:])
        split = (n + 7) // 8
        used = np.unpackbits(np.frombuffer(raw[:split], np.uint8), count=n).astype(bool)
        out = np.zeros(n, dtype)
        out[used] = np.frombuffer(raw[split:], f"i{data[0]}")
        return out

    return StreamCoder("bitmap + zstd", f"{version}, level 19", encode, decode, integers_only=True)


def gap_coder() -> StreamCoder:
    """Distances between non-zeros as bytes (255: go on), then the non-zeros; zstd -19 on each."""
    pack, unpack, version = _zstd(19)

    def encode(q: Array) -> bytes:
        at = np.flatnonzero(q)
        distance = np.diff(at, prepend=-1) - 1
        more = distance // 255
        steps = np.full(int(more.sum()) + len(at), 255, np.uint8)
        steps[np.cumsum(more + 1) - 1] = distance % 255
        values = narrow(q[at])
        first = pack(steps.tobytes())
        head = bytes([values.itemsize]) + len(first).to_bytes(4, "little")
        return head + first + pack(values.tobytes())

    def decode(data: bytes, dtype: np.dtype[np.generic], n: int) -> Array:
        end = 5 + int.from_bytes(data[1:5], "little")
        steps = np.frombuffer(unpack(data[5:end]), np.uint8)
        last = steps < 255
        at = np.cumsum(steps + last.astype(np.int64))[last] - 1
        out = np.zeros(n, dtype)
        out[at] = np.frombuffer(unpack(data[end:]), f"i{data[0]}")
        return out

    return StreamCoder("gaps + zstd", f"{version}, level 19", encode, decode, integers_only=True)

"""How much a file from elsewhere may ask for: one limit for every reader.

A few bytes of a compressed archive, of a sparse tensor or of a graph can state terabytes. Every
reader of foreign files adds up what a file states, compares it with `byte_limit`, and only then
allocates. What cannot be added up, because somebody else's runtime decides, runs in a process of
its own under the same limit, see `prunecast.common.bounded`.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["byte_limit", "disk_bytes", "too_large"]

_FREE_BYTES = 1 << 30
_EXPANSION = 64
_BLOCK = 512  # bytes, the unit of st_blocks


def byte_limit(size: int, max_bytes: int | None = None) -> int:
    """Bytes that the content of a file may take in memory.

    Args:
        size: of the file on disk, see `disk_bytes`.
        max_bytes: what the user allows; None for 1 GiB, or 64 times `size` where that is more.

    >>> byte_limit(1778), byte_limit(1 << 30), byte_limit(1 << 30, 10**9)
    (1073741824, 68719476736, 1000000000)
    """
    return max(_FREE_BYTES, _EXPANSION * size) if max_bytes is None else max_bytes


def disk_bytes(path: Path) -> int:
    """Bytes that a file takes on disk: of a file with holes, fewer than it seems to have.

    Raises:
        OSError: the file system refuses.
    """
    found = os.stat(path)
    return min(found.st_size, _BLOCK * found.st_blocks)


def too_large(what: str, limit: int) -> str:
    """What a reader says of a file beyond the limit, and the remedy.

    >>> too_large("it inflates to", 1000)
    'it inflates to more than 1,000 bytes; allow more if you trust it (--max-bytes)'
    """
    return f"{what} more than {limit:,} bytes; allow more if you trust it (--max-bytes)"

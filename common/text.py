"""What people read: figures, the first line of an error, and less of what others log."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = [
    "bits_text",
    "bytes_of",
    "bytes_text",
    "count_text",
    "duration_text",
    "first_line",
    "percent",
    "quiet",
    "ratio_text",
]


def bytes_text(count: float | None) -> str:
    """Bytes in decimal units with three significant digits; ``–`` for None.

    >>> bytes_text(812), bytes_text(6_526_000), bytes_text(984e6)
    ('812 B', '6.53 MB', '984 MB')
    """
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if round(value, 0 if unit == "B" else 1) < 1000:
            break
        value /= 1000
    else:
        unit = "TB"
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}


def bytes_of(text: str) -> int:
    """The bytes that a text in decimal units states, as `bytes_text` writes them.

    Raises:
        ValueError: it states none, or less than none.

    >>> bytes_of("2 MB"), bytes_of("1.5kB"), bytes_of("800")
    (2000000, 1500, 800)
    """
    found = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].lower() not in _SIZES:
        raise ValueError(f"{text!r} is no number of bytes, such as '500 kB', '2 MB' or 1000000")
    return round(float(found[1]) * _SIZES[found[2].lower()])


def bits_text(nbytes: float, size: int) -> str:
    """Bits for each of `size` elements, with three significant digits; ``–`` for no elements."""
    if not size:
        return "–"
    bits = 8 * nbytes / size
    return f"{bits:.1f}" if bits >= 9.995 else f"{bits:.2f}" if bits >= 0.995 else f"{bits:.3f}"


def count_text(count: int, what: str) -> str:
    """``1 tensor``, ``2 tensors``, ``12,000 tensors``."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def duration_text(seconds: float | None) -> str:
    """A duration with two or three significant digits, such as ``2.5 min``; ``–`` for None.

    >>> duration_text(0.042), duration_text(150), duration_text(200_000)
    ('0.042 s', '2.5 min', '2.31 d')
    """
    if seconds is None:
        return "–"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return (
                f"{seconds / size:.3g} {unit}"
                if seconds < 1000 * size
                else f"{seconds / size:,.0f} {unit}"
            )
    return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.3g} s"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as a percentage, such as ``12.5 %``."""
    return f"{100 * fraction:.{digits}f} %"


def ratio_text(ratio: float | None) -> str:
    """How many times smaller, such as ``57.1×``; ``–`` for None."""
    if ratio is None:
        return "–"
    return f"{ratio:.0f}×" if ratio >= 99.5 else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def first_line(error: BaseException) -> str:
    """What an exception of somebody else says, without its details; its name where it is silent."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def quiet(logger: str | None = None) -> Iterator[None]:
    """Let a logger, by default the root, say nothing below an error for the duration."""
    log = logging.getLogger(logger)
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)

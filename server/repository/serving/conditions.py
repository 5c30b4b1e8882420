"""Conditional and range requests (RFC 9110, sections 13 and 14), as far as they concern a file."""

from __future__ import annotations

import re

__all__ = ["listed", "part", "same"]

_TAG = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
_RANGE = re.compile(r"([0-9]*)-([0-9]*)")
_DIGITS = 18  # more would not be a size


def listed(header: str, tag: str) -> bool:
    """Whether a list of entity tags holds `tag`; ``*`` holds every tag. The comparison is weak.

    >>> listed('"a", W/"b"', '"b"'), listed("*", '"b"'), listed('"a"', '"b"'), listed("b", '"b"')
    (True, True, False, False)
    """
    if header.strip() == "*":
        return True
    return tag in (found.removeprefix("W/") for found in _TAG.findall(header))


def same(header: str, tag: str) -> bool:
    """Whether an If-Range names exactly this entity; dates never do, for files have none here."""
    return header.strip() == tag


def part(header: str, size: int) -> range | None:
    """The bytes that a Range header selects from a file.

    Args:
        header: its value.
        size: of the file in bytes.

    Returns:
        Their positions; none of them where the range cannot be satisfied or there are several,
        which is refused because it lets a small request make a large answer (RFC 9110, 14.2).
        None where the header is not about bytes or malformed, and so is to be ignored.

    >>> part("bytes=2-4", 10), part("bytes=7-", 10), part("bytes=-3", 10), part("bytes=5-99", 10)
    (range(2, 5), range(7, 10), range(7, 10), range(5, 10))
    >>> part("bytes=10-", 10), part("bytes=0-1,3-4", 10), part("bytes=-0", 10)
    (range(0, 0), range(0, 0), range(0, 0))
    >>> part("lines=1-2", 10), part("bytes=4-2", 10), part("bytes=x", 10)
    (None, None, None)
    """
    unit, _, specifier = header.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    found = [_RANGE.fullmatch(one.strip()) for one in specifier.split(",")]
    ends = [match.groups() for match in found if match and match[0] != "-"]
    if len(ends) != len(found) or any(len(end) > _DIGITS for pair in ends for end in pair):
        return None
    if len(ends) > 1:
        return range(0)
    first, last = ends[0]
    if not first:
        return range(max(0, size - int(last)), size) if int(last) and size else range(0)
    if last and int(last) < int(first):
        return None
    if int(first) >= size:
        return range(0)
    return range(int(first), min(int(last) + 1, size) if last else size)

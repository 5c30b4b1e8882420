"""Strings of bytes that were edited: what of the new one stands in the held one, and the rest.

A model that is no array of numbers (trees, in somebody's own serialisation) travels as a vector of
bytes, whose length changes with every version. Place by place it has nothing in common with the
one before, but long runs of it are the same, somewhere else. It is cut into *literals* and *copies*
of the held string, as in rsync (Tridgell and Mackerras 1996, "The rsync algorithm").
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.versions.errors import BadPayload

__all__ = ["COPIES", "LEAST_COPY", "ByteEdits", "apply_edits", "find_edits"]

COPIES = "\0copies"
"""After a string's name: its copies, in a codec payload that has the literals under the name."""

LEAST_COPY = 32
"""Bytes of the shortest copy: what a shorter one says takes as many bytes as it saves."""
_MOST = 1 << 26  # bytes of a string: a second's search for every four million
_MOST_COPIES = 1 << 16  # of one string; what follows is literal
_WORTH = 0.875  # part of the string that may be literal, at most
_AHEAD = 1 << 12  # bytes that are compared at a time
_HASHED = 1 << 20  # bytes that are hashed at a time, eight bytes each
_ODD = np.uint64(0x9E3779B97F4A7C15)
Bytes = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ByteEdits:
    """A string, given another one.

    Attributes:
        literals: uint8, the bytes that no copy has, in order.
        copies: int32, one row for each copy: how many literals stand before it, from where it is
            in the held string, less where the copy before ended, and how many bytes.
    """

    literals: Bytes
    copies: NDArray[np.int32]


def find_edits(held: Bytes, new: Bytes) -> ByteEdits | None:
    """Cut a string into literals and copies of the held one.

    Args:
        held: uint8, one axis.
        new: uint8, one axis.

    Returns:
        None where that does not pay.
    """
    if not min(held.size, new.size) >= LEAST_COPY or max(held.size, new.size) > _MOST:
        return None
    held, new = np.ascontiguousarray(held), np.ascontiguousarray(new)
    literals: list[Bytes] = []
    copies: list[tuple[int, int, int]] = []
    at = source = 0  # where the last copy ended, in either string
    begins, places = _candidates(held, new)
    number = 0
    while number < len(begins) and len(copies) < _MOST_COPIES:
        begin, place = int(begins[number]), int(places[number])
        number += 1
        # where the last copy would go on comes first: what was inserted is over then
        shifted = begin + source - at
        if shifted >= 0 and _begin_alike(held[shifted:], new[begin:]):
            place = shifted
        if not _begin_alike(held[place:], new[begin:]):
            continue  # two strings of one hash
        back = _common(held[:place][::-1], new[at:begin][::-1])
        begin, place = begin - back, place - back
        length = _common(held[place:], new[begin:])
        literals.append(new[at:begin])
        copies.append((begin - at, place - source, length))
        at, source = begin + length, place + length
        number = int(np.searchsorted(begins, at))
    literals.append(new[at:])
    found = np.concatenate(literals)
    if found.size > _WORTH * new.size:
        return None
    return ByteEdits(found, np.array(copies, np.int32).reshape(-1, 3))


def apply_edits(held: Bytes, edits: ByteEdits, size: int) -> Bytes:
    """Inverse of `find_edits`.

    Args:
        held: the string that copies are of.
        edits: literals and copies.
        size: of the string that they make.

    Raises:
        BadPayload: they do not make a string of that size, or copy what is not there.
    """
    if edits.copies.shape[1:] != (3,) or edits.copies.dtype.kind != "i":
        raise BadPayload("edits of a string are no table of copies")
    before, moves, lengths = edits.copies.astype(np.int64).T
    sources = np.cumsum(moves + np.concatenate(([0], lengths[:-1]))) if len(moves) else moves
    if (
        (before < 0).any()
        or (lengths < LEAST_COPY).any()
        or (sources < 0).any()
        or (sources + lengths > held.size).any()
        or int(before.sum()) > edits.literals.size
        or edits.literals.size + int(lengths.sum()) != size
    ):
        raise BadPayload("edits of a string copy what is not there, or make another length")
    made = np.empty(size, np.uint8)
    at = taken = 0
    for count, source, length in zip(
        before.tolist(), sources.tolist(), lengths.tolist(), strict=True
    ):
        made[at : at + count] = edits.literals[taken : taken + count]
        at, taken = at + count, taken + count
        made[at : at + length] = held[source : source + length]
        at += length
    made[at:] = edits.literals[taken:]
    return made


def _candidates(held: Bytes, new: Bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places in the new string, ascending, and in the held one, that begin alike, very likely.

    Of the held one those are looked for that lie at multiples of the shortest copy.
    """
    blocks = np.concatenate([part[::LEAST_COPY] for part in _hashes(held)])
    known, first = np.unique(blocks, return_index=True)
    begins: list[NDArray[np.int64]] = []
    places: list[NDArray[np.int64]] = []
    at = 0
    for hashes in _hashes(new):
        found = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        some = np.flatnonzero(known[found] == hashes)
        begins.append(some + at)
        places.append(first[found[some]] * LEAST_COPY)
        at += len(hashes)
    return np.concatenate(begins), np.concatenate(places)


def _hashes(data: Bytes) -> Iterator[NDArray[np.uint64]]:
    """Of every run of `LEAST_COPY` bytes, part by part."""
    for at in range(0, data.size - LEAST_COPY + 1, _HASHED):
        part = data[at : at + _HASHED + LEAST_COPY - 1]
        hashes = part.astype(np.uint64) + np.uint64(1)
        shift = 1
        while shift < LEAST_COPY:
            hashes = hashes[:-shift] * _ODD + (hashes[shift:] ^ (hashes[shift:] >> np.uint64(29)))
            shift *= 2
        yield hashes


def _begin_alike(one: Bytes, other: Bytes) -> bool:
    """Whether two strings have a copy's bytes in common at their beginnings."""
    return one.size >= LEAST_COPY and one[:LEAST_COPY].tobytes() == other[:LEAST_COPY].tobytes()


def _common(one: Bytes, other: Bytes) -> int:
    """How many bytes two strings begin with alike."""
    most = min(len(one), len(other))
    for at in range(0, most, _AHEAD):
        end = min(at + _AHEAD, most)
        apart = np.flatnonzero(one[at:end] != other[at:end])
        if len(apart):
            return at + int(apart[0])
    return most

"""How many weights each tensor loses where a weight counts by its share of its own tensor.

That is what LAMP and the allocation by sensitivity rank, see `ALLOCATIONS`. Within a tensor such
shares rise with the magnitude, so it is enough to know how many of each tensor go; but a share is
known only once the tensor is sorted, so its magnitudes are held, one tensor at a time. Sorted, they
are gone through in chunks, with sums carried along in the order in which NumPy adds, and the result
is that of memory bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.files.selection import (
    DIGIT,
    VALUES,
    Part,
    Ranking,
    highest_key,
    keep_ties,
    next_digit,
    read_part,
)
from prunecast.compression.files.workers import Run

__all__ = ["MOST_GATHERED", "SHARED", "removed_by_share"]

SHARED = ("lamp", "sensitivity")
"""Allocations that rank shares."""

_BITS = 64
MOST_GATHERED = 1 << 23
"""Shares, of 8 bytes, that are held together."""
_TINY = np.finfo(np.float64).tiny


@dataclass(frozen=True)
class _Job:
    """A whole tensor, and which of its shares are meant: those whose first bits are the prefix."""

    part: Part
    ranking: Ranking
    lost: bool
    shift: int
    prefix: int


def removed_by_share(
    tensors: Sequence[tuple[Part, Ranking]],
    allocation: str,
    remove: int,
    run: Run,
    tick: Callable[[int], None],
    begin: Callable[[], None] = lambda: None,
) -> list[int]:
    """How many weights of each tensor go when the lowest so many shares of all go.

    Args:
        tensors: each as one part, with what it is ranked by on its own.
        allocation: one of `SHARED`.
        remove: how many weights go, so that each tensor can keep one.
        run: how the work on tensors is done.
        tick: told the bytes that were read, after each tensor.
        begin: called before each pass over the tensors; how many it takes depends on the shares.

    Raises:
        FilesError: a file cannot be read, or a weight is NaN or infinite.
    """
    prefix, left, shift = 0, remove, _BITS

    def jobs() -> list[_Job]:
        lost = allocation == "sensitivity"
        return [_Job(p, ranking, lost, shift, prefix) for p, ranking in tensors]

    while shift:
        begin()
        shift -= DIGIT
        counts = np.zeros(VALUES, np.int64)
        for (part, _), found in zip(tensors, run(_count_shares, jobs()), strict=True):
            counts += found
            tick(part.nbytes)
        digit, left = next_digit(counts, left)
        prefix = (prefix << DIGIT) | digit
        if counts[digit] <= MOST_GATHERED:
            break
    lower: list[int] = []
    gathered: list[NDArray[np.uint64]] = []
    same: list[int] = []
    begin()
    for (part, _), (under, keys, number) in zip(tensors, run(_gather_shares, jobs()), strict=True):
        lower.append(under)
        gathered.append(keys)
        same.append(number)
        tick(part.nbytes)
    if shift == 0:
        return _split(lower, same, remove)
    together, more = np.concatenate(gathered), remove - sum(lower)
    if not more:
        return lower
    threshold = np.partition(together, more - 1)[more - 1]
    return _split(
        [n + int(np.count_nonzero(k < threshold)) for n, k in zip(lower, gathered, strict=True)],
        [int(np.count_nonzero(keys == threshold)) for keys in gathered],
        remove,
    )


def _split(under: list[int], tied: list[int], remove: int) -> list[int]:
    """Numbers by tensor: all below a threshold go, and of those at it the last ones."""
    stays = keep_ties(under, tied, remove)
    return [below + ties - stay for below, ties, stay in zip(under, tied, stays, strict=True)]


def _count_shares(job: _Job) -> NDArray[np.int64]:
    """How many of a tensor's shares have each value of a digit."""
    counts = np.zeros(VALUES, np.int64)
    for keys in _keys(job):
        if job.shift + DIGIT < _BITS:
            keys = keys[keys >> np.uint64(job.shift + DIGIT) == job.prefix]
        counts += np.bincount((keys >> np.uint64(job.shift)).astype(np.uint16), minlength=VALUES)
    return counts


def _gather_shares(job: _Job) -> tuple[int, NDArray[np.uint64], int]:
    """How many of a tensor's shares lie below the prefix, those that have it, and how many have.

    Once all bits are known they are the same, and may be all that there are: the number is enough.
    """
    below, same, found = 0, 0, [np.zeros(0, np.uint64)]
    for keys in _keys(job):
        digits = keys >> np.uint64(job.shift)
        below += int(np.count_nonzero(digits < job.prefix))
        there = digits == job.prefix
        same += int(np.count_nonzero(there))
        if job.shift:
            found.append(keys[there])
    return below, np.concatenate(found), same


def _keys(job: _Job) -> Iterator[NDArray[np.uint64]]:
    """Bits of the shares of a tensor's weights but for the highest, which stays in any case."""
    ascending = _sorted(job)
    largest = float(job.ranking.magnitudes(ascending[-1:])[0]) or 1.0

    def squares(first: int, behind: int) -> NDArray[np.float64]:
        chunk = job.ranking.magnitudes(ascending[first:behind]).astype(np.float64)
        return np.square(chunk / largest)

    size = ascending.size
    if job.lost:
        total = 0.0
        for at in range(0, size, job.part.chunk):
            total = float(_carried(total, squares(at, at + job.part.chunk))[-1])
        total, carry = max(total, float(_TINY)), 0.0
        for at in range(0, size - 1, job.part.chunk):
            sums = _carried(carry, squares(at, min(at + job.part.chunk, size - 1)))
            carry = float(sums[-1])
            yield (sums / total).view(np.uint64)
        return
    carry = 0.0
    for behind in range(size, 0, -job.part.chunk):
        falling = squares(max(0, behind - job.part.chunk), behind)[::-1]
        sums = _carried(carry, falling)
        carry = float(sums[-1])
        shares = falling / np.maximum(sums, _TINY)
        yield shares[1 if behind == size else 0 :].view(np.uint64)


def _carried(carry: float, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Running sums that go on from an earlier one."""
    return np.cumsum(np.concatenate([[carry], values]))[1:]


def _sorted(job: _Job) -> NDArray[np.unsignedinteger]:
    keys: NDArray[np.unsignedinteger] | None = None
    for start, values in read_part(job.part):
        found = job.ranking.keys(job.part, start, values)
        highest_key(job.part, job.ranking, start, found)
        if keys is None:
            keys = np.empty(job.part.stop - job.part.start, found.dtype)
        keys[start - job.part.start :][: found.size] = found
    assert keys is not None
    keys.sort()
    return keys

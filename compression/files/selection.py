"""Which weights go, found without ever holding more than a piece of them.

Scores of 0 or above rank as the integers of their bits do. So the threshold below which exactly so
many lie is found digit by digit (of 16 bits): a pass counts how many weights have each value of the
digit, which says in which value the threshold lies; the next pass counts the next digit of those
alone. float32 takes two passes, 16-bit floats one, float64 up to four, and another pass counts what
each part of a tensor has below the threshold and at it. The result is that of
`prunecast.compression.pruning.allocation` bit for bit: ties go by position, and no tensor loses its
highest.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.files import CannotPrune, UnreadableFile
from prunecast.compression.files.contents import reading
from prunecast.compression.files.tensors import FileTensor, raw_dtype
from prunecast.compression.files.workers import Run
from prunecast.compression.pruning.criteria import CRITERIA, Knowledge

__all__ = [
    "CHUNK",
    "DIGIT",
    "SCORED",
    "VALUES",
    "Cut",
    "Part",
    "Ranking",
    "highest_key",
    "keep_ties",
    "next_digit",
    "read_part",
    "select",
]

CHUNK = 1 << 20
"""Weights that are looked at together; some 40 bytes of each are held meanwhile."""
SCORED = ("magnitude", "l2", "random")
"""Criteria that look at no more than the row that a weight is in."""

DIGIT, VALUES = 16, 1 << 16
"""Bits of a key that are counted in one pass, and values that they have."""
_INTEGERS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True)
class Part:
    """A run of a tensor's weights in a file, row by row.

    Attributes:
        name: of the tensor.
        dtype: of the tensor.
        path: of the file.
        offset: of the tensor's first byte there.
        start: number of the first weight of the part, a multiple of 8.
        stop: number of the first weight behind it.
        row: weights of one position of the tensor's first axis.
        step: chunks and parts hold a multiple of so many weights: 8, or 8 rows or more.
        twin: the tensor that it is tied with, whose random numbers it gets; "" for none.
    """

    name: str
    dtype: str
    path: Path
    offset: int
    start: int
    stop: int
    row: int = 1
    step: int = 8
    twin: str = ""

    @property
    def chunk(self) -> int:
        """Weights that are looked at together."""
        return max(self.step, CHUNK // self.step * self.step)

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return (self.stop - self.start) * raw_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Ranking:
    """What weights are ranked by.

    Attributes:
        dtype: that scores are compared in, wide enough for all that are ranked together.
        criterion: one of `SCORED`.
        seed: of "random".
    """

    dtype: str
    criterion: str = "magnitude"
    seed: int = 0

    @classmethod
    def of(cls, dtypes: Iterable[str], criterion: str = "magnitude", seed: int = 0) -> Ranking:
        """The narrowest for weights of these dtypes, as NumPy joins them."""
        kinds = set(dtypes)
        if criterion != "magnitude":
            return cls("float64", criterion, seed)
        if len(kinds) == 1:
            return cls(kinds.pop(), criterion, seed)
        return cls("float64" if "float64" in kinds else "float32", criterion, seed)

    @property
    def bits(self) -> int:
        """Of a score."""
        return 8 * raw_dtype(self.dtype).itemsize

    @property
    def infinity(self) -> int:
        """Key of an infinite score; above are those of NaN."""
        wide = np.dtype("float32" if self.dtype == "bfloat16" else self.dtype)
        key = int(np.array(np.inf, wide).view(_INTEGERS[wide.itemsize]))
        return key >> 16 if self.dtype == "bfloat16" else key

    def keys(self, part: Part, start: int, values: NDArray[Any]) -> NDArray[Any]:
        """Unsigned integers that rank as scores do.

        Args:
            part: that the weights are of.
            start: number of the first of them in their tensor.
            values: as `raw_dtype` has them.
        """
        if self.criterion == "random":  # as the criterion of that name draws a whole tensor
            drawn = np.random.PCG64(
                np.random.SeedSequence([self.seed, zlib.crc32((part.twin or part.name).encode())])
            )
            scores = np.random.Generator(drawn.advance(start)).random(values.size)
            return scores.view(np.uint64)
        if self.criterion == "l2":
            rows = FileTensor(values, part.dtype).real().reshape(-1, part.row)
            scored = CRITERIA["l2"].scores(Knowledge({"": rows}))[""]
            return np.ascontiguousarray(scored, np.float64).ravel().view(np.uint64)
        if part.dtype != self.dtype:
            values = FileTensor(values, part.dtype).real().astype(self.dtype)
        bits = values.view(_INTEGERS[values.itemsize])
        magnitude: NDArray[Any] = bits & bits.dtype.type((1 << (self.bits - 1)) - 1)
        return magnitude

    def magnitudes(self, keys: NDArray[Any]) -> NDArray[Any]:
        """The scores whose keys these are; of bfloat16 as float32."""
        bits = keys if self.dtype == "bfloat16" else keys.view(self.dtype)
        return FileTensor(bits, self.dtype).real()


@dataclass(frozen=True)
class Cut:
    """What goes of one part.

    Attributes:
        threshold: key below which weights go.
        ties: how many of those at the threshold stay, the earliest ones.
        spared: number of the weight in the tensor that stays in any case; -1 for none.
        removed: how many weights go.
    """

    threshold: int
    ties: int
    spared: int
    removed: int


def read_part(part: Part) -> Iterator[tuple[int, NDArray[Any]]]:
    """The weights of a part in chunks, each with the number of its first weight in the tensor.

    Raises:
        UnreadableFile: the file became shorter, or cannot be read from this machine.
    """
    dtype = raw_dtype(part.dtype)
    with reading(part.path), open(part.path, "rb") as file:
        file.seek(part.offset + part.start * dtype.itemsize)
        for start in range(part.start, part.stop, part.chunk):
            count = min(part.chunk, part.stop - start)
            values = np.fromfile(file, dtype, count)
            if values.size != count:
                raise UnreadableFile(f"{part.path} became shorter while it was read")
            yield start, values.astype(dtype.newbyteorder("="), copy=False)


def select(
    parts: Sequence[Part], remove: int, ranking: Ranking, run: Run, tick: Callable[[int], None]
) -> list[Cut]:
    """What goes of each part when the lowest so many weights of all go.

    Args:
        parts: in the order in which ties are decided: earlier ones stay. Those of a tensor follow
            each other.
        remove: how many weights go, so that each tensor can keep one.
        ranking: what they are ranked by.
        run: how the work on parts is done.
        tick: told the bytes that were read, or need not be, after each part.

    Raises:
        CannotPrune: a weight is NaN or infinite.
        FilesError: a file cannot be read.
    """
    prefix, left = 0, remove
    highest: list[tuple[int, int]] = []
    for shift in range(ranking.bits - DIGIT, -1, -DIGIT):
        counts = np.zeros(VALUES, np.int64)
        jobs = [_Digit(part, ranking, shift, prefix) for part in parts]
        for part, (found, key, number) in zip(parts, run(_count_digit, jobs), strict=True):
            counts += found
            if len(highest) < len(parts):
                highest.append((key, number))
            tick(part.nbytes)
        spared = _spared(parts, highest)
        for index in spared.values():
            key = highest[index][0] >> shift
            if key >> DIGIT == prefix:
                counts[key & (VALUES - 1)] -= 1  # it ranks above all others
        digit, left = next_digit(counts, left)
        prefix = (prefix << DIGIT) | digit
    if not remove:
        for part in parts:
            tick(part.nbytes)
        return [Cut(0, part.stop - part.start, -1, 0) for part in parts]
    found_at = []
    jobs_at = [_Threshold(part, ranking, prefix) for part in parts]
    for index, (part, (lower, tied)) in enumerate(zip(parts, run(_count_at, jobs_at), strict=True)):
        key = highest[index][0] if spared[part.name] == index else prefix + 1
        found_at.append((lower - (key < prefix), tied - (key == prefix)))
        tick(part.nbytes)
    stays = keep_ties([lower for lower, _ in found_at], [tied for _, tied in found_at], remove)
    cuts = []
    for index, (part, (lower, tied), ties) in enumerate(zip(parts, found_at, stays, strict=True)):
        number = highest[index][1] if spared[part.name] == index else -1
        cuts.append(Cut(prefix, ties, number, lower + tied - ties))
    return cuts


def next_digit(counts: NDArray[np.int64], left: int) -> tuple[int, int]:
    """In which value of a digit a threshold lies, and how many keys with that value go.

    `counts`, int64 of shape (65536,), says how many keys have each; the `left` lowest go.
    """
    below = np.cumsum(counts)
    digit = min(int(np.searchsorted(below, max(left, 1), side="left")), VALUES - 1)
    return digit, left - (int(below[digit - 1]) if digit else 0)


def keep_ties(lower: Sequence[int], tied: Sequence[int], remove: int) -> list[int]:
    """How many stay of each piece's keys at a threshold: the earliest ones.

    Args:
        lower: by piece, how many keys lie below the threshold: these go.
        tied: by piece, how many lie at it.
        remove: how many go of all.
    """
    keep, stays = sum(tied) - (remove - sum(lower)), []
    for ties in tied:
        stays.append(min(ties, keep))
        keep -= stays[-1]
    return stays


def _spared(parts: Sequence[Part], highest: Sequence[tuple[int, int]]) -> dict[str, int]:
    """Tensor to the number of the part with the first of its highest scores."""
    best: dict[str, int] = {}
    for index, part in enumerate(parts):
        first = best.setdefault(part.name, index)
        if highest[index][0] > highest[first][0]:
            best[part.name] = index
    return best


@dataclass(frozen=True)
class _Digit:
    part: Part
    ranking: Ranking
    shift: int
    prefix: int


def _count_digit(job: _Digit) -> tuple[NDArray[np.int64], int, int]:
    """How many weights have each value of a digit, of those whose digits before are the prefix.

    And the highest key of all, with the number of the first weight that has it.
    """
    counts, highest, number = np.zeros(VALUES, np.int64), -1, 0
    first = job.shift + DIGIT == job.ranking.bits
    for start, values in read_part(job.part):
        keys = job.ranking.keys(job.part, start, values)
        if first:
            found = highest_key(job.part, job.ranking, start, keys)
            if found[0] > highest:
                highest, number = found
        else:
            keys = keys[keys >> (job.shift + DIGIT) == job.prefix]
        counts += np.bincount((keys >> job.shift).astype(np.uint16), minlength=VALUES)
    return counts, highest, number


def highest_key(
    part: Part, ranking: Ranking, start: int, keys: NDArray[np.unsignedinteger]
) -> tuple[int, int]:
    """The highest key of a chunk, and the number of the first weight that has it.

    Raises:
        CannotPrune: it is that of NaN or an infinity.
    """
    at = int(keys.argmax())
    key, number = int(keys[at]), start + at
    if key >= ranking.infinity:
        raise CannotPrune(
            f"tensor {part.name!r} holds NaN or an infinity (weight {number:,}): repair it, or "
            f"leave it out with --exclude {part.name!r}"
        )
    return key, number


@dataclass(frozen=True)
class _Threshold:
    part: Part
    ranking: Ranking
    threshold: int


def _count_at(job: _Threshold) -> tuple[int, int]:
    """How many weights of a part lie below a threshold, and how many at it."""
    below = tied = 0
    for start, values in read_part(job.part):
        keys = job.ranking.keys(job.part, start, values)
        below += int(np.count_nonzero(keys < job.threshold))
        tied += int(np.count_nonzero(keys == job.threshold))
    return below, tied

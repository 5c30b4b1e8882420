"""One case, one coder: size, speed, memory, and whether everything came back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from .cases import Case, case
from .coders import OURS, Bound, Coder, NotApplicable, sections
from .memory import peak_resident, peak_traced

__all__ = ["LossError", "Row", "measure"]

_ENOUGH = 1.5  # seconds of repetitions, after which no further one is begun
_AT_LEAST = 0.1  # seconds of repetitions, unless only one is wanted: short calls vary
_LARGE = 4_000_000  # bytes of tensors below which the resident set says nothing

T = TypeVar("T")


class LossError(Exception):
    """A coder did not give back what it was given."""


@dataclass(frozen=True)
class Row:
    """What was measured. MB are 10**6 bytes of the tensors as float32, whatever was coded.

    Attributes:
        coder: its name.
        bytes: everything the receiver needs beyond what it knows already.
        encode_seconds: CPU time, best of the repetitions after a warm-up.
        decode_seconds: likewise.
        sections: ours: bytes by section of the payload.
        encode_resident: growth of the resident set in bytes, result included; None if unknown.
        decode_resident: likewise.
        encode_traced: ours: peak of Python's allocator in bytes, result included.
        decode_traced: likewise.
    """

    coder: str
    bytes: int
    encode_seconds: float
    decode_seconds: float
    sections: dict[str, int] | None = None
    encode_resident: int | None = None
    decode_resident: int | None = None
    encode_traced: int | None = None
    decode_traced: int | None = None

    @property
    def side_information(self) -> float | None:
        """Share of the bytes that are not coded symbols: envelope, header, tables, levels."""
        if self.sections is None:
            return None
        coded = sum(self.sections[k] for k in ("symbols", "segments", "stored"))
        return 1 - coded / self.bytes


def _timed(call: Callable[[], T], repeat: int) -> tuple[T, float]:
    """Result, and the least CPU seconds after one warm-up."""
    result = call()
    least, spent, done = float("inf"), 0.0, 0
    while (done < repeat and spent < _ENOUGH) or (repeat > 1 and spent < _AT_LEAST):
        start = time.process_time()
        call()
        took = max(time.process_time() - start, 1e-6)
        least, spent, done = min(least, took), spent + took, done + 1
    return result, least


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in zip(a, b, strict=True)
    )


def _tiny(like: Case) -> Case:
    """A small case of the same kind and context, to load code with."""
    rng = np.random.default_rng(0)
    zero = rng.random((64, 64)) < 0.7
    dtype = np.float32 if like.kind.startswith("float") else np.int32
    before = np.where(zero, 0, rng.integers(-9, 9, (64, 64))).astype(dtype)
    values = ((before + rng.integers(-1, 2, (64, 64))) * (before != 0)).astype(dtype)
    mask = None if like.context.mask is None else {"w": before != 0}
    previous = None if like.context.previous is None else {"w": before}
    return case("tiny", like.kind, {"w": values}, mask=mask, previous=previous)


def measure(subject: Case, coder: Coder, *, repeat: int, memory: bool) -> Row | None:
    """Measure one coder on one case; None where it is not made for such a case.

    Args:
        subject: the case.
        coder: the coder.
        repeat: repetitions of encoding and of decoding after a warm-up each; fewer if slow,
            more if quick, but one if one is asked for.
        memory: whether to measure memory too.

    Raises:
        LossError: what was decoded differs from what was encoded.
    """
    try:
        bound = coder.bind(subject)
    except NotApplicable:
        return None
    data, encode_seconds = _timed(bound.encode, repeat)
    back, decode_seconds = _timed(lambda: bound.decode(data), repeat)
    if not _same(list(subject.tensors.values()), back):
        raise LossError(f"{coder.name} is not lossless on {subject.name}")
    del back
    ours = coder.name == OURS
    resident: tuple[int | None, int | None] = (None, None)
    traced: tuple[int | None, int | None] = (None, None)
    if memory and 4 * subject.parameters >= _LARGE:
        small = coder.bind(_tiny(subject))
        resident = _resident(bound, data, small)
    if memory and ours:
        traced = peak_traced(bound.encode), peak_traced(lambda: bound.decode(data))
    return Row(
        coder.name,
        len(data),
        encode_seconds,
        decode_seconds,
        sections(data, subject) if ours else None,
        *resident,
        *traced,
    )


def _resident(bound: Bound, data: bytes, small: Bound) -> tuple[int | None, int | None]:
    little = small.encode()
    return (
        peak_resident(bound.encode, small.encode),
        peak_resident(lambda: bound.decode(data), lambda: small.decode(little)),
    )

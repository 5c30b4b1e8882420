"""What a coder is, for measuring: a case to one byte string, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from ..cases import Case

__all__ = ["Absent", "Array", "Bound", "Coder", "NotApplicable"]

Array = NDArray[Any]


class Absent(Exception):
    """A coder that this environment cannot run; the message says what to do."""


class NotApplicable(Exception):
    """A coder that is not made for this kind of case."""


@dataclass(frozen=True)
class Bound:
    """A coder with one case at hand.

    Attributes:
        encode: makes the byte string; timed.
        decode: makes the tensors from it and from what both sides know; timed.
    """

    encode: Callable[[], bytes]
    decode: Callable[[bytes], Sequence[Array]]


class Coder(Protocol):
    """A coder under measurement."""

    @property
    def name(self) -> str:
        """Short name, for tables."""

    @property
    def settings(self) -> str:
        """Version and chosen settings, for the reader of a table."""

    def bind(self, case: Case) -> Bound:
        """Prepare one case; nothing done here is timed.

        Raises:
            NotApplicable: the coder is not made for such a case.
        """

"""What an examination of a repository finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Finding", "listed"]

_SHOWN = 5


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        severity: ``problem`` when something must be done, ``note`` when nothing need be.
        code: stable name of the kind of finding, for scripts.
        subject: the file, role or release.
        what: what is wrong with it.
        remedy: what to do.
    """

    severity: Literal["problem", "note"]
    code: str
    subject: str
    what: str
    remedy: str


def listed(names: list[str]) -> str:
    """The first few names and how many more there are.

    >>> listed(["a", "b"]), listed(list("abcdefgh"))
    ('a, b', 'a, b, c, d, e and 3 more')
    """
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

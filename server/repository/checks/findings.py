"""What an examination of a repository finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = ["Finding", "Findings", "listed"]

_SHOWN = 5
Severity = Literal["problem", "note"]
Subject = str | Path | Sequence[str] | Sequence[Path]


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        severity: ``problem`` when something must be done, ``note`` when nothing need be.
        code: stable name of the kind of finding, for scripts.
        subject: the file, role or release; the first few where there are several.
        what: what is wrong with it.
        remedy: what to do.
    """

    severity: Severity
    code: str
    subject: str
    what: str
    remedy: str


@dataclass
class Findings:
    """Collects what checks find.

    Attributes:
        path: the repository; files in it are named relative to it.
        all: the findings, in the order of the checks.
    """

    path: Path
    all: list[Finding] = field(default_factory=list)

    def problem(self, code: str, subject: Subject, what: str, remedy: str) -> None:
        """Something must be done."""
        self._add("problem", code, subject, what, remedy)

    def note(self, code: str, subject: Subject, what: str, remedy: str) -> None:
        """Nothing need be done."""
        self._add("note", code, subject, what, remedy)

    def _add(self, severity: Severity, code: str, subject: Subject, what: str, remedy: str) -> None:
        several = [subject] if isinstance(subject, str | Path) else subject
        names = [self._name(each) for each in several]
        self.all.append(Finding(severity, code, listed(names), what, remedy))

    def _name(self, subject: str | Path) -> str:
        if isinstance(subject, Path) and self.path in subject.parents:
            return str(subject.relative_to(self.path))
        return str(subject)


def listed(names: list[str]) -> str:
    """The first few names and how many more there are.

    >>> listed(["a", "b"]), listed(list("abcdefgh"))
    ('a, b', 'a, b, c, d, e and 3 more')
    """
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")

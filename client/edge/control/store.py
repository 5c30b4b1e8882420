"""What the agent knows from its fleet and owes it, in one file: `control.json`.

The directive, what was answered to it and the reports that wait change together or not at all, so
a power cut neither loses an answer nor makes a second one.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from prunecast.client.edge.state import StateFolder
from prunecast.common.documents import from_document

__all__ = ["ControlStore", "StoredAnswer", "StoredDirective", "StoredReport"]

_FILE = "control.json"
_GOOD = ("activated", "confirmed")  # in this order
_MOST_REPORTS = 64  # the fleet remembers four times as many ids


@dataclass(frozen=True)
class StoredDirective:
    """What the fleet told this device; see `fleet.proto`."""

    serial: int
    release: str = ""
    version: int | None = None
    downgrade: bool = False
    rollout: str = ""


@dataclass(frozen=True)
class StoredAnswer:
    """What became of a directive; `outcome` as the fleet names it."""

    serial: int
    version: int
    outcome: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        """Whether it speaks against the release."""
        return self.outcome not in _GOOD

    def follows(self, last: StoredAnswer) -> bool:
        """Whether it says something new about the same directive: nothing turns good again."""
        if last.failed:
            return False
        return self.failed or _GOOD.index(last.outcome) < _GOOD.index(self.outcome)


@dataclass(frozen=True)
class StoredReport:
    """A report on its way; see `fleet.proto`. The store gives it its id and its device."""

    agent: str
    running: int | None
    answer: StoredAnswer | None = None
    error: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    made: float = 0.0
    id: str = ""
    device: str = ""


@dataclass(frozen=True)
class _Content:
    schema: Literal[1] = 1
    fingerprint: str = ""
    device: str = ""
    directive: StoredDirective | None = None
    answered: StoredAnswer | None = None
    reports: tuple[StoredReport, ...] = ()


class ControlStore:
    """Reads and writes `control.json`; may be used by several threads.

    A file that cannot be read is taken for none: the fleet tells its directive again, and counts
    an answer that it knows already only once. What changes it raises StateError when the disk
    refuses; the change holds nevertheless until the process ends.

    Args:
        folder: the agent's state folder, which it has locked.
        make_id: makes identifiers that are never used again.
        most: reports that may wait.
    """

    def __init__(
        self,
        folder: StateFolder,
        make_id: Callable[[], str] = lambda: secrets.token_hex(16),
        *,
        most: int = _MOST_REPORTS,
    ) -> None:
        self._folder, self._make_id, self._most = folder, make_id, most
        self._lock = threading.Lock()
        try:
            self._content = from_document(_Content, folder.read_json(_FILE))
        except ValueError:
            self._content = _Content()

    @property
    def directive(self) -> StoredDirective | None:
        """The last directive; None: there never was one."""
        return self._content.directive

    @property
    def device(self) -> str:
        """Name of this device; empty: not known yet."""
        return self._content.device

    def __len__(self) -> int:
        """How many reports wait."""
        return len(self._content.reports)

    def name_for(self, fingerprint: str) -> str:
        """Name that a credential stood for the last time; empty for another credential."""
        return self._content.device if fingerprint == self._content.fingerprint else ""

    def welcome(self, device: str, fingerprint: str) -> None:
        """The server has said whom the credential stands for.

        StoredDirective and reports of another device are dropped: nobody would take them.
        """
        with self._lock:
            known = self._content
            if known.device and device != known.device:
                known = _Content()
            self._write(replace(known, device=device, fingerprint=fingerprint))

    def accept(self, directive: StoredDirective) -> bool:
        """Take a directive; whether it is another one than before."""
        with self._lock:
            if directive == self._content.directive:
                return False
            self._write(replace(self._content, directive=directive))
            return True

    def queue(self, report: StoredReport) -> None:
        """Add a report; one without an answer takes the place of an earlier one of its kind.

        When too many wait, the oldest are dropped.
        """
        with self._lock:
            known, answer = self._content, report.answer
            report = replace(report, id=self._make_id(), device=known.device)
            waiting = [r for r in known.reports if answer or r.answer] + [report]
            known = replace(known, reports=tuple(waiting[-self._most :]))
            self._write(replace(known, answered=answer) if answer else known)

    def is_due(self, answer: StoredAnswer) -> bool:
        """Whether an answer says something new: the first, one that confirms it, or a failure."""
        last = self._content.answered
        if last is None or (last.serial, last.version) != (answer.serial, answer.version):
            return True
        return answer.follows(last)

    def first(self) -> StoredReport | None:
        """The report that has waited longest."""
        waiting = self._content.reports
        return waiting[0] if waiting else None

    def done(self, report: str) -> None:
        """A report, by its id, has arrived or will never be taken.

        When the disk refuses it may be sent once more, and is recognised.
        """
        with self._lock:
            left = tuple(r for r in self._content.reports if r.id != report)
            if left != self._content.reports:
                self._write(replace(self._content, reports=left))

    def _write(self, content: _Content) -> None:
        if content != self._content:
            self._content = content
            self._folder.write_json(_FILE, asdict(content))

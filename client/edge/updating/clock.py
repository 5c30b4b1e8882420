"""What time it is at least, so that a clock that is behind does not keep metadata from expiring.

A device may wake up in 1970, or far back, and whoever holds its traffic could then feed it metadata
that expired long ago. So there is a *floor*: when this code was made, and when metadata were last
found to be valid here by a clock that could be right. That was within their lifetime, so a clock
that was ahead once does not lock a device out. A clock above the floor is believed,
and one that is a little below it (it was set back, or keeps local time) costs nothing.

One a day below it is wrong for certain. Then the latest time that this device has come across
counts, if that is later than the floor: its clock at a check that found everything expired, or when
a release was made, by what is signed. Neither is certain, and a clock that is set again overrules
them.

Both are kept beside the metadata, in `time.floor`.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from prunecast.common.clock import BUILT
from prunecast.common.documents import from_document, read_document
from prunecast.common.files import StorageError, write_atomically

__all__ = ["FLOOR_FILE", "TimeFloor", "shown_time"]

FLOOR_FILE = "time.floor"
_EARLIEST = datetime(1970, 1, 1, tzinfo=UTC)
_STEP = timedelta(hours=1)  # flash wears out
_SLACK = timedelta(days=1)
_FAR = timedelta(days=400)  # more than the year that a root lives


@dataclass(frozen=True)
class _Kept:
    """Content of the file; seconds since 1970, UTC."""

    schema: Literal[1] = 1
    floor: float = 0.0
    seen: float = 0.0


class TimeFloor:
    """The floor of one device, over its processes.

    Args:
        folder: of the verified metadata. A file in it that cannot be read or written costs only
            what is known from earlier.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FLOOR_FILE
        self._kept = _Kept()
        with suppress(OSError, ValueError):
            self._kept = from_document(_Kept, read_document(self._path, most_bytes=1 << 12))

    @property
    def floor(self) -> datetime:
        """What time it is at least."""
        return max(BUILT, _time(self._kept.floor))

    def judge(self, clock: datetime) -> datetime:
        """The time by which expiry is judged.

        Args:
            clock: what this device takes for the time.
        """
        if not self.is_behind(clock):
            return max(clock, self.floor)
        return max(self.floor, _time(self._kept.seen))

    def problem(self, clock: datetime) -> str | None:
        """What is wrong with this device's clock; None: it may be right."""
        if self.is_behind(clock):
            return (
                f"this device's clock is behind: it says {clock:%Y-%m-%d}, and it is "
                f"{self.judge(clock):%Y-%m-%d} or later, by which expiry is judged: set the clock"
            )
        return None

    def is_behind(self, clock: datetime) -> bool:
        """Whether a clock says what is past for certain."""
        return clock < self.floor - _SLACK

    def is_far_ahead(self, clock: datetime) -> bool:
        """Whether a clock says more than this device has lived through by all it knows."""
        return clock - self.floor > _FAR

    def verified(self, clock: datetime) -> None:
        """Metadata were valid by this clock."""
        if not self.is_behind(clock):
            at = self.judge(clock).timestamp()
            # a clock that is right corrects what one that was ahead has left
            self._keep(replace(self._kept, floor=at, seen=at))

    def saw(self, at: datetime) -> None:
        """It may be as late as this."""
        if at.timestamp() > self._kept.seen:
            self._keep(replace(self._kept, seen=at.timestamp()))

    def _keep(self, kept: _Kept) -> None:
        before, self._kept = self._kept, kept
        step = _STEP.total_seconds()
        if max(abs(kept.floor - before.floor), abs(kept.seen - before.seen)) >= step:
            with suppress(StorageError):
                write_atomically(self._path, json.dumps(asdict(kept)).encode() + b"\n")
        elif kept != before:
            self._kept = before  # so that small steps add up to one that is written


def shown_time(at: datetime) -> str:
    """A time for people."""
    return f"{at:%Y-%m-%d %H:%M} UTC"


def _time(seconds: float) -> datetime:
    with suppress(OverflowError, OSError, ValueError):
        return datetime.fromtimestamp(seconds, UTC)
    return _EARLIEST

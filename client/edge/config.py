"""What an agent is told, which release it goes to, and what it tells about one check."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time
from pathlib import Path
from typing import Literal

from prunecast.client.edge.errors import OrderRefused

__all__ = [
    "AGENT_VERSION",
    "AgentConfig",
    "Order",
    "PayloadKind",
    "QuietHours",
    "UpdateResult",
    "candidates",
]

AGENT_VERSION = "0.1.0"
PayloadKind = Literal["patch", "keyframe", "none"]
_WINDOW = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")


@dataclass(frozen=True)
class QuietHours:
    """A daily window of local time; it may cross midnight.

    Attributes:
        begin: first moment of the window.
        end: first moment after it.

    >>> hours = QuietHours.parse("22:00-06:00")
    >>> datetime(2026, 1, 1, 23, 30) in hours, datetime(2026, 1, 1, 6, 0) in hours
    (True, False)
    """

    begin: time
    end: time

    @classmethod
    def parse(cls, text: str) -> QuietHours:
        """Read ``HH:MM-HH:MM``.

        Raises:
            ValueError: not of that form, or empty.
        """
        found = _WINDOW.fullmatch(text)
        if not found or found[1] + found[2] == found[3] + found[4]:
            raise ValueError(f"{text!r} is no window of time: write it like 22:00-06:00")
        hours = [int(part) for part in found.groups()]
        return cls(time(hours[0], hours[1]), time(hours[2], hours[3]))

    def __contains__(self, moment: datetime) -> bool:
        """Whether a local time lies in the window."""
        at = moment.time()
        if self.begin < self.end:
            return self.begin <= at < self.end
        return at >= self.begin or at < self.end


@dataclass(frozen=True)
class AgentConfig:
    """What an agent needs to know; trust has no default.

    Attributes:
        state: folder for everything the agent keeps.
        url: of the release repository.
        name: of the release to follow.
        root: the repository's root metadata, given to the device when it was provisioned.
        threads: threads of the inference session; None leaves the choice to onnxruntime.
        most_bytes: refuse releases whose `weights.bin` or payload is larger.
        most_starts: how often a process may start with a release that never gets confirmed
            before the agent goes back: the sign of a crash loop.
        confirm_after: seconds of service after which `run` confirms a release.
        quiet: daily window in which no release is downloaded; metadata are.
        optimise: keep each release as onnxruntime has optimised it for this CPU; starts are
            quicker and need less memory, for up to five times the disk of `weights.bin`.
    """

    state: Path
    url: str
    name: str
    root: bytes
    threads: int | None = None
    most_bytes: int = 4 * 2**30
    most_starts: int = 3
    confirm_after: float = 60.0
    quiet: QuietHours | None = None
    optimise: bool = False

    def waits(self, version: int, at: datetime) -> str | None:
        """Why a release must not be downloaded at this local time; None if it may."""
        if self.quiet is None or at not in self.quiet:
            return None
        return f"release {version} waits for the end of the quiet hours at {self.quiet.end:%H:%M}"


@dataclass(frozen=True)
class UpdateResult:
    """What one check for updates did.

    Attributes:
        outcome: ``updated``; ``current``: nothing newer; ``rejected``: the newer release did not
            pass and the old one stays.
        version: the release that is active now; None when there is none.
        previous: the one that was active before.
        payload: how the weights came: ``patch``, ``keyframe``, or ``none``.
        downloaded: bytes received by kind: ``metadata``, ``patch``, ``keyframe``, ``files``.
        reason: why a release was rejected or waits, or a patch was replaced by the keyframe.
        difference: largest difference in the self-test.
        seconds: duration.
    """

    outcome: Literal["updated", "current", "rejected"]
    version: int | None
    previous: int | None = None
    payload: PayloadKind = "none"
    downloaded: Mapping[str, int] = field(default_factory=dict)
    reason: str | None = None
    difference: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Order:
    """What a device shall run, from whoever may decide that: see `prunecast.client.edge.control`.

    An order only chooses among the releases that are signed and live.

    Attributes:
        version: of the release; None: keep what runs.
        downgrade: the version may be lower than what runs; without it, that is refused.
    """

    version: int | None = None
    downgrade: bool = False


def candidates(order: Order | None, live: Sequence[int], held: int) -> list[int]:
    """Versions to go to, the first one that was not rejected on this device.

    Args:
        order: what to run; None: the highest version.
        live: numbers of the releases that are signed and live, ascending.
        held: what runs; 0: nothing.

    Raises:
        OrderRefused: the order names a release that is not live, or goes down without saying so.

    >>> candidates(None, [1, 2, 3], 1), candidates(Order(2), [1, 2, 3], 1)
    ([3, 2], [2])
    >>> candidates(Order(1, downgrade=True), [1, 2, 3], 2), candidates(Order(), [1, 2, 3], 2)
    ([1], [])
    """
    if order is None:
        return [version for version in reversed(live) if version > held]
    version = order.version
    if version is None or version == held:
        return []
    if version not in live:
        shown = ", ".join(map(str, live)) or "none"
        raise OrderRefused(
            f"release {version} is ordered but not signed and live (live: {shown}): publish it "
            "again under a new number, and roll that out"
        )
    if version < held and not order.downgrade:
        raise OrderRefused(
            f"release {version} is ordered, lower than the {held} that runs, and the order does "
            "not say that this is meant"
        )
    return [version]

"""What a fleet is: immutable values, without file, socket, clock or generator.

Times are seconds since the epoch, given by the caller. A `Fleet` need not be the whole fleet: the
database loads the part that an event concerns, and the decisions are the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

from prunecast.common.fleet_protocol import CONFIRM_SECONDS
from prunecast.server.fleet.errors import NotFound, Unusable

__all__ = [
    "SOAK_SECONDS",
    "Device",
    "Directive",
    "Failure",
    "Fleet",
    "Group",
    "Outcome",
    "Part",
    "Progress",
    "Release",
    "Rollout",
    "RolloutPolicy",
    "Status",
    "Tally",
    "Told",
    "check_name",
]

SOAK_SECONDS = 2 * CONFIRM_SECONDS
"""Seconds that a stage lasts at least, by default: a device has confirmed the release by then, or
it has shown that it cannot."""

_T = TypeVar("_T")
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


def check_name(name: str, what: str) -> str:
    """Return `name` if it can name a device, group or rollout.

    Raises:
        Unusable: empty, longer than 64, or with characters other than letters, digits, . _ -

    >>> check_name("cam-1", "device")
    'cam-1'
    """
    if not _NAME.fullmatch(name):
        raise Unusable(
            f"{what} name {name[:80]!r} is not usable: at most 64 letters, digits and . _ -, "
            "beginning and ending with a letter or digit"
        )
    return name


@dataclass(frozen=True, order=True)
class Release:
    """A release of the signed repository, by name and number."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


class Outcome(StrEnum):
    """What became of a release on a device, as the device reports it.

    ``ACTIVATED`` is provisional: the release passed its self-test and serves, and may still bring
    the process down. ``CONFIRMED`` follows when it has served long enough.
    """

    ACTIVATED = "activated"
    CONFIRMED = "confirmed"
    SELFTEST_FAILED = "self-test failed"
    ROLLED_BACK = "rolled back"
    CRASH_LOOP = "crash loop"

    @property
    def failed(self) -> bool:
        """Whether it speaks against the release."""
        return self not in (Outcome.ACTIVATED, Outcome.CONFIRMED)

    def follows(self, earlier: Outcome | None) -> bool:
        """Whether a device may say this after `earlier` to the same directive.

        >>> Outcome.CONFIRMED.follows(Outcome.ACTIVATED)
        True
        >>> Outcome.ACTIVATED.follows(Outcome.CONFIRMED)
        False
        """
        order = [None, Outcome.ACTIVATED, Outcome.CONFIRMED]
        if self.failed:
            return earlier is None or not earlier.failed
        return earlier in order and order.index(earlier) < order.index(self)


@dataclass(frozen=True)
class Failure:
    """Why a release was given up on a device.

    Attributes:
        outcome: what it failed at.
        detail: the agent's own words.
        at: when the device said so.
    """

    outcome: Outcome
    detail: str = ""
    at: float = 0.0

    def __str__(self) -> str:
        return f"{self.outcome}: {self.detail}" if self.detail else str(self.outcome)


class Progress(StrEnum):
    """Where a device stands in a rollout."""

    WAITING = "waiting"
    TOLD = "told"
    ACTIVATED = "activated"
    CONFIRMED = "confirmed"
    FAILED = "failed"
    SILENT = "silent"

    @property
    def settled(self) -> bool:
        """Whether a rollout no longer waits for this device."""
        return self not in (Progress.WAITING, Progress.TOLD, Progress.ACTIVATED)


class Status(StrEnum):
    """State of a rollout."""

    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    ABORTED = "aborted"

    @property
    def active(self) -> bool:
        """Whether it still occupies its groups."""
        return self in (Status.RUNNING, Status.PAUSED)


@dataclass(frozen=True)
class Part:
    """A device's part in the last rollout that it belonged to.

    Attributes:
        rollout: its identifier.
        stage: the first stage (from 0) in which the device may be told.
        progress: where it stands.
        told_at: when it was told; None while it waits.
        epoch: the observation window in which `progress` was counted.
    """

    rollout: str
    stage: int
    progress: Progress = Progress.WAITING
    told_at: float | None = None
    epoch: int = 0


@dataclass(frozen=True)
class Told:
    """What a device was last told.

    Attributes:
        serial: number of the directive; a report names the directive that it answers.
        version: of the release; None: keep what runs.
        at: when this was first told.
        rollout: because of which rollout; None: because of a pin or of the stable release.
        outcome: what the device answered.
    """

    serial: int = 0
    version: int | None = None
    at: float | None = None
    rollout: str | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Device:
    """A device; it belongs to one group.

    Attributes:
        id: its name.
        group: its group.
        pin: version that it stays on whatever happens.
        revoked: it takes part no more.
        running: version that it last said it runs.
        agent: version of its software, as it says.
        last_seen: when it last polled or reported; of polls a minute apart or less, the first.
        failures: versions that failed on it, and why; it is not told them again.
        told: its directive.
        part: its part in a rollout.
    """

    id: str
    group: str
    pin: int | None = None
    revoked: bool = False
    running: int | None = None
    agent: str = ""
    last_seen: float | None = None
    failures: Mapping[int, Failure] = field(default_factory=dict)
    told: Told = field(default_factory=Told)
    part: Part | None = None

    @property
    def refused(self) -> frozenset[int]:
        """Versions that failed on it."""
        return frozenset(self.failures)


@dataclass(frozen=True)
class Group:
    """Devices that follow one release name together.

    Attributes:
        id: its name.
        release: the release name that its devices follow.
        stable: version in force before `rollout`; see `Fleet.stable`.
        pin: version that all its devices stay on.
        rollout: the last rollout, active or not.
    """

    id: str
    release: str
    stable: int | None = None
    pin: int | None = None
    rollout: str | None = None


@dataclass(frozen=True)
class RolloutPolicy:
    """When a rollout goes on and when it stops.

    Attributes:
        max_error_rate: pause when a larger share of the reports are failures.
        max_silent_rate: pause when a larger share of the settled devices are silent.
        min_reports: so many reports decide a stage (all of them where a stage expects fewer);
            rates are shares of at least this number, so one early failure does not stop a stage.
        report_deadline: seconds after which a device that was told and said nothing is silent.
        soak: seconds that a stage lasts at least; by default long enough for a crash loop to show.
        timeout: seconds after which a stage is decided by whatever was reported.
        automatic: go to the next stage without an operator.
        roll_back_on_error: abort on the error rate instead of pausing; silence only pauses, as
            it says nothing about the release.
    """

    max_error_rate: float = 0.1
    max_silent_rate: float = 0.5
    min_reports: int = 5
    report_deadline: float = 3600.0
    soak: float = SOAK_SECONDS
    timeout: float = 86400.0
    automatic: bool = True
    roll_back_on_error: bool = False

    def __post_init__(self) -> None:
        for name in ("max_error_rate", "max_silent_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise Unusable(f"{name} is a share between 0 and 1, not {getattr(self, name)}")
        if self.min_reports < 1:
            raise Unusable("min_reports is at least 1: without a report nothing is known")
        if not 0 <= self.soak <= self.timeout < float("inf"):
            raise Unusable("soak is at least 0 and at most the timeout, and the timeout is finite")
        if not 0 < self.report_deadline < float("inf"):
            raise Unusable("report_deadline is a positive number of seconds")


@dataclass(frozen=True)
class Tally:
    """Devices that settled in one observation window."""

    confirmed: int = 0
    failed: int = 0
    silent: int = 0

    @property
    def reports(self) -> int:
        """Devices whose answer is final."""
        return self.confirmed + self.failed

    @property
    def settled(self) -> int:
        """Devices that the window no longer waits for."""
        return self.reports + self.silent

    def counted(self, progress: Progress, by: int) -> Tally:
        """One device more, or less, that settled like this."""
        change: dict[str, Any] = {progress.value: getattr(self, progress.value) + by}
        return replace(self, **change)


@dataclass(frozen=True)
class Rollout:
    """The way of one release through some groups.

    Attributes:
        id: its name; the order of devices is a hash of it.
        release: what is rolled out.
        groups: where to.
        stages: percentages, rising to 100.
        policy: when it goes on.
        status: of the rollout.
        stage: current stage, from 0.
        cohorts: per stage, how many devices it adds; members that left before they settled are
            not counted.
        since: when the observation window began.
        epoch: number of the window; a stage, a promotion and a resumption each begin one.
        expected: how many devices the window waits for.
        tally: what settled in this window.
        windows: what settled in the windows before, corrected by what devices said later; without
            failures that an operator has accepted by resuming or promoting.
        completed: when it was completed the last time; None: it never was. An active rollout that
            has been completed was reopened by late failures.
        told: how many devices were told, in all.
        settled: how many devices settled, in all.
        reason: why it is in its status.
    """

    id: str
    release: Release
    groups: tuple[str, ...]
    stages: tuple[float, ...]
    policy: RolloutPolicy
    cohorts: tuple[int, ...]
    since: float
    status: Status = Status.RUNNING
    stage: int = 0
    epoch: int = 1
    expected: int = 0
    tally: Tally = field(default_factory=Tally)
    windows: tuple[Tally, ...] = ()
    completed: float | None = None
    told: int = 0
    settled: int = 0
    reason: str = ""

    @property
    def reached(self) -> int:
        """How many devices the stages up to the current one hold."""
        return sum(self.cohorts[: self.stage + 1])


@dataclass(frozen=True)
class Directive:
    """What a device shall run.

    Attributes:
        device: to whom.
        serial: grows whenever a device is told something else; reports name it.
        release: what to run; None: keep what runs.
        downgrade: the release is older than what the device was told or runs, and that is meant.
        rollout: because of which rollout.
    """

    device: str
    serial: int
    release: Release | None
    downgrade: bool = False
    rollout: str | None = None


@dataclass(frozen=True)
class Fleet:
    """The state that events change.

    Attributes:
        releases: what the signed repository lists as live.
        groups: by name.
        devices: by name.
        rollouts: by name.
    """

    releases: frozenset[Release] = frozenset()
    groups: Mapping[str, Group] = field(default_factory=dict)
    devices: Mapping[str, Device] = field(default_factory=dict)
    rollouts: Mapping[str, Rollout] = field(default_factory=dict)

    def device(self, name: str) -> Device:
        """A device by name.

        Raises:
            NotFound: there is none.
        """
        return _get(self.devices, name, "device")

    def group(self, name: str) -> Group:
        """A group by name.

        Raises:
            NotFound: there is none.
        """
        return _get(self.groups, name, "group")

    def rollout(self, name: str) -> Rollout:
        """A rollout by name.

        Raises:
            NotFound: there is none.
        """
        return _get(self.rollouts, name, "rollout")

    def current(self, group: Group) -> Rollout | None:
        """The active rollout of a group."""
        last = self.rollouts[group.rollout] if group.rollout else None
        return last if last and last.status.active else None

    def stable(self, group: Group) -> int | None:
        """The version in force: of the last completed rollout; None before the first."""
        last = self.rollouts[group.rollout] if group.rollout else None
        done = last is not None and last.status is Status.COMPLETED
        return last.release.version if last and done else group.stable


def _get(found: Mapping[str, _T], name: str, what: str) -> _T:
    try:
        return found[name]
    except KeyError:
        remedy = f"list them with `prunecast fleet {what} list`"
        raise NotFound(f"there is no {what} named {name!r}: {remedy}") from None

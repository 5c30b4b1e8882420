"""What can happen to a fleet. Every event carries its time and who caused it."""

from __future__ import annotations

from dataclasses import dataclass, field

from prunecast.server.fleet.model import Outcome, Release, RolloutPolicy

__all__ = [
    "Abort",
    "AddDevice",
    "AddGroup",
    "AnyEvent",
    "Enrolment",
    "Event",
    "MoveDevice",
    "Pause",
    "PinDevice",
    "PinGroup",
    "Pinning",
    "Poll",
    "Promote",
    "ReportOutcome",
    "Resume",
    "RevokeDevice",
    "StartRollout",
    "Steering",
    "Tick",
]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events.

    Attributes:
        at: seconds since the epoch.
        actor: for the audit log.
    """

    at: float
    actor: str = "fleet"


@dataclass(frozen=True, kw_only=True)
class AddGroup(Event):
    """A group that follows a release name; `stable` is what its devices shall run already."""

    group: str
    release: str
    stable: int | None = None


@dataclass(frozen=True, kw_only=True)
class AddDevice(Event):
    """A device joins; in an active rollout it waits for the last stage."""

    device: str
    group: str


@dataclass(frozen=True, kw_only=True)
class MoveDevice(Event):
    """A device goes to another group, as one that leaves and a late joiner there."""

    device: str
    group: str


@dataclass(frozen=True, kw_only=True)
class RevokeDevice(Event):
    """A device takes part no more."""

    device: str


@dataclass(frozen=True, kw_only=True)
class PinDevice(Event):
    """A device stays on a version; None undoes it."""

    device: str
    version: int | None


@dataclass(frozen=True, kw_only=True)
class PinGroup(Event):
    """All devices of a group stay on a version; None undoes it."""

    group: str
    version: int | None


@dataclass(frozen=True, kw_only=True)
class StartRollout(Event):
    """A release starts on its way.

    Attributes:
        rollout: a name that no other rollout ever had: it decides which devices come first.
        release: what.
        groups: where to.
        stages: rising percentages, the last one 100.
        policy: when it goes on.
    """

    rollout: str
    release: Release
    groups: tuple[str, ...]
    stages: tuple[float, ...] = (5.0, 25.0, 100.0)
    policy: RolloutPolicy = field(default_factory=RolloutPolicy)


@dataclass(frozen=True, kw_only=True)
class Steering(Event):
    """Base of what an operator does with a rollout that is under way."""

    rollout: str


@dataclass(frozen=True, kw_only=True)
class Promote(Steering):
    """The next stage begins at once; after the last one the release is stable."""


@dataclass(frozen=True, kw_only=True)
class Pause(Steering):
    """Nobody new is told."""

    reason: str = "by an operator"


@dataclass(frozen=True, kw_only=True)
class Resume(Steering):
    """The stage goes on with a new window: failures are accepted, silent devices awaited anew."""


@dataclass(frozen=True, kw_only=True)
class Abort(Steering):
    """The rollout ends; devices that were told are told the previous release."""

    reason: str = "by an operator"


@dataclass(frozen=True, kw_only=True)
class Poll(Event):
    """A device asks what to run and says what it runs."""

    device: str
    running: int | None = None
    agent: str = ""


@dataclass(frozen=True, kw_only=True)
class ReportOutcome(Event):
    """A device says what became of a directive.

    Attributes:
        device: which.
        serial: of the directive that is answered.
        version: that it named.
        outcome: what became of it.
        detail: the agent's own words.
    """

    device: str
    serial: int
    version: int
    outcome: Outcome
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class Tick(Event):
    """Time has passed; deadlines are looked at."""


Enrolment = AddGroup | AddDevice | MoveDevice | RevokeDevice
Pinning = PinDevice | PinGroup
AnyEvent = Enrolment | Pinning | StartRollout | Steering | Poll | ReportOutcome | Tick

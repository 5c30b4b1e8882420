"""What a device shows and says when it talks to the fleet."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from prunecast.server.fleet.errors import Unusable
from prunecast.server.fleet.model import Outcome

__all__ = [
    "Certified",
    "Credential",
    "DeviceReport",
    "DeviceState",
    "DirectiveAnswer",
    "Health",
    "Identity",
    "Receipt",
]

_ID = re.compile(r"[A-Za-z0-9]{8,64}")
_FIGURE = re.compile(r"[A-Za-z0-9._-]{1,64}")
_MOST_FIGURES = 64
_MOST_DETAIL = 500


@dataclass(frozen=True)
class Certified:
    """A device whose name the transport has authenticated, by a client certificate."""

    device: str


Credential = str | Certified
"""A token as `FleetService.enrol` returned it, or a name that a certificate proves."""


@dataclass(frozen=True)
class Identity:
    """Whom a credential stands for: the device and the name of the release that it follows."""

    device: str
    release: str


@dataclass(frozen=True)
class DeviceState:
    """What a device says about itself when it polls.

    Attributes:
        running: version of the active release; None: none is active.
        agent: version of its software.

    Raises:
        Unusable: out of bounds.
    """

    running: int | None = None
    agent: str = ""

    def __post_init__(self) -> None:
        if self.running is not None and not 1 <= self.running < 10**15:
            raise Unusable(f"running version {str(self.running)[:20]} is no release number")
        if len(self.agent) > 64 or not self.agent.isprintable():
            raise Unusable("the agent's version is at most 64 printable characters")


@dataclass(frozen=True)
class DirectiveAnswer:
    """A device's answer to a directive.

    Attributes:
        serial: of the directive that is answered.
        version: that the directive named.
        outcome: what became of it.
        detail: the agent's own words; at most 500 printable characters are kept.
    """

    serial: int
    version: int
    outcome: Outcome
    detail: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", _printable(self.detail))


@dataclass(frozen=True)
class Health:
    """How a device says it is.

    Attributes:
        error: its last problem; empty: none. At most 500 printable characters are kept.
        figures: telemetry by name; what is not finite is dropped.
        made: seconds since the epoch by the device's clock.

    Raises:
        Unusable: too many figures, or a name that cannot be one.
    """

    error: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
    made: float = 0.0

    def __post_init__(self) -> None:
        if len(self.figures) > _MOST_FIGURES:
            raise Unusable(f"{len(self.figures)} figures are too many: at most {_MOST_FIGURES}")
        for name in self.figures:
            if not _FIGURE.fullmatch(name):
                raise Unusable(f"figure {name[:80]!r}: a name is 1 to 64 letters, digits and . _ -")
        object.__setattr__(self, "error", _printable(self.error))
        finite = {k: v for k, v in self.figures.items() if math.isfinite(v)}
        object.__setattr__(self, "figures", finite)
        object.__setattr__(self, "made", self.made if math.isfinite(self.made) else 0.0)


@dataclass(frozen=True)
class DeviceReport:
    """Everything that a device reports at once.

    Attributes:
        id: of the report, never used again by this device; None: not remembered.
        state: what it runs; None: not said.
        answer: to a directive; None: none is due.
        health: how it is; None: not said.

    Raises:
        Unusable: an identifier that cannot be one.
    """

    id: str | None = None
    state: DeviceState | None = None
    answer: DirectiveAnswer | None = None
    health: Health | None = None

    def __post_init__(self) -> None:
        if self.id is not None and not _ID.fullmatch(self.id):
            raise Unusable(f"report {self.id[:80]!r}: an id is 8 to 64 letters and digits")


@dataclass(frozen=True)
class Receipt:
    """What became of a report.

    Attributes:
        counted: its answer changed something. False: there was none, it was known already, or it
            answers another directive than the present one. Either way it need not be sent again.
        replayed: a report of this id had been taken before, so this one was ignored.
    """

    counted: bool
    replayed: bool


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:_MOST_DETAIL])

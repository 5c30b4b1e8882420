"""For how long signed metadata is valid."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from prunecast.server.repository.keys import ROLES

__all__ = ["Expiry"]


@dataclass(frozen=True)
class Expiry:
    """For how long each role's metadata is valid after signing.

    Short-lived online roles bound how long a network attacker can hide a new release from a
    device; they must be renewed more often than they expire.
    """

    root: timedelta = timedelta(days=365)
    targets: timedelta = timedelta(days=180)
    snapshot: timedelta = timedelta(days=21)
    timestamp: timedelta = timedelta(days=7)
    delegated: timedelta = timedelta(days=30)

    def until(self, role: str, now: datetime) -> datetime:
        """When metadata signed `now` expires, in whole seconds, UTC."""
        return (now + self.lifetime(role)).replace(microsecond=0)

    def lifetime(self, role: str) -> timedelta:
        """Of the role's metadata; a name that is none of TUF's is a delegated role."""
        lifetime: timedelta = getattr(self, role if role in ROLES else "delegated")
        return lifetime

    def soon(self, role: str, expires: datetime, now: datetime) -> bool:
        """Whether the last quarter of the role's lifetime has begun."""
        return expires - now < self.lifetime(role) / 4

"""Who signs what, and how many must: TUF's roles, lifetimes, delegations, and counted signatures.

The holders of the targets keys hand a pattern of release names to a role with keys and a threshold
of its own (TUF 1.0, section 4.5), so that a server can publish without their keys, and only there.
A name that was handed to nobody has a list of its own all the same, signed by the targets keys: a
device of another name need not fetch it. Nothing here touches a file or a clock.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, Targets

from prunecast.compression.release.manifest import manifest_path
from prunecast.server.repository.errors import ThresholdNotMet

__all__ = [
    "HOLDER",
    "HOLDER_NAME",
    "NEXT_VERSION",
    "OFFLINE_ROLES",
    "ONLINE_ROLES",
    "ROLES",
    "Expiry",
    "Tally",
    "delegate",
    "delegations_of",
    "hand_over",
    "holder_of",
    "list_of",
    "listed_name",
    "require_signed",
    "signer_of",
    "tally",
    "undelegate",
]

OFFLINE_ROLES = ("root", "targets")
ONLINE_ROLES = ("snapshot", "timestamp")
ROLES = OFFLINE_ROLES + ONLINE_ROLES
"""TUF's own; any other name is a delegated role."""

HOLDER = "x-prunecast-holder"
"""Field of a public key: the name of its holder."""

HOLDER_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")

NEXT_VERSION = "x-prunecast-next-version"
"""Field of a list of releases: for each name the number of its next release."""

_OF_NAME = "name."  # with a dot, which no role has that people name


def list_of(name: str) -> str:
    """The role whose metadata are the list of `name` alone, where no role was given that name."""
    return f"{_OF_NAME}{name}"


def listed_name(role: str) -> str | None:
    """The name that `list_of` made a role for; None for every other role."""
    return role.removeprefix(_OF_NAME) if role.startswith(_OF_NAME) else None


def signer_of(role: str) -> str:
    """The role whose keys and lifetime `role` has: targets for the list of a single name.

    >>> signer_of("name.digits"), signer_of("robot"), signer_of("root")
    ('targets', 'robot', 'root')
    """
    return role if listed_name(role) is None else Targets.type


def delegate(targets: Targets, role: str, names: Iterable[str]) -> DelegatedRole:
    """Hand names of releases, or patterns of them, to a new role, without keys as yet."""
    if targets.delegations is None:
        targets.delegations = Delegations(keys={}, roles={})
    assert targets.delegations.roles is not None
    # terminating: what this role does not list is not looked for in later ones
    paths = [f"{name}/*/release.json" for name in names]
    given = DelegatedRole(role, [], 1, terminating=True, paths=paths)
    targets.delegations.roles[role] = given
    return given


def undelegate(targets: Targets, role: str) -> None:
    """End a role and the trust in its keys."""
    assert targets.delegations is not None
    assert targets.delegations.roles is not None
    for keyid in list(targets.delegations.roles[role].keyids):
        targets.revoke_key(keyid, role)
    del targets.delegations.roles[role]
    if not targets.delegations.roles:
        targets.delegations = None


def hand_over(source: Targets, target: Targets | None, given: DelegatedRole | None) -> None:
    """Move releases and their counters from one list to another.

    Args:
        source: the list that loses them.
        target: the list that gains them; None only removes them.
        given: moves what this delegated role publishes. None moves everything.
    """

    def moves(path: str) -> bool:
        return given is None or given.is_delegated_path(path)

    moved = {path: source.targets.pop(path) for path in list(source.targets) if moves(path)}
    counters = dict(source.unrecognized_fields.get(NEXT_VERSION, {}))
    numbers = {name: counters.pop(name) for name in list(counters) if moves(manifest_path(name, 1))}
    if NEXT_VERSION in source.unrecognized_fields:
        source.unrecognized_fields[NEXT_VERSION] = counters
    if target is not None:
        target.targets |= moved
        there = target.unrecognized_fields.get(NEXT_VERSION, {})
        most = {name: max(number, there.get(name, 1)) for name, number in numbers.items()}
        if most:
            target.unrecognized_fields[NEXT_VERSION] = {**there, **most}


def delegations_of(targets: Targets) -> Mapping[str, DelegatedRole]:
    """The roles that `targets` delegates to, in the order in which they are asked."""
    if targets.delegations is None or targets.delegations.roles is None:
        return {}
    return targets.delegations.roles


@dataclass(frozen=True)
class Tally:
    """Valid signatures on one role's metadata, by the keys that one delegator names.

    Attributes:
        subject: what was signed, such as ``root 2``.
        delegator: who names the keys, such as ``root 1``.
        threshold: how many must sign.
        signed: holders whose signature is valid.
        unsigned: holders who have not signed, or whose signature is of other bytes.
    """

    subject: str
    delegator: str
    threshold: int
    signed: tuple[str, ...]
    unsigned: tuple[str, ...]

    @property
    def missing(self) -> int:
        """How many signatures are still needed."""
        return max(0, self.threshold - len(self.signed))

    def __str__(self) -> str:
        who = f": {', '.join(self.signed)}" if self.signed else ""
        said = f"{self.subject} has {len(self.signed)} of {self.threshold} signatures{who}"
        return f"{said} (keys of {self.delegator})"

    @property
    def asked(self) -> str:
        """Whom to ask for what is missing."""
        return f"{self.missing} more of {', '.join(self.unsigned) or 'nobody'} must sign"


def holder_of(key: Key) -> str:
    """Name of a key's holder; the beginning of its id where there is none."""
    name = key.unrecognized_fields.get(HOLDER)
    return (
        name if isinstance(name, str) and HOLDER_NAME.fullmatch(name) else f"key {key.keyid[:12]}"
    )


def tally(delegator: Root | Targets, role: str, metadata: Metadata[Any]) -> Tally:
    """Count the valid signatures on `metadata` by the keys that `delegator` names for `role`.

    Raises:
        ValueError: `delegator` has no such role.
    """
    result = delegator.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return Tally(
        f"{role} {metadata.signed.version}",
        f"{delegator.type} {delegator.version}",
        result.threshold,
        tuple(sorted(map(holder_of, result.signed.values()))),
        tuple(sorted(map(holder_of, result.unsigned.values()))),
    )


def require_signed(tallies: Iterable[Tally]) -> None:
    """Refuse what has not enough signatures.

    Raises:
        ThresholdNotMet: names who has signed and who can.
    """
    for counted in tallies:
        if counted.missing:
            raise ThresholdNotMet(
                f"{counted}: {counted.asked}, with `prunecast release keys sign`; nothing was "
                "published"
            )


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
        signer = signer_of(role)
        lifetime: timedelta = getattr(self, signer if signer in ROLES else "delegated")
        return lifetime

    def soon(self, role: str, expires: datetime, now: datetime) -> bool:
        """Whether the last quarter of the role's lifetime has begun."""
        return expires - now < self.lifetime(role) / 4

"""Delegated roles: who lists the releases of which names.

The holders of the targets keys hand a pattern of release names to a role with keys and a threshold
of its own (TUF 1.0, section 4.5), so that a server can publish without their keys, and only there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from datetime import datetime

from tuf.api.metadata import DelegatedRole, Targets

from prunecast.compression.release.manifest import manifest_path

__all__ = ["NEXT_VERSION", "delegations_of", "first_listing", "hand_over", "publisher_of"]

NEXT_VERSION = "x-prunecast-next-version"
"""Field of a list of releases: for each name the number of its next release."""


def hand_over(source: Targets, target: Targets, role: str | None) -> None:
    """Move releases and their counters from one list to another.

    Args:
        source: the list that loses them.
        target: the list that gains them; the same one to only remove them.
        role: a delegated role of `source`: what it publishes moves. None moves everything.
    """
    given = None if role is None else delegations_of(source)[role]
    for path in list(source.targets):
        if given is None or given.is_delegated_path(path):
            moved = source.targets.pop(path)
            if target is not source:
                target.targets[path] = moved
    counters = dict(source.unrecognized_fields.get(NEXT_VERSION, {}))
    for name in list(counters):
        if given is None or given.is_delegated_path(manifest_path(name, 1)):
            number = counters.pop(name)
            if target is not source:
                there = target.unrecognized_fields.get(NEXT_VERSION, {})
                most = max(number, there.get(name, 1))
                target.unrecognized_fields[NEXT_VERSION] = {**there, name: most}
    if NEXT_VERSION in source.unrecognized_fields:
        source.unrecognized_fields[NEXT_VERSION] = counters


def first_listing(before: Targets, after: Targets, role: str, now: datetime) -> Targets:
    """The first list of a delegated role: the releases that left the list of targets for it."""
    held = copy.deepcopy(before)
    held.delegations = after.delegations
    made = Targets(expires=now.replace(microsecond=0))
    hand_over(held, made, role)
    return made


def delegations_of(targets: Targets) -> Mapping[str, DelegatedRole]:
    """The roles that `targets` delegates to, in the order in which they are asked."""
    if targets.delegations is None or targets.delegations.roles is None:
        return {}
    return targets.delegations.roles


def publisher_of(targets: Targets, path: str) -> str:
    """The role that lists `path`: the first delegated one that may, or targets itself."""
    for role, given in delegations_of(targets).items():
        if given.is_delegated_path(path):
            return role
    return Targets.type

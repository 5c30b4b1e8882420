"""What a ceremony asks holders to sign: root and targets metadata before any signature.

Pure functions from the metadata in force and a wish to the metadata that fulfils it. They refuse
what would lock the repository's owners out: a threshold that no longer can be met, or one key on
both sides of the line between offline and online.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from securesystemslib.signer import Key
from tuf.api.metadata import DelegatedRole, Delegations, Root, Targets

from prunecast.server.repository.errors import CeremonyError
from prunecast.server.repository.metadata import MetadataSet
from prunecast.server.repository.roles import (
    OFFLINE_ROLES,
    ONLINE_ROLES,
    ROLES,
    Expiry,
    delegations_of,
    hand_over,
    holder_of,
)

__all__ = ["Change", "RoleKeys", "changed_metadata", "first_metadata"]

_ROLE = re.compile(r"[a-z][a-z0-9-]{0,63}")
_PATTERN = re.compile(r"[a-z0-9._*?-]{1,64}")


@dataclass(frozen=True)
class RoleKeys:
    """Who may sign for a role.

    Attributes:
        keys: public keys.
        threshold: how many of them must sign.
    """

    keys: Sequence[Key]
    threshold: int = 1


@dataclass(frozen=True)
class Change:
    """What is to change. Roles are the four of TUF and the delegated ones.

    Attributes:
        add: public keys that a role trusts from now on.
        revoke: holders, or beginnings of key ids (8 digits at least), that a role trusts no more.
        threshold: new thresholds.
        delegate: new roles, each with the patterns of release names it publishes (``*``, ``?``).
        withdraw: delegated roles that end; their releases move into the list of targets.
        renew: roles out of root and targets that are only signed again, for a later expiry.
    """

    add: Mapping[str, Sequence[Key]] = field(default_factory=dict)
    revoke: Mapping[str, Sequence[str]] = field(default_factory=dict)
    threshold: Mapping[str, int] = field(default_factory=dict)
    delegate: Mapping[str, Sequence[str]] = field(default_factory=dict)
    withdraw: Sequence[str] = ()
    renew: Sequence[str] = ()


def first_metadata(
    roles: Mapping[str, RoleKeys], expiry: Expiry, now: datetime
) -> dict[str, Root | Targets]:
    """Version 1 of root and targets.

    Args:
        roles: keys of each of the four roles.
        expiry: lifetimes.
        now: when the ceremony takes place.

    Raises:
        CeremonyError: a role has no keys, or a threshold that cannot be met.
    """
    root = Root(expires=expiry.until("root", now), consistent_snapshot=True)
    for role in ROLES:
        if role not in roles or not roles[role].keys:
            raise CeremonyError(f"the {role} role has no key: name at least one public key file")
        for key in roles[role].keys:
            root.add_key(key, role)
        root.roles[role].threshold = roles[role].threshold
    _check(root, None)
    return {"root": root, "targets": Targets(expires=expiry.until("targets", now))}


def changed_metadata(
    state: MetadataSet, change: Change, expiry: Expiry, now: datetime
) -> dict[str, Root | Targets]:
    """The next version of root, of targets, or of both: what has to be signed for `change`.

    Raises:
        CeremonyError: nothing would change, a role or holder is unknown, or a threshold could not
            be met.
    """
    root, targets = copy.deepcopy(state.root.signed), copy.deepcopy(state.targets.signed)
    asked = [*change.add, *change.revoke, *change.threshold]
    for role in change.delegate:
        _delegate(targets, role, change.delegate[role])
    known = [*ROLES, *delegations_of(targets)]
    for role in [*asked, *change.withdraw]:
        if role not in known:
            raise CeremonyError(
                f"there is no role {role!r}: {', '.join(known)}; --delegate makes new ones"
            )
    unknown = set(change.renew) - set(OFFLINE_ROLES)
    if unknown:
        raise CeremonyError(
            f"{', '.join(sorted(unknown))}: holders sign root and targets; `prunecast release "
            "renew` signs the others anew"
        )
    for role in dict.fromkeys(asked):
        delegator: Root | Targets = root if role in ROLES else targets
        # first, so that a holder's new key may come for the old one
        for holder in change.revoke.get(role, ()):
            delegator.revoke_key(_find(delegator, role, holder), role)
        for key in change.add.get(role, ()):
            delegator.add_key(key, role)
        if role in change.threshold:
            delegator.get_delegated_role(role).threshold = change.threshold[role]
    for role in change.delegate:
        # out of the list; into the role's when it is enacted
        hand_over(targets, None, delegations_of(targets)[role])
    for role in change.withdraw:
        _withdraw(state, targets, role)
    _check(root, targets)
    made: dict[str, Root | Targets] = {}
    if "root" in change.renew or root != state.root.signed:
        root.version += 1
        root.expires = expiry.until("root", now)
        made["root"] = root
    stale = not root.get_verification_result(
        "targets", state.targets.signed_bytes, state.targets.signatures
    )
    if "targets" in change.renew or targets != state.targets.signed or stale:
        targets.version += 1
        targets.expires = expiry.until("targets", now)
        made["targets"] = targets
    if not made:
        raise CeremonyError("nothing would change: name keys, a threshold, or a role to renew")
    return made


def _delegate(targets: Targets, role: str, names: Sequence[str]) -> None:
    if not _ROLE.fullmatch(role) or role in ROLES:
        raise CeremonyError(f"{role!r} cannot name a role: use a-z 0-9 -, and none of TUF's names")
    if not names or not all(_PATTERN.fullmatch(name) for name in names):
        raise CeremonyError(
            f"the {role} role needs names of releases that it publishes, such as digits or digits-*"
        )
    if targets.delegations is None:
        targets.delegations = Delegations(keys={}, roles={})
    roles = targets.delegations.roles
    assert roles is not None
    if role in roles:
        raise CeremonyError(f"the {role} role exists: change its keys with --add and --revoke")
    # terminating: what this role does not list is not looked for in later ones
    paths = [f"{name}/*/release.json" for name in names]
    roles[role] = DelegatedRole(role, [], 1, terminating=True, paths=paths)


def _withdraw(state: MetadataSet, targets: Targets, role: str) -> None:
    if role not in state.delegated or targets.delegations is None:
        raise CeremonyError(f"{role} is no delegated role: only those can be withdrawn")
    assert targets.delegations.roles is not None
    given = targets.delegations.roles[role]
    held = state.delegated[role].signed
    for keyid in list(given.keyids):
        targets.revoke_key(keyid, role)
    hand_over(copy.deepcopy(held), targets, None)
    del targets.delegations.roles[role]
    if not targets.delegations.roles:
        targets.delegations = None


def _find(delegator: Root | Targets, role: str, holder: str) -> str:
    keyids = delegator.get_delegated_role(role).keyids
    found = [
        keyid
        for keyid in keyids
        if holder_of(delegator.get_key(keyid)) == holder
        or (len(holder) >= 8 and keyid.startswith(holder))
    ]
    if len(found) != 1:
        names = ", ".join(f"{holder_of(delegator.get_key(k))} ({k[:12]})" for k in keyids)
        what = "no key" if not found else "several keys"
        raise CeremonyError(f"{holder!r} names {what} of the {role} role; it has: {names}")
    return found[0]


def _check(root: Root, targets: Targets | None) -> None:
    roles: dict[str, Any] = {**root.roles, **(delegations_of(targets) if targets else {})}
    for name, role in roles.items():
        if not 1 <= role.threshold <= len(role.keyids):
            raise CeremonyError(
                f"the {name} role would have {len(role.keyids)} keys and a threshold of "
                f"{role.threshold}: nobody could sign for it; add keys or change the threshold"
            )
    for name in OFFLINE_ROLES:
        holders = [holder_of(root.get_key(keyid)) for keyid in roles[name].keyids]
        if twice := sorted({holder for holder in holders if holders.count(holder) > 1}):
            raise CeremonyError(
                f"{twice[0]} would hold two keys of the {name} role and count twice: revoke the "
                "old one, or name the other holder differently"
            )
    offline = {keyid for name in OFFLINE_ROLES for keyid in roles[name].keyids}
    for name in [*ONLINE_ROLES, *(n for n in roles if n not in ROLES)]:
        if shared := offline & set(roles[name].keyids):
            raise CeremonyError(
                f"key {min(shared)[:12]} would sign for root or targets and for {name}, which "
                "lies online: take a key of its own"
            )

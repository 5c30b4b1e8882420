"""What a ceremony asks holders to sign, and their signatures on it, as files that can be mailed.

Requests are root and targets metadata before any signature: pure functions from the metadata in
force and a wish to the metadata that fulfils it. They refuse what would lock the repository's
owners out: a threshold that no longer can be met, or one key on both sides of the line between
offline and online.

Beside the signature that becomes part of the metadata a holder gives a second one, over a statement
of what was signed and when, so that nobody who handles the file can change the time in the
transcript.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import CryptoSigner, Key, Signature
from tuf.api.metadata import Root, Targets

from prunecast.common.documents import from_document
from prunecast.compression.release.manifest import manifest_path
from prunecast.server.repository.errors import CeremonyError
from prunecast.server.repository.metadata import MetadataSet
from prunecast.server.repository.roles import (
    OFFLINE_ROLES,
    ONLINE_ROLES,
    ROLES,
    Expiry,
    delegate,
    delegations_of,
    hand_over,
    holder_of,
    listed_name,
    signer_of,
    undelegate,
)

__all__ = [
    "Change",
    "HolderSignature",
    "RoleKeys",
    "changed_metadata",
    "first_metadata",
    "sign_request",
    "utc_stamp",
]

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
        withdraw: delegated roles that end; their releases move into targets.
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
    known = [*ROLES, *(r for r in delegations_of(targets) if listed_name(r) is None)]
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
        # out of the lists; into the role's when it is enacted
        given = delegations_of(targets)[role]
        hand_over(targets, None, given)
        for own in _own_lists(targets):
            if given.is_delegated_path(manifest_path(str(listed_name(own)), 1)):
                undelegate(targets, own)
    for role in change.withdraw:
        if role not in state.delegated:
            raise CeremonyError(f"{role} is no delegated role: only those can be withdrawn")
        _take_back(state, targets, role)
    # the targets keys sign lists of names, too: what holders sign instead is one list
    for own in _own_lists(targets):
        if "targets" in change.renew or not _same_keys(root, targets, own):
            _take_back(state, targets, own)
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
    if role in delegations_of(targets):
        raise CeremonyError(f"the {role} role exists: change its keys with --add and --revoke")
    delegate(targets, role, names)


def _take_back(state: MetadataSet, targets: Targets, role: str) -> None:
    hand_over(copy.deepcopy(state.delegated[role].signed), targets, None)
    undelegate(targets, role)


def _own_lists(targets: Targets) -> list[str]:
    return [role for role in delegations_of(targets) if listed_name(role) is not None]


def _same_keys(root: Root, targets: Targets, own: str) -> bool:
    given, like = targets.get_delegated_role(own), root.roles["targets"]
    return (given.threshold, set(given.keyids)) == (like.threshold, set(like.keyids))


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
    for name in [*ONLINE_ROLES, *(n for n in roles if signer_of(n) not in ROLES)]:
        if shared := offline & set(roles[name].keyids):
            raise CeremonyError(
                f"key {min(shared)[:12]} would sign for root or targets and for {name}, which "
                "lies online: take a key of its own"
            )


_SCHEMA = 1
_MOST = 16_384  # bytes
_STAMP = "%Y-%m-%dT%H:%M:%SZ"
_DOMAIN = b"prunecast ceremony 1\n"  # no TUF metadata begins like this


@dataclass(frozen=True)
class HolderSignature:
    """A signature and when it was given.

    Attributes:
        role: ``root`` or ``targets``.
        version: of the metadata.
        sha256: digest (hex) of the bytes that were signed.
        keyid: of the key.
        sig: over the metadata, hex.
        at: UTC, ISO 8601, by the holder's clock.
        statement: over role, version, sha256 and at, hex.
    """

    role: str
    version: int
    sha256: str
    keyid: str
    sig: str
    at: str
    statement: str

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"{self.role}-{self.version}-{self.keyid[:16]}.json"

    def to_bytes(self) -> bytes:
        """As JSON."""
        return (json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> HolderSignature:
        """Read what `to_bytes` wrote; nothing is verified yet.

        Raises:
            CeremonyError: not such a file.
        """
        try:
            if len(data) > _MOST:
                raise ValueError("too long")
            document: dict[str, Any] = json.loads(data)
            if document["schema"] != _SCHEMA:
                raise ValueError("another schema")
            made = from_document(cls, document)
            bytes.fromhex(made.keyid), bytes.fromhex(made.sig), bytes.fromhex(made.statement)
            if len(made.keyid) != 64 or made.role not in ("root", "targets"):
                raise ValueError("an unusable key id or role")
            datetime.strptime(made.at, _STAMP)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CeremonyError(
                "not a signature file: `prunecast release keys sign` writes them"
            ) from error
        return made

    def verify(self, key: Key, payload: bytes) -> None:
        """Check both signatures.

        Args:
            key: with this signature's `keyid`.
            payload: the bytes of the metadata.

        Raises:
            CeremonyError: either was made with another key, or over something else.
        """
        try:
            key.verify_signature(Signature(self.keyid, self.sig), payload)
            said = _statement(self.role, self.version, self.sha256, self.at)
            key.verify_signature(Signature(self.keyid, self.statement), said)
        except UnverifiedSignatureError as error:
            raise CeremonyError(
                f"the signature on {self.role} {self.version} by key {self.keyid[:12]} is not "
                "valid: its holder must sign again"
            ) from error


def sign_request(
    signer: CryptoSigner, role: str, version: int, payload: bytes, sha256: str, now: datetime
) -> HolderSignature:
    """Sign `payload`, the bytes of a request, and the statement about it."""
    at = utc_stamp(now)
    sig = signer.sign(payload)
    statement = signer.sign(_statement(role, version, sha256, at))
    return HolderSignature(role, version, sha256, sig.keyid, sig.signature, at, statement.signature)


def _statement(role: str, version: int, sha256: str, at: str) -> bytes:
    fields = {"role": role, "version": version, "sha256": sha256, "at": at}
    return _DOMAIN + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def utc_stamp(when: datetime) -> str:
    """A time in UTC, ISO 8601, in whole seconds."""
    return when.astimezone(UTC).strftime(_STAMP)

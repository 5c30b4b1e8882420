"""The repository's signed metadata in memory; touches no file and no clock.

A `MetadataSet` is the four TUF roles in force and the roles that targets delegates release names
to: those that people named, and one for each other name. Operations return the files that a new
state adds, in the order in which they must appear on disk: `timestamp.json` last, because it alone
has no version in its name and makes the new state visible.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import (
    DelegatedRole,
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from prunecast.compression.release.manifest import manifest_path, parse_manifest_path
from prunecast.server.repository.errors import (
    CeremonyError,
    KeyFileError,
    RepositoryCorrupt,
    ThresholdNotMet,
)
from prunecast.server.repository.roles import (
    NEXT_VERSION,
    ROLES,
    Expiry,
    delegate,
    delegations_of,
    hand_over,
    list_of,
    listed_name,
    require_signed,
    signer_of,
    tally,
)

__all__ = ["MetadataSet", "Signers"]

Signers = Callable[[str], Sequence[CryptoSigner]]
"""Role to the private keys of it that are at hand."""

_SERIALISER = JSONSerializer(compact=True)


@dataclass(eq=False)
class MetadataSet:
    """The metadata in force.

    Attributes:
        root: trusted keys of every role.
        targets: who lists which releases; releases themselves where holders took them back.
        snapshot: which targets metadata is current.
        timestamp: which snapshot is current.
        delegated: live releases of the names that a role lists, by role.
    """

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]
    delegated: dict[str, Metadata[Targets]] = field(default_factory=dict)

    @classmethod
    def found(
        cls,
        root: Metadata[Root],
        targets: Metadata[Targets],
        signers: Signers,
        expiry: Expiry,
        now: datetime,
    ) -> dict[str, bytes]:
        """The files of a repository that begins with root and targets as their holders signed them.

        Raises:
            ThresholdNotMet: too few signatures.
            KeyFileError: the key of an online role is missing, or not the one that root names.
        """
        require_signed([tally(root.signed, "root", root), tally(root.signed, "targets", targets)])
        made = cls(root, targets, Metadata(Snapshot()), Metadata(Timestamp()))
        made.snapshot.signed.version = made.timestamp.signed.version = 0
        files = {f"{root.signed.version}.root.json": root.to_bytes(_SERIALISER)}
        files |= made._listed("targets")
        return files | made.sign(["snapshot"], signers, expiry, now)

    @classmethod
    def load(cls, read: Callable[[str], bytes], root_version: int) -> MetadataSet:
        """Load the state that `timestamp.json` names and check every signature.

        Args:
            read: returns the content of a metadata file by name.
            root_version: of the newest root.

        Raises:
            RepositoryCorrupt: missing, damaged, or not signed by the keys in force.
        """

        def trusted(role: str, delegator: Root | Targets | None, version: int) -> Metadata[Any]:
            name = f"{version}.{role}.json" if version else f"{role}.json"
            metadata = Metadata[Any].from_bytes(read(name))
            counted = tally(delegator or metadata.signed, role, metadata)
            if counted.missing:
                raise ValueError(str(counted))
            return metadata

        try:
            root = trusted("root", None, root_version)
            timestamp = trusted("timestamp", root.signed, 0)
            snapshot = trusted("snapshot", root.signed, timestamp.signed.snapshot_meta.version)
            meta = snapshot.signed.meta
            targets = trusted("targets", root.signed, meta["targets.json"].version)
            delegated = {
                role: trusted(role, targets.signed, meta[f"{role}.json"].version)
                for role in delegations_of(targets.signed)
            }
        except (tuf_errors.RepositoryError, KeyError, ValueError, OSError) as error:
            raise RepositoryCorrupt(
                f"the repository's metadata cannot be trusted: {error}; restore it from a copy"
            ) from error
        return cls(root, targets, snapshot, timestamp, delegated)

    def paths(self) -> Mapping[str, TargetFile]:
        """Live targets by path: those in the list, and those of roles that publish their name."""
        found = dict(self.targets.signed.targets)
        for role, given in delegations_of(self.targets.signed).items():
            for path, target in self.delegated[role].signed.targets.items():
                if given.is_delegated_path(path):
                    found.setdefault(path, target)
        return found

    def publisher_of(self, name: str) -> str:
        """The role that lists `name`: the first delegated one that may, or targets itself."""
        for role, given in delegations_of(self.targets.signed).items():
            if given.is_delegated_path(manifest_path(name, 1)):
                return role
        return Targets.type

    def next_version(self, name: str) -> int:
        """The number of the next release of `name`; numbers are never given twice."""
        counters: dict[str, int] = self._list(name).unrecognized_fields.get(NEXT_VERSION, {})
        return counters.get(name, 1)

    @property
    def own_lists(self) -> list[str]:
        """The roles that list a single name each and are signed by the targets keys."""
        return [role for role in self.delegated if listed_name(role) is not None]

    def separate(self, *names: str) -> set[str]:
        """Give each of `names`, and each name that stands in targets, a list of its own.

        What other roles publish stays there.

        Returns:
            The roles that are to be signed: none where every name has its list already.
        """
        targets = self.targets.signed
        standing = {found[0] for found in map(parse_manifest_path, targets.targets) if found}
        standing |= set(targets.unrecognized_fields.get(NEXT_VERSION, {}))
        made = set()
        for name in sorted({*names, *standing}):
            if self.publisher_of(name) != Targets.type:
                continue
            role = list_of(name)
            given = delegate(targets, role, [name])
            self._trust_like_targets(role)
            self._begin_list(role, [targets], given)
            made |= {Targets.type, role}
        return made

    def _trust_like_targets(self, role: str) -> None:
        """Let the keys of targets, and as many of them, sign the list of a name."""
        root, targets = self.root.signed, self.targets.signed
        given, like = targets.get_delegated_role(role), root.roles[Targets.type]
        for keyid in list(given.keyids):
            if keyid not in like.keyids:
                targets.revoke_key(keyid, role)
        for keyid in like.keyids:
            targets.add_key(root.keys[keyid], role)
        given.threshold = like.threshold

    def _begin_list(self, role: str, sources: Sequence[Targets], given: DelegatedRole) -> None:
        """A list for `role`, not signed yet, with what it takes from `sources`."""
        listing = Targets(expires=self.targets.signed.expires)
        for source in sources:
            hand_over(source, listing, given)
        # a role of that name may have been withdrawn before: its number never goes back
        known = self.snapshot.signed.meta.get(f"{role}.json")
        listing.version = known.version if known else 0
        self.delegated[role] = Metadata(listing)

    def _numbers(self) -> dict[str, int]:
        """The number of the next release of every name that has had one."""
        found: dict[str, int] = {}
        for metadata in (self.targets, *self.delegated.values()):
            for name, number in metadata.signed.unrecognized_fields.get(NEXT_VERSION, {}).items():
                found[name] = max(number, found.get(name, 1))
        return found

    def list_release(self, name: str, version: int, target: TargetFile) -> None:
        """Add a release, and remember that its number has been given."""
        listing = self._list(name)
        listing.targets[manifest_path(name, version)] = target
        counters = listing.unrecognized_fields.get(NEXT_VERSION, {})
        listing.unrecognized_fields[NEXT_VERSION] = {**counters, name: version + 1}

    def unlist_release(self, name: str, version: int) -> None:
        """Remove a release."""
        del self._list(name).targets[manifest_path(name, version)]

    def _list(self, name: str) -> Targets:
        listing: Targets = self._role(self.publisher_of(name)).signed
        return listing

    def sign(
        self, roles: Collection[str], signers: Signers, expiry: Expiry, now: datetime
    ) -> dict[str, bytes]:
        """New versions of `roles` and of those that name them, signed with the roles' keys.

        A list of releases is named by snapshot, and snapshot by timestamp.

        Raises:
            KeyFileError, ThresholdNotMet: see `usable`.
        """
        files: dict[str, bytes] = {}
        if "root" in roles:
            self._renew("root", signers, expiry, now)
            files[f"{self.root.signed.version}.root.json"] = self.root.to_bytes(_SERIALISER)
        lists = [role for role in ("targets", *self.delegated) if role in roles]
        for role in lists:
            self._renew(role, signers, expiry, now)
            files |= self._listed(role)
        above = bool(lists) or "snapshot" in roles
        if above:
            self._renew("snapshot", signers, expiry, now)
            version, data = self.snapshot.signed.version, self.snapshot.to_bytes(_SERIALISER)
            files[f"{version}.snapshot.json"] = data
            self.timestamp.signed.snapshot_meta = MetaFile.from_data(version, data, ["sha256"])
        if above or "timestamp" in roles:
            self._renew("timestamp", signers, expiry, now)
            files["timestamp.json"] = self.timestamp.to_bytes(_SERIALISER)
        return files

    def _listed(self, role: str) -> dict[str, bytes]:
        """The file of targets or of a delegated role, noted in snapshot."""
        metadata = self._role(role)
        data: bytes = metadata.to_bytes(_SERIALISER)
        meta = MetaFile.from_data(metadata.signed.version, data, ["sha256"])
        if listed_name(role) is not None:
            # every device fetches this of every name, so it is short; not without the digest, for
            # lists do not say whose they are, and one must not take the place of another
            meta.length = None
        self.snapshot.signed.meta[f"{role}.json"] = meta
        return {f"{metadata.signed.version}.{role}.json": data}

    def replace_key(
        self, role: str, new: CryptoSigner, signers: Signers, expiry: Expiry, now: datetime
    ) -> dict[str, bytes]:
        """A new root in which `role` trusts only the key of `new`; lists of names follow targets.

        Rotating root itself is signed by the old key and by the new one, so that devices which
        trust the old root accept the new one.
        Root and the role must have one key each, see `require_sole`.
        """
        old = self.usable("root", signers)
        for keyid in list(self.root.signed.roles[role].keyids):
            self.root.signed.revoke_key(keyid, role)
        self.root.signed.add_key(new.public_key, role)
        for own in self.own_lists if role == Targets.type else ():
            self._trust_like_targets(own)
        self._bump("root", expiry, now)
        self.root.sign(old[0])
        if role == "root":
            self.root.sign(new, append=True)
        return {f"{self.root.signed.version}.root.json": self.root.to_bytes(_SERIALISER)}

    def require_sole(self, *roles: str) -> None:
        """Refuse roles that several holders share: one machine must not take them over.

        Raises:
            ThresholdNotMet: names the role.
        """
        for role in roles:
            keys = self.root.signed.roles[role].keyids
            if len(keys) != 1:
                raise ThresholdNotMet(
                    f"the {role} role has {len(keys)} keys: prepare the change with `prunecast "
                    "release keys change`, and let their holders sign"
                )

    def enact(
        self,
        root: Metadata[Root] | None,
        targets: Metadata[Targets] | None,
        signers: Signers,
        expiry: Expiry,
        now: datetime,
    ) -> dict[str, bytes]:
        """Take over root and targets that their holders signed; sign what names them.

        Args:
            root: the next version, or None to keep the one in force.
            targets: the next version, or None to keep the one in force.
            signers: of the online roles.
            expiry: lifetimes.
            now: the time.

        Raises:
            ThresholdNotMet: too few signatures.
            CeremonyError: made for another state of the repository than the one in force.
            KeyFileError: the key of an online role is missing, or not the one that root names.
        """
        live, numbers = set(self.paths()), self._numbers()
        before = self.targets.signed
        for role, made in (("root", root), ("targets", targets)):
            if made is not None and made.signed.version != self._role(role).signed.version + 1:
                raise CeremonyError(
                    f"the ceremony made {role} {made.signed.version}, but {role} "
                    f"{self._role(role).signed.version} is in force: the repository has moved on; "
                    "prepare the change again"
                )
        if root is not None:
            names = [tally(held.signed, "root", root) for held in (self.root, root)]
            require_signed(names)
            self.root = root
        if targets is not None:
            self.targets = targets
        require_signed([tally(self.root.signed, "targets", self.targets)])
        files = self._listed("targets") if targets is not None else {}
        given = delegations_of(self.targets.signed)
        ended = [self.delegated[role].signed for role in self.own_lists if role not in given]
        self.delegated = {role: held for role, held in self.delegated.items() if role in given}
        for role in given:
            if role not in self.delegated:
                self._begin_list(role, copy.deepcopy([before, *ended]), given[role])
            elif not tally(self.targets.signed, role, self.delegated[role]).missing:
                continue
            self._renew(role, signers, expiry, now)
            files |= self._listed(role)
        now_live, now_next = set(self.paths()), self._numbers()
        if lost := live - now_live:
            raise CeremonyError(
                f"{', '.join(sorted(lost))} would be lost, published since the ceremony was "
                "prepared: prepare it again"
            )
        again = {name for name, number in numbers.items() if now_next.get(name, 1) < number}
        if back := sorted({*(now_live - live), *again}):
            raise CeremonyError(
                f"{', '.join(back)} would come back, or its numbers be given again: it was retired "
                "since the ceremony was prepared: prepare it again"
            )
        files |= self.sign(["snapshot"], signers, expiry, now)
        if root is not None:  # what it requires lies there already when devices see it
            timestamp = files.pop("timestamp.json")
            files[f"{root.signed.version}.root.json"] = root.to_bytes(_SERIALISER)
            files["timestamp.json"] = timestamp
        return files

    def _role(self, role: str) -> Metadata[Any]:
        metadata: Metadata[Any] = getattr(self, role) if role in ROLES else self.delegated[role]
        return metadata

    def _bump(self, role: str, expiry: Expiry, now: datetime) -> None:
        signed = self._role(role).signed
        signed.version += 1
        signed.expires = expiry.until(role, now)

    def usable(self, role: str, signers: Signers) -> list[CryptoSigner]:
        """The keys at hand that the role trusts; enough of them to sign.

        Raises:
            KeyFileError: its key is missing, or not the one in force.
            ThresholdNotMet: too few of its keys are at hand.
        """
        delegator = self.root.signed if role in ROLES else self.targets.signed
        given = delegator.get_delegated_role(role)
        role = signer_of(role)
        found = {s.public_key.keyid: s for s in signers(role)}
        usable = [found[keyid] for keyid in given.keyids if keyid in found]
        if not usable:
            raise KeyFileError(
                f"the {role} key at hand is not the one this repository trusts: it was rotated, "
                "or belongs to another repository"
            )
        if len(usable) < given.threshold:
            raise ThresholdNotMet(
                f"the {role} role needs {given.threshold} signatures, and {len(usable)} of its "
                "keys is at hand: name the folders of the others too, or let their holders sign "
                "(`prunecast release keys change`)"
            )
        return usable

    def _renew(self, role: str, signers: Signers, expiry: Expiry, now: datetime) -> None:
        self._bump(role, expiry, now)
        for number, signer in enumerate(self.usable(role, signers)):
            self._role(role).sign(signer, append=number > 0)

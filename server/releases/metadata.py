"""The repository's signed metadata in memory; touches no file and no clock.

A `MetadataSet` is the four TUF roles in force. Operations return the files that a new state adds,
in the order in which they must appear on disk: `timestamp.json` last, because it alone has no
version in its name and makes the new state visible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from prunecast.server.releases.errors import KeyFileError, RepositoryCorrupt
from prunecast.server.releases.keys import ROLES

__all__ = ["Expiry", "MetadataSet", "Signers"]

Signers = Callable[[str], CryptoSigner]
_NEXT = "x-prunecast-next-version"
_SERIALISER = JSONSerializer(compact=True)


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

    def until(self, role: str, now: datetime) -> datetime:
        """When metadata signed `now` expires, in whole seconds, UTC."""
        lifetime: timedelta = getattr(self, role)
        return (now + lifetime).replace(microsecond=0)


class MetadataSet:
    """The metadata in force.

    Attributes:
        root: trusted keys of every role.
        targets: the live releases.
        snapshot: which targets metadata is current.
        timestamp: which snapshot is current.
    """

    def __init__(
        self,
        root: Metadata[Root],
        targets: Metadata[Targets],
        snapshot: Metadata[Snapshot],
        timestamp: Metadata[Timestamp],
    ) -> None:
        self.root, self.targets = root, targets
        self.snapshot, self.timestamp = snapshot, timestamp

    @classmethod
    def create(
        cls, signers: Signers, expiry: Expiry, now: datetime
    ) -> tuple[MetadataSet, dict[str, bytes]]:
        """The key ceremony: version 1 of every role. Returns the set and its files."""
        root = Root(expires=expiry.until("root", now), consistent_snapshot=True)
        for role in ROLES:
            root.add_key(signers(role).public_key, role)
        made = cls(
            Metadata(root),
            Metadata(Targets(expires=expiry.until("targets", now))),
            Metadata(Snapshot(expires=expiry.until("snapshot", now))),
            Metadata(Timestamp(expires=expiry.until("timestamp", now))),
        )
        for role in ROLES:
            made._role(role).signed.version = 0
        files = made.sign_root(signers, expiry, now)
        files |= made.sign_targets(signers, expiry, now)
        return made, files

    @classmethod
    def load(cls, read: Callable[[str], bytes], root_version: int) -> MetadataSet:
        """Load the state that `timestamp.json` names and check every signature.

        Args:
            read: returns the content of a metadata file by name.
            root_version: of the newest root.

        Raises:
            RepositoryCorrupt: missing, damaged, or not signed by the keys in force.
        """
        try:
            root = Metadata[Root].from_bytes(read(f"{root_version}.root.json"))
            root.verify_delegate(Root.type, root)
            timestamp = Metadata[Timestamp].from_bytes(read("timestamp.json"))
            number = timestamp.signed.snapshot_meta.version
            snapshot = Metadata[Snapshot].from_bytes(read(f"{number}.snapshot.json"))
            number = snapshot.signed.meta["targets.json"].version
            targets = Metadata[Targets].from_bytes(read(f"{number}.targets.json"))
            for role, metadata in (
                (Timestamp.type, timestamp),
                (Snapshot.type, snapshot),
                (Targets.type, targets),
            ):
                root.verify_delegate(role, metadata)
        except (RepositoryError, DeserializationError, KeyError, ValueError, OSError) as error:
            raise RepositoryCorrupt(
                f"the repository's metadata cannot be trusted: {error}; restore it from a copy"
            ) from error
        return cls(root, targets, snapshot, timestamp)

    def paths(self) -> Mapping[str, TargetFile]:
        """Live targets by path."""
        return self.targets.signed.targets

    def next_version(self, name: str) -> int:
        """The number of the next release of `name`; numbers are never given twice."""
        counters: dict[str, int] = self.targets.signed.unrecognized_fields.get(_NEXT, {})
        return counters.get(name, 1)

    def count_release(self, name: str, version: int) -> None:
        """Remember that `version` of `name` has been given."""
        fields = self.targets.signed.unrecognized_fields
        fields[_NEXT] = {**fields.get(_NEXT, {}), name: version + 1}

    def sign_root(self, signers: Signers, expiry: Expiry, now: datetime) -> dict[str, bytes]:
        """A new version of root, signed with the role's key."""
        self._bump("root", expiry, now)
        self.root.sign(signers("root"))
        return {f"{self.root.signed.version}.root.json": self.root.to_bytes(_SERIALISER)}

    def sign_targets(self, signers: Signers, expiry: Expiry, now: datetime) -> dict[str, bytes]:
        """New versions of targets, snapshot and timestamp."""
        self._bump("targets", expiry, now)
        self._sign("targets", signers)
        data = self.targets.to_bytes(_SERIALISER)
        files = {f"{self.targets.signed.version}.targets.json": data}
        self.snapshot.signed.meta["targets.json"] = MetaFile.from_data(
            self.targets.signed.version, data, ["sha256"]
        )
        return files | self.sign_snapshot(signers, expiry, now)

    def sign_snapshot(self, signers: Signers, expiry: Expiry, now: datetime) -> dict[str, bytes]:
        """New versions of snapshot and timestamp."""
        self._bump("snapshot", expiry, now)
        self._sign("snapshot", signers)
        data = self.snapshot.to_bytes(_SERIALISER)
        files = {f"{self.snapshot.signed.version}.snapshot.json": data}
        self.timestamp.signed.snapshot_meta = MetaFile.from_data(
            self.snapshot.signed.version, data, ["sha256"]
        )
        return files | self.sign_timestamp(signers, expiry, now)

    def sign_timestamp(self, signers: Signers, expiry: Expiry, now: datetime) -> dict[str, bytes]:
        """A new version of timestamp."""
        self._bump("timestamp", expiry, now)
        self._sign("timestamp", signers)
        return {"timestamp.json": self.timestamp.to_bytes(_SERIALISER)}

    def replace_key(
        self, role: str, new: CryptoSigner, signers: Signers, expiry: Expiry, now: datetime
    ) -> dict[str, bytes]:
        """A new root in which `role` trusts only the key of `new`.

        Rotating root itself is signed by the old key and by the new one, so that devices which
        trust the old root accept the new one.
        """
        old = signers("root")
        for keyid in list(self.root.signed.roles[role].keyids):
            self.root.signed.revoke_key(keyid, role)
        self.root.signed.add_key(new.public_key, role)
        self._bump("root", expiry, now)
        self.root.sign(old)
        if role == "root":
            self.root.sign(new, append=True)
        return {f"{self.root.signed.version}.root.json": self.root.to_bytes(_SERIALISER)}

    def _role(self, role: str) -> Metadata[Any]:
        metadata: Metadata[Any] = getattr(self, role)
        return metadata

    def _bump(self, role: str, expiry: Expiry, now: datetime) -> None:
        signed = self._role(role).signed
        signed.version += 1
        signed.expires = expiry.until(role, now)

    def _sign(self, role: str, signers: Signers) -> None:
        signer = signers(role)
        if signer.public_key.keyid not in self.root.signed.roles[role].keyids:
            raise KeyFileError(
                f"the {role} key at hand is not the one this repository trusts: it was rotated, "
                "or belongs to another repository"
            )
        self._role(role).sign(signer)

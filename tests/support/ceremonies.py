"""Ceremonies with holders whose keys are in memory: no passphrase, no scrypt, no prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner

from prunecast.server.repository import (
    Ceremony,
    Change,
    Expiry,
    KeyRing,
    Repository,
    RoleKeys,
    first_metadata,
)
from prunecast.server.repository.keys.keyholders import key_of, write_key

__all__ = ["Circle", "utc_now"]


def utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass
class Circle:
    """Holders by name, and the folder in which their ceremonies take place."""

    folder: Path
    signers: dict[str, CryptoSigner] = field(default_factory=dict)
    held: int = 0

    def signer(self, holder: str) -> CryptoSigner:
        if holder not in self.signers:
            private = Ed25519PrivateKey.generate()
            self.signers[holder] = CryptoSigner(private, key_of(private.public_key(), holder))
        return self.signers[holder]

    def keys(self, *holders: str) -> list:
        return [self.signer(holder).public_key for holder in holders]

    def online(self, name: str, *roles: str) -> KeyRing:
        """A key folder of a machine; `keys` knows its keys as ``<folder>.<role>``."""
        for role in roles:
            private = Ed25519PrivateKey.generate()
            write_key(self.folder / name / f"{role}.pem", private)
            public = key_of(private.public_key(), f"{name}.{role}")
            self.signers[f"{name}.{role}"] = CryptoSigner(private, public)
        return KeyRing(self.folder / name)

    def plan(self, holders: Sequence[str], threshold: int, *, online: str = "host") -> Ceremony:
        roles = {
            "root": RoleKeys(self.keys(*holders), threshold),
            "targets": RoleKeys(self.keys(*holders), threshold),
            "snapshot": RoleKeys(self.keys(f"{online}.snapshot")),
            "timestamp": RoleKeys(self.keys(f"{online}.timestamp")),
        }
        made = first_metadata(roles, Expiry(), utc_now())
        return Ceremony.create(self._folder(), made, None, utc_now())

    def prepare(self, repository: Repository, change: Change) -> Ceremony:
        return repository.change(self._folder(), change, utc_now())

    def sign(self, ceremony: Ceremony, holders: Iterable[str]) -> Ceremony:
        for holder in holders:
            ceremony.sign(self.signer(holder), utc_now())
        return ceremony

    def change(self, repository: Repository, change: Change, *holders: str) -> list[str]:
        return repository.enact(self.sign(self.prepare(repository, change), holders))

    def found(self, path: Path, *, threshold: int = 2) -> Repository:
        """A repository of alice, bob and carol, with its online keys in the folder ``host``."""
        ring = self.online("host", "snapshot", "timestamp")
        ceremony = self.plan(["alice", "bob", "carol"], threshold)
        self.sign(ceremony, ["alice", "bob", "carol"][:threshold])
        return Repository.create(path, ring, ceremony=ceremony)

    def _folder(self) -> Path:
        self.held += 1
        return self.folder / f"ceremony-{self.held}"

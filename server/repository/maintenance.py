"""Keep a repository's signed metadata valid: lock, keys, renewals, rotations, ceremonies."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root

from prunecast.common.files import write_atomically
from prunecast.common.locks import lock_file
from prunecast.server.repository.errors import (
    CeremonyError,
    KeyFileError,
    RepositoryError,
    ThresholdNotMet,
)
from prunecast.server.repository.garbage import collect
from prunecast.server.repository.keys.ceremony import Ceremony
from prunecast.server.repository.keys.keyring import KeyRing, write_key
from prunecast.server.repository.metadata import MetadataSet
from prunecast.server.repository.reading import RepositoryReader
from prunecast.server.repository.roles import ONLINE_ROLES, ROLES, Expiry

__all__ = ["MaintainedRepository", "check_outside", "utc_now"]

_RETRY = 0.05  # seconds between tries for the lock; a writer holds it for less than a second


def utc_now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


class MaintainedRepository(RepositoryReader):
    """A repository whose metadata can be signed anew; it publishes nothing.

    Args:
        path: its folder, the one that is served.
        keys: where the private keys are; None for reading only.
        window: how many releases of one name stay live; publishing one more retires the oldest.
        expiry: lifetimes of the signed metadata.
        grace: how long files stay after nothing live refers to them, for devices in mid-download.
        patience: how long to wait while another process writes.
        now: the clock, for tests.

    Raises:
        RepositoryCorrupt: no repository there.
        KeyFileError: a key folder lies inside the served folder.
    """

    def __init__(
        self,
        path: Path | str,
        keys: KeyRing | None,
        *,
        window: int = 16,
        expiry: Expiry | None = None,
        grace: timedelta = timedelta(days=1),
        patience: timedelta = timedelta(seconds=10),
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        if window < 1:
            raise RepositoryError("the window holds at least one release")
        super().__init__(path)
        check_outside(keys, self.path)
        self.window, self.grace, self.patience = window, grace, patience
        self._keys, self._expiry, self._now = keys, expiry or Expiry(), now

    def enact(self, ceremony: Ceremony) -> list[str]:
        """Take over what holders signed; a call that was cut off may be repeated.

        Returns:
            The metadata files that were written.

        Raises:
            ThresholdNotMet: too few holders have signed.
            CeremonyError: it was prepared for another state of the repository.
            KeyFileError: an online key is missing, or not the one that root names.
        """
        signed = ceremony.complete()
        root, targets = signed.get("root"), signed.get("targets")
        with self._locked():
            newest = self._root_version()
            if root is not None and root.signed.version == newest > 1:
                # cut off between root and timestamp: go on from the root before
                held = Metadata[Root].from_bytes(self._read(f"{newest}.root.json"))
                newest -= held.signed_bytes == root.signed_bytes
            state, now = MetadataSet.load(self._read, newest), self._now()
            held_root = state.root.signed_bytes
            if ceremony.trusted is None or ceremony.trusted.signed_bytes != held_root:
                raise CeremonyError(
                    f"{ceremony.folder} was prepared for another root than the one in force, root "
                    f"{state.root.signed.version}: prepare it again"
                )
            files = state.enact(root, targets, self._signers, self._expiry, now)
            self._commit(files)
        ceremony.mark_enacted(now)
        return list(files)

    def renew(self, roles: Collection[str] | None = None) -> dict[str, datetime]:
        """Sign metadata anew before it expires; returns when each signed role now expires.

        Renewing a role implies the roles that name it: targets, then snapshot, then timestamp.

        Args:
            roles: to sign; by default snapshot and timestamp, and delegated roles in the second
                half of their lifetime whose key is at hand.

        Raises:
            RepositoryError: an unknown role, or a missing key.
        """
        with self._locked():
            state, now = self._load(), self._now()
            chosen = {*ONLINE_ROLES, *self._due(state, now)} if roles is None else set(roles)
            known = [*ROLES, *state.delegated]
            if not chosen or not chosen <= set(known):
                unknown = ", ".join(sorted(chosen - set(known)))
                raise RepositoryError(f"roles are {', '.join(known)}, not {unknown}")
            files = state.sign(chosen, self._signers, self._expiry, now)
            self._commit(files)
            collect(self.path, now, self.grace)
        return {name.split(".")[-2]: self._expiry.until(name.split(".")[-2], now) for name in files}

    def expiring(self) -> dict[str, datetime]:
        """Roles in the last quarter of their lifetime, and when they expire."""
        now = self._now()
        return {
            role: expires
            for role, expires in self.expires().items()
            if self._expiry.soon(role, expires, now)
        }

    def _due(self, state: MetadataSet, now: datetime) -> Iterator[str]:
        for role, metadata in state.delegated.items():
            if metadata.signed.expires - now < self._expiry.lifetime(role) / 2:
                with suppress(RepositoryError):
                    state.require(role, self._signers)
                    yield role

    def rotate_key(self, role: str) -> None:
        """Replace the key of a role: the old one is trusted by no device that sees the new root.

        The old key file stays beside the new one as ``<role>.pem.old``; destroy it.

        Raises:
            RepositoryError: an unknown role, a missing key, or one rotated before.
            ThresholdNotMet: several holders share the role, or root.
        """
        if role not in ROLES:
            raise RepositoryError(f"roles are {', '.join(ROLES)}, not {role!r}")
        with self._locked():
            state, now = self._load(), self._now()
            state.require_sole("root", role)
            self._require(state, *dict.fromkeys(["root", *ROLES[ROLES.index(role) :]]))
            path = self._keyring().path(role)
            key, fresh = Ed25519PrivateKey.generate(), path.with_suffix(".pem.new")
            write_key(fresh, key)
            new = CryptoSigner(key)

            def signers(wanted: str) -> Sequence[CryptoSigner]:
                return [new] if wanted == role else self._signers(wanted)

            files = state.replace_key(role, new, self._signers, self._expiry, now)
            if role != "root":
                files |= state.sign([role], signers, self._expiry, now)
            # the key must be safe before anything is visible that only it can renew
            path.replace(path.with_suffix(".pem.old"))
            fresh.replace(path)
            self._commit(files)

    def _commit(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():  # in order: timestamp.json makes the state visible
            write_atomically(self.path / "metadata" / name, data)

    def _keyring(self) -> KeyRing:
        if self._keys is None:
            raise KeyFileError("this changes the repository: name the folder that holds the keys")
        return self._keys

    def _signers(self, role: str) -> Sequence[CryptoSigner]:
        return self._keyring().signers(role)

    def _require(self, state: MetadataSet, *roles: str) -> None:
        for role in roles:
            try:
                state.require(role, self._signers)
            except (KeyFileError, ThresholdNotMet) as error:
                if role != "targets":
                    raise
                raise type(error)(
                    f"{error}; to publish without the holders of the targets keys, they hand the "
                    "name to an online role: `prunecast release keys change --delegate`"
                ) from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        until = time.monotonic() + self.patience.total_seconds()
        while True:
            try:
                lock = lock_file(self.path / ".lock")
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise RepositoryError(
                        f"{self.path} is being changed by another process: try again when it is "
                        "done"
                    ) from error
                time.sleep(_RETRY)
        with lock:
            yield


def check_outside(keys: KeyRing | None, path: Path) -> None:
    """Refuse keys in the folder that everybody can download.

    Raises:
        KeyFileError: names the key folder.
    """
    for folder in keys.folders if keys else ():
        if folder.resolve().is_relative_to(path.resolve()):
            raise KeyFileError(f"{folder} lies inside the served folder {path}: move the keys out")

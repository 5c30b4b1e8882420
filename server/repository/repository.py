"""The release repository: a folder of static files that any web server can deliver.

::

    metadata/   N.root.json, N.targets.json, N.name.<name>.json                 (signed)
                N.snapshot.json, timestamp.json
    targets/    <name>/<version>/<sha256>.release.json                          (signed by digest)
    blobs/      <sha256>                               (digests stand in release.json)

Every file but ``timestamp.json`` is immutable. A publication writes the new files first and
replaces ``timestamp.json`` last, by rename: a reader sees the old state or the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, TargetFile

from prunecast.common.clock import utc_now
from prunecast.common.files import write_atomically
from prunecast.compression.release.manifest import (
    ReleaseManifest,
    blob_path,
    check_release_name,
    manifest_path,
)
from prunecast.server.repository.errors import (
    CeremonyError,
    KeyFileError,
    RepositoryError,
    RepositoryExists,
    ThresholdNotMet,
)
from prunecast.server.repository.fleets import FollowingFleets
from prunecast.server.repository.keys.ceremony import Ceremony
from prunecast.server.repository.keys.keyholders import KeyRing, write_key
from prunecast.server.repository.keys.signing import RoleKeys, first_metadata
from prunecast.server.repository.metadata import MetadataSet
from prunecast.server.repository.reading import (
    VERSIONED,
    RepositoryReader,
    collect,
    target_file,
)
from prunecast.server.repository.roles import (
    ONLINE_ROLES,
    ROLES,
    Expiry,
    listed_name,
    signer_of,
)

if TYPE_CHECKING:
    from prunecast.server.repository.authoring.build import ReleaseContents

__all__ = ["PublishedRelease", "Repository"]


@dataclass(frozen=True)
class PublishedRelease:
    """What a publication made.

    Attributes:
        manifest: content of `release.json`.
        onnx_bytes: the same model as one fp32 ``.onnx`` file; None above protobuf's 2 GiB.
        retired: versions that left the window.
        kept: versions that stay live outside the window, and why.
        settings: of onnxruntime's session that recorded the self-test.
    """

    manifest: ReleaseManifest
    onnx_bytes: int | None
    retired: tuple[int, ...] = ()
    kept: Mapping[int, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> int:
        """Number of the release."""
        return self.manifest.version

    @property
    def patch_bytes(self) -> dict[int, int]:
        """Sizes of the payloads, by the release they start from."""
        return {patch.base_version: patch.file.length for patch in self.manifest.patches}


class Repository(RepositoryReader):
    """A release repository on disk, to publish into and to keep valid.

    A release that a fleet stands on is not withdrawn: the fleets that `.fleets.json` remembers and
    those that are given are asked.

    Args:
        path: its folder, the one that is served.
        keys: where the private keys are; None for reading only.
        window: how many releases of one name stay live; publishing one more retires the oldest,
            unless a fleet needs them.
        fleets: URLs of databases of fleets to ask besides those that are remembered.
        expiry: lifetimes of the signed metadata.
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
        fleets: Sequence[str] = (),
        expiry: Expiry | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        if window < 1:
            raise RepositoryError("the window holds at least one release")
        super().__init__(path)
        _check_outside(keys, self.path)
        self.window, self._fleets = window, FollowingFleets(self.path, fleets)
        self._keys, self._expiry, self._now = keys, expiry or Expiry(), now

    @classmethod
    def create(
        cls,
        path: Path | str,
        keys: KeyRing,
        *,
        ceremony: Ceremony | None = None,
        window: int = 16,
        expiry: Expiry | None = None,
        now: Callable[[], datetime] = utc_now,
    ) -> Repository:
        """Sign version 1 of every role, and lay out the folder.

        Args:
            path: where.
            keys: one for each role, or the online ones with a `ceremony`.
            ceremony: root and targets that holders signed; None signs them with `keys`.
            window: see `Repository`, and so the others.

        Raises:
            RepositoryExists: there is a repository already.
            KeyFileError: a key is missing, not the one that root names, or lies inside the folder.
            ThresholdNotMet: too few holders have signed.
            CeremonyError: the ceremony changes an existing repository.
        """
        path, at, lifetimes = Path(path), now(), expiry or Expiry()
        _check_outside(keys, path)
        if (path / "metadata").exists():
            raise RepositoryExists(f"{path} already is a repository")
        if ceremony is None:
            roles = {role: RoleKeys([keys.signers(role)[0].public_key]) for role in ROLES}
            made = first_metadata(roles, lifetimes, at)
            signed = {role: Metadata[Any](first) for role, first in made.items()}
            for role, metadata in signed.items():
                metadata.sign(keys.signers(role)[0])
        elif ceremony.trusted is not None:
            raise CeremonyError(
                f"{ceremony.folder} changes a repository, and {path} is none: name that repository"
            )
        else:
            signed = ceremony.complete()
        files = MetadataSet.found(**signed, signers=keys.signers, expiry=lifetimes, now=at)
        for name in ("targets", "blobs"):
            (path / name).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(path / "metadata" / name, data)
        if ceremony is not None:
            ceremony.mark_enacted(at)
        return cls(path, keys, window=window, expiry=expiry, now=now)

    def publish(
        self, name: str, contents: ReleaseContents, *, at_least: int = 1
    ) -> PublishedRelease:
        """Publish what `ReleaseRecipe.make` made as the next release of `name`.

        Everything that takes time happens while others may publish; they are kept out only while
        finished files and metadata are written. Where somebody else has published this name
        meanwhile, the payload from that release is coded before the next try.

        Args:
            name: 1 to 64 of ``a-z 0-9 . _ -``.
            contents: what to release.
            at_least: lowest number of the release: devices that took one which was published with
                a stolen key, far ahead, take only a higher one.

        Raises:
            RepositoryError: a key is missing, the repository is damaged, the inputs are unusable.
            ReleaseError: the model does not fit the graph or the runtime refuses it.
            VersionsError: the model cannot be coded, or a file cannot be written.
                Nothing was published in any of these cases.
        """
        from prunecast.server.repository.authoring.build import BuiltRelease

        self.check_publishable(name)
        built = BuiltRelease(contents, name)
        while True:
            with self.held():
                state = self._load()
                publisher = state.publisher_of(name)
                self._require(state, publisher, *ONLINE_ROLES)
                live, now = self._live(state, name), self._now()
                changed = self._touched(state, name, now)
                missing = [b for b in live if not built.starts_from(b.model_digest)]
                if not missing:
                    version = max(state.next_version(name), at_least)
                    manifest, blobs = built.finish(version, now, live)
                    data = manifest.to_bytes()
                    target = TargetFile.from_data(manifest_path(name, version), data, ["sha256"])
                    for digest, blob in blobs.items():
                        self._write_once(self.path / blob_path(digest), blob)
                    file = target_file(self.path, target.path, target.hashes["sha256"])
                    self._write_once(file, data)
                    state.list_release(name, version, target)
                    outside = [m.version for m in live[: max(0, len(live) + 1 - self.window)]]
                    kept = self._fleets.needing(name, outside, now)
                    retired = tuple(old for old in outside if old not in kept)
                    for old in retired:
                        state.unlist_release(name, old)
                    self._sign(state, changed, now)
                    break
            for base in missing:
                built.add_patch(self.model(base))
        return PublishedRelease(manifest, built.onnx_bytes, retired, kept, built.settings)

    def retire(self, name: str, version: int, *, force: bool = False) -> tuple[str, ...]:
        """Withdraw a release: devices that do not have it yet will not get it any more.

        Devices that run it keep it until a later release appears; to make them go back, publish
        the earlier model again, as a new release. Its number is not given again.

        Args:
            name: of the release.
            version: its number.
            force: withdraw it whatever fleets need; they are not even asked.

        Returns:
            For what it would have been good to have, in sentences.

        Raises:
            ReleaseNotFound: no such live release.
            ReleaseInUse: a fleet stands on it; says who, and how to do without it.
            FleetUnanswered: a fleet cannot be asked.
        """
        with self.held():  # a fleet's operators hold it as well while they begin to use a release
            state = self._load()
            entry = self._find(state, name, version)
            publisher = state.publisher_of(name)
            self._require(state, publisher, *ONLINE_ROLES)
            now = self._now()
            missed = () if force else self._fleets.require_unused(name, version, now)
            changed = self._touched(state, name, now)
            state.unlist_release(entry.name, entry.version)
            self._sign(state, changed, now)
        return missed

    def check_publishable(self, name: str) -> None:
        """Find out whether the keys at hand can publish `name`; nothing is changed.

        Raises:
            RepositoryError: a key is missing or not the one in force, or the repository is damaged.
        """
        check_release_name(name)
        with self.held():  # between root and timestamp, metadata do not fit together
            state = self._load()
        self._require(state, state.publisher_of(name), *ONLINE_ROLES)

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
        with self.held():
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
        The lists of names that have no role of their own go with targets.

        Args:
            roles: to sign; by default snapshot and timestamp, and delegated roles in the second
                half of their lifetime whose key is at hand.

        Raises:
            RepositoryError: an unknown role, or a missing key.
        """
        with self.held():
            state, now = self._load(), self._now()
            chosen = {*ONLINE_ROLES, *self._due(state, now)} if roles is None else set(roles)
            known = [*ROLES, *(r for r in state.delegated if listed_name(r) is None)]
            if not chosen or not chosen <= set(known):
                unknown = ", ".join(sorted(chosen - set(known)))
                raise RepositoryError(f"roles are {', '.join(known)}, not {unknown}")
            if "targets" in chosen:
                self._require(state, "targets")
                state.separate()
                chosen.update(state.own_lists)
            files = self._sign(state, chosen, now)
        named = (VERSIONED.fullmatch(name) for name in files)
        signed = dict.fromkeys(signer_of(match[2]) if match else "timestamp" for match in named)
        return {role: self._expiry.until(role, now) for role in signed}

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
            if listed_name(role) is None and self._late(role, metadata, now):
                with suppress(RepositoryError):
                    state.usable(role, self._signers)
                    yield role

    def _late(self, role: str, metadata: Metadata[Any], now: datetime) -> bool:
        expires: datetime = metadata.signed.expires
        return expires - now < self._expiry.lifetime(role) / 2

    def _touched(self, state: MetadataSet, name: str, now: datetime) -> set[str]:
        """The lists that are signed when `name` changes; there is one of its own from now on.

        While the targets keys are at hand, whatever of theirs is in the second half of its lifetime
        is signed with it: who publishes often need not renew as well.
        """
        publisher = state.publisher_of(name)
        if signer_of(publisher) != "targets":
            return {publisher}
        changed = state.separate(name)
        theirs = {"targets": state.targets} | {r: state.delegated[r] for r in state.own_lists}
        late = {role for role, metadata in theirs.items() if self._late(role, metadata, now)}
        return {state.publisher_of(name), *changed, *late}

    def rotate_key(self, role: str) -> None:
        """Replace the key of a role: the old one is trusted by no device that sees the new root.

        The old key file stays beside the new one as ``<role>.pem.old``; destroy it.

        Raises:
            RepositoryError: an unknown role, a missing key, or one rotated before.
            ThresholdNotMet: several holders share the role, or root.
        """
        if role not in ROLES:
            raise RepositoryError(f"roles are {', '.join(ROLES)}, not {role!r}")
        with self.held():
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
                signed = [role, *state.own_lists] if role == "targets" else [role]
                files |= state.sign(signed, signers, self._expiry, now)
            # the key must be safe before anything is visible that only it can renew
            path.replace(path.with_suffix(".pem.old"))
            fresh.replace(path)
            self._commit(files)

    def _sign(
        self, state: MetadataSet, roles: Collection[str], now: datetime
    ) -> Mapping[str, bytes]:
        files = state.sign(roles, self._signers, self._expiry, now)
        self._commit(files)
        collect(self.path, now)
        return files

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
                state.usable(role, self._signers)
            except (KeyFileError, ThresholdNotMet) as error:
                if signer_of(role) != "targets":
                    raise
                raise type(error)(
                    f"{error}; to publish without the holders of the targets keys, they hand the "
                    "name to an online role: `prunecast release keys change --delegate`"
                ) from error

    def _live(self, state: MetadataSet, name: str) -> list[ReleaseManifest]:
        return [self._manifest(entry) for entry in self._entries(state) if entry.name == name]

    def _write_once(self, path: Path, data: bytes) -> None:
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)


def _check_outside(keys: KeyRing | None, path: Path) -> None:
    """Refuse keys in the folder that everybody can download."""
    for folder in keys.folders if keys else ():
        if folder.resolve().is_relative_to(path.resolve()):
            raise KeyFileError(f"{folder} lies inside the served folder {path}: move the keys out")

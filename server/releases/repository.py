"""The release repository: a folder of static files that any web server can deliver.

::

    metadata/   N.root.json, N.targets.json, N.snapshot.json, timestamp.json   (signed)
    targets/    <name>/<version>/<sha256>.release.json                          (signed by digest)
    blobs/      <sha256>                               (digests stand in release.json)

Every file but ``timestamp.json`` is immutable. A publication writes the new files first and
replaces ``timestamp.json`` last, by rename: a reader sees the old state or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from prunecast.compression.onnx import (
    ExportedGraph,
    FileRef,
    ReleaseManifest,
    Tolerance,
    Variant,
)
from prunecast.compression.onnx.manifest import (
    blob_path,
    check_release_name,
    manifest_path,
    parse_manifest_path,
)
from prunecast.compression.onnx.selftest import Arrays
from prunecast.compression.versions import (
    PublishedModel,
    VersionsError,
    decode_model,
    write_atomically,
)
from prunecast.server.releases.build import ReleaseRequest, build_release
from prunecast.server.releases.errors import (
    KeyFileError,
    ReleaseNotFound,
    ReleasesError,
    RepositoryCorrupt,
    RepositoryExists,
)
from prunecast.server.releases.garbage import collect
from prunecast.server.releases.keys import ONLINE_ROLES, ROLES, KeyRing, write_key
from prunecast.server.releases.metadata import Expiry, MetadataSet
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import TargetFile

__all__ = ["PublishedRelease", "ReleaseEntry", "Repository"]

_ROOT = re.compile(r"([1-9][0-9]*)\.root\.json")


def _utc_now() -> datetime:
    return datetime.now(UTC)


@dataclass(frozen=True)
class ReleaseEntry:
    """A live release as the signed metadata lists it."""

    name: str
    version: int
    manifest: FileRef


@dataclass(frozen=True)
class PublishedRelease:
    """What a publication made; sizes in bytes.

    Attributes:
        name: of the release.
        version: its number.
        manifest: content of `release.json`.
        onnx_bytes: the same model as one fp32 ``.onnx`` file; None above protobuf's 2 GiB.
        weights_bytes: `weights.bin` on the device.
        keyframe_bytes: the payload for a device that holds nothing.
        patch_bytes: payloads by the release they start from.
        file_bytes: the small files by name, and `release.json`.
        retired: versions that left the window.
    """

    name: str
    version: int
    manifest: ReleaseManifest
    onnx_bytes: int | None
    weights_bytes: int
    keyframe_bytes: int
    patch_bytes: Mapping[int, int]
    file_bytes: Mapping[str, int]
    retired: tuple[int, ...] = ()


class Repository:
    """A release repository on disk.

    Args:
        path: its folder, the one that is served.
        keys: where the private keys are; None for reading only.
        window: how many releases of one name stay live; publishing one more retires the oldest.
        expiry: lifetimes of the signed metadata.
        grace: how long files stay after nothing live refers to them, for devices in mid-download.
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
        now: Callable[[], datetime] = _utc_now,
    ) -> None:
        if window < 1:
            raise ReleasesError("the window holds at least one release")
        self.path, self.window, self.grace = Path(path), window, grace
        self._keys, self._expiry, self._now = keys, expiry or Expiry(), now
        _check_outside(keys, self.path)
        if not (self.path / "metadata" / "timestamp.json").is_file():
            raise RepositoryCorrupt(f"{self.path} is not a release repository: create one first")

    @classmethod
    def create(
        cls,
        path: Path | str,
        keys: KeyRing,
        *,
        window: int = 16,
        expiry: Expiry | None = None,
        now: Callable[[], datetime] = _utc_now,
    ) -> Repository:
        """The key ceremony: sign version 1 of every role with `keys` and lay out the folder.

        Raises:
            RepositoryExists: there is a repository already.
            KeyFileError: a key is missing, or lies inside the served folder.
        """
        path = Path(path)
        _check_outside(keys, path)
        if (path / "metadata").exists():
            raise RepositoryExists(f"{path} already is a repository")
        _, files = MetadataSet.create(keys.signer, expiry or Expiry(), now())
        for name in ("targets", "blobs"):
            (path / name).mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(path / "metadata" / name, data)
        return cls(path, keys, window=window, expiry=expiry, now=now)

    def trusted_root(self) -> bytes:
        """The newest root metadata: what a device is provisioned with."""
        return self._read(f"{self._root_version()}.root.json")

    def releases(self) -> list[ReleaseEntry]:
        """Live releases, by name and number."""
        return self._entries(self._load())

    def show(self, name: str, version: int | None = None) -> ReleaseManifest:
        """The manifest of a live release; the newest when no version is given.

        Raises:
            ReleaseNotFound: no such live release.
            RepositoryCorrupt: its manifest is missing or damaged.
        """
        return self._manifest(self._find(self._load(), name, version))

    def model(self, manifest: ReleaseManifest) -> PublishedModel:
        """The published model of a release, from its keyframe.

        Raises:
            RepositoryCorrupt: the keyframe is missing or damaged.
        """
        data = self.blob(manifest.keyframe)
        try:
            return decode_model(data, stream=manifest.stream)
        except VersionsError as error:
            raise RepositoryCorrupt(
                f"keyframe of {manifest.name} {manifest.version}: {error}"
            ) from error

    def blob(self, ref: FileRef) -> bytes:
        """Content of a file, checked against its digest.

        Raises:
            RepositoryCorrupt: missing or damaged.
        """
        path = self.path / blob_path(ref.sha256)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RepositoryCorrupt(f"cannot read {path}: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise RepositoryCorrupt(f"{path} is damaged: restore it from a copy")
        return data

    def publish(
        self,
        name: str,
        model: PublishedModel,
        graph: ExportedGraph,
        *,
        selftest_inputs: Arrays | NDArray[np.generic],
        metrics: Mapping[str, float] | None = None,
        variant: Variant = "lattice",
        licence: str | None = None,
        minimum_agent: str = "0.1.0",
        tolerance: Tolerance | None = None,
    ) -> PublishedRelease:
        """Publish a model as the next release of `name`.

        Args:
            name: 1 to 64 of ``a-z 0-9 . _ -``.
            model: the weights.
            graph: the architecture.
            selftest_inputs: a few real inputs by name, or one array when there is one input.
            metrics: figures measured on this very model, such as ``{"accuracy": 0.97}``.
            variant: ``lattice`` (integers and ``DequantizeLinear``) or ``fp32``.
            licence: SPDX expression of the weights, if stated.
            minimum_agent: lowest agent version that can run it.
            tolerance: of the self-test; default 1e-4 of the largest output, 1e-3 of each value.

        Raises:
            ReleasesError: a key is missing, the repository is damaged, the inputs are unusable.
            OnnxError: the model does not fit the graph or the runtime refuses it.
            VersionsError: the model cannot be coded, or a file cannot be written.
                Nothing was published in any of these cases.
        """
        check_release_name(name)
        request = ReleaseRequest(
            model,
            graph,
            selftest_inputs,
            metrics or {},
            variant,
            licence,
            minimum_agent,
            tolerance,
        )
        with self._locked():
            state = self._load()
            self._require("targets", "snapshot", "timestamp")
            live = [e for e in self._entries(state) if e.name == name]
            kept = live[max(0, len(live) + 1 - self.window) :]
            now = self._now()
            built = build_release(
                request,
                name=name,
                version=state.next_version(name),
                created=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
                bases=self._bases(live),
            )
            manifest = built.manifest
            data = manifest.to_bytes()
            sha256 = hashlib.sha256(data).hexdigest()
            for digest, blob in built.blobs.items():
                self._write_once(self.path / blob_path(digest), blob)
            path = manifest_path(name, manifest.version)
            self._write_once(self._target_file(path, sha256), data)
            targets = state.targets.signed.targets
            targets[path] = TargetFile(len(data), {"sha256": sha256}, path)
            retired = [e for e in live if e not in kept]
            for entry in retired:
                del targets[manifest_path(entry.name, entry.version)]
            state.count_release(name, manifest.version)
            self._commit(state.sign_targets(self._signers, self._expiry, now))
            collect(self.path, now, self.grace)
        return PublishedRelease(
            name=name,
            version=manifest.version,
            manifest=manifest,
            onnx_bytes=built.onnx_bytes,
            weights_bytes=manifest.weights.length,
            keyframe_bytes=manifest.keyframe.length,
            patch_bytes={p.base_version: p.file.length for p in manifest.patches},
            file_bytes={
                **{file: ref.length for file, ref in manifest.files.items()},
                "release.json": len(data),
            },
            retired=tuple(e.version for e in retired),
        )

    def retire(self, name: str, version: int) -> None:
        """Withdraw a release: devices that do not have it yet will not get it any more.

        Devices that run it keep it until a later release appears; to make them go back, publish
        the earlier model again, as a new release. Its number is not given again.

        Raises:
            ReleaseNotFound: no such live release.
        """
        with self._locked():
            state = self._load()
            entry = self._find(state, name, version)
            del state.targets.signed.targets[manifest_path(entry.name, entry.version)]
            now = self._now()
            self._commit(state.sign_targets(self._signers, self._expiry, now))
            collect(self.path, now, self.grace)

    def renew(self, roles: Collection[str] = ONLINE_ROLES) -> dict[str, datetime]:
        """Sign metadata anew before it expires; returns when each signed role now expires.

        Renewing a role implies the roles that name it: targets, then snapshot, then timestamp.

        Raises:
            ReleasesError: an unknown role, or a missing key.
        """
        unknown = set(roles) - set(ROLES)
        if unknown or not roles:
            raise ReleasesError(f"roles are {', '.join(ROLES)}, not {', '.join(sorted(unknown))}")
        with self._locked():
            state, now = self._load(), self._now()
            files: dict[str, bytes] = {}
            if "root" in roles:
                files |= state.sign_root(self._signers, self._expiry, now)
            if "targets" in roles:
                files |= state.sign_targets(self._signers, self._expiry, now)
            elif "snapshot" in roles:
                files |= state.sign_snapshot(self._signers, self._expiry, now)
            elif "timestamp" in roles:
                files |= state.sign_timestamp(self._signers, self._expiry, now)
            self._commit(files)
            collect(self.path, now, self.grace)
        return {name.split(".")[-2]: self._expiry.until(name.split(".")[-2], now) for name in files}

    def rotate_key(self, role: str) -> None:
        """Replace the key of a role: the old one is trusted by no device that sees the new root.

        The old key file stays beside the new one as ``<role>.pem.old``; destroy it.

        Raises:
            ReleasesError: an unknown role, a missing key, or one rotated before.
        """
        if role not in ROLES:
            raise ReleasesError(f"roles are {', '.join(ROLES)}, not {role!r}")
        with self._locked():
            state, now = self._load(), self._now()
            self._require(*{"root", *ROLES[ROLES.index(role) :]})
            path = self._keyring().path(role)
            key, fresh = Ed25519PrivateKey.generate(), path.with_suffix(".pem.new")
            write_key(fresh, key)
            new = CryptoSigner(key)

            def signers(wanted: str) -> CryptoSigner:
                return new if wanted == role else self._signers(wanted)

            files = state.replace_key(role, new, self._signers, self._expiry, now)
            if role == "targets":
                files |= state.sign_targets(signers, self._expiry, now)
            elif role == "snapshot":
                files |= state.sign_snapshot(signers, self._expiry, now)
            elif role == "timestamp":
                files |= state.sign_timestamp(signers, self._expiry, now)
            # the key must be safe before anything is visible that only it can renew
            path.replace(path.with_suffix(".pem.old"))
            fresh.replace(path)
            self._commit(files)

    def expires(self) -> dict[str, datetime]:
        """When each role's metadata expires."""
        state = self._load()
        roles = (state.root, state.targets, state.snapshot, state.timestamp)
        return dict(zip(ROLES, (m.signed.expires for m in roles), strict=True))

    def _bases(self, live: Sequence[ReleaseEntry]) -> Iterator[tuple[int, PublishedModel]]:
        for entry in live:
            yield entry.version, self.model(self._manifest(entry))

    def _entries(self, state: MetadataSet) -> list[ReleaseEntry]:
        found = []
        for path, target in state.paths().items():
            parsed = parse_manifest_path(path)
            if parsed:
                ref = FileRef(target.hashes["sha256"], target.length)
                found.append(ReleaseEntry(*parsed, ref))
        return sorted(found, key=lambda e: (e.name, e.version))

    def _find(self, state: MetadataSet, name: str, version: int | None) -> ReleaseEntry:
        named = [e for e in self._entries(state) if e.name == name]
        if not named:
            known = ", ".join(sorted({e.name for e in self._entries(state)})) or "none"
            raise ReleaseNotFound(f"no live release is named {name!r} (live names: {known})")
        found = [e for e in named if version in (None, e.version)]
        if not found:
            numbers = ", ".join(str(e.version) for e in named)
            raise ReleaseNotFound(f"{name} has no live release {version} (live: {numbers})")
        return found[-1]

    def _manifest(self, entry: ReleaseEntry) -> ReleaseManifest:
        path = self._target_file(manifest_path(entry.name, entry.version), entry.manifest.sha256)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise RepositoryCorrupt(f"cannot read {path}: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != entry.manifest.sha256:
            raise RepositoryCorrupt(f"{path} is damaged: restore it from a copy")
        return ReleaseManifest.from_bytes(data)

    def _target_file(self, path: str, sha256: str) -> Path:
        folder, _, base = path.rpartition("/")
        return self.path / "targets" / folder / f"{sha256}.{base}"

    def _write_once(self, path: Path, data: bytes) -> None:
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)

    def _commit(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():  # in order: timestamp.json makes the state visible
            write_atomically(self.path / "metadata" / name, data)

    def _load(self) -> MetadataSet:
        return MetadataSet.load(self._read, self._root_version())

    def _read(self, name: str) -> bytes:
        return (self.path / "metadata" / name).read_bytes()

    def _root_version(self) -> int:
        found = (_ROOT.fullmatch(p.name) for p in (self.path / "metadata").iterdir())
        versions = [int(m[1]) for m in found if m]
        if not versions:
            raise RepositoryCorrupt(f"{self.path} has no root metadata: restore it from a copy")
        return max(versions)

    def _keyring(self) -> KeyRing:
        if self._keys is None:
            raise KeyFileError("this changes the repository: name the folder that holds the keys")
        return self._keys

    def _signers(self, role: str) -> CryptoSigner:
        return self._keyring().signer(role)

    def _require(self, *roles: str) -> None:
        for role in roles:
            self._signers(role)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ReleasesError(
                    f"{self.path} is being changed by another process: try again when it is done"
                ) from error
            yield


def _check_outside(keys: KeyRing | None, path: Path) -> None:
    for folder in keys.folders if keys else ():
        if folder.resolve().is_relative_to(path.resolve()):
            raise KeyFileError(f"{folder} lies inside the served folder {path}: move the keys out")

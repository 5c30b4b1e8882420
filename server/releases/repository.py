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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import TargetFile

from prunecast.compression.onnx import (
    ExportedGraph,
    ReleaseManifest,
    Tolerance,
    Variant,
)
from prunecast.compression.onnx.manifest import (
    blob_path,
    check_release_name,
    manifest_path,
)
from prunecast.compression.onnx.selftest import Arrays
from prunecast.compression.versions import PublishedModel, write_atomically
from prunecast.server.releases.build import ReleaseRequest, build_release
from prunecast.server.releases.errors import (
    KeyFileError,
    ReleasesError,
    RepositoryExists,
)
from prunecast.server.releases.garbage import collect
from prunecast.server.releases.keys import ONLINE_ROLES, ROLES, KeyRing, write_key
from prunecast.server.releases.metadata import Expiry, MetadataSet
from prunecast.server.releases.reading import ReleaseEntry, RepositoryReader

__all__ = ["PublishedRelease", "Repository"]


def _utc_now() -> datetime:
    return datetime.now(UTC)


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


class Repository(RepositoryReader):
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
        super().__init__(path)
        _check_outside(keys, self.path)
        self.window, self.grace = window, grace
        self._keys, self._expiry, self._now = keys, expiry or Expiry(), now

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
        kind: str = "",
        numerics: Mapping[str, float] | None = None,
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
            kind: which variant of the model this is, in a word for people.
            numerics: how far it computes from the float32 reference, see `releases.variants`.

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
            kind,
            numerics or {},
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

    def _bases(self, live: Sequence[ReleaseEntry]) -> Iterator[tuple[int, PublishedModel]]:
        for entry in live:
            yield entry.version, self.model(self._manifest(entry))

    def _write_once(self, path: Path, data: bytes) -> None:
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)

    def _commit(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():  # in order: timestamp.json makes the state visible
            write_atomically(self.path / "metadata" / name, data)

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

"""The release repository: a folder of static files that any web server can deliver.

::

    metadata/   N.root.json, N.targets.json, N.snapshot.json, timestamp.json   (signed)
    targets/    <name>/<version>/<sha256>.release.json                          (signed by digest)
    blobs/      <sha256>                               (digests stand in release.json)

Every file but ``timestamp.json`` is immutable. A publication writes the new files first and
replaces ``timestamp.json`` last, by rename: a reader sees the old state or the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tuf.api.metadata import TargetFile

from prunecast.common.files import write_atomically
from prunecast.compression.release.manifest import (
    ReleaseManifest,
    blob_path,
    check_release_name,
    manifest_path,
)
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository.errors import CeremonyError, RepositoryExists
from prunecast.server.repository.garbage import collect
from prunecast.server.repository.keys.ceremony import Ceremony
from prunecast.server.repository.keys.keyring import KeyRing
from prunecast.server.repository.maintenance import MaintainedRepository, check_outside, utc_now
from prunecast.server.repository.metadata import MetadataSet
from prunecast.server.repository.roles import ONLINE_ROLES, Expiry

if TYPE_CHECKING:
    from prunecast.compression.onnx.graph import ExportedGraph
    from prunecast.server.repository.authoring.build import ReleaseContents

__all__ = ["PublishedRelease", "Repository"]


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


class Repository(MaintainedRepository):
    """A release repository on disk; see `MaintainedRepository` for its arguments."""

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
            window: see `MaintainedRepository`, and so the others.
            expiry: lifetimes of the signed metadata.
            now: the clock.

        Raises:
            RepositoryExists: there is a repository already.
            KeyFileError: a key is missing, not the one that root names, or lies inside the folder.
            ThresholdNotMet: too few holders have signed.
            CeremonyError: the ceremony changes an existing repository.
        """
        path, at, lifetimes = Path(path), now(), expiry or Expiry()
        check_outside(keys, path)
        if (path / "metadata").exists():
            raise RepositoryExists(f"{path} already is a repository")
        if ceremony is None:
            files = MetadataSet.create(keys.signers, lifetimes, at)
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
        self,
        name: str,
        model: PublishedModel,
        graph: ExportedGraph,
        *,
        selftest_inputs: Arrays | NDArray[np.generic],
        at_least: int = 1,
        **described: Any,
    ) -> PublishedRelease:
        """Publish a model as the next release of `name`, without a recipe.

        Args:
            name: 1 to 64 of ``a-z 0-9 . _ -``.
            model: the weights.
            graph: the architecture.
            selftest_inputs: a few real inputs by name, or one array when there is one input.
            at_least: see `publish_contents`.
            described: other fields of `ReleaseContents`.

        Raises:
            RepositoryError, ReleaseError, VersionsError: see `publish_contents`.
        """
        from prunecast.server.repository.authoring.build import ReleaseContents

        contents = ReleaseContents(model, graph, selftest_inputs, **described)
        return self.publish_contents(name, contents, at_least=at_least)

    def publish_contents(
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
            with self._locked():
                state = self._load()
                publisher = state.publisher_of(name)
                self._require(state, publisher, *ONLINE_ROLES)
                live, now = self._live(state, name), self._now()
                missing = [b for b in live if not built.starts_from(b.model_digest)]
                if not missing:
                    version = max(state.next_version(name), at_least)
                    manifest, blobs = built.finish(version, now, live)
                    data = manifest.to_bytes()
                    target = TargetFile.from_data(manifest_path(name, version), data, ["sha256"])
                    for digest, blob in blobs.items():
                        self._write_once(self.path / blob_path(digest), blob)
                    file = self._target_file(target.path, target.hashes["sha256"])
                    self._write_once(file, data)
                    state.list_release(name, version, target)
                    retired = live[: max(0, len(live) + 1 - self.window)]
                    for old in retired:
                        state.unlist_release(name, old.version)
                    self._commit(state.sign([publisher], self._signers, self._expiry, now))
                    collect(self.path, now, self.grace)
                    break
            for base in missing:
                built.add_patch(self.model(base))
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
            retired=tuple(old.version for old in retired),
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
            publisher = state.publisher_of(name)
            self._require(state, publisher, *ONLINE_ROLES)
            state.unlist_release(entry.name, entry.version)
            now = self._now()
            self._commit(state.sign([publisher], self._signers, self._expiry, now))
            collect(self.path, now, self.grace)

    def check_publishable(self, name: str) -> None:
        """Find out whether the keys at hand can publish `name`; nothing is changed.

        Raises:
            RepositoryError: a key is missing or not the one in force, or the repository is damaged.
        """
        check_release_name(name)
        with self._locked():  # between root and timestamp, metadata do not fit together
            state = self._load()
        self._require(state, state.publisher_of(name), *ONLINE_ROLES)

    def _live(self, state: MetadataSet, name: str) -> list[ReleaseManifest]:
        return [self._manifest(entry) for entry in self._entries(state) if entry.name == name]

    def _write_once(self, path: Path, data: bytes) -> None:
        if not path.is_file() or path.read_bytes() != data:
            write_atomically(path, data)

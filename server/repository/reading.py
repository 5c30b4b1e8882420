"""Read a release repository; nothing here needs a private key."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from prunecast.common.locks import is_locked
from prunecast.compression.release.manifest import (
    FileRef,
    ReleaseManifest,
    blob_path,
    manifest_path,
    parse_manifest_path,
)
from prunecast.compression.versions import PublishedModel, VersionsError, decode_model
from prunecast.server.repository.errors import ReleaseNotFound, RepositoryCorrupt
from prunecast.server.repository.keys.ceremony import Ceremony
from prunecast.server.repository.keys.changes import Change, changed_metadata
from prunecast.server.repository.metadata import MetadataSet
from prunecast.server.repository.roles import ROLES, Expiry

__all__ = ["VERSIONED", "ReleaseEntry", "RepositoryReader", "root_versions", "target_file"]

VERSIONED = re.compile(r"([1-9][0-9]*)\.([a-z][a-z0-9-]*)\.json")
"""Names of metadata: number and role."""


def target_file(repository: Path, path: str, sha256: str) -> Path:
    """Where the target that metadata list as `path` lies; consistent snapshots name its digest."""
    folder, _, base = path.rpartition("/")
    return repository / "targets" / folder / f"{sha256}.{base}"


def root_versions(metadata: Path) -> list[int]:
    """Versions of the roots in a folder, in order."""
    found = (VERSIONED.fullmatch(path.name) for path in metadata.iterdir())
    return sorted(int(match[1]) for match in found if match and match[2] == "root")


@dataclass(frozen=True)
class ReleaseEntry:
    """A live release as the signed metadata lists it."""

    name: str
    version: int
    manifest: FileRef


class RepositoryReader:
    """The live releases of a repository on disk.

    Args:
        path: its folder.

    Raises:
        RepositoryCorrupt: no repository there.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not (self.path / "metadata" / "timestamp.json").is_file():
            raise RepositoryCorrupt(f"{self.path} is not a release repository: create one first")

    def trusted_root(self) -> bytes:
        """The newest root metadata: what a device is provisioned with."""
        return self._read(f"{self._root_version()}.root.json")

    def releases(self) -> list[ReleaseEntry]:
        """Live releases, by name and number."""
        return self._entries(self._visible())

    def show(self, name: str, version: int | None = None) -> ReleaseManifest:
        """The manifest of a live release; the newest when no version is given.

        Raises:
            ReleaseNotFound: no such live release.
            RepositoryCorrupt: its manifest is missing or damaged.
        """
        return self._manifest(self._find(self._visible(), name, version))

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
        return _checked(self.path / blob_path(ref.sha256), ref)

    def expires(self) -> dict[str, datetime]:
        """When each role's metadata expires."""
        state = self._visible()
        expires = {role: getattr(state, role).signed.expires for role in ROLES}
        return expires | {role: held.signed.expires for role, held in state.delegated.items()}

    def change(
        self, folder: Path | str, change: Change, now: datetime, expiry: Expiry | None = None
    ) -> Ceremony:
        """Prepare a change of keys, thresholds or delegations for its holders to sign.

        Raises:
            CeremonyError: what was asked for cannot be, or the folder holds a ceremony.
        """
        state = self._load()
        requests = changed_metadata(state, change, expiry or Expiry(), now)
        return Ceremony.create(folder, requests, state.root, now)

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
        path = target_file(
            self.path, manifest_path(entry.name, entry.version), entry.manifest.sha256
        )
        return ReleaseManifest.from_bytes(_checked(path, entry.manifest))

    def _visible(self) -> MetadataSet:
        """What devices see, also while somebody writes a new root and what goes with it."""
        newest = self._root_version()
        try:
            return MetadataSet.load(self._read, newest)
        except RepositoryCorrupt:
            if newest == 1 or not is_locked(self.path / ".lock"):
                raise
        return MetadataSet.load(self._read, newest - 1)

    def _load(self) -> MetadataSet:
        return MetadataSet.load(self._read, self._root_version())

    def _read(self, name: str) -> bytes:
        return (self.path / "metadata" / name).read_bytes()

    def _root_version(self) -> int:
        versions = root_versions(self.path / "metadata")
        if not versions:
            raise RepositoryCorrupt(f"{self.path} has no root metadata: restore it from a copy")
        return versions[-1]


def _checked(path: Path, ref: FileRef) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RepositoryCorrupt(f"cannot read {path}: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise RepositoryCorrupt(f"{path} is damaged: restore it from a copy")
    return data

"""Read a release repository, and delete files that nothing refers to; no private key is needed.

Superseded metadata stays for a grace period, and every file it refers to stays with it: a device
that read the old state a moment ago can finish its download. What cannot be judged stays: while a
list or a manifest on disk is damaged, what it refers to is unknown.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from prunecast.common.files import is_locked, lock_file, lock_open
from prunecast.compression.release import ManifestError
from prunecast.compression.release.manifest import (
    FileRef,
    ReleaseManifest,
    blob_path,
    manifest_path,
    parse_manifest_path,
    unpack_file,
)
from prunecast.compression.versions import PublishedModel, VersionsError, decode_model
from prunecast.server.repository.errors import (
    ReleaseNotFound,
    RepositoryCorrupt,
    RepositoryError,
)
from prunecast.server.repository.keys.ceremony import Ceremony
from prunecast.server.repository.keys.signing import Change, changed_metadata
from prunecast.server.repository.metadata import MetadataSet
from prunecast.server.repository.roles import ROLES, Expiry, signer_of

__all__ = [
    "GRACE",
    "VERSIONED",
    "Kept",
    "ReleaseEntry",
    "RepositoryReader",
    "age",
    "collect",
    "kept_files",
    "root_versions",
    "target_file",
]

VERSIONED = re.compile(r"([1-9][0-9]*)\.([a-z][a-z0-9-]*|name\.[a-z0-9._-]+)\.json")
"""Names of metadata: number and role."""

GRACE = timedelta(days=1)
"""How long files stay after nothing live refers to them, for devices in mid-download."""

_RETRY = 0.05  # seconds between tries for the lock; a writer holds it for less than a second
_log = logging.getLogger(__name__)


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

    Attributes:
        patience: how long to wait while another process writes.

    Args:
        path: its folder.

    Raises:
        RepositoryCorrupt: no repository there.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self.patience = Path(path), timedelta(seconds=10)
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
        """Content of a file, unpacked and checked against its digest.

        Raises:
            RepositoryCorrupt: missing or damaged.
        """
        path = self.path / blob_path(ref.travels.sha256)
        data = _checked(path, ref.travels)
        if ref.packed is None:
            return data
        try:
            return unpack_file(data, ref)
        except ManifestError as error:
            raise RepositoryCorrupt(f"{path}: {error}") from error

    def expires(self) -> dict[str, datetime]:
        """When each role's metadata expires; for targets, the first of all lists of its keys."""
        state = self._visible()
        expires = {role: getattr(state, role).signed.expires for role in ROLES}
        for role, held in state.delegated.items():
            signer, at = signer_of(role), held.signed.expires
            expires[signer] = min(at, expires.get(signer, at))
        return expires

    def change(self, folder: Path | str, change: Change, now: datetime) -> Ceremony:
        """Prepare a change of keys, thresholds or delegations for its holders to sign.

        Raises:
            CeremonyError: what was asked for cannot be, or the folder holds a ceremony.
        """
        state = self._load()
        requests = changed_metadata(state, change, Expiry(), now)
        return Ceremony.create(folder, requests, state.root, now)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep everybody from changing the repository while the block runs.

        Whoever may only read the folder holds the lock as well, but cannot make its file: where
        nobody has ever written, there is none.

        Raises:
            RepositoryError: another process is changing it all the time.
        """
        until = time.monotonic() + self.patience.total_seconds()
        while True:
            try:
                lock = _lock(self.path / ".lock")
                break
            except BlockingIOError as error:
                if time.monotonic() >= until:
                    raise RepositoryError(
                        f"{self.path} is being changed by another process: try again when it is "
                        "done"
                    ) from error
                time.sleep(_RETRY)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

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


def _lock(path: Path) -> IO[str] | None:
    """The held lock; None where it can neither be made nor read."""
    try:
        return lock_file(path)
    except BlockingIOError:
        raise
    except OSError:
        try:
            file = open(path)  # noqa: SIM115
        except OSError:
            return None
    return lock_open(file)


def _checked(path: Path, ref: FileRef) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RepositoryCorrupt(f"cannot read {path}: {error.strerror or error}") from error
    if hashlib.sha256(data).hexdigest() != ref.sha256:
        raise RepositoryCorrupt(f"{path} is damaged: restore it from a copy")
    return data


@dataclass
class Kept:
    """What the lists of releases on disk refer to, superseded ones included.

    Attributes:
        manifests: files under ``targets``.
        blobs: files under ``blobs``.
        damaged_lists: lists that cannot be read: then neither of the above is complete.
        damaged_manifests: manifests that cannot be read: then `blobs` is not complete.
    """

    manifests: set[Path] = field(default_factory=set)
    blobs: set[Path] = field(default_factory=set)
    damaged_lists: list[Path] = field(default_factory=list)
    damaged_manifests: list[Path] = field(default_factory=list)


def collect(repository: Path, now: datetime, grace: timedelta = GRACE) -> list[Path]:
    """Remove superseded metadata older than `grace` and files that no kept state refers to.

    Says in the log what it had to leave because a list or a manifest is damaged.

    Returns:
        What was removed. A crash in between leaves only files that the next call removes.
    """
    removed = _old_metadata(repository / "metadata", now, grace)
    kept = kept_files(repository)
    damaged = [*kept.damaged_lists, *kept.damaged_manifests]
    if damaged:
        _log.warning(
            "%s cannot be read: what it may refer to stays on disk; see `prunecast release doctor`",
            ", ".join(str(path.relative_to(repository)) for path in damaged),
        )
    judged = []
    if not kept.damaged_lists:
        judged.append(("targets", kept.manifests))
    if not damaged:
        judged.append(("blobs", kept.blobs))
    for folder, keep in judged:
        for path in (repository / folder).rglob("*"):
            if path.is_file() and path not in keep and age(path, now) > grace:
                path.unlink()
                removed.append(path)
    return removed


def kept_files(repository: Path) -> Kept:
    """What the lists on disk refer to: of targets and of delegated roles, old and new."""
    kept = Kept()
    for role, _, listing in _numbered(repository / "metadata"):
        if role == "snapshot":
            continue
        try:
            document: dict[str, Any] = json.loads(listing.read_bytes())
            for name, target in document["signed"]["targets"].items():
                kept.manifests.add(target_file(repository, name, target["hashes"]["sha256"]))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            kept.damaged_lists.append(listing)
    for manifest in sorted(kept.manifests):
        try:
            references = ReleaseManifest.from_bytes(manifest.read_bytes()).references()
        except (OSError, ManifestError):
            kept.damaged_manifests.append(manifest)
            continue
        kept.blobs |= {repository / blob_path(ref.sha256) for ref in references.values()}
    return kept


def _numbered(folder: Path) -> Iterator[tuple[str, int, Path]]:
    """Metadata with a version in its name, except roots: role, version, path."""
    found = ((VERSIONED.fullmatch(path.name), path) for path in folder.iterdir())
    named = [(match[2], int(match[1]), path) for match, path in found if match]
    yield from sorted(entry for entry in named if entry[0] != "root")


def _old_metadata(folder: Path, now: datetime, grace: timedelta) -> list[Path]:
    force = _in_force(folder)
    removed = []
    for (role, number, path), (following, _, successor) in pairwise([*_numbered(folder), _END]):
        if role in force:
            # superseded when its successor appeared; one that was cut off supersedes nothing
            old = role == following and number < force[role] and age(successor, now) > grace
        else:  # nothing is delegated to it any more
            ended = folder / f"{force['targets']}.targets.json" if force else path
            old = bool(force) and min(age(ended, now), age(path, now)) > grace
        if old:
            path.unlink()
            removed.append(path)
    return removed


_END: tuple[str, int, Path] = "", 0, Path()


def _in_force(folder: Path) -> dict[str, int]:
    """Numbers of snapshot, targets and what they delegate to; empty where that cannot be told."""
    try:

        def signed(name: str) -> dict[str, Any]:
            document: dict[str, Any] = json.loads((folder / f"{name}.json").read_bytes())["signed"]
            return document

        snapshot = int(signed("timestamp")["meta"]["snapshot.json"]["version"])
        meta = signed(f"{snapshot}.snapshot")["meta"]
        targets = int(meta["targets.json"]["version"])
        delegated = signed(f"{targets}.targets").get("delegations", {}).get("roles", [])
        lists = {each["name"]: int(meta[f"{each['name']}.json"]["version"]) for each in delegated}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {"snapshot": snapshot, "targets": targets, **lists}


def age(path: Path, now: datetime) -> timedelta:
    """How long ago a file was written."""
    return now - datetime.fromtimestamp(path.stat().st_mtime, tz=now.tzinfo)

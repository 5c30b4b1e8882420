"""Examine the files that metadata names, and those that nothing names."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from prunecast.common.files import file_digest
from prunecast.compression.release import ManifestError
from prunecast.compression.release.manifest import (
    FileRef,
    ReleaseManifest,
    blob_path,
    parse_manifest_path,
)
from prunecast.server.repository.checks.findings import Findings
from prunecast.server.repository.checks.metadata import RepositoryState
from prunecast.server.repository.garbage import VERSIONED, Kept, age, kept_files

__all__ = ["check_leftovers", "check_permissions", "check_releases", "check_served_keys"]

_SERVED = ("metadata", "targets", "blobs")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")
_AGAIN = "restore it from a copy, or publish the model again and retire this release"


def check_releases(path: Path, state: RepositoryState, found: Findings) -> None:
    """Every live release: its manifest and every file it refers to, by size and SHA-256."""
    if state.targets is None:
        return
    checked: set[str] = set()
    lists = [state.targets.signed, *(held.signed for held in state.delegated.values())]
    live = {name: target for signed in lists for name, target in signed.targets.items()}
    for name, target in sorted(live.items()):
        release = parse_manifest_path(name)
        if release is None:
            found.note(
                "foreign-target", name, "is signed, but is no release", "nothing: agents ignore it"
            )
            continue
        label = f"{release[0]} {release[1]}"
        folder, _, base = name.rpartition("/")
        ref = FileRef(target.hashes.get("sha256", ""), target.length)
        manifest_file = path / "targets" / folder / f"{ref.sha256}.{base}"
        if not _sound(manifest_file, ref, f"manifest of {label}", "manifest", found):
            continue
        try:
            manifest = ReleaseManifest.from_bytes(manifest_file.read_bytes())
        except ManifestError as error:
            found.problem("manifest-damaged", label, f"is not usable: {error}", _AGAIN)
            continue
        if (manifest.name, manifest.version) != release:
            what = f"holds the manifest of {manifest.name} {manifest.version}"
            found.problem("manifest-damaged", label, what, _AGAIN)
        for what, blob in manifest.references().items():
            if blob.sha256 not in checked:
                checked.add(blob.sha256)
                place = path / blob_path(blob.sha256)
                _sound(place, blob, f"{what} of {label}", "blob", found)


def _sound(file: Path, ref: FileRef, label: str, kind: str, found: Findings) -> bool:
    try:
        size = file.stat().st_size
        digest = file_digest(file)
    except FileNotFoundError:
        found.problem(f"{kind}-missing", file, f"({label}) is missing", _AGAIN)
        return False
    except OSError as error:
        what = f"({label}) cannot be read: {error.strerror or error}"
        found.problem(f"{kind}-unreadable", file, what, "make it readable")
        return False
    if size != ref.length:
        what = f"({label}) has {size} bytes instead of {ref.length}"
        found.problem(f"{kind}-size", file, what, _AGAIN)
    elif digest != ref.sha256:
        found.problem(f"{kind}-digest", file, f"({label}) has another content", _AGAIN)
    return size == ref.length and digest == ref.sha256


def check_leftovers(
    path: Path, state: RepositoryState, now: datetime, grace: timedelta, found: Findings
) -> None:
    """What a publication that was cut off left behind, and files that nothing refers to."""
    temporary = [p for p in _files(path) if _TEMPORARY.fullmatch(p.name)]
    if temporary:
        found.problem(
            "unfinished-write",
            temporary,
            "is a file that a process did not finish writing",
            "delete it; nothing refers to it",
        )
    ahead = []
    for file in (path / "metadata").iterdir():
        parsed = VERSIONED.fullmatch(file.name)
        current = state.versions.get(parsed[2]) if parsed else None
        if parsed and current is not None and int(parsed[1]) > current:
            ahead.append(file)
    if ahead:
        found.problem(
            "unfinished-publication",
            ahead,
            "was written, but timestamp.json does not lead to it: devices see the state before",
            "publish, retire or renew again: it overwrites these files",
        )
    kept = kept_files(path)
    in_force = {f"{version}.{role}.json" for role, version in state.versions.items()}
    damaged = [p for p in kept.damaged_lists if p.name not in in_force]
    if damaged:
        found.note(
            "old-list-damaged",
            damaged,
            "is a superseded list that cannot be read: what it refers to is kept meanwhile",
            "nothing: it goes when the grace period ends; delete it to free the space now",
        )
    orphans = [p for p in _orphans(path, kept) if p not in temporary]
    if orphans:
        size = sum(p.stat().st_size for p in orphans)
        young = sum(1 for p in orphans if age(p, now) <= grace)
        youth = f", {young} of them younger than the grace period" if young else ""
        found.note(
            "orphaned",
            orphans,
            f"{len(orphans)} files ({size} bytes) that no kept metadata refers to{youth}",
            "nothing: the next publication or renewal after the grace period removes them",
        )


def _orphans(path: Path, kept: Kept) -> list[Path]:
    """Files of `targets` and `blobs` that no targets metadata on disk leads to.

    Nothing while a list or a manifest cannot be read: what it refers to would look orphaned.
    """
    if kept.damaged_lists or kept.damaged_manifests:
        return []
    inside = (p for folder in ("targets", "blobs") for p in _files(path / folder))
    return [p for p in inside if p not in kept.manifests | kept.blobs]


def check_served_keys(path: Path, found: Findings) -> None:
    """Private keys inside the folder that everybody can download."""
    keys = []
    for file in _files(path):
        with suppress(OSError), open(file, "rb") as data:
            if b"PRIVATE KEY-----" in data.read(4096):
                keys.append(file)
    if keys:
        found.problem(
            "key-served",
            keys,
            "is a private key in the served folder: whoever downloaded it can sign",
            "move it out, then `prunecast release rotate-key` for its role",
        )


def check_permissions(path: Path, found: Findings) -> None:
    """Whether a web server under another user can read what is served."""
    if os.name != "posix":
        return
    folders = [path, *(path / name for name in _SERVED)]
    folders += [p for name in _SERVED for p in (path / name).rglob("*") if p.is_dir()]
    closed = [p for p in folders if p.is_dir() and not p.stat().st_mode & stat.S_IXOTH]
    files = [p for name in _SERVED for p in _files(path / name)]
    hidden = [p for p in files if not p.stat().st_mode & stat.S_IROTH]
    if closed or hidden:
        found.problem(
            "not-readable",
            [*closed, *hidden],
            f"{len(closed)} folders and {len(hidden)} files are closed to other users, such "
            "as a web server's",
            f"chmod -R o+rX {path}, and publish under umask 022",
        )
    above = [p for p in path.resolve().parents if not p.stat().st_mode & stat.S_IXOTH]
    if above:
        found.note(
            "folder-above-closed",
            above[-1],
            "lies above the repository and is closed to other users",
            "chmod o+x it, unless `prunecast serve` runs as this user",
        )


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")

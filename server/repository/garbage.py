"""Delete files that nothing refers to any more.

Superseded metadata stays for a grace period, and every file it refers to stays with it: a device
that read the old state a moment ago can finish its download. What cannot be judged stays: while a
list or a manifest on disk is damaged, what it refers to is unknown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from prunecast.compression.release import ManifestError
from prunecast.compression.release.manifest import ReleaseManifest, blob_path
from prunecast.server.repository.reading import VERSIONED, target_file

__all__ = ["Kept", "age", "collect", "kept_files"]

_log = logging.getLogger(__name__)


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


def collect(repository: Path, now: datetime, grace: timedelta) -> list[Path]:
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
    removed = []
    for (role, _, path), (following, _, successor) in pairwise(_numbered(folder)):
        # superseded when its successor appeared
        if role == following and age(successor, now) > grace:
            path.unlink()
            removed.append(path)
    return removed


def age(path: Path, now: datetime) -> timedelta:
    """How long ago a file was written."""
    return now - datetime.fromtimestamp(path.stat().st_mtime, tz=now.tzinfo)

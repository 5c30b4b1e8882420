"""Delete files that nothing refers to any more.

Superseded metadata stays for a grace period, and every file it refers to stays with it: a device
that read the old state a moment ago can finish its download.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from prunecast.compression.onnx import ManifestError, ReleaseManifest

__all__ = ["collect"]

_VERSIONED = re.compile(r"([1-9][0-9]*)\.(targets|snapshot)\.json")


def collect(repository: Path, now: datetime, grace: timedelta) -> list[Path]:
    """Remove superseded metadata older than `grace` and files that no kept state refers to.

    Returns:
        What was removed. A crash in between leaves only files that the next call removes.
    """
    removed = _old_metadata(repository / "metadata", now, grace)
    keep: set[Path] = set()
    for listing in (repository / "metadata").glob("*.targets.json"):
        document: dict[str, Any] = json.loads(listing.read_bytes())
        for path, target in document["signed"]["targets"].items():
            folder, _, base = path.rpartition("/")
            manifest = repository / "targets" / folder / f"{target['hashes']['sha256']}.{base}"
            keep.add(manifest)
            with suppress(OSError, ManifestError):
                references = ReleaseManifest.from_bytes(manifest.read_bytes()).references()
                keep.update(repository / "blobs" / ref.sha256 for ref in references.values())
    for folder in ("targets", "blobs"):
        for path in (repository / folder).rglob("*"):
            if path.is_file() and path not in keep and _age(path, now) > grace:
                path.unlink()
                removed.append(path)
    return removed


def _old_metadata(folder: Path, now: datetime, grace: timedelta) -> list[Path]:
    removed = []
    for role in ("targets", "snapshot"):
        numbered = sorted(
            (int(found[1]), path)
            for path in folder.iterdir()
            if (found := _VERSIONED.fullmatch(path.name)) and found[2] == role
        )
        for (_, path), (_, successor) in pairwise(numbered):
            if _age(successor, now) > grace:  # superseded when its successor appeared
                path.unlink()
                removed.append(path)
    return removed


def _age(path: Path, now: datetime) -> timedelta:
    return now - datetime.fromtimestamp(path.stat().st_mtime, tz=now.tzinfo)

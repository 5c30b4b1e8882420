"""What a blob is for: names are digests, so only the manifests tell patches from keyframes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunecast.compression.release.manifest import MAX_MANIFEST_BYTES
from prunecast.server.repository.serving.names import family

__all__ = ["BlobKinds"]

_WORDS = {"keyframe": "keyframe", "patches": "patch", "files": "file"}
_PAUSE = 10.0  # seconds between two looks at all manifests


class BlobKinds:
    """Kinds of a repository's blobs, for counting; signatures are not checked.

    Args:
        root: the repository.
        clock: monotonic seconds, for tests.
    """

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._root, self._clock = root, clock
        self._kinds: dict[str, str] = {}
        self._seen: set[str] = set()
        self._due = 0.0

    def of(self, sha256: str) -> str:
        """``patch``, ``keyframe``, ``file``, or ``blob`` where no manifest is known to name it."""
        return self._kinds.get(sha256, "blob")

    @property
    def stale(self) -> bool:
        """Whether it is time to look at all manifests again."""
        return self._clock() >= self._due

    def look(self) -> None:
        """Read every manifest that was not read yet."""
        self._due = self._clock() + _PAUSE
        for path in self._root.glob("targets/*/*/*.release.json"):
            self.read(path.relative_to(self._root).as_posix())
        self._due = self._clock() + _PAUSE

    def read(self, name: str) -> None:
        """Read one manifest, unless that was done."""
        if name in self._seen or family(name) != "manifest":
            return
        try:
            with open(self._root / name, "rb") as file:
                document = json.loads(file.read(MAX_MANIFEST_BYTES))
            found = _digests(document, None)
        except (OSError, ValueError, RecursionError):
            return  # a device will complain about it; it does not matter to the counts
        self._seen.add(name)
        self._kinds.update(found)


def _digests(value: Any, kind: str | None) -> dict[str, str]:
    """Digests in a manifest by the field they stand below, however deep."""
    found: dict[str, str] = {}
    if isinstance(value, list):
        for inner in value:
            found |= _digests(inner, kind)
    elif isinstance(value, dict):
        digest = value.get("sha256")
        if kind is not None and isinstance(digest, str):
            found[digest] = kind
        for key, inner in value.items():
            found |= _digests(inner, _WORDS.get(key, kind))
    return found

"""What is wrong with a release repository, and what to do: every check goes on after a failure.

`verify_repository` answers whether a device would accept everything; this answers why not, and
also sees what devices do not: keys, permissions, leftovers of a publication that was cut off.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prunecast.server.repository.doctor_files import (
    check_leftovers,
    check_permissions,
    check_releases,
    check_served_keys,
)
from prunecast.server.repository.doctor_keys import check_keys, check_offline
from prunecast.server.repository.doctor_metadata import check_metadata
from prunecast.server.repository.findings import Finding
from prunecast.server.repository.keys import KeyRing

__all__ = ["Finding", "examine"]


def _utc_now() -> datetime:
    return datetime.now(UTC)


def examine(
    path: Path | str,
    keys: KeyRing | None = None,
    *,
    grace: timedelta = timedelta(days=1),
    now: Callable[[], datetime] = _utc_now,
) -> list[Finding]:
    """Examine a repository; nothing is changed.

    Args:
        path: its folder.
        keys: where private keys lie; None leaves them out.
        grace: how long files may stay after nothing live refers to them.
        now: the clock, for tests.

    Returns:
        Findings, problems first; empty when all is well.
    """
    path = Path(path)
    if not (path / "metadata").is_dir():
        return [
            Finding(
                *("problem", "no-repository", str(path), "has no metadata folder"),
                "name the folder that `release init` made, or restore it from a copy",
            )
        ]
    at = now()
    state, found = check_metadata(path / "metadata", at)
    found += check_releases(path, state)
    if _busy(path):
        found.append(
            Finding(
                *("note", "busy", str(path), "is being changed by another process"),
                "run this again when it is done; leftovers were not looked for",
            )
        )
    else:
        found += check_leftovers(path, state, at, grace)
    found += check_served_keys(path)
    found += check_permissions(path)
    if keys is not None:
        found += check_keys(keys, state)
    found += check_offline(path, keys, state)
    return sorted(found, key=lambda f: f.severity != "problem")


def _busy(path: Path) -> bool:
    """Whether a publication holds the lock; a repository that nobody may write has none."""
    try:
        with open(path / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False

"""Examine the signed metadata: readable, signed by the keys in force, consistent, not expired."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Targets
from tuf.api.serialization import DeserializationError

from prunecast.server.releases.findings import Finding
from prunecast.server.releases.metadata import Expiry

__all__ = ["RepositoryState", "check_metadata"]

_ROOT = re.compile(r"([1-9][0-9]*)\.root\.json")
_RESTORE = "restore it from a copy of the repository"
_SOON = 4  # the last quarter of a lifetime


@dataclass
class RepositoryState:
    """What could be read of the metadata in force.

    Attributes:
        root: the newest root, or None.
        targets: the list of live releases, or None.
        versions: versions in force of snapshot and targets, as far as known.
    """

    root: Metadata[Root] | None = None
    targets: Metadata[Targets] | None = None
    versions: dict[str, int] = field(default_factory=dict)


def check_metadata(folder: Path, now: datetime) -> tuple[RepositoryState, list[Finding]]:
    """Read what `timestamp.json` names, and say what is wrong on the way."""
    found: list[Finding] = []
    state = RepositoryState(_roots(folder, found))
    timestamp = _read(folder, "timestamp.json", "timestamp", None, state.root, found)
    snapshot = None
    if timestamp is not None:
        meta = timestamp.signed.snapshot_meta
        state.versions["snapshot"] = meta.version
        snapshot = _read(
            folder, f"{meta.version}.snapshot.json", "snapshot", meta, state.root, found
        )
    if snapshot is not None:
        listed = snapshot.signed.meta.get("targets.json")
        if listed is not None:
            state.versions["targets"] = listed.version
            name = f"{listed.version}.targets.json"
            state.targets = _read(folder, name, "targets", listed, state.root, found)
    for role, metadata in (
        ("root", state.root),
        ("targets", state.targets),
        ("snapshot", snapshot),
        ("timestamp", timestamp),
    ):
        if metadata is not None:
            found += _expiry(role, metadata.signed.expires, now)
    return state, found


def _roots(folder: Path, found: list[Finding]) -> Metadata[Root] | None:
    names = (_ROOT.fullmatch(path.name) for path in folder.iterdir())
    versions = sorted(int(m[1]) for m in names if m)
    if not versions:
        found.append(
            Finding("problem", "metadata-missing", "root.json", "there is no root", _RESTORE)
        )
        return None
    gaps = sorted({*range(versions[0], versions[-1])} - {*versions})
    if gaps:
        found.append(
            Finding(
                *("problem", "root-gap", f"{gaps[0]}.root.json", "is missing between other roots"),
                f"{_RESTORE}: devices go from root to root and cannot skip one",
            )
        )
    roots = {v: _load(folder / f"{v}.root.json", found) for v in versions}
    for before, after in pairwise(versions):
        old, new = roots[before], roots[after]
        if old is not None and new is not None and after == before + 1:
            _signed(f"{after}.root.json", partial(old.verify_delegate, "root", new), found)
    last = roots[versions[-1]]
    if last is not None:
        _signed(f"{versions[-1]}.root.json", partial(last.verify_delegate, "root", last), found)
    return last


def _load(path: Path, found: list[Finding]) -> Metadata[Any] | None:
    try:
        return Metadata.from_bytes(path.read_bytes())
    except FileNotFoundError:
        what, code = "is missing", "metadata-missing"
    except OSError as error:
        what, code = f"cannot be read: {error.strerror or error}", "metadata-unreadable"
    except (DeserializationError, RepositoryError, ValueError, KeyError, TypeError) as error:
        what, code = f"is damaged: {error}", "metadata-unreadable"
    found.append(Finding("problem", code, path.name, what, _RESTORE))
    return None


def _signed(name: str, check: Callable[[], object], found: list[Finding]) -> None:
    try:
        check()
    except (RepositoryError, ValueError) as error:
        found.append(
            Finding(
                *("problem", "metadata-signature", name, f"is not signed by the keys: {error}"),
                "sign it with `release renew` and the right keys, or restore it from a copy: "
                "devices refuse it",
            )
        )


def _read(
    folder: Path,
    name: str,
    role: str,
    meta: MetaFile | None,
    root: Metadata[Root] | None,
    found: list[Finding],
) -> Metadata[Any] | None:
    """One role's metadata, compared with what names it."""
    metadata = _load(folder / name, found)
    if metadata is None:
        return None
    if metadata.signed.type != role:
        found.append(
            Finding("problem", "metadata-mismatch", name, f"holds {metadata.signed.type}", _RESTORE)
        )
        return None
    if meta is not None:
        wrong = []
        try:
            meta.verify_length_and_hashes((folder / name).read_bytes())
        except (RepositoryError, OSError) as error:
            wrong.append(str(error))
        if metadata.signed.version != meta.version:
            wrong.append(f"it says version {metadata.signed.version}")
        if wrong:
            found.append(
                Finding(
                    *("problem", "metadata-mismatch", name),
                    f"is not the file that the role above it names: {'; '.join(wrong)}",
                    f"{_RESTORE}: devices refuse it",
                )
            )
    if root is not None:
        _signed(name, partial(root.verify_delegate, role, metadata), found)
    return metadata


def _expiry(role: str, expires: datetime, now: datetime) -> list[Finding]:
    lifetime: timedelta = getattr(Expiry(), role)
    left = expires - now
    renew = f"prunecast release renew --role {role}"
    if role in ("snapshot", "timestamp"):
        renew += " (from a timer, it needs no offline key)"
    else:
        renew += " (it needs the offline key)"
    if left <= timedelta(0):
        what = f"expired on {expires:%Y-%m-%d %H:%M} UTC: devices keep what they run"
        return [Finding("problem", "expired", role, what, renew)]
    if left < lifetime / _SOON:
        hours = int(left.total_seconds() // 3600)
        what = f"expires in {hours // 24} days and {hours % 24} hours"
        return [Finding("problem", "expires-soon", role, what, renew)]
    return []

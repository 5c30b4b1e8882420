"""Findings; and the signed metadata: readable, signed by the keys in force, consistent, valid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets

from prunecast.server.repository.reading import root_versions
from prunecast.server.repository.roles import OFFLINE_ROLES, ROLES, Expiry, delegations_of, tally

__all__ = ["Finding", "Findings", "RepositoryState", "check_metadata"]

_SHOWN = 5
Severity = Literal["problem", "note"]
Subject = str | Path | Sequence[str] | Sequence[Path]


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    Attributes:
        severity: ``problem`` when something must be done, ``note`` when nothing need be.
        code: stable name of the kind of finding, for scripts.
        subject: the file, role or release; the first few where there are several.
        what: what is wrong with it.
        remedy: what to do.
    """

    severity: Severity
    code: str
    subject: str
    what: str
    remedy: str


@dataclass
class Findings:
    """Collects what checks find.

    Attributes:
        path: the repository; files in it are named relative to it.
        all: the findings, in the order of the checks.
    """

    path: Path
    all: list[Finding] = field(default_factory=list)

    def problem(self, code: str, subject: Subject, what: str, remedy: str) -> None:
        """Something must be done."""
        self._add("problem", code, subject, what, remedy)

    def note(self, code: str, subject: Subject, what: str, remedy: str) -> None:
        """Nothing need be done."""
        self._add("note", code, subject, what, remedy)

    def _add(self, severity: Severity, code: str, subject: Subject, what: str, remedy: str) -> None:
        several = [subject] if isinstance(subject, str | Path) else subject
        names = [self._name(each) for each in several]
        self.all.append(Finding(severity, code, listed(names), what, remedy))

    def _name(self, subject: str | Path) -> str:
        if isinstance(subject, Path) and self.path in subject.parents:
            return str(subject.relative_to(self.path))
        return str(subject)


def listed(names: list[str]) -> str:
    """The first few names and how many more there are.

    >>> listed(["a", "b"]), listed(list("abcdefgh"))
    ('a, b', 'a, b, c, d, e and 3 more')
    """
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


_RESTORE = "restore it from a copy of the repository"


@dataclass
class RepositoryState:
    """What could be read of the metadata in force.

    Attributes:
        root: the newest root, or None.
        targets: the list of live releases, or None.
        delegated: lists of the roles that publish names of their own, as far as readable.
        versions: versions in force of snapshot, targets and delegated roles, as far as known.
    """

    root: Metadata[Root] | None = None
    targets: Metadata[Targets] | None = None
    delegated: dict[str, Metadata[Targets]] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)


def check_metadata(folder: Path, now: datetime) -> tuple[RepositoryState, list[Finding]]:
    """Read what `timestamp.json` names, and say what is wrong on the way."""
    found = Findings(folder.parent)
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
        _delegated(folder, state, snapshot.signed, found)
    read: dict[str, Metadata[Any] | None] = {
        "root": state.root,
        "targets": state.targets,
        "snapshot": snapshot,
        "timestamp": timestamp,
    }
    for role, metadata in {**read, **state.delegated}.items():
        if metadata is not None:
            _expiry(role, metadata.signed.expires, now, found)
    return state, found.all


def _delegated(folder: Path, state: RepositoryState, snapshot: Snapshot, found: Findings) -> None:
    for role in delegations_of(state.targets.signed) if state.targets else ():
        meta = snapshot.meta.get(f"{role}.json")
        if meta is None:
            found.problem(
                "metadata-mismatch",
                role,
                "is delegated to, but has no list",
                f"{_RESTORE}, or have the delegation withdrawn: devices of its names stop",
            )
            continue
        state.versions[role] = meta.version
        name = f"{meta.version}.{role}.json"
        listing = _read(folder, name, role, meta, state.targets, found)
        if listing is not None:
            state.delegated[role] = listing


def _roots(folder: Path, found: Findings) -> Metadata[Root] | None:
    versions = root_versions(folder)
    if not versions:
        found.problem("metadata-missing", "root.json", "there is no root", _RESTORE)
        return None
    gaps = sorted({*range(versions[0], versions[-1])} - {*versions})
    if gaps:
        found.problem(
            "root-gap",
            f"{gaps[0]}.root.json",
            "is missing between other roots",
            f"{_RESTORE}: devices go from root to root and cannot skip one",
        )
    roots = {v: _load(folder / f"{v}.root.json", found) for v in versions}
    for before, after in pairwise(versions):
        old, new = roots[before], roots[after]
        if old is not None and new is not None and after == before + 1:
            _signed(f"{after}.root.json", old, "root", new, found)
    last = roots[versions[-1]]
    if last is not None:
        _signed(f"{versions[-1]}.root.json", last, "root", last, found)
    return last


def _load(path: Path, found: Findings) -> Metadata[Any] | None:
    try:
        return Metadata.from_bytes(path.read_bytes())
    except FileNotFoundError:
        what, code = "is missing", "metadata-missing"
    except OSError as error:
        what, code = f"cannot be read: {error.strerror or error}", "metadata-unreadable"
    except (tuf_errors.RepositoryError, ValueError, KeyError, TypeError) as error:
        what, code = f"is damaged: {error}", "metadata-unreadable"
    found.problem(code, path.name, what, _RESTORE)
    return None


def _signed(
    name: str,
    delegator: Metadata[Root] | Metadata[Targets],
    role: str,
    metadata: Metadata[Any],
    found: Findings,
) -> None:
    try:
        counted = tally(delegator.signed, role, metadata)
    except (tuf_errors.RepositoryError, ValueError, KeyError) as error:
        said, code = f"is not signed by the keys: {error}", "metadata-signature"
    else:
        if not counted.missing:
            return
        code = "threshold-not-met" if counted.signed else "metadata-signature"
        unsigned = ", ".join(counted.unsigned) or "nobody"
        said = (
            f"{counted}; {counted.missing} valid signatures are missing, of {unsigned}"
            if counted.signed
            else f"is not signed by the keys of {counted.delegator}: {unsigned}"
        )
    remedy = (
        "have its holders sign with `release keys change` and enact that, or restore it from a "
        "copy: devices refuse it"
        if role in OFFLINE_ROLES
        else "sign it with `release renew` and the right keys, or restore it from a copy: devices "
        "refuse it"
    )
    found.problem(code, name, said, remedy)


def _read(
    folder: Path,
    name: str,
    role: str,
    meta: MetaFile | None,
    delegator: Metadata[Root] | Metadata[Targets] | None,
    found: Findings,
) -> Metadata[Any] | None:
    """One role's metadata, compared with what names it."""
    metadata = _load(folder / name, found)
    if metadata is None:
        return None
    if metadata.signed.type != (role if role in ROLES else Targets.type):
        found.problem("metadata-mismatch", name, f"holds {metadata.signed.type}", _RESTORE)
        return None
    if meta is not None:
        wrong = []
        try:
            meta.verify_length_and_hashes((folder / name).read_bytes())
        except (tuf_errors.RepositoryError, OSError) as error:
            wrong.append(str(error))
        if metadata.signed.version != meta.version:
            wrong.append(f"it says version {metadata.signed.version}")
        if wrong:
            found.problem(
                "metadata-mismatch",
                name,
                f"is not the file that the role above it names: {'; '.join(wrong)}",
                f"{_RESTORE}: devices refuse it",
            )
    if delegator is not None:
        _signed(name, delegator, role, metadata, found)
    return metadata


def _expiry(role: str, expires: datetime, now: datetime, found: Findings) -> None:
    left = expires - now
    if role in OFFLINE_ROLES:
        renew = (
            f"prunecast release renew --role {role} with the offline key; where several holders "
            f"sign, `release keys change --renew {role}`"
        )
    else:
        renew = f"prunecast release renew --role {role} (from a timer, it needs no offline key)"
    if left <= timedelta(0):
        what = f"expired on {expires:%Y-%m-%d %H:%M} UTC: devices keep what they run"
        found.problem("expired", role, what, renew)
    elif Expiry().soon(role, expires, now):
        hours = int(left.total_seconds() // 3600)
        what = f"expires in {hours // 24} days and {hours % 24} hours"
        found.problem("expires-soon", role, what, renew)

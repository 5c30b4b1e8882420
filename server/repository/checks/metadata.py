"""Findings; and the signed metadata: readable, signed by the keys in force, consistent, valid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, MetaFile, Root, Targets

from prunecast.server.repository.reading import root_versions
from prunecast.server.repository.roles import (
    OFFLINE_ROLES,
    ROLES,
    Expiry,
    delegations_of,
    signer_of,
    tally,
)

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
    """Collects what checks find; where they name a list of subjects and it is empty, nothing.

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
        if names := [self._name(each) for each in several]:
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


class RepositoryState:
    """What can be read of the metadata that `timestamp.json` leads to, checked on the way.

    Args:
        folder: of the metadata.
        now: the time.
        found: gains what is wrong.

    Attributes:
        root: the newest root, or None.
        targets: the list of live releases, or None.
        delegated: lists of the roles that publish names of their own, as far as readable.
        versions: versions in force of snapshot, targets and delegated roles, as far as known.
    """

    def __init__(self, folder: Path, now: datetime, found: Findings) -> None:
        self._folder, self._found = folder, found
        self.versions: dict[str, int] = {}
        self.root = self._newest_root()
        timestamp = self._read("timestamp", self.root)
        meta = timestamp.signed.snapshot_meta if timestamp else None
        snapshot = self._read("snapshot", self.root, meta) if meta else None
        listed: dict[str, MetaFile] = snapshot.signed.meta if snapshot else {}
        self.targets: Metadata[Targets] | None = None
        if "targets.json" in listed:
            self.targets = self._read("targets", self.root, listed["targets.json"])
        self.delegated: dict[str, Metadata[Targets]] = {}
        for role in delegations_of(self.targets.signed) if self.targets else ():
            if f"{role}.json" not in listed:
                what = "is delegated to, but has no list"
                remedy = f"{_RESTORE}, or have the delegation withdrawn: devices of its names stop"
                found.problem("metadata-mismatch", role, what, remedy)
            elif listing := self._read(role, self.targets, listed[f"{role}.json"]):
                self.delegated[role] = listing
        read = {"root": self.root, "targets": self.targets, "snapshot": snapshot}
        first: dict[str, datetime] = {}
        for role, metadata in {**read, "timestamp": timestamp, **self.delegated}.items():
            if metadata is not None:
                signer, at = signer_of(role), metadata.signed.expires
                first[signer] = min(at, first.get(signer, at))
        for role, at in first.items():  # said once for targets and the lists of names
            self._check_expiry(role, at, now)

    def _newest_root(self) -> Metadata[Root] | None:
        versions = root_versions(self._folder)
        if not versions:
            self._found.problem("metadata-missing", "root.json", "there is no root", _RESTORE)
            return None
        if gaps := sorted({*range(versions[0], versions[-1])} - {*versions}):
            self._found.problem(
                "root-gap",
                f"{gaps[0]}.root.json",
                "is missing between other roots",
                f"{_RESTORE}: devices go from root to root and cannot skip one",
            )
        roots = {v: self._load(f"{v}.root.json") for v in versions}
        for before, after in pairwise(versions):
            if after == before + 1:
                self._check_signed(f"{after}.root.json", roots[before], "root", roots[after])
        newest = roots[versions[-1]]
        self._check_signed(f"{versions[-1]}.root.json", newest, "root", newest)
        return newest

    def _load(self, name: str) -> Metadata[Any] | None:
        try:
            return Metadata.from_bytes((self._folder / name).read_bytes())
        except FileNotFoundError:
            what, code = "is missing", "metadata-missing"
        except OSError as error:
            what, code = f"cannot be read: {error.strerror or error}", "metadata-unreadable"
        except (tuf_errors.RepositoryError, ValueError, KeyError, TypeError) as error:
            what, code = f"is damaged: {error}", "metadata-unreadable"
        self._found.problem(code, name, what, _RESTORE)
        return None

    def _check_signed(
        self, name: str, delegator: Metadata[Any] | None, role: str, metadata: Metadata[Any] | None
    ) -> None:
        if delegator is None or metadata is None:
            return
        try:
            counted = tally(delegator.signed, role, metadata)
        except (tuf_errors.RepositoryError, ValueError, KeyError) as error:
            said, code = f"is not signed by the keys: {error}", "metadata-signature"
        else:
            if not counted.missing:
                return
            unsigned = ", ".join(counted.unsigned) or "nobody"
            code = "metadata-signature"
            said = f"is not signed by the keys of {counted.delegator}: {unsigned}"
            if counted.signed:
                code = "threshold-not-met"
                said = f"{counted}; {counted.missing} valid signatures are missing, of {unsigned}"
        remedy = "sign it with `release renew` and the right keys"
        if signer_of(role) in OFFLINE_ROLES:
            remedy = "have its holders sign with `release keys change` and enact that"
        remedy += ", or restore it from a copy: devices refuse it"
        self._found.problem(code, name, said, remedy)

    def _read(
        self, role: str, delegator: Metadata[Any] | None, meta: MetaFile | None = None
    ) -> Metadata[Any] | None:
        """One role's metadata, compared with what names it."""
        name = f"{role}.json"
        if meta is not None:
            self.versions[role] = meta.version
            name = f"{meta.version}.{name}"
        metadata = self._load(name)
        if metadata is None:
            return None
        if metadata.signed.type != (role if role in ROLES else Targets.type):
            what = f"holds {metadata.signed.type}"
            self._found.problem("metadata-mismatch", name, what, _RESTORE)
            return None
        if meta is not None:
            wrong = []
            try:
                meta.verify_length_and_hashes((self._folder / name).read_bytes())
            except (tuf_errors.RepositoryError, OSError) as error:
                wrong.append(str(error))
            if metadata.signed.version != meta.version:
                wrong.append(f"it says version {metadata.signed.version}")
            if wrong:
                what = f"is not the file that the role above it names: {'; '.join(wrong)}"
                remedy = f"{_RESTORE}: devices refuse it"
                self._found.problem("metadata-mismatch", name, what, remedy)
        self._check_signed(name, delegator, role, metadata)
        return metadata

    def _check_expiry(self, role: str, expires: datetime, now: datetime) -> None:
        left, renew = expires - now, f"prunecast release renew --role {role}"
        if role in OFFLINE_ROLES:
            renew += (
                " with the offline key; where several holders sign, `release keys change --renew "
                f"{role}`"
            )
        else:
            renew += " (from a timer, it needs no offline key)"
        if left <= timedelta(0):
            what = f"expired on {expires:%Y-%m-%d %H:%M} UTC: devices keep what they run"
            self._found.problem("expired", role, what, renew)
        elif Expiry().soon(role, expires, now):
            hours = int(left.total_seconds() // 3600)
            what = f"expires in {hours // 24} days and {hours % 24} hours"
            self._found.problem("expires-soon", role, what, renew)


def check_metadata(folder: Path, now: datetime) -> tuple[RepositoryState, list[Finding]]:
    """Read what `timestamp.json` names, and say what is wrong on the way."""
    found = Findings(folder.parent)
    return RepositoryState(folder, now, found), found.all

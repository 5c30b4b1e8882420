"""What is wrong with a release repository, and what to do: every check goes on after a failure.

`verify_repository` answers whether a device would accept everything; this answers why not, and
also sees what devices do not: keys, permissions, leftovers of a publication that was cut off.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from tuf.api.metadata import TargetFile

from prunecast.common.clock import utc_now
from prunecast.common.files import file_digest, is_locked
from prunecast.compression.release import ManifestError
from prunecast.compression.release.manifest import (
    FileRef,
    ReleaseManifest,
    blob_path,
    parse_manifest_path,
)
from prunecast.server.repository.checks.metadata import (
    Finding,
    Findings,
    RepositoryState,
    check_metadata,
)
from prunecast.server.repository.errors import FleetUnanswered, KeyFileError
from prunecast.server.repository.fleets import FollowingFleets
from prunecast.server.repository.keys.keyholders import KeyRing, as_signer
from prunecast.server.repository.reading import GRACE, VERSIONED, age, kept_files, target_file
from prunecast.server.repository.roles import OFFLINE_ROLES, ROLES, delegations_of, signer_of

__all__ = ["examine"]

_MOST_FILES, _MOST_BYTES = 2000, 16_384  # looked at beside the repository
_KEY_ID = re.compile(rb"^Key-Id: ([0-9a-f]{64})$", re.MULTILINE)


def examine(
    path: Path | str,
    keys: KeyRing | None = None,
    *,
    fleets: Sequence[str] = (),
    now: Callable[[], datetime] = utc_now,
) -> list[Finding]:
    """Examine a repository; nothing is changed.

    Args:
        path: its folder.
        keys: where private keys lie; None leaves them out.
        fleets: URLs of databases of fleets to ask besides those that the repository remembers.
        now: the clock, for tests.

    Returns:
        Findings, problems first; empty when all is well.
    """
    path = Path(path)
    found = Findings(path)
    if not (path / "metadata").is_dir():
        remedy = "name the folder that `release init` made, or restore it from a copy"
        found.problem("no-repository", path, "has no metadata folder", remedy)
        return found.all
    at = now()
    state, found.all[:] = check_metadata(path / "metadata", at)
    _check_releases(path, state, found)
    if is_locked(path / ".lock"):
        remedy = "run this again when it is done; leftovers were not looked for"
        found.note("busy", path, "is being changed by another process", remedy)
    else:
        _check_leftovers(path, state, at, found)
    _check_fleets(path, fleets, state, at, found)
    _check_served_keys(path, found)
    _check_permissions(path, found)
    if keys is not None:
        _check_keys(keys, state, found)
    _check_offline(path, keys, state, found)
    return sorted(found.all, key=lambda finding: finding.severity != "problem")


def _check_offline(
    path: Path, keys: KeyRing | None, state: RepositoryState, found: Findings
) -> None:
    """Private keys of root and targets on the machine that serves.

    Looks into the folder that holds the repository, one level below it, and into the key folders.
    Where one key is enough to sign, as `release init` begins, it is a note; where several holders
    share a role, somebody brought a key that must not be here.
    """
    if state.root is None:
        return
    root = state.root.signed
    alone: list[str] = []
    shared: list[str] = []
    for file in _candidates(path, keys):
        key = _key_id(file)
        if roles := [role for role in OFFLINE_ROLES if key in root.roles[role].keyids]:
            single = all(len(root.roles[role].keyids) == 1 for role in roles)
            (alone if single else shared).append(f"{file} ({', '.join(roles)})")
    what = "is an offline private key on the machine that serves: whoever breaks in can sign"
    remedy = "move it to a medium of its own; only online keys are needed here"
    away = f"{remedy}. If others use this machine, have the key revoked: `release keys change`"
    found.problem("offline-key-here", shared, what, away)
    found.note("offline-key-here", alone, what, remedy)


def _candidates(path: Path, keys: KeyRing | None) -> Iterator[Path]:
    beside = path.resolve().parent
    folders = [beside]
    with suppress(OSError):
        folders += sorted(p for p in beside.iterdir() if p.is_dir() and p != path.resolve())
    folders += [folder.resolve() for folder in keys.folders] if keys else []
    seen = 0
    for folder in dict.fromkeys(folders):
        with suppress(OSError):
            for file in sorted(folder.iterdir()):
                seen += 1
                if seen > _MOST_FILES:
                    return
                if file.is_file() and file.stat().st_size <= _MOST_BYTES:
                    yield file


def _key_id(file: Path) -> str | None:
    """The key id of a private key file; encrypted ones say it above the PEM block."""
    try:
        data = file.read_bytes()
        if b"PRIVATE KEY-----" not in data:
            return None
        if stated := _KEY_ID.search(data):
            return stated[1].decode()
        return as_signer(file, data, None).public_key.keyid
    except (OSError, KeyFileError):
        return None


def _check_keys(keys: KeyRing, state: RepositoryState, found: Findings) -> None:
    """Compare the keys at hand with those that root and targets name."""
    named = dict(state.root.signed.roles) if state.root else {}
    named |= delegations_of(state.targets.signed) if state.targets else {}
    for role in dict.fromkeys([*ROLES, *map(signer_of, named)]):
        try:
            path = keys.path(role)
        except KeyFileError as error:
            _missing(role, str(error), found)
            continue
        try:
            signer = keys.signers(role)[0]
        except KeyFileError as error:
            remedy = f"restore {role}.pem or its mode; its owner alone may read it"
            found.problem("key-unusable", role, str(error), remedy)
            continue
        if role in named and signer.public_key.keyid not in named[role].keyids:
            what = f"{path} is not the key that this repository trusts"
            remedy = "use the key folder of this repository; after a rotation, the new key"
            found.problem("key-foreign", role, what, remedy)
    _leftovers(keys, found)


def _missing(role: str, what: str, found: Findings) -> None:
    if role in OFFLINE_ROLES:
        found.note("key-offline", role, what, "nothing: it belongs on another medium")
        return
    remedy = (
        f"put {role}.pem there, or have it replaced: `release rotate-key` with the root key, "
        "`release keys change` where several holders sign"
    )
    found.problem("key-missing", role, what, remedy)


def _leftovers(keys: KeyRing, found: Findings) -> None:
    for folder in keys.folders:
        for role in ROLES:
            fresh, old = folder / f"{role}.pem.new", folder / f"{role}.pem.old"
            if fresh.exists():
                what = "a rotation of this key was cut off before anything was published"
                found.problem("unfinished-rotation", fresh, what, "delete it and rotate again")
            if old.exists():
                found.note("old-key", old, "is a rotated key that nothing needs", "destroy it")


_SERVED = ("metadata", "targets", "blobs")
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}")
_AGAIN = "restore it from a copy, or publish the model again and retire this release"


def _check_releases(path: Path, state: RepositoryState, found: Findings) -> None:
    """Every live release: its manifest and every file it refers to, by size and SHA-256."""
    if state.targets is None:
        return
    checked: set[str] = set()
    for name, target in sorted(_listed(state).items()):
        release = parse_manifest_path(name)
        if release is None:
            what = "is signed, but is no release"
            found.note("foreign-target", name, what, "nothing: agents ignore it")
            continue
        label = f"{release[0]} {release[1]}"
        ref = FileRef(target.hashes.get("sha256", ""), target.length)
        manifest_file = target_file(path, name, ref.sha256)
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


def _listed(state: RepositoryState) -> dict[str, TargetFile]:
    """Live targets by path."""
    lists = [state.targets.signed] if state.targets else []
    lists += [held.signed for held in state.delegated.values()]
    return {name: target for signed in lists for name, target in signed.targets.items()}


def _check_fleets(
    path: Path, given: Sequence[str], state: RepositoryState, now: datetime, found: Findings
) -> None:
    """Whether everything that the fleets stand on is live."""
    if state.targets is None:
        return
    live = set(map(parse_manifest_path, _listed(state)))
    try:
        for fleet, use in FollowingFleets(path, given).uses(now):
            if use.lasting and (use.release.name, use.release.version) not in live:
                found.problem(
                    "fleet-on-retired",
                    f"{use.user} (fleet {fleet})",
                    f"{use.why}: {use.release}, which is retired, so no device is told it",
                    "publish that model again as a new version and roll it out; until then devices "
                    "keep what they run, and an abort brings nothing back",
                )
    except FleetUnanswered as error:
        remedy = "see to it before the next release is retired: nothing is, meanwhile"
        found.problem("fleet-unanswered", path, str(error), remedy)


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


def _check_leftovers(path: Path, state: RepositoryState, now: datetime, found: Findings) -> None:
    """What a publication that was cut off left behind, and files that nothing refers to."""
    temporary = [p for p in _files(path) if _TEMPORARY.fullmatch(p.name)]
    what = "is a file that a process did not finish writing"
    found.problem("unfinished-write", temporary, what, "delete it; nothing refers to it")
    ahead = []
    for file in (path / "metadata").iterdir():
        parsed = VERSIONED.fullmatch(file.name)
        current = state.versions.get(parsed[2]) if parsed else None
        if parsed and current is not None and int(parsed[1]) > current:
            ahead.append(file)
    found.problem(
        "unfinished-publication",
        ahead,
        "was written, but timestamp.json does not lead to it: devices see the state before",
        "publish, retire or renew again: it overwrites these files",
    )
    kept = kept_files(path)
    in_force = {f"{version}.{role}.json" for role, version in state.versions.items()}
    damaged = [p for p in kept.damaged_lists if p.name not in in_force]
    found.note(
        "old-list-damaged",
        damaged,
        "is a superseded list that cannot be read: what it refers to is kept meanwhile",
        "nothing: it goes when the grace period ends; delete it to free the space now",
    )
    if kept.damaged_lists or kept.damaged_manifests:
        return  # what those refer to would look orphaned
    known = kept.manifests | kept.blobs | {*temporary}
    inside = [p for folder in ("targets", "blobs") for p in _files(path / folder)]
    orphans = [p for p in inside if p not in known]
    size = sum(p.stat().st_size for p in orphans)
    young = sum(1 for p in orphans if age(p, now) <= GRACE)
    youth = f", {young} of them younger than the grace period" if young else ""
    what = f"{len(orphans)} files ({size} bytes) that no kept metadata refers to{youth}"
    remedy = "nothing: the next publication or renewal after the grace period removes them"
    found.note("orphaned", orphans, what, remedy)


def _check_served_keys(path: Path, found: Findings) -> None:
    """Private keys inside the folder that everybody can download."""
    keys = []
    for file in _files(path):
        with suppress(OSError), open(file, "rb") as data:
            if b"PRIVATE KEY-----" in data.read(4096):
                keys.append(file)
    what = "is a private key in the served folder: whoever downloaded it can sign"
    remedy = "move it out, then `prunecast release rotate-key` for its role"
    found.problem("key-served", keys, what, remedy)


def _check_permissions(path: Path, found: Findings) -> None:
    """Whether a web server under another user can read what is served."""
    if os.name != "posix":
        return
    folders = [path, *(path / name for name in _SERVED)]
    folders += [p for name in _SERVED for p in (path / name).rglob("*") if p.is_dir()]
    closed = [p for p in folders if p.is_dir() and not p.stat().st_mode & stat.S_IXOTH]
    files = [p for name in _SERVED for p in _files(path / name)]
    hidden = [p for p in files if not p.stat().st_mode & stat.S_IROTH]
    found.problem(
        "not-readable",
        [*closed, *hidden],
        f"{len(closed)} folders and {len(hidden)} files are closed to other users, such as a web "
        "server's",
        f"chmod -R o+rX {path}, and publish under umask 022",
    )
    above = [p for p in path.resolve().parents if not p.stat().st_mode & stat.S_IXOTH]
    what = "lies above the repository and is closed to other users"
    remedy = "chmod o+x it, unless `prunecast serve` runs as this user"
    found.note("folder-above-closed", above[-1:], what, remedy)


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.rglob("*") if p.is_file() and p.name != ".lock")

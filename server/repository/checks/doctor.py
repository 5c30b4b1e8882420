"""What is wrong with a release repository, and what to do: every check goes on after a failure.

`verify_repository` answers whether a device would accept everything; this answers why not, and
also sees what devices do not: keys, permissions, leftovers of a publication that was cut off.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import SSlibKey
from tuf.api.metadata import Root, Targets

from prunecast.common.locks import is_locked
from prunecast.server.repository.checks.files import (
    check_leftovers,
    check_permissions,
    check_releases,
    check_served_keys,
)
from prunecast.server.repository.checks.findings import Finding, Findings
from prunecast.server.repository.checks.metadata import RepositoryState, check_metadata
from prunecast.server.repository.errors import KeyFileError
from prunecast.server.repository.keys.keyring import KeyRing
from prunecast.server.repository.roles import OFFLINE_ROLES, ROLES, delegations_of

__all__ = ["Finding", "check_keys", "check_offline", "examine"]

_MOST_FILES, _MOST_BYTES = 2000, 16_384  # looked at beside the repository
_KEY_ID = re.compile(rb"^Key-Id: ([0-9a-f]{64})$", re.MULTILINE)


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
    found = Findings(path)
    if not (path / "metadata").is_dir():
        remedy = "name the folder that `release init` made, or restore it from a copy"
        found.problem("no-repository", path, "has no metadata folder", remedy)
        return found.all
    at = now()
    state, found.all[:] = check_metadata(path / "metadata", at)
    check_releases(path, state, found)
    if is_locked(path / ".lock"):
        remedy = "run this again when it is done; leftovers were not looked for"
        found.note("busy", path, "is being changed by another process", remedy)
    else:
        check_leftovers(path, state, at, grace, found)
    check_served_keys(path, found)
    check_permissions(path, found)
    if keys is not None:
        check_keys(keys, state, found)
    check_offline(path, keys, state, found)
    return sorted(found.all, key=lambda finding: finding.severity != "problem")


def check_offline(
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
    if shared:
        away = f"{remedy}. If others use this machine, have the key revoked: `release keys change`"
        found.problem("offline-key-here", shared, what, away)
    if alone:
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
        key = load_pem_private_key(data, password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, Ed25519PrivateKey):
        return None
    return SSlibKey.from_crypto(key.public_key()).keyid


def check_keys(keys: KeyRing, state: RepositoryState, found: Findings) -> None:
    """Compare the keys at hand with those that root and targets name."""
    targets = state.targets.signed if state.targets else None
    delegated = tuple(delegations_of(targets)) if targets else ()
    for role in (*ROLES, *delegated):
        delegator: Root | Targets | None = targets if role in delegated else None
        if role in ROLES and state.root is not None:
            delegator = state.root.signed
        try:
            keys.path(role)
        except KeyFileError as error:
            _missing(role, str(error), found)
            continue
        try:
            signer = keys.signer(role)
        except KeyFileError as error:
            remedy = f"restore {role}.pem or its mode; its owner alone may read it"
            found.problem("key-unusable", role, str(error), remedy)
            continue
        trusted = delegator.get_delegated_role(role).keyids if delegator else None
        if trusted is not None and signer.public_key.keyid not in trusted:
            found.problem(
                "key-foreign",
                role,
                f"{keys.path(role)} is not the key that this repository trusts",
                "use the key folder of this repository; after a rotation, the new key",
            )
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
                found.problem(
                    "unfinished-rotation",
                    fresh,
                    "a rotation of this key was cut off before anything was published",
                    "delete it and rotate again",
                )
            if old.exists():
                found.note("old-key", old, "is a rotated key that nothing needs", "destroy it")

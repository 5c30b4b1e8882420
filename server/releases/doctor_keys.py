"""Examine private keys: there, closed to others, and the ones that the root trusts."""

from __future__ import annotations

from tuf.api.metadata import Metadata, Root

from prunecast.server.releases.errors import KeyFileError
from prunecast.server.releases.findings import Finding
from prunecast.server.releases.keys import ONLINE_ROLES, ROLES, KeyRing

__all__ = ["check_keys"]


def check_keys(keys: KeyRing, root: Metadata[Root] | None) -> list[Finding]:
    """Compare the keys at hand with those that `root` names."""
    found: list[Finding] = []
    for role in ROLES:
        try:
            keys.path(role)
        except KeyFileError as error:
            found.append(_missing(role, str(error)))
            continue
        try:
            signer = keys.signer(role)
        except KeyFileError as error:
            remedy = f"restore {role}.pem or its mode; its owner alone may read it"
            found.append(Finding("problem", "key-unusable", role, str(error), remedy))
            continue
        if root is not None and signer.public_key.keyid not in root.signed.roles[role].keyids:
            found.append(
                Finding(
                    *("problem", "key-foreign", role),
                    f"{keys.path(role)} is not the key that this repository trusts",
                    "use the key folder of this repository; after a rotation, the new key",
                )
            )
    return found + _leftovers(keys)


def _missing(role: str, what: str) -> Finding:
    if role in ONLINE_ROLES:
        remedy = (
            f"put {role}.pem there, or replace it with `release rotate-key {role}` and the root key"
        )
        return Finding("problem", "key-missing", role, what, remedy)
    return Finding("note", "key-offline", role, what, "nothing: it belongs on another medium")


def _leftovers(keys: KeyRing) -> list[Finding]:
    found: list[Finding] = []
    for folder in keys.folders:
        for role in ROLES:
            fresh, old = folder / f"{role}.pem.new", folder / f"{role}.pem.old"
            if fresh.exists():
                found.append(
                    Finding(
                        *("problem", "unfinished-rotation", str(fresh)),
                        "a rotation of this key was cut off before anything was published",
                        "delete it and rotate again",
                    )
                )
            if old.exists():
                found.append(
                    Finding(
                        *("note", "old-key", str(old), "is a rotated key that nothing needs"),
                        "destroy it",
                    )
                )
    return found

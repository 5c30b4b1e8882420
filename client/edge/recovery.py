"""What runs when `state.json` is lost: the slots, held against what was signed.

Without `state.json` nothing says which slot is complete. Its releases are still there, and the
metadata that this device has verified still say which of them were signed: a slot is taken only if
its `release.json` is listed there and every file has the digest that it states. Nothing is fetched
and nothing can get older than what the metadata list; whatever is recovered starts unconfirmed and
passes its self-test first. What was given up is not recovered, because giving up a release takes
`release.json` out of its slot.
"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from urllib.parse import quote

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, Root, Targets
from tuf.api.serialization import DeserializationError

from prunecast.client.edge.errors import StateError
from prunecast.client.edge.records import SLOTS, SlotRecord, State
from prunecast.client.edge.slots.slot import verify_slot
from prunecast.client.edge.state import StateFolder
from prunecast.common.files import file_digest
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.manifest import (
    MAX_MANIFEST_BYTES,
    ReleaseManifest,
    manifest_path,
)

__all__ = ["recover_state"]

_UNUSABLE = (RepositoryError, DeserializationError, OSError, ValueError)


def recover_state(
    folder: StateFolder, name: str | None = None, root: bytes | None = None
) -> State | None:
    """The state that the slots of a folder tell; None when no slot holds what was signed.

    Args:
        folder: whose `state.json` is missing or unreadable; it is not written.
        name: of the release that it follows; None: whichever is there.
        root: the root metadata of the device; None: the oldest that the folder keeps, which is
            what the device was provisioned with.
    """
    found: list[tuple[ReleaseManifest, SlotRecord]] = []
    for slot in SLOTS:
        path = folder.slot(slot)
        try:
            digest = file_digest(path / "release.json")
            if (path / "release.json").stat().st_size > MAX_MANIFEST_BYTES:
                continue
            manifest = ReleaseManifest.from_bytes((path / "release.json").read_bytes())
            if name not in (None, manifest.name):
                continue
            signed = _signed_digest(folder.metadata, root, manifest.name, manifest.version)
            if digest != signed:
                continue
            verify_slot(path, digest)
        except (*_UNUSABLE, ReleaseError, StateError):
            continue
        found.append((manifest, SlotRecord(slot, manifest.version, digest)))
    if not found:
        return None
    found.sort(key=lambda one: one[0].version, reverse=True)
    records = [record for manifest, record in found if manifest.name == found[0][0].name]
    return State(found[0][0].name, records[0], records[1] if len(records) > 1 else None)


def _signed_digest(metadata: Path, root: bytes | None, name: str, version: int) -> str | None:
    """SHA-256 (hex) of a manifest in the metadata that were verified here, however old they are.

    Expiry says that something newer should be there, not that this was never signed.
    """
    path = manifest_path(name, version)
    targets = Metadata[Targets].from_bytes((metadata / "targets.json").read_bytes())
    _root(metadata, root).verify_delegate(Targets.type, targets.signed_bytes, targets.signatures)
    listings = [targets.signed]
    roles = targets.signed.delegations.roles if targets.signed.delegations else None
    for role in (roles or {}).values():
        if role.is_delegated_path(path):
            kept = metadata / f"{quote(role.name, '')}.json"
            given = Metadata[Targets].from_bytes(kept.read_bytes())
            targets.signed.verify_delegate(role.name, given.signed_bytes, given.signatures)
            listings.append(given.signed)
            if role.terminating:
                break
    for listing in listings:
        if path in listing.targets:
            return listing.targets[path].hashes.get("sha256")
    return None


def _root(metadata: Path, given: bytes | None) -> Root:
    """The newest root that the first one leads to, by the roots that are kept."""
    history = metadata / "root_history"
    if given is None:
        kept = [int(p.name.split(".")[0]) for p in history.glob("[0-9]*.root.json")]
        given = (history / f"{min(kept)}.root.json").read_bytes()
    first = Metadata[Root].from_bytes(given)
    trusted = first.signed
    trusted.verify_delegate(Root.type, first.signed_bytes, first.signatures)
    for number in count(trusted.version + 1):
        path = history / f"{number}.root.json"
        if not path.is_file():
            break
        following = Metadata[Root].from_bytes(path.read_bytes())
        for signer in (trusted, following.signed):
            signer.verify_delegate(Root.type, following.signed_bytes, following.signatures)
        if following.signed.version != number:
            raise ValueError(f"{path} is of version {following.signed.version}")
        trusted = following.signed
    return trusted

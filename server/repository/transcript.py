"""A ceremony in words: what holders read before they sign, and what is kept afterwards."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from securesystemslib.signer import Key
from tuf.api.metadata import Root, Targets

from prunecast.compression.release.manifest import parse_manifest_path
from prunecast.server.repository.delegation import delegations_of
from prunecast.server.repository.holders import describe_key, holder_of

if TYPE_CHECKING:
    from prunecast.server.repository.ceremony import Ceremony

__all__ = ["describe_requests", "transcript"]


def describe_requests(ceremony: Ceremony) -> list[str]:
    """What each request says, and what it changes in the root in force; a line each."""
    lines: list[str] = []
    for role, request in ceremony.requests.items():
        signed = request.signed
        lines += [
            f"{role} {signed.version}, valid until {signed.expires:%Y-%m-%d %H:%M} UTC",
            f"  SHA-256 of what is signed: {ceremony.digest(role)}",
        ]
        if isinstance(signed, Root):
            held = ceremony.trusted.signed if ceremony.trusted else None
            lines += _root(signed, held)
        else:
            lines += _targets(signed)
    return lines


def transcript(ceremony: Ceremony) -> str:
    """The whole ceremony: keys with their digests, requests, signatures, what is missing."""
    keys: dict[str, Key] = {}
    for role in ceremony.requests:
        for root in ceremony.delegators(role):
            keys |= root.keys
        signed = ceremony.requests[role].signed
        if isinstance(signed, Targets) and signed.delegations:
            keys |= signed.delegations.keys
    lines = [
        "Key ceremony",
        f"prepared {ceremony.prepared}",
        "",
        "Keys",
        *sorted(f"  {describe_key(key)}\n    key id {keyid}" for keyid, key in keys.items()),
        "",
        "Requests",
        *(f"  {line}" for line in describe_requests(ceremony)),
        "",
        "Signatures",
        *(
            f"  {s.at}  {s.role} {s.version}  {holder_of(keys[s.keyid])} (key {s.keyid[:16]})"
            for s in sorted(ceremony.signatures, key=lambda s: (s.at, s.role, s.keyid))
        ),
        "",
        "Thresholds",
    ]
    for counted in ceremony.tallies():
        lines.append(f"  {counted}{f'; {counted.asked}' if counted.missing else ''}")
    lines += ["", f"enacted {ceremony.enacted}" if ceremony.enacted else "not enacted", ""]
    return "\n".join(lines)


def _root(root: Root, held: Root | None) -> list[str]:
    lines = []
    for name, role in root.roles.items():
        said = _signers(role.threshold, (root.get_key(k) for k in role.keyids))
        if held is not None:
            old = held.roles[name]
            before = _signers(old.threshold, (held.get_key(k) for k in old.keyids))
            if (old.threshold, set(old.keyids)) != (role.threshold, set(role.keyids)):
                said += f"  (was {before})"
        lines.append(f"  {name}: {said}")
    return lines


def _targets(targets: Targets) -> list[str]:
    found = sorted(filter(None, map(parse_manifest_path, targets.targets)))
    names = ", ".join(f"{name} {version}" for name, version in found) or "none"
    lines = [f"  releases: {names}"]
    for name, given in delegations_of(targets).items():
        keys = (targets.get_key(keyid) for keyid in given.keyids)
        paths = ", ".join(path.split("/")[0] for path in given.paths or [])
        lines.append(f"  {name} publishes {paths}: {_signers(given.threshold, keys)}")
    return lines


def _signers(threshold: int, keys: Iterable[Key]) -> str:
    return f"{threshold} of {', '.join(sorted(map(holder_of, keys)))}"

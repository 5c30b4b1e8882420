"""A key ceremony: what holders are asked to sign, what they have signed, and its transcript.

::

    ceremony.json                   schema, when it was prepared and enacted
    root.json, targets.json         the requests: metadata without signatures, either or both
    trusted-root.json               the root in force, unless this makes the first one
    signatures/<role>-….json        one file per holder and request
    transcript.txt                  written anew whenever something changes

The folder holds nothing secret. Copies of it travel to the holders, and their signature files
travel back; every signature is verified wherever the folder is opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from securesystemslib.signer import CryptoSigner, Key, Signature
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Targets
from tuf.api.serialization.json import JSONSerializer

from prunecast.common.files import write_atomically
from prunecast.compression.release.manifest import parse_manifest_path
from prunecast.server.repository.errors import CeremonyError
from prunecast.server.repository.keys.keyholders import describe_key, fingerprint
from prunecast.server.repository.keys.signing import HolderSignature, sign_request, utc_stamp
from prunecast.server.repository.roles import (
    Tally,
    delegations_of,
    holder_of,
    require_signed,
    tally,
)

__all__ = ["Ceremony", "describe_requests", "transcript"]

_SCHEMA = 1
_TYPES: Mapping[str, type[Root] | type[Targets]] = {"root": Root, "targets": Targets}
_SERIALISER = JSONSerializer(compact=False)


class Ceremony:
    """A ceremony's folder.

    Args:
        folder: that `create` made, or a copy of it.

    Attributes:
        requests: what is to be signed, by role, without signatures.
        trusted: the root in force, or None for a first ceremony.
        signatures: that were given so far; all are valid.

    Raises:
        CeremonyError: a file is missing, damaged, or contradicts another.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        try:
            about: Any = json.loads((self.folder / "ceremony.json").read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise CeremonyError(
                f"{self.folder} holds no ceremony: prepare one with `release keys plan` or "
                "`release keys change`"
            ) from error
        about = about if isinstance(about, dict) else {}
        if about.get("schema") != _SCHEMA or not isinstance(about.get("prepared"), str):
            raise CeremonyError(f"{self.folder} is no ceremony of a kind this version knows")
        self.prepared: str = about["prepared"]
        self.enacted: str | None = about.get("enacted")
        self.requests = {
            role: self._metadata(f"{role}.json", kind)
            for role, kind in _TYPES.items()
            if (self.folder / f"{role}.json").is_file()
        }
        self.trusted: Metadata[Root] | None = None
        if (self.folder / "trusted-root.json").is_file():
            self.trusted = self._metadata("trusted-root.json", Root)
        if not self.requests or (self.trusted is None and "root" not in self.requests):
            raise CeremonyError(f"{self.folder} asks for nothing: prepare the ceremony again")
        try:
            for role in self.requests:
                list(map(fingerprint, self.keys(role).values()))
        except (ValueError, KeyError) as error:
            raise CeremonyError(f"{self.folder} asks for a key that is none: {error}") from error
        self.signatures: list[HolderSignature] = []
        for path in sorted((self.folder / "signatures").glob("*.json")):
            self._accept(path)

    @classmethod
    def create(
        cls,
        folder: Path | str,
        requests: Mapping[str, Root | Targets],
        trusted: Metadata[Root] | None,
        now: datetime,
    ) -> Ceremony:
        """Write the requests into a new folder.

        Raises:
            CeremonyError: the folder holds a ceremony already, or cannot be written.
        """
        folder = Path(folder)
        if (folder / "ceremony.json").exists():
            raise CeremonyError(f"{folder} holds a ceremony already: name a new folder")
        files = {f"{role}.json": Metadata[Any](request) for role, request in requests.items()}
        if trusted is not None:
            files["trusted-root.json"] = trusted
        for name, metadata in files.items():
            write_atomically(folder / name, metadata.to_bytes(_SERIALISER))
        about = {"schema": _SCHEMA, "prepared": utc_stamp(now)}
        write_atomically(folder / "ceremony.json", json.dumps(about).encode())
        made = cls(folder)
        made.write_transcript()
        return made

    def delegators(self, role: str) -> list[Root]:
        """The roots whose keys must sign for `role`: the one in force, and the new one.

        Targets are signed by the keys of the new root where there is one.
        """
        new = self.requests["root"].signed if "root" in self.requests else None
        held = self.trusted.signed if self.trusted is not None else None
        if role == "root":
            return [root for root in (held, new) if root is not None]
        return [root for root in (new or held,) if root is not None]

    def keys(self, role: str) -> dict[str, Key]:
        """Keys that may sign the request for `role`, by id."""
        return {
            keyid: root.get_key(keyid)
            for root in self.delegators(role)
            for keyid in root.roles[role].keyids
        }

    def digest(self, role: str) -> str:
        """SHA-256 (hex) of the bytes that a signature on `role` covers."""
        return hashlib.sha256(self.requests[role].signed_bytes).hexdigest()

    def sign(self, signer: CryptoSigner, now: datetime) -> list[Path]:
        """Sign every request that the key may sign; returns the files to send back.

        Raises:
            CeremonyError: none asks for this key.
        """
        roles = [role for role in self.requests if signer.public_key.keyid in self.keys(role)]
        if not roles:
            asked = sorted(
                {holder_of(k) for role in self.requests for k in self.keys(role).values()}
            )
            raise CeremonyError(
                f"nothing here is to be signed by key {signer.public_key.keyid[:12]}; it asks for "
                f"{', '.join(asked)}"
            )
        written = []
        for role in roles:
            request = self.requests[role]
            version = request.signed.version
            made = sign_request(signer, role, version, request.signed_bytes, self.digest(role), now)
            written.append(self._keep(made))
        self.write_transcript()
        return written

    def merge(self, paths: Iterable[Path]) -> list[HolderSignature]:
        """Take over signature files that holders sent back.

        Raises:
            CeremonyError: names the first file that is no valid signature on these requests. The
                files before it were taken over.
        """
        merged = []
        for path in paths:
            made = self._accept(path)
            self._keep(made)
            merged.append(made)
        self.write_transcript()
        return merged

    def tallies(self) -> list[Tally]:
        """Signatures given so far, per request and root whose keys must sign."""
        signed = self._signed()
        return [
            tally(root, role, metadata)
            for role, metadata in signed.items()
            for root in self.delegators(role)
        ]

    def complete(self) -> dict[str, Metadata[Any]]:
        """The requests with their signatures.

        Raises:
            ThresholdNotMet: too few holders have signed; names them and the others.
        """
        require_signed(self.tallies())
        return self._signed()

    def mark_enacted(self, now: datetime) -> None:
        """Note in the transcript that the repository has taken this over."""
        self.enacted = self.enacted or utc_stamp(now)
        about = {"schema": _SCHEMA, "prepared": self.prepared, "enacted": self.enacted}
        write_atomically(self.folder / "ceremony.json", json.dumps(about).encode())
        self.write_transcript()

    def write_transcript(self) -> Path:
        """Write ``transcript.txt`` from what lies in the folder."""
        path = self.folder / "transcript.txt"
        write_atomically(path, transcript(self).encode())
        return path

    def _signed(self) -> dict[str, Metadata[Any]]:
        made = {role: Metadata(request.signed) for role, request in self.requests.items()}
        for given in sorted(self.signatures, key=lambda s: s.keyid):
            made[given.role].signatures[given.keyid] = Signature(given.keyid, given.sig)
        return made

    def _keep(self, made: HolderSignature) -> Path:
        path = self.folder / "signatures" / made.file_name
        write_atomically(path, made.to_bytes())
        others = [s for s in self.signatures if (s.role, s.keyid) != (made.role, made.keyid)]
        self.signatures = [*others, made]
        return path

    def _accept(self, path: Path) -> HolderSignature:
        try:
            with open(path, "rb") as file:
                made = HolderSignature.from_bytes(file.read(1 << 16))
            self._verify(made)
        except CeremonyError as error:
            raise CeremonyError(f"{path}: {error}") from error
        except OSError as error:
            raise CeremonyError(f"cannot read {path}: {error.strerror or error}") from error
        if made not in self.signatures:
            self.signatures.append(made)
        return made

    def _verify(self, made: HolderSignature) -> None:
        request = self.requests.get(made.role)
        if request is None or request.signed.version != made.version:
            raise CeremonyError(
                f"signs {made.role} {made.version}, which this ceremony does not ask for"
            )
        if made.sha256 != self.digest(made.role):
            raise CeremonyError(
                f"signs another {made.role} {made.version} (SHA-256 {made.sha256[:16]}…, here "
                f"{self.digest(made.role)[:16]}…): its holder has another copy of this ceremony"
            )
        key = self.keys(made.role).get(made.keyid)
        if key is None:
            raise CeremonyError(f"key {made.keyid[:12]} has no say in {made.role} {made.version}")
        made.verify(key, request.signed_bytes)

    def _metadata(self, name: str, kind: type[Any]) -> Metadata[Any]:
        try:
            metadata: Metadata[Any] = Metadata.from_bytes((self.folder / name).read_bytes())
        except (OSError, tuf_errors.RepositoryError, ValueError, KeyError) as error:
            raise CeremonyError(f"{self.folder / name} is not readable: {error}") from error
        if not isinstance(metadata.signed, kind):
            raise CeremonyError(f"{self.folder / name} holds {metadata.signed.type}")
        return metadata


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

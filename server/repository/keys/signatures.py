"""One holder's signature on one request of a ceremony, as a file that can be mailed.

Beside the signature that becomes part of the metadata it carries a second one, over a statement of
what was signed and when, so that nobody who handles the file can change the time in the transcript.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from securesystemslib.exceptions import UnverifiedSignatureError
from securesystemslib.signer import CryptoSigner, Key, Signature

from prunecast.server.repository.errors import CeremonyError

__all__ = ["HolderSignature", "sign_request", "utc_stamp"]

_SCHEMA = 1
_MOST = 16_384  # bytes
_STAMP = "%Y-%m-%dT%H:%M:%SZ"
_DOMAIN = b"prunecast ceremony 1\n"  # no TUF metadata begins like this


@dataclass(frozen=True)
class HolderSignature:
    """A signature and when it was given.

    Attributes:
        role: ``root`` or ``targets``.
        version: of the metadata.
        sha256: digest (hex) of the bytes that were signed.
        keyid: of the key.
        sig: over the metadata, hex.
        at: UTC, ISO 8601, by the holder's clock.
        statement: over role, version, sha256 and at, hex.
    """

    role: str
    version: int
    sha256: str
    keyid: str
    sig: str
    at: str
    statement: str

    @property
    def file_name(self) -> str:
        """Name of its file."""
        return f"{self.role}-{self.version}-{self.keyid[:16]}.json"

    def to_bytes(self) -> bytes:
        """As JSON."""
        return (json.dumps({"schema": _SCHEMA, **asdict(self)}, indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> HolderSignature:
        """Read what `to_bytes` wrote; nothing is verified yet.

        Raises:
            CeremonyError: not such a file.
        """
        try:
            if len(data) > _MOST:
                raise ValueError("too long")
            document: dict[str, Any] = json.loads(data)
            if document.pop("schema") != _SCHEMA:
                raise ValueError("another schema")
            made = cls(**document)
            texts = (made.role, made.sha256, made.keyid, made.sig, made.at, made.statement)
            if not all(isinstance(text, str) for text in texts) or type(made.version) is not int:
                raise ValueError("a field of another type")
            bytes.fromhex(made.keyid), bytes.fromhex(made.sig), bytes.fromhex(made.statement)
            if len(made.keyid) != 64 or made.role not in ("root", "targets"):
                raise ValueError("an unusable key id or role")
            datetime.strptime(made.at, _STAMP)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CeremonyError(
                "not a signature file: `prunecast release keys sign` writes them"
            ) from error
        return made

    def verify(self, key: Key, payload: bytes) -> None:
        """Check both signatures.

        Args:
            key: with this signature's `keyid`.
            payload: the bytes of the metadata.

        Raises:
            CeremonyError: either was made with another key, or over something else.
        """
        try:
            key.verify_signature(Signature(self.keyid, self.sig), payload)
            said = _statement(self.role, self.version, self.sha256, self.at)
            key.verify_signature(Signature(self.keyid, self.statement), said)
        except UnverifiedSignatureError as error:
            raise CeremonyError(
                f"the signature on {self.role} {self.version} by key {self.keyid[:12]} is not "
                "valid: its holder must sign again"
            ) from error


def sign_request(
    signer: CryptoSigner, role: str, version: int, payload: bytes, sha256: str, now: datetime
) -> HolderSignature:
    """Sign `payload`, the bytes of a request, and the statement about it."""
    at = utc_stamp(now)
    sig = signer.sign(payload)
    statement = signer.sign(_statement(role, version, sha256, at))
    return HolderSignature(role, version, sha256, sig.keyid, sig.signature, at, statement.signature)


def _statement(role: str, version: int, sha256: str, at: str) -> bytes:
    fields = {"role": role, "version": version, "sha256": sha256, "at": at}
    return _DOMAIN + json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()


def utc_stamp(when: datetime) -> str:
    """A time in UTC, ISO 8601, in whole seconds."""
    return when.astimezone(UTC).strftime(_STAMP)

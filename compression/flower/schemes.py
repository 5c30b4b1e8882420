"""Updates that travel by a scheme of the literature: what `SchemeGrid` and `scheme_mod` agree on.

Server to node: which scheme, its options, the key of everything random, and the last reply that
was accepted (so that the node commits the state that belongs to it). Node to server: which scheme
it used. Both are one field of compact JSON in a config record of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Array, ArrayRecord

from prunecast.compression.flower.records import NUMPY, payload_of, payload_record
from prunecast.compression.schemes import Option
from prunecast.compression.versions import BadPayload

__all__ = [
    "SCHEME_RECORD",
    "SchemeInstruction",
    "SchemeReport",
    "coded_record",
    "float_names",
    "open_coded",
]

SCHEME_RECORD = "prunecast-scheme"
"""Key of the config record that carries a `SchemeInstruction` or a `SchemeReport`."""
_PAYLOAD = "prunecast"
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class SchemeInstruction:
    """Server to node.

    Attributes:
        name: of the scheme.
        config: its options.
        key: decides what is random in the reply; another one in every message.
        accepted: `reply_tag` of the node's last reply the server accepted; "" for none.
    """

    name: str
    config: Mapping[str, Option] = field(default_factory=dict)
    key: int = 0
    accepted: str = ""

    def to_bytes(self) -> bytes:
        """Compact JSON."""
        return _dump({"s": self.name, "c": dict(self.config), "k": self.key, "a": self.accepted})

    @classmethod
    def from_bytes(cls, data: object) -> SchemeInstruction:
        """Parse and check.

        Raises:
            BadPayload: not an instruction.
        """
        match _load(data):
            case {"s": str() as name, "c": dict() as config, "k": int() as key, "a": str() as tag}:
                return cls(name, config, key, tag)
        raise BadPayload("scheme record from the server is not understood: versions differ?")


@dataclass(frozen=True)
class SchemeReport:
    """Node to server.

    Attributes:
        name: of the scheme that the reply's records are coded with.
        encode_ms: milliseconds the node spent on it, 0 to 10**6; carried with a fixed width, so
            that timing never changes the number of bytes.
    """

    name: str
    encode_ms: float = 0.0

    def to_bytes(self) -> bytes:
        """Compact JSON."""
        micros = f"{min(round(self.encode_ms * 1e3), 999_999_999):09d}"
        return _dump({"s": self.name, "t": micros})

    @classmethod
    def from_bytes(cls, data: object) -> SchemeReport:
        """Parse and check.

        Raises:
            BadPayload: not a report.
        """
        match _load(data):
            case {"s": str() as name, "t": str() as micros} if (
                len(micros) == 9 and micros.isascii() and micros.isdigit()
            ):
                return cls(name, int(micros) / 1e3)
        raise BadPayload("scheme record from the node is not understood: versions differ?")


def float_names(record: ArrayRecord) -> list[str]:
    """Names of the arrays that a scheme can code: NumPy's floating point, float16 to float64."""
    return [
        name
        for name, array in record.items()
        if array.stype == NUMPY and array.dtype in ("float16", "float32", "float64")
    ]


def coded_record(payload: bytes, exact: Mapping[str, Array]) -> ArrayRecord:
    """A record of one scheme payload and, as they are, the arrays that no scheme codes.

    Flower refuses to read the payload's serialisation type, so a server that does not know it
    fails instead of aggregating something else.
    """
    record = payload_record(payload)
    for name, array in exact.items():
        record[f"={name}"] = array
    return record


def open_coded(record: ArrayRecord) -> tuple[bytes, dict[str, Array]] | None:
    """Inverse of `coded_record`; None for any other record."""
    names = list(record)
    if not names or names[0] != _PAYLOAD or any(name[:1] != "=" for name in names[1:]):
        return None
    payload = payload_of(ArrayRecord({_PAYLOAD: record[_PAYLOAD]}))
    if payload is None:
        return None
    return payload, {name[1:]: record[name] for name in names[1:]}


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _load(data: object) -> object:
    if not isinstance(data, bytes) or len(data) > _MAX_BYTES:
        raise BadPayload("scheme record carries no text, or too much of it")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadPayload(f"scheme record is not JSON: {error}") from error

"""The small control record that accompanies every message between grid and mod.

Server to node: the replies that were accepted or given up (so that the node knows what became of
the residuals they took along), and how arrays are to come back: as updates on a version, by a
scheme of the literature, or as they are. Node to server: which version it holds of each record's
stream, and which records it cannot decode because the base is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prunecast.compression.versions.errors import BadPayload
from prunecast.compression.versions.frame import SHORT_DIGEST

__all__ = ["Instruction", "NodeReport", "SchemeRule", "UpdateRule", "reply_tag"]

_MAX_BYTES = 1 << 20
_LONGEST = 300  # characters of a node's trouble
_TAG = 16  # characters of a reply's tag
_HEX = frozenset("0123456789abcdef")
_DIGITS = 20  # of the largest integer of 64 bits


@dataclass(frozen=True)
class UpdateRule:
    """How a node quantises its update.

    Attributes:
        step: quantisation step in standard deviations of the tensor's update; 0.0 sends the
            trained arrays exactly.
        dead_zone: fraction of a step below which a change rounds to zero, 0.5 to 1.
        error_feedback: keep what quantisation dropped and add it to the next update
            (Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", algorithm 1).
    """

    step: float
    dead_zone: float = 0.5
    error_feedback: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step) and self.step >= 0):
            raise BadPayload(f"update step {self.step!r} is not a non-negative number")
        if not 0.5 <= self.dead_zone <= 1:
            raise BadPayload(f"dead zone {self.dead_zone!r} is outside 0.5..1")


@dataclass(frozen=True)
class SchemeRule:
    """How a node codes its update by a scheme, see `prunecast.compression.schemes`.

    Attributes:
        name: of the scheme.
        options: of the scheme.
        key: decides what is random in the reply; another one in every message.
    """

    name: str
    options: Mapping[str, int | float | str | bool] = field(default_factory=dict)
    key: int = 0


@dataclass(frozen=True)
class Instruction:
    """Server to node.

    Attributes:
        rule: how arrays come back; None for as they are.
        accepted: `reply_tag` of the node's replies that the server accepted, as far as the node
            has not said that it knows.
        given_up: likewise of those it will not accept any more: refused, or not waited for.
        reuse: record key to short digest of the version to use, where the node holds it already.
        statistics: names of the statistics that the node may contribute to pruning.
    """

    rule: UpdateRule | SchemeRule | None
    accepted: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()
    reuse: Mapping[str, bytes] = field(default_factory=dict)
    statistics: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """Compact JSON."""
        rule: list[object] = []
        if isinstance(self.rule, UpdateRule):
            rule = [self.rule.step, self.rule.dead_zone, int(self.rule.error_feedback)]
        elif self.rule is not None:
            rule = [self.rule.name, dict(self.rule.options), self.rule.key]
        reuse = {key: digest.hex() for key, digest in self.reuse.items()}
        asked = {"s": list(self.statistics)} if self.statistics else {}
        lost = {"x": "".join(self.given_up)} if self.given_up else {}
        return _dump({"r": rule, "a": "".join(self.accepted), "u": reuse, **asked, **lost})

    @classmethod
    def from_bytes(cls, data: object) -> Instruction:
        """Parse and check.

        Raises:
            BadPayload: not an instruction.
        """
        match _load(data):
            case {"r": list() as rule, "a": str() as accepted, "u": dict() as reuse, **rest} if (
                isinstance(asked := rest.get("s", []), list)
                and all(isinstance(name, str) for name in asked)
            ):
                held = {str(k): _digest(v) for k, v in reuse.items()}
                tags = _tags(accepted), _tags(rest.get("x", ""))
                return cls(_rule(rule), *tags, held, tuple(asked))
        raise BadPayload("control record from the server is not understood: versions differ?")


@dataclass(frozen=True)
class NodeReport:
    """Node to server.

    Attributes:
        held: record key to short digest of the version the node holds after this message.
        missing: record keys whose payload could not be decoded because the base is missing.
        encode_ms: milliseconds the node spent encoding its reply, 0 to 10**6; carried with a
            fixed width, so that timing never changes the number of bytes.
        trouble: why the node could not keep on disk what it should, 300 characters at most; ""
            when it could. It then holds what it held before.
    """

    held: Mapping[str, bytes] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    encode_ms: float = 0.0
    trouble: str = ""

    def to_bytes(self) -> bytes:
        """Compact JSON."""
        micros = f"{min(round(self.encode_ms * 1e3), 999_999_999):09d}"
        held = {key: digest.hex() for key, digest in self.held.items()}
        trouble = {"e": self.trouble[:_LONGEST]} if self.trouble else {}
        return _dump({"h": held, "m": list(self.missing), "t": micros, **trouble})

    @classmethod
    def from_bytes(cls, data: object) -> NodeReport:
        """Parse and check.

        Raises:
            BadPayload: not a report.
        """
        match _load(data):
            case {"h": dict() as held, "m": list() as missing, "t": str() as micros, **rest} if (
                all(isinstance(k, str) for k in missing)
                and isinstance(trouble := rest.get("e", ""), str)
                and len(micros) == 9
                and micros.isascii()
                and micros.isdigit()
            ):
                digests = {str(k): _digest(v) for k, v in held.items()}
                return cls(digests, tuple(missing), int(micros) / 1e3, trouble[:_LONGEST])
        raise BadPayload("control record from the node is not understood: versions differ?")


def reply_tag(message_id: str) -> str:
    """Short name of the reply to a message, the same on both sides; 16 characters."""
    return hashlib.sha256(message_id.encode()).hexdigest()[:_TAG]


def _tags(text: object) -> tuple[str, ...]:
    if not isinstance(text, str) or len(text) % _TAG or not _HEX.issuperset(text):
        raise BadPayload("control record names a reply by something that is no tag")
    return tuple(text[at : at + _TAG] for at in range(0, len(text), _TAG))


def _rule(value: list[object]) -> UpdateRule | SchemeRule | None:
    match value:
        case []:
            return None
        case [int() | float() as step, int() | float() as zone, 0 | 1 as feedback]:
            return UpdateRule(float(step), float(zone), bool(feedback))
        case [str() as name, dict() as options, int() as key]:
            return SchemeRule(name, options, key)
    raise BadPayload(
        "control record from the server asks for updates in an unknown way: update "
        "Prunecast on this side"
    )


def _digest(value: object) -> bytes:
    try:
        raw = bytes.fromhex(value) if isinstance(value, str) else b""
    except ValueError:
        raw = b""
    if len(raw) != SHORT_DIGEST:
        raise BadPayload("control record names a version by something that is no digest")
    return raw


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _load(data: object) -> object:
    if not isinstance(data, bytes) or len(data) > _MAX_BYTES:
        raise BadPayload(f"control record carries no text, or more than {_MAX_BYTES} bytes of it")
    try:
        return json.loads(data, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise BadPayload(f"control record is not JSON: {error}") from error


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:  # no float and no key can be made of it
        raise ValueError("it has an integer of more than 64 bits")
    return int(digits)

"""The small control record that accompanies every message between grid and mod.

Server to node: the replies that were accepted or given up (so that the node knows what became of
the residuals they took along), and how arrays are to come back: as updates on a version, by a
scheme of the literature, or as they are. Node to server: which version it holds of each record's
stream, and which records it cannot decode because the base is missing.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from prunecast.compression.versions.capabilities import Capabilities
from prunecast.compression.versions.errors import BadPayload
from prunecast.compression.versions.fields import FieldReader, FieldWriter
from prunecast.compression.versions.statistics import MOST_STATISTICS_BITS

__all__ = [
    "INSTRUCTION_FORMAT",
    "TAG_BYTES",
    "Instruction",
    "NodeReport",
    "SchemeRule",
    "UpdateRule",
    "is_large",
]

_MAX_BYTES = 1 << 20
_LONGEST = 300  # characters of a node's trouble
_LONGEST_NAME = 64  # characters of the name of a class
TAG_BYTES = 4
"""Of a reply's tag, which is written in hexadecimal digits elsewhere."""
_NO_TAG = "00" * TAG_BYTES
INSTRUCTION_FORMAT = 1
"""First byte of an instruction; a node says which it understands, see `Capabilities`."""
_REPORT_FORMAT = 1  # first byte of a report, which every later server reads
_AS_THEY_ARE, _UPDATE, _UPDATE_FED_BACK, _SCHEME = range(4)
# added to these: a job is named, freshness is, it is the last round, the node is to say what it can
# do, and is to keep no version, and nothing that its updates drop
_OF_JOB, _FRESH, _LAST, _ASKS, _NO_VERSION, _NO_RESIDUAL = 4, 8, 16, 32, 64, 128
_ADDED = 252  # all of them
_AS_SENT, _HELD, _MISSING, _TROUBLE, _WIDTH, _UNSETTLED, _STALE = 1, 2, 4, 8, 16, 32, 64
_ABLE, _COARSER = 128, 256
_SPARING = 256  # likewise: the rule of an update ends in a norm and a number of bytes
_MOST_MICROSECONDS = (1 << 32) - 1


_LARGE = 1 << 16


def is_large(weights: int, of: int) -> bool:
    """Whether a tensor has so many weights that few of them matter, and it is coarsely coded.

    From 65,536 weights; from 32,768 in a model of 131,072 or more, which has others.

    Args:
        weights: of the tensor.
        of: weights of the whole model.
    """
    return weights >= (_LARGE // 2 if of >= 2 * _LARGE else _LARGE)


@dataclass(frozen=True)
class UpdateRule:
    """How a node quantises its update.

    Attributes:
        step: quantisation step in standard deviations of the tensor's update; 0.0 sends the
            trained arrays exactly.
        dead_zone: fraction of a step below which a change rounds to zero, 0.5 to 1.
        error_feedback: keep what quantisation dropped and add it to the next update
            (Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", algorithm 1).
        floor: the step is at least so many steps of the lattice that the tensor was published on:
            what the next version could not show is left to error feedback. Half of that for tensors
            that are not large (`is_large`); none without error feedback.
        statistics_bits: mantissa bits, 0 to 23, that running statistics of normalisation layers
            (see `is_statistic`) are rounded to, where there is a step and error feedback; 0 for
            exact.
        lazy: a reply whose change, with the residual, has a smaller norm than this is not sent
            but kept as residual; 0 for none (Chen et al. 2018, "LAG", equation 7b).
        most: bytes that the payloads of a reply may have together: steps and floor grow until they
            fit, as far as they can; 0 for no bound.
    """

    step: float
    dead_zone: float = 0.5
    error_feedback: bool = True
    floor: float = 0.0
    statistics_bits: int = 0
    lazy: float = 0.0
    most: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.step) and self.step >= 0):
            raise BadPayload(f"update step {self.step!r} is not a non-negative number")
        if not (math.isfinite(self.floor) and self.floor >= 0):
            raise BadPayload(f"update floor {self.floor!r} is not a non-negative number")
        if not 0.5 <= self.dead_zone <= 1:
            raise BadPayload(f"dead zone {self.dead_zone!r} is outside 0.5..1")
        if not 0 <= self.statistics_bits <= MOST_STATISTICS_BITS:
            raise BadPayload(
                f"statistics of {self.statistics_bits!r} bits are outside 0..{MOST_STATISTICS_BITS}"
            )
        if not (math.isfinite(self.lazy) and self.lazy >= 0):
            raise BadPayload(f"norm {self.lazy!r} below which nothing is sent is no norm")
        if self.lazy and not self.error_feedback:
            raise BadPayload("what is not sent would be lost without error feedback")

    def in_model(self, weights: int) -> UpdateRule:
        """The rule for a model of so many weights: in a small one, each of them matters more.

        Below 65,536 its steps are four fifths, its dead zone reaches half as far beyond rounding,
        and its floor is a quarter. Without error feedback the rule is as it says.
        """
        if weights >= _LARGE or not self.error_feedback:
            return self
        zone = 0.5 + (self.dead_zone - 0.5) / 2
        return replace(self, step=0.8 * self.step, dead_zone=zone, floor=self.floor / 4)

    def least_step(self, step: float, *, large: bool) -> float:
        """The floor of a tensor's step.

        Args:
            step: of the lattice that it was published on.
            large: see `is_large`.
        """
        return self.floor * step * (1 if large else 0.5)


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
        accepted: tags of the node's replies that the server accepted, as far as the node has not
            said that it knows.
        given_up: likewise of those it will not accept any more: refused, or not waited for.
        reuse: record key to short digest of the version to use, where the node holds it already.
        statistics: names of the statistics that the node may contribute to pruning.
        tag: what server and node call the reply, where there is a rule; the same on all nodes
            that are told the same, another for each message to a node.
        channels: record key to the plan of which channels remain, as it is coded, where the node
            does not know it.
        job: whose streams and store the message is of; "" for those of its Flower run.
        attempt: how often the job was resumed before this message; replies to what was sent before
            the last time are given up, unless `accepted` names them.
        fresh_seconds: after the message's `created_at`, by the node's clock, for how long the reply
            is wanted; 0 where that is not said.
        last: whether it is of the job's last round, as far as the server knows: what the node keeps
            may go when room is needed, and with the beginning of another job.
        asks: whether the node is to say what it can do.
        keeps_version: whether it keeps the versions that it is sent for later deltas.
        keeps_residual: whether it keeps what its updates drop for the next one.
    """

    rule: UpdateRule | SchemeRule | None
    accepted: tuple[str, ...] = ()
    given_up: tuple[str, ...] = ()
    reuse: Mapping[str, bytes] = field(default_factory=dict)
    statistics: tuple[str, ...] = ()
    tag: str = _NO_TAG
    channels: Mapping[str, bytes] = field(default_factory=dict)
    job: str = ""
    attempt: int = 0
    fresh_seconds: int = 0
    last: bool = False
    asks: bool = False
    keeps_version: bool = True
    keeps_residual: bool = True

    def to_bytes(self) -> bytes:
        """As docs/payloads.md has it."""
        out = FieldWriter(bytes([INSTRUCTION_FORMAT]))
        match self.rule:
            case None:
                self._begin(out, _AS_THEY_ARE)
            case UpdateRule(step, zone, feedback, floor, bits, lazy, most):
                sparing = _SPARING if lazy or most else 0
                self._begin(out, (_UPDATE_FED_BACK if feedback else _UPDATE) | sparing)
                for value in (step, zone, floor):
                    out.real(value)
                out.number(bits)
                if sparing:
                    out.real(lazy)
                    out.number(most)
            case SchemeRule(name, options, key):
                self._begin(out, _SCHEME)
                out.text(name)
                out.text(json.dumps(dict(options), separators=(",", ":")))
                out.number(key)
        if self.rule is not None:
            out.raw(bytes.fromhex(self.tag))
        if self.fresh_seconds:
            out.number(self.fresh_seconds)
        for tags in (self.accepted, self.given_up):
            out.number(len(tags))
            for tag in tags:
                out.raw(bytes.fromhex(tag))
        out.digests(self.reuse)
        out.texts(self.statistics)
        for record, plan in self.channels.items():  # as many as there are
            out.text(record)
            out.part(plan)
        return bytes(out.data)

    def _begin(self, out: FieldWriter, kind: int) -> None:
        kind |= _LAST * self.last | _FRESH * bool(self.fresh_seconds) | _ASKS * self.asks
        kind |= _NO_VERSION * (not self.keeps_version) | _NO_RESIDUAL * (not self.keeps_residual)
        if not self.job:
            out.number(kind)
            return
        out.number(kind | _OF_JOB)
        out.text(self.job)
        out.number(self.attempt)

    @classmethod
    def from_bytes(cls, data: object) -> Instruction:
        """Parse and check.

        Raises:
            BadPayload: not an instruction.
        """
        found = _read(data, "the server", INSTRUCTION_FORMAT)
        kind, job, attempt = found.number(), "", 0
        if kind & _OF_JOB:
            job, attempt = found.text(), found.number()
        rule = _rule(found, kind & ~_ADDED)
        tag = _NO_TAG if rule is None else found.raw(TAG_BYTES).hex()
        fresh_seconds = found.number() if kind & _FRESH else 0
        accepted, given_up = (
            tuple(found.raw(TAG_BYTES).hex() for _ in range(found.count())) for _ in range(2)
        )
        reuse, statistics = found.digests(), found.texts()
        channels: dict[str, bytes] = {}
        while found.left:
            key = found.text()
            channels[key] = found.part()
        return cls(
            *(rule, accepted, given_up, reuse, statistics, tag, channels, job, attempt),
            fresh_seconds=fresh_seconds,
            last=bool(kind & _LAST),
            asks=bool(kind & _ASKS),
            keeps_version=not kind & _NO_VERSION,
            keeps_residual=not kind & _NO_RESIDUAL,
        )


@dataclass(frozen=True)
class NodeReport:
    """Node to server.

    Attributes:
        held: record key to short digest of the version the node holds after this message.
        as_sent: whether it holds, of every record that came as a version, just that one.
        missing: record keys whose payload could not be decoded because the base is missing.
        encode_ms: milliseconds the node spent encoding its reply, carried with a
            fixed width, so that timing never changes the number of bytes.
        trouble: why the node could not keep on disk what it should, 300 characters at most; ""
            when it could. It then holds what it held before.
        width: the class of nodes that it belongs to, by which the server decides how wide a part of
            the model it trains, 64 characters at most; "" for none.
        unsettled: whether it could not write what it was told of earlier replies, and has to be
            told again.
        stale: whether it did not train, as the reply was not wanted any more when it could have.
        able: what it says of itself, where it was asked or does not understand the server.
        coarser: by how many quarters of a doubling the steps of its reply are coarser than the
            rule says, so that the bytes that it may have suffice; 0 to 255.
    """

    held: Mapping[str, bytes] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    encode_ms: float = 0.0
    trouble: str = ""
    as_sent: bool = False
    width: str = ""
    unsettled: bool = False
    stale: bool = False
    able: Capabilities | None = None
    coarser: int = 0

    def to_bytes(self) -> bytes:
        """As docs/payloads.md has it."""
        out = FieldWriter(bytes([_REPORT_FORMAT]))
        out.raw(struct.pack("<I", min(round(self.encode_ms * 1e3), _MOST_MICROSECONDS)))
        out.number(
            _AS_SENT * self.as_sent
            | _HELD * bool(self.held)
            | _MISSING * bool(self.missing)
            | _TROUBLE * bool(self.trouble)
            | _WIDTH * bool(self.width)
            | _UNSETTLED * self.unsettled
            | _STALE * self.stale
            | _ABLE * (self.able is not None)
            | _COARSER * bool(self.coarser)
        )
        if self.held:
            out.digests(self.held)
        if self.missing:
            out.texts(self.missing)
        if self.trouble:
            # names of files may be no text
            out.part(self.trouble[:_LONGEST].encode("utf-8", "replace"))
        if self.width:
            out.text(self.width[:_LONGEST_NAME])
        if self.able is not None:
            out.part(self.able.to_bytes())
        if self.coarser:
            out.raw(bytes([self.coarser]))
        return bytes(out.data)

    @classmethod
    def from_bytes(cls, data: object) -> NodeReport:
        """Parse and check.

        Raises:
            BadPayload: not a report.
        """
        found = _read(data, "the node", _REPORT_FORMAT)
        (micros,) = struct.unpack("<I", found.raw(4))
        says = found.number()
        held = found.digests() if says & _HELD else {}
        missing = found.texts() if says & _MISSING else ()
        trouble = found.text() if says & _TROUBLE else ""
        width = found.text()[:_LONGEST_NAME] if says & _WIDTH else ""
        able = Capabilities.from_bytes(found.part()) if says & _ABLE else None
        (coarser,) = found.raw(1) if says & _COARSER else (0,)
        found.end()
        said = (bool(says & flag) for flag in (_AS_SENT, _UNSETTLED, _STALE))
        as_sent, unsettled, stale = said
        told = as_sent, width, unsettled, stale, able, coarser
        return cls(held, missing, micros / 1e3, trouble[:_LONGEST], *told)


def _rule(found: FieldReader, kind: int) -> UpdateRule | SchemeRule | None:
    sparing = kind in (_UPDATE | _SPARING, _UPDATE_FED_BACK | _SPARING)
    kind &= ~_SPARING if sparing else -1
    match kind:
        case 0:
            return None
        case 1 | 2:
            step, zone, floor = (found.real() for _ in range(3))
            bits = found.number()
            lazy, most = (found.real(), found.number()) if sparing else (0.0, 0)
            return UpdateRule(step, zone, kind == _UPDATE_FED_BACK, floor, bits, lazy, most)
        case 3:
            name, options, key = found.text(), _options(found.text()), found.number()
            return SchemeRule(name, options, key)
    raise BadPayload(
        "control record from the server asks for updates in an unknown way: update "
        "Prunecast on this side"
    )


def _options(text: str) -> dict[str, int | float | str | bool]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise _strange("the server", "options of a scheme are none")
    return found


def _read(data: object, sender: str, form: int) -> FieldReader:
    if not isinstance(data, bytes) or not 0 < len(data) <= _MAX_BYTES:
        raise BadPayload(f"control record carries nothing, or more than {_MAX_BYTES} bytes")
    if data[0] != form:
        raise _strange(sender, "its format is another")
    return FieldReader(data[1:], partial(_strange, sender))


def _strange(sender: str, why: str) -> BadPayload:
    return BadPayload(f"control record from {sender} is not understood ({why}): versions differ?")

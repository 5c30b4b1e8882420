"""The head as a list of decisions: recorded while a payload is read, and played again changed.

A changed byte of the adaptive section changes everything after it. Here the decoder itself is
the parser: :class:`Recorder` notes each value it asks for, and :class:`Script` answers it from
such notes, writing every answer with the real encoder. The head that comes out of a changed
script is one that the decoder reads as meant, up to the change and beyond it.
"""

from __future__ import annotations

import random
from collections import defaultdict, deque
from collections.abc import Iterable
from typing import Any, NamedTuple
from unittest import mock

from prunecast.compression.codec import CodecError, Context, Limits, open_payload, payload
from prunecast.compression.codec.entropy.adaptive import AdaptiveDecoder, AdaptiveEncoder
from prunecast.compression.codec.errors import MalformedPayload

__all__ = ["Op", "Recorder", "Script", "play", "record"]

_MOST = 4000
"""Decisions of one script; what asks for more is cut off there."""


class Op(NamedTuple):
    """One answer of the coder.

    Attributes:
        kind: ``bit`` (a decision), ``uint`` (an integer) or ``bits`` (plain bits).
        context: the decision's context, the integer's first, or the number of plain bits.
        value: what was answered.
    """

    kind: str
    context: int
    value: int


class Recorder(AdaptiveDecoder):
    """A decoder that notes what it was asked and what it answered."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.ops: list[Op] = []
        self._inside = False

    def bit(self, i: int) -> int:
        """Note a decision, unless it is part of an integer."""
        value = super().bit(i)
        if not self._inside:
            self.ops.append(Op("bit", i, value))
        return value

    def bits(self, count: int) -> int:
        """Note plain bits, unless they are part of an integer."""
        value = super().bits(count)
        if not self._inside:
            self.ops.append(Op("bits", count, value))
        return value

    def uint(self, first: int) -> int:
        """Note an integer."""
        self._inside = True
        try:
            value = super().uint(first)
        finally:
            self._inside = False
        self.ops.append(Op("uint", first, value))
        return value

    def levels(self, models: list[int], middle: int, most: int, count: int) -> bytes:
        """Read levels one by one, so that each is noted."""
        return _levels(self, models, middle, most, count)


class Script:
    """Answers from notes, per context in their order, and writes the answers down."""

    def __init__(self, ops: Iterable[Op], rng: random.Random) -> None:
        self.encoder = AdaptiveEncoder()
        self._queues: dict[tuple[str, int], deque[int]] = defaultdict(deque)
        for kind, context, value in ops:
            self._queues[kind, context].append(value)
        self._rng, self._left = rng, _MOST

    def _next(self, kind: str, context: int) -> int:
        self._left -= 1
        if self._left < 0:
            raise MalformedPayload("the script ends")
        queue = self._queues[kind, context]
        if queue:
            return queue.popleft()
        if kind == "uint":
            return self._rng.choice((0, 0, 0, 1, 1, 2, 5))
        return 1 << 16 if kind == "bits" else self._rng.getrandbits(1)

    def contexts(self, count: int) -> int:
        """Reserve contexts in the encoder."""
        return self.encoder.contexts(count)

    def bit(self, i: int) -> int:
        """Answer a decision."""
        value = self._next("bit", i)
        self.encoder.bit(i, value)
        return value

    def bits(self, count: int) -> int:
        """Answer plain bits."""
        value = self._next("bits", count)
        self.encoder.bits(value, count)
        return value & (1 << count) - 1

    def uint(self, first: int) -> int:
        """Answer an integer."""
        value = self._next("uint", first)
        self.encoder.uint(first, value)
        return value

    def sint(self, first: int) -> int:
        """Answer a signed integer."""
        z = self.uint(first)
        return -(z + 1 >> 1) if z & 1 else z >> 1

    def levels(self, models: list[int], middle: int, most: int, count: int) -> bytes:
        """Answer levels one by one."""
        return _levels(self, models, middle, most, count)


def _levels(coder: Any, models: list[int], middle: int, most: int, count: int) -> bytes:
    out, previous = bytearray(), middle
    for _ in range(count):
        previous = middle + coder.sint(models[min(max(previous - middle, -3), 4) + 3])
        if not 0 <= previous <= most:
            raise MalformedPayload("a level is out of range")
        out.append(previous)
    return bytes(out)


def record(sealed: bytes, context: Context, limits: Limits) -> list[Op]:
    """The decisions of a payload's head, as far as it can be read."""
    made: list[Recorder] = []

    def coder(head: bytes) -> Recorder:
        made.append(Recorder(head))
        return made[0]

    _read(coder, sealed, context, limits)
    return made[0].ops if made else []


def play(
    ops: Iterable[Op], sealed: bytes, context: Context, limits: Limits, rng: random.Random
) -> bytes:
    """A head that is read as ``ops`` say; ``sealed`` gives what follows the head."""
    script = Script(ops, rng)
    _read(lambda head: script, sealed, context, limits)
    return script.encoder.finish()


def _read(coder: Any, sealed: bytes, context: Context, limits: Limits) -> None:
    # Lane segments hold no decisions: reading them would only take time.
    with (
        mock.patch.object(payload, "AdaptiveDecoder", coder),
        mock.patch.object(payload, "read_segment", _no_segment),
    ):
        try:
            opened = open_payload(sealed, context=context, limits=limits)
            for name in opened:  # serial symbols are part of the head
                opened[name]
        except CodecError:
            pass


def _no_segment(*_: Any) -> Any:
    raise MalformedPayload("segments are not read here")

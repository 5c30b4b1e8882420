"""Changes to inputs that get past the checksum: bytes, sections, decisions, whole payloads."""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable

from prunecast.compression.codec import Context
from prunecast.compression.codec.container.wire import FORMS, seal

from .grammar import ODD, generate
from .oracle import CONTEXTS, TIGHT, Mode
from .script import Op, play, record

__all__ = ["cross", "mutate", "sections"]

Bytes = Callable[[bytes, int], bytes]
"""Changes bytes blindly, to at most so many: the engine's own mutations."""


def sections(payload: bytes) -> tuple[bytes, bytes]:
    """Head and what follows it, of anything that looks like a payload."""
    at = 6
    while at < len(payload) and payload[at] & 128:
        at += 1
    at += 1
    if len(payload) > 5 and payload[5] & 7:
        at += 4
    length = shift = 0
    while at < len(payload):
        byte = payload[at]
        at += 1
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128 or shift > 63:
            break
    end = max(len(payload) - 4, at)
    return payload[at : at + length][: end - at], payload[at + length : end]


def has_forms(payload: bytes) -> bool:
    """Whether a payload's flags say that its head speaks of forms."""
    return len(payload) > 5 and bool(payload[5] & FORMS)


def mutate(data: bytes, max_size: int, seed: int, engine: Bytes) -> bytes:
    """Return a changed input of at most ``max_size`` bytes."""
    rng = random.Random(seed)
    out = _mutate(data or b"\0", max_size, rng, engine)
    return out if len(out) <= max_size else engine(data, max_size)


def _mutate(data: bytes, max_size: int, rng: random.Random, engine: Bytes) -> bytes:
    roll = rng.random()
    if roll < 0.03:
        return engine(data, max_size)
    mode, payload = Mode.of(data[0]), data[1:]
    if roll < 0.06:
        return data[:1] + _repaired(engine(payload, max_size - 1))
    if roll < 0.16:
        mode = _other_mode(mode, rng, everything=rng.random() < 0.2)
        return bytes([mode.byte]) + generate(rng, CONTEXTS[mode.context])
    head, rest = sections(payload)
    forms = has_forms(payload) ^ (rng.random() < 0.02)
    if roll < 0.20:
        mode = _other_mode(mode, rng, everything=True)
    elif roll < 0.42:
        head = engine(head or b"\0", max_size)
    elif roll < 0.58:
        rest = engine(rest or b"\0", max_size)
    elif roll < 0.62:
        whole = head + rest
        cut = min(max(len(head) + rng.choice((-9, -2, -1, 1, 2, 9)), 0), len(whole))
        head, rest = whole[:cut], whole[cut:] + bytes(rng.choice((0, 0, 1, 4)))
    else:
        context = CONTEXTS[mode.context]
        sealed = seal(context, head, rest, forms=forms)
        ops = _changed(_recorded(mode.context, head, forms), rng)
        head = play(ops, sealed, context, TIGHT, rng)
    if rng.random() < 0.2:
        mode = _other_mode(mode, rng, everything=False)
    return bytes([mode.byte]) + seal(CONTEXTS[mode.context], head, rest, forms=forms)


def cross(a: bytes, b: bytes, max_size: int, seed: int) -> bytes:
    """Return an input with parts of both."""
    rng = random.Random(seed)
    mode = Mode.of(a[0] if a else 0)
    context: Context = CONTEXTS[mode.context]
    (head, rest), (other_head, other_rest) = sections(a[1:]), sections(b[1:])
    forms = has_forms(a[1:])
    if rng.random() < 0.4:
        cut, other_cut = rng.randrange(len(head) + 1), rng.randrange(len(other_head) + 1)
        head = head[:cut] + other_head[other_cut:] if rng.random() < 0.7 else other_head
        rest = other_rest if rng.random() < 0.5 else rest
    else:
        mine = _recorded(mode.context, head, forms)
        theirs = _recorded(Mode.of(b[0] if b else 0).context, other_head, has_forms(b[1:]))
        i, j = rng.randrange(len(mine) + 1), rng.randrange(len(theirs) + 1)
        if rng.random() < 0.5:
            rest = other_rest
        sealed = seal(context, head, rest, forms=forms)
        head = play(mine[:i] + theirs[j:], sealed, context, TIGHT, rng)
    out = bytes([mode.byte]) + seal(context, head, rest, forms=forms)
    return out if len(out) <= max_size else a[:max_size]


@functools.lru_cache(maxsize=2048)
def _recorded(index: int, head: bytes, forms: bool) -> list[Op]:
    """Decisions of a head; inputs of the corpus come again and again."""
    return record(seal(CONTEXTS[index], head, b"", forms=forms), CONTEXTS[index], TIGHT)


def _other_mode(mode: Mode, rng: random.Random, *, everything: bool) -> Mode:
    context = rng.randrange(len(CONTEXTS)) if everything else mode.context
    return Mode(context, rng.random() < 0.15, rng.choice((0, 0, 0, 1, 2, 3)))


def _repaired(payload: bytes) -> bytes:
    """The same with a right total length and checksum, whatever else it holds."""
    if len(payload) < 11:
        return payload
    at = 6
    while at < len(payload) - 5 and payload[at] & 128:
        at += 1
    body = payload[at + 1 : -4]
    for width in (1, 2, 3):
        total = 6 + width + len(body) + 4
        if total < 1 << 7 * width:
            break
    length = bytes(total >> 7 * i & 127 | (128 if i + 1 < width else 0) for i in range(width))
    whole = payload[:6] + length + body
    return whole + zlib.crc32(whole).to_bytes(4, "little")


def _changed(ops: list[Op], rng: random.Random) -> list[Op]:
    """Change one to four places of a script."""
    ops = list(ops)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        # Most decisions are letters of names; integers are what the format turns on.
        integers = [i for i, op in enumerate(ops) if op.kind != "bit"]
        if not integers:
            break
        i = rng.choice(integers) if rng.random() < 0.8 else rng.randrange(len(ops))
        op, roll = ops[i], rng.random()
        some = ops[i : i + rng.choice((1, 1, 2, 8))]
        if roll < 0.08:
            del ops[i : i + len(some)]
        elif roll < 0.16:
            ops[i:i] = some
        else:
            ops[i] = op._replace(value=_other_value(op, ops[rng.choice(integers)].value, rng))
    return ops


def _other_value(op: Op, another: int, rng: random.Random) -> int:
    if op.kind == "bit":
        return 1 - op.value
    roll = rng.random()
    if roll < 0.4:
        return max(op.value + rng.choice((-2, -1, 1, 2, 4)), 0)
    if roll < 0.8:
        return rng.choice(ODD)
    return another if roll < 0.9 else rng.getrandbits(rng.randint(0, 64))

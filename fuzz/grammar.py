"""Payloads from scratch, by the grammar of docs/format.md, now and then with a rule broken.

The encoder makes only what is cheap to decode, and a changed byte of a lane segment is nearly
always refused by the final states. Here segments carry random tokens with their states and raw
bits in order, so what lies behind those checks is reached as well. All clusters of a kind get
the same table: the tokens then hold wherever a position's cluster turns out to be.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np

from prunecast.compression.codec import CodecError, Context, TensorSpec
from prunecast.compression.codec.container.wire import seal
from prunecast.compression.codec.context import DTYPE_CODES
from prunecast.compression.codec.entropy.packs import CODERS, pack
from prunecast.compression.codec.entropy.rans import RansTables
from prunecast.compression.codec.entropy.static import static_encode
from prunecast.compression.codec.entropy.streams import LaneStream, write_stream
from prunecast.compression.codec.entropy.tables import frequencies, predicted
from prunecast.compression.codec.modelling.copies import may_have_copies
from prunecast.compression.codec.modelling.fields import Field
from prunecast.compression.codec.modelling.forms import (
    PER_COLUMN,
    Equal,
    Form,
    Lattice,
    Packed,
    Palette,
    Rounded,
    all_fields,
    may_be_rounded,
    may_have_form,
)

from .writer import HeadWriter

__all__ = ["ODD", "generate"]

ODD = (
    0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 48, 63, 64, 127, 128, 254, 255, 256, 257, 511, 1023,
    2**14, 2**16 - 1, 2**16, 2**29, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**61, 2**62 - 1,
    2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**65 - 2,
)  # fmt: skip
"""Integers at which something changes."""
_NAMES = ("w", "v", "n", "u", "d", "h", "e", "b", "", "é", "\ud800", "w" * 32)
_POSITIONS = 200


class _Writer(HeadWriter):
    """Writes, rarely, something else than it is told."""

    def __init__(self, rng: random.Random, glitch: float) -> None:
        super().__init__()
        self.rng, self.glitch = rng, glitch
        self.side: list[tuple[int, int]] | None = None
        """Context and symbol of what goes to the static coder, if anything does."""
        self.references: dict[int, int] = {}
        """Identity of a field of references to rows kept: their number."""

    def uint(self, model: str, value: int) -> int:
        if self.rng.random() < self.glitch:
            value = self.rng.choice(ODD)
        return super().uint(model, value)

    def bit(self, context: str, value: bool) -> bool:
        return super().bit(context, value ^ (self.rng.random() < self.glitch / 4))


def generate(rng: random.Random, context: Context) -> bytes:
    """Return one payload for ``context``; most decode, or fail late."""
    w = _Writer(rng, rng.choice((0.0, 0.0, 0.0, 0.004, 0.02, 0.1)))
    specs = dict(context.layout) if context.layout is not None else _specs(w, context)
    kept = _copies(w, specs, context)
    formed = rng.random() < 0.4
    forms, packs = _forms(w, specs, context, kept) if formed else ({}, b"")
    fields: list[Field] = []
    try:
        for name, own in all_fields(specs, context, kept, forms).items():
            fields += own
            if name in kept:
                w.references[id(own[0])] = kept[name]
    except (CodecError, ValueError):
        fields = []
    if sum(f.size for f in fields) > 1 << 13:  # the limits' business; bodies stay small
        fields = []
    rest = _body(w, fields) + packs
    if rng.random() < w.glitch:
        rest = rest[: rng.randrange(len(rest) + 1)] + rng.randbytes(rng.randrange(3))
    return seal(context, w.coder.finish(), rest, forms=formed)


def _forms(
    w: _Writer, specs: Mapping[str, TensorSpec], context: Context, kept: Mapping[str, int]
) -> tuple[dict[str, Form], bytes]:
    """What each tensor is coded as, and the bytes of packs."""
    rng, forms = w.rng, dict[str, Form]()
    names, members = list(specs), list[list[str]]()
    for number, (name, spec) in enumerate(specs.items()):
        if may_be_rounded(name, spec, context):
            width = 8 * spec.dtype.itemsize
            zeros = w.uint("zeros", rng.choice((0, 1, width // 2, width - 1, rng.randrange(width))))
            if 0 < zeros < width:
                forms[name] = Rounded(zeros)
            continue
        if not may_have_form(name, spec, context) or name in kept:
            continue
        same = [
            i
            for i, other in enumerate(names[:number])
            if (specs[other].dtype, specs[other].size) == (spec.dtype, spec.size)
            and not isinstance(forms.get(other), Equal)
        ]
        usable = [0, 3, 4] if spec.dtype.kind != "b" else [0, 4]
        usable += [1, 1, 1] * bool(same) + [2, 2] * (spec.dtype.kind == "f")
        kind = w.uint("form", rng.choice(usable))
        if kind == 1:
            source = rng.choice(same) if same else 0
            w.uint("source", number - source - 1)
            forms[name] = Equal(names[source])
        elif kind == 2:
            axis = w.uint("axis", rng.choice((0, 1, 2)) if len(spec.shape) > 1 else 0)
            forms[name] = Lattice(min(axis, PER_COLUMN), w.bit("signed", rng.random() < 0.5))
            if not axis:
                step = np.array(rng.choice((0.1, 1.0, 1e300, 5e-324, rng.random())), ">f8")
                if rng.random() < w.glitch:
                    step = np.frombuffer(rng.randbytes(8), ">f8")[0]
                w.coder.bits(int.from_bytes(np.array(step, ">f8").tobytes(), "big"), 64)
        elif kind == 3:
            count = w.uint("colours", rng.randrange(min(spec.size, 9))) + 1
            forms[name] = Palette(min(count, 1 << 16))
        elif kind == 4:
            back = w.uint("pack", rng.randint(0, len(members)))
            if not (back and members):
                members.append([])
            at = max(len(members) - max(back, 1), 0)
            members[at].append(name)
            forms[name] = Packed(at)
    packs = b""
    for held in members:
        coder = w.uint("axis", rng.randrange(len(CODERS)))
        w.bit("shuffled", rng.random() < 0.5)
        size = sum(specs[name].nbytes for name in held)
        size += rng.choice((-1, 1)) * (rng.random() < w.glitch)
        values = np.frombuffer(bytes([rng.randrange(2)]) * max(min(size, 1 << 13), 1), np.uint8)
        data = pack([values], min(coder, len(CODERS) - 1), shuffle=False)
        if rng.random() < w.glitch:
            data = data[: rng.randrange(len(data) + 1)] + rng.randbytes(rng.randrange(3))
        w.uint("pack bytes", len(data))
        packs += data
    return forms, packs


def _specs(w: _Writer, context: Context) -> dict[str, TensorSpec]:
    rng = w.rng
    known: dict[str, tuple[int, ...]] = {}
    for part in (context.mask, context.previous):
        known |= {name: array.shape for name, array in (part or {}).items()}
    specs: dict[str, TensorSpec] = {}
    names = rng.sample(_NAMES, rng.choice((0, 1, 1, 1, 2, 3, 5)))
    if known:
        names = [rng.choice(list(known)) if rng.random() < 0.8 else name for name in names]
    if rng.random() < 0.97:
        names = list(dict.fromkeys(names))
    w.uint("count", len(names))
    for name in names:
        shape = known[name] if name in known and rng.random() < 0.95 else _shape(rng)
        code = rng.randrange(len(DTYPE_CODES))
        previous = (context.previous or {}).get(name)
        if previous is not None and previous.dtype.kind == "f" and rng.random() < 0.9:
            code = DTYPE_CODES.index(previous.dtype.name)
        elif previous is not None and rng.random() < 0.9:
            code = rng.randrange(9)
        shape = w.tensor(name, DTYPE_CODES[code], shape)
        specs[name] = TensorSpec(np.dtype(DTYPE_CODES[code]), shape)
    return specs


def _copies(w: _Writer, specs: Mapping[str, TensorSpec], context: Context) -> dict[str, int]:
    """Which tensors have copied rows, and how many rows of these are kept."""
    kept: dict[str, int] = {}
    for name, spec in specs.items():
        if may_have_copies(name, spec, context) and w.bit("copies", w.rng.random() < 0.7):
            number = w.uint("kept", w.rng.choice((1, 2, 9, spec.shape[0] - 1)))
            if 0 < number < spec.shape[0]:
                kept[name] = number
    return kept


def _shape(rng: random.Random) -> tuple[int, ...]:
    if rng.random() < 0.06:  # enough rows to be copies of each other
        return rng.choice(((64, 8), (70, 3, 3), (65, 1, 9)))
    if rng.random() < 0.04:
        shape = [rng.choice(ODD) for _ in range(rng.randrange(1, 5))]
        return tuple([*shape, 0] if rng.random() < 0.7 else shape)
    dims = rng.choice((0, 1, 1, 2, 2, 2, 3, 4))
    shape, left = [], rng.choice((1, 12, 60, _POSITIONS))
    for _ in range(dims):
        d = rng.choice((0, 1, 2, 3, 7, 8, 9, 17, left)) if rng.random() < 0.9 else left
        shape.append(min(d, max(left, 1)))
        left //= max(shape[-1], 1)
    rng.shuffle(shape)
    return tuple(shape)


# --- the body ----------------------------------------------------------------------------------


def _body(w: _Writer, fields: list[Field]) -> bytes:
    rng = w.rng
    serial = w.bit("serial", rng.random() < 0.4)
    w.side = [] if w.bit("static", rng.random() < 0.3) else None
    stored, sets = b"", 0
    groups: list[list[tuple[Field, int]]] = []
    shared: list[tuple[Field, int]] | None = None
    for f in fields:
        if not f.size:
            continue
        referring = id(f) in w.references and rng.random() < 0.8
        mode = w.uint("mode", 2 if referring else rng.choice((0, 1, 1, 1, 1, 1, 2)))
        if mode == 2:
            stored += _stored(w, f)
            continue
        half = 1 << (f.width - 1)
        centre = rng.choice((0, 0, 0, 1, -1, half - 1, -half, rng.randrange(-half, half)))
        if f.spec.dtype.kind == "b":
            centre = rng.choice((0, 1))
        w.sint("centre", centre)
        if mode != 1:
            continue
        table_set = w.uint("set", rng.choice((0, sets, min(sets, 1))))
        sets = max(sets, table_set + 1)
        levels = [w.bit("rows", rng.random() < 0.3), w.bit("columns", rng.random() < 0.3)]
        w.sint("base", rng.choice((36, 30, 40, 0, 63, -128, rng.randrange(-128, 64))))
        for present, count in zip(levels, (f.rows, f.columns), strict=True):
            if present:
                _levels(w, count)
        depth = 0
        if f.mask is None and not f.conditioned and f.width < 64:
            depth = min(w.uint("depth", rng.choice((0, 0, 1, 2, 3))), 3)
        grouping = 0 if serial else w.uint("grouping", rng.choice((0, 0, 1, 2)))
        if grouping or shared is None:
            groups.append([(f, depth)])
            shared = shared if grouping == 1 else groups[-1]
        else:
            shared.append((f, depth))
    return _symbols(w, groups, sets, serial) + stored


def _stored(w: _Writer, f: Field) -> bytes:
    """Values as they are; references that mostly lead to rows that there are."""
    rng = w.rng
    if id(f) not in w.references:
        return rng.randbytes(f.size * f.width // 8)
    kept = w.references[id(f)]
    most = kept + (rng.random() < w.glitch)
    references = [rng.randint(1, most) if i >= kept else 0 for i in range(f.size)]
    rng.shuffle(references)
    return np.array(references, "<i4").tobytes()


def _levels(w: _Writer, count: int) -> None:
    rng = w.rng
    step = w.uint("step", rng.choice((0, 0, 1, 2, 8, 62, 63))) + 1
    top = 63 // step
    previous = middle = min(w.uint("middle", rng.randint(0, top)), 63)
    spread = rng.choice((1, 2, 5, 64))
    for _ in range(min(count, 1 << 10)):
        v = min(max(previous + rng.randint(-spread, spread), 0), top)
        context = min(max(previous - middle, -3), 4) + 3
        if w.side is None:
            w.sint(f"level {context}", v - middle)
        else:
            w.side.append((context, _zigzag(v - middle)))
        previous = v


def _zigzag(v: int) -> int:
    return 2 * v if v >= 0 else -2 * v - 1


def _side(w: _Writer) -> bytes:
    """Static side information: its tables and state in the head, its words here."""
    if w.side is None:
        return b""
    rng = w.rng
    tables: dict[int, list[int]] = {}
    last: list[int] = []
    for context in range(16):
        used = {symbol for c, symbol in w.side if c == context}
        if not w.bit("present", bool(used) or rng.random() < 0.05):
            continue
        logs = [rng.randint(1, 63) if s in used else 0 for s in range(max(used, default=0) + 1)]
        logs[-1] = logs[-1] or 63
        _write_table(w, "side", logs, last)
        tables[context] = last = logs
    state, words = 1 << 16, b""
    if w.side and all(context in tables for context, _ in w.side):
        contexts, symbols = np.array(w.side, np.int64).T
        state, words = static_encode(contexts, symbols, tables)
    if rng.random() < w.glitch:
        state ^= 1 << rng.randrange(32)
    w.coder.bits(state, 32)
    w.uint("static words", len(words) // 2)
    return words


def _map(w: _Writer, known: int, most: int) -> int:
    """One cluster map; ``known`` clusters so far, at most ``most`` in the end."""
    rng = w.rng
    for row in range(16):
        if not w.bit(f"class {row}", not known or rng.random() < 0.3):
            continue
        first = w.uint("range", rng.choice((0, 0, 30, 36, rng.randrange(64))))
        more = w.uint("range", rng.choice((0, 3, max(63 - first, 0))))
        previous = -1
        for _ in range(min(more + 1, 64)):
            step = rng.choice((0, 0, 0, 1, 2))
            if step == 1 and known >= most:
                step = 0
            if not known or (step == 0 and previous < 0):
                step = 1 if known < most else 2
            if step == 2:
                previous = rng.randrange(max(known, 1))
                w.uint("cluster", 2 + previous)
            else:
                previous = known if step else previous
                known += step
                w.uint("cluster", step)
    return known


def _symbols(w: _Writer, groups: list[list[tuple[Field, int]]], sets: int, serial: bool) -> bytes:
    rng = w.rng
    clusters = 0
    most = rng.choice((1, 1, 2, 5, 255))
    for _ in range(min(sets, 8)):
        clusters = _map(w, clusters, most)
    direct = rng.randrange(8)
    mantissa = rng.randint(0, min(direct, 3))
    w.uint("general", 4 * direct + mantissa)
    # All dense or all sparse, so that the number of symbols is known.
    sparse = rng.random() < 0.5
    mixed = rng.random() < 0.1
    for _ in range(clusters):
        w.bit("sparse", rng.random() < 0.5 if mixed else sparse)
    if serial:
        words = _side(w)
        for group in groups:
            for phase in range(1 + max(d for _, d in group)):
                _serial(w, sum(_size(f, d, phase) for f, d in group), clusters, sparse, group)
        return words
    precision = w.uint("general", rng.choice((9, 10, 12, 14)))
    if not 9 <= precision <= 14:
        precision = 12
    width = min((f.width for group in groups for f, _ in group), default=8)
    tables: dict[str, list[int]] = {}
    for kind in ("gaps" if sparse else "dense", "values"):
        if kind == "values" and not sparse:
            continue
        d, m = (3, 2) if kind == "gaps" else (direct, mantissa)
        tables[kind] = _table(rng, _alphabet(d, m, 5 if kind == "gaps" else width), precision)
        last: list[int] = []
        for _ in range(clusters):
            if w.bit("table", tables[kind] != [63] or rng.random() < 0.5):
                _write_table(w, kind, tables[kind], last)
                last = tables[kind]
    out = b""
    for group in groups:
        for phase in range(1 + max(d for _, d in group)):
            n = sum(_size(f, d, phase) for f, d in group)
            out += _segment(w, n, clusters, sparse, (direct, mantissa), tables, precision)
    return _side(w) + out


def _size(f: Field, depth: int, phase: int) -> int:
    if phase > depth:
        return 0
    step = 1 << (depth - phase)
    return len(range(0, f.size, step)) if not phase else len(range(step, f.size, 2 * step))


def _serial(
    w: _Writer, n: int, clusters: int, sparse: bool, group: list[tuple[Field, int]]
) -> None:
    rng = w.rng
    top = 1 << rng.randint(0, max(f.width for f, _ in group))
    if not sparse:
        for _ in range(n):
            w.uint("dense 0", rng.choice((0, 0, 1, 2, rng.randrange(top))))
        return
    left = n
    for c in range(clusters):
        k = w.uint("nonzeros", rng.randint(0, min(left, 40)) if c == 0 else 0)
        for _ in range(min(k, 64)):
            left -= 1 + w.uint(f"gap {c}", rng.randint(0, max(min(left - 1, 3), 0)))
            w.uint(f"value {c}", rng.randrange(top))


def _alphabet(direct: int, mantissa: int, width: int) -> int:
    """Tokens of values below ``2**width``."""
    if width <= direct:
        return 1 << width
    return min((1 << direct) + ((width - direct) << mantissa), 256)


def _table(rng: random.Random, alphabet: int, precision: int) -> list[int]:
    if rng.random() < 0.05:
        alphabet = 256
    size = rng.choice((1, 2, min(8, alphabet), alphabet))
    logs = [rng.choice((0, 63, 60, 40, rng.randint(1, 63))) for _ in range(min(size, alphabet))]
    logs[-1] = logs[-1] or 63
    return logs


def _write_table(w: _Writer, kind: str, logs: list[int], last: list[int]) -> None:
    w.uint(f"{kind} size", len(logs) - 1)
    static = w.side is not None and kind != "side"
    before = False
    for i, k in enumerate(logs):
        off = predicted(last, logs, i) - k
        if static and w.side is not None:
            context = 8 + 2 * min(i, 3) + before
            w.side.append((context, 1 + _zigzag(off) if k else 0))
        elif i + 1 < len(logs):
            w.bit(f"{kind} absent {before}", not k)
        before = not k
        if k and not static:
            w.sint(f"{kind} log {min(i, 3)}", off)


def _segment(
    w: _Writer,
    n: int,
    clusters: int,
    sparse: bool,
    scheme: tuple[int, int],
    tables: Mapping[str, list[int]],
    precision: int,
) -> bytes:
    rng = w.rng
    nonzeros = rng.randint(0, min(n // 3, 60)) if sparse and clusters else 0
    plan = [("dense", *scheme, n)]
    if sparse:
        plan = [("gaps", 3, 2, nonzeros), ("values", *scheme, nonzeros)]
    symbols: list[int] = []
    raw, bits = 0, 0
    f = np.zeros((2, 256), np.uint32)
    for row, (kind, direct, mantissa, count) in enumerate(plan):
        f[row, : len(tables[kind])] = frequencies(tables[kind], precision)
        used = np.flatnonzero(f[row]).tolist()
        weights = None if rng.random() < 0.3 else f[row, used].tolist()
        for t in rng.choices(used, weights, k=count):
            symbols.append(row << 8 | t)
            if t >= 1 << direct:
                exponent = direct + ((t - (1 << direct)) >> mantissa)
                raw |= rng.getrandbits(max(exponent - mantissa, 0)) << bits
                bits += exponent - mantissa
    data = raw.to_bytes(bits + 7 >> 3, "little")
    keys = np.array(symbols, np.uint32)
    tail = min(rng.choice((0, 0, 1, len(keys) // 4, len(keys) // 2, len(keys))), len(keys))
    streams: list[LaneStream] = []
    for part in (keys[len(keys) - tail :], keys[: len(keys) - tail]) if tail else (keys,):
        lanes = rng.choice((1, 1, 2, 3, 7, 8, 9, 40))
        entry, data = write_stream(part, RansTables(f, precision), lanes, data)
        streams.append(entry)
    w.stream(streams[-1])
    w.uint("raw", bits + 7 >> 3)
    if sparse:
        for c in range(clusters):
            w.uint("segment nonzeros", nonzeros if c == 0 else 0)
    w.uint("tail", tail)
    if tail:
        w.stream(streams[0])
    return data

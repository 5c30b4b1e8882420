"""The payload's head: everything but the symbols, coded with the adaptive coder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..context import DTYPE_CODES, Limits, TensorSpec
from ..entropy.adaptive import UINT_CONTEXTS, AdaptiveDecoder, AdaptiveEncoder
from ..entropy.streams import FEWEST_PACKED, LaneStream
from ..entropy.tables import TableModel
from ..entropy.tokens import TokenScheme
from ..errors import LimitExceeded, MalformedPayload, UnsupportedShape
from ..modelling.classes import (
    ACTIVITIES,
    ALONE,
    CODED,
    CONSTANT,
    MAX_DEPTH,
    NEW_SHARED,
    SHARED,
    STORED,
    FieldCode,
    may_have_neighbours,
    phase_size,
)
from ..modelling.fields import PREVIOUS_CLASSES, Field
from .levels import LevelModel, LevelRun
from .side import SideModel, SideWriter, open_side

__all__ = [
    "Body",
    "HeadModels",
    "Segment",
    "read_body",
    "read_specs",
    "segments_of",
    "write_body",
    "write_specs",
]

_MAX_SETS = 256
_MAX_CLUSTERS = 256
_DIMENSIONS = 32


@dataclass
class Segment:
    """Directory entry of one separately decodable segment."""

    parts: list[tuple[int, int]]
    """Field and phase of each part."""
    stream: LaneStream = field(default_factory=LaneStream)
    raw_bytes: int = 0
    counts: list[int] = field(default_factory=list)
    """Non-zeros of each sparse cluster."""
    tail_symbols: int = 0
    """Number of last symbols in a stream of their own, which the first words carry."""
    tail: LaneStream = field(default_factory=LaneStream)

    @property
    def rest_bytes(self) -> int:
        """Bytes that start in the lanes' first words: the tail, or else the raw bits."""
        return self.tail.nbytes(self.raw_bytes) if self.tail_symbols else self.raw_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the segment in the payload."""
        return self.stream.nbytes(self.rest_bytes)

    def steps(self, dense: int) -> int:
        """Steps of its coders, one after the other, with so many dense symbols."""
        symbols, last = dense + 2 * sum(self.counts), self.tail_symbols
        steps = -(-max(symbols - last, 0) // self.stream.lanes)
        return steps - (-last // self.tail.lanes) if last else steps


@dataclass
class Body:
    """What the head says about fields, clusters, tables and segments."""

    codes: list[FieldCode]
    maps: list[NDArray[np.uint8]] = field(default_factory=list)
    """Per table set: cluster of [previous class, activity]."""
    sparse: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    scheme: TokenScheme = field(default_factory=lambda: TokenScheme(5, 1))
    serial: bool = True
    static: bool = False
    """Whether levels and tables are coded by the static coder, after the head."""
    side_bytes: int = 0
    """Bytes of those."""
    precision: int = 12
    tables: list[list[int]] = field(default_factory=list)
    """Quarter-octave logarithms: one table a cluster, then one (values) a sparse cluster."""
    groups: list[list[int]] = field(default_factory=list)
    """Fields that are decoded together: one segment for each phase."""
    segments: list[Segment] = field(default_factory=list)


# --- names, dtypes, shapes -------------------------------------------------------------------


def write_specs(coder: AdaptiveEncoder, specs: Mapping[str, TensorSpec]) -> None:
    """Write the layout (payloads without one in the context).

    Raises:
        UnsupportedShape: a tensor has more than 32 dimensions.
    """
    u = [coder.contexts(UINT_CONTEXTS) for _ in range(4)]
    letters = coder.contexts(256)
    coder.uint(u[0], len(specs))
    for name, spec in specs.items():
        raw = name.encode("utf-8", "surrogatepass")
        coder.uint(u[1], len(raw))
        for byte in raw:
            node = 1
            for shift in range(7, -1, -1):
                bit = byte >> shift & 1
                coder.bit(letters + node, bit)
                node = 2 * node + bit
        if len(spec.shape) > _DIMENSIONS:
            raise UnsupportedShape(
                f"tensor {name!r} has {len(spec.shape)} dimensions and a payload can state "
                f"{_DIMENSIONS}: reshape it, or put the layout into the context"
            )
        kind = DTYPE_CODES.index(spec.dtype.name) * (_DIMENSIONS + 1) + len(spec.shape)
        coder.uint(u[2], kind)
        for d in spec.shape:
            coder.uint(u[3], d)


def read_specs(coder: AdaptiveDecoder, limits: Limits) -> dict[str, TensorSpec]:
    """Read the layout, checking every quantity against ``limits``."""
    u = [coder.contexts(UINT_CONTEXTS) for _ in range(4)]
    letters = coder.contexts(256)
    count = coder.uint(u[0])
    _limit("tensors", count, limits.tensors)
    specs: dict[str, TensorSpec] = {}
    name_bytes = 0
    for _ in range(count):
        length = coder.uint(u[1])
        _limit("name_bytes", length, limits.name_bytes)
        name_bytes += length
        _limit("all_name_bytes", name_bytes, limits.all_name_bytes)
        raw = bytearray()
        for _ in range(length):
            node = 1
            while node < 256:
                node = 2 * node + coder.bit(letters + node)
            raw.append(node - 256)
        try:
            name = raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise MalformedPayload("a tensor's name is not UTF-8") from error
        if name in specs:
            raise MalformedPayload(f"tensor {name!r} appears twice")
        code, ndim = divmod(coder.uint(u[2]), _DIMENSIONS + 1)
        if code >= len(DTYPE_CODES):
            raise MalformedPayload(f"tensor {name!r} has the unknown dtype code {code}")
        _limit("dimensions", ndim, limits.dimensions)
        shape = tuple(coder.uint(u[3]) for _ in range(ndim))
        if any(d >= 1 << 62 for d in shape):
            raise MalformedPayload(f"tensor {name!r} has a dimension beyond 2**62")
        spec = TensorSpec(np.dtype(DTYPE_CODES[code]), shape)
        if not spec.size and math.prod(d for d in shape if d) * spec.dtype.itemsize >= 1 << 63:
            raise MalformedPayload(f"tensor {name!r} is empty, but no array has its shape")
        specs[name] = spec
    return specs


def _limit(name: str, value: int, most: int) -> None:
    if value > most:
        raise LimitExceeded(
            f"the payload states {name} = {value}, above Limits.{name} = {most}; raise that limit "
            "if you trust the sender"
        )


# --- fields, clusters, tables, segments --------------------------------------------------------


class HeadModels:
    """Contexts of everything in the body's head, by what they code."""

    def __init__(self, coder: AdaptiveEncoder | AdaptiveDecoder) -> None:
        def uint() -> int:
            return coder.contexts(UINT_CONTEXTS)

        self.mode, self.centre, self.set, self.base = uint(), uint(), uint(), uint()
        self.depth, self.group = uint(), uint()
        self.flag = coder.contexts(8)
        self.present = coder.contexts(PREVIOUS_CLASSES)
        self.range, self.cluster = uint(), uint()
        self.general, self.lanes, self.words, self.raw, self.count = (
            uint(), uint(), uint(), uint(), uint(),
        )  # fmt: skip
        self.level = LevelModel(coder)
        self.dense_table, self.gap_table = TableModel(coder), TableModel(coder)
        self.value_table = TableModel(coder)
        self.state, self.tail = uint(), uint()
        self.side = SideModel(coder)

    def kinds(self, sparse: NDArray[np.bool_]) -> list[TableModel]:
        """Model of every table: one for each cluster, then values of each sparse cluster."""
        kinds = [self.gap_table if s else self.dense_table for s in sparse]
        return kinds + [self.value_table] * int(sparse.sum())


def segments_of(groups: list[list[int]], codes: list[FieldCode]) -> list[Segment]:
    """Segments of all groups in order: phase 0, then each later phase that any field has."""
    segments = []
    for group in groups:
        for phase in range(1 + max(codes[i].depth for i in group)):
            segments.append(Segment([(i, phase) for i in group if codes[i].depth >= phase]))
    return segments


def write_body(coder: AdaptiveEncoder, body: Body, fields: list[Field]) -> bytes:
    """Write the body's head; return the bytes that follow the head (static side information)."""
    m = HeadModels(coder)
    coder.bit(m.flag, body.serial)
    coder.bit(m.flag + 6, body.static)
    side = SideWriter()
    for f, code in zip(fields, body.codes, strict=True):
        if not f.size:
            continue
        coder.uint(m.mode, code.mode)
        if code.mode == STORED:
            continue
        coder.sint(m.centre, code.centre)
        if code.mode == CONSTANT:
            continue
        coder.uint(m.set, code.table_set)
        coder.bit(m.flag + 1, code.rows is not None)
        coder.bit(m.flag + 2, code.columns is not None)
        coder.sint(m.base, code.base)
        for levels in (code.rows, code.columns):
            if levels is not None:
                values = m.level.start(coder, levels)
                if body.static:
                    side.add_levels(values)
                else:
                    m.level.write(coder, values)
        if may_have_neighbours(f):
            coder.uint(m.depth, code.depth)
        if not body.serial:
            coder.uint(m.group, code.grouping)
    known = 0
    for table in body.maps:
        known = _write_map(coder, m, table, known)
    coder.uint(m.general, body.scheme.direct * 4 + body.scheme.mantissa)
    for s in body.sparse:
        coder.bit(m.flag + 4, int(s))
    if body.serial:
        return side.finish(coder, m.side) if body.static else b""
    coder.uint(m.general, body.precision)
    for kind, logs in zip(m.kinds(body.sparse), body.tables, strict=True):
        coder.bit(m.flag + 5, bool(logs))
        if not logs:
            continue
        if body.static:
            kind.write_size(coder, logs)
            side.add_table(kind, logs)
        else:
            kind.write(coder, logs)
    for segment in body.segments:
        _write_stream(coder, m, segment.stream)
        coder.uint(m.raw, segment.raw_bytes)
        for k in segment.counts:
            coder.uint(m.count, k)
        coder.uint(m.tail, segment.tail_symbols)
        if segment.tail_symbols:
            _write_stream(coder, m, segment.tail)
    return side.finish(coder, m.side) if body.static else b""


def read_body(coder: AdaptiveDecoder, fields: list[Field], limits: Limits, rest: bytes) -> Body:
    """Read the body's head; every quantity is checked before anything depends on it.

    ``rest`` is what follows the head: static side information, segments, stored fields.
    """
    m = HeadModels(coder)
    serial = bool(coder.bit(m.flag))
    body = Body([], serial=serial, static=bool(coder.bit(m.flag + 6)))
    runs: list[tuple[FieldCode, bool, LevelRun]] = []
    shared: list[int] | None = None
    sets, levels_left = 0, limits.levels
    for i, f in enumerate(fields):
        code = FieldCode(CONSTANT)
        body.codes.append(code)
        if not f.size:
            continue
        code.mode = coder.uint(m.mode)
        if code.mode not in (CONSTANT, CODED, STORED):
            raise MalformedPayload(f"tensor {f.name!r} has the unknown mode {code.mode}")
        if code.mode == STORED:
            continue
        code.centre = coder.sint(m.centre)
        if not -(1 << f.width - 1) <= code.centre < 1 << f.width - 1:
            raise MalformedPayload(f"tensor {f.name!r}: its centre exceeds {f.width} bits")
        if code.mode == CONSTANT:
            continue
        code.table_set = coder.uint(m.set)
        if code.table_set > min(sets, _MAX_SETS - 1):
            raise MalformedPayload(f"tensor {f.name!r} names table set {code.table_set}")
        sets = max(sets, code.table_set + 1)
        has_rows, has_columns = coder.bit(m.flag + 1), coder.bit(m.flag + 2)
        code.base = coder.sint(m.base)
        if not -2 * ACTIVITIES <= code.base < ACTIVITIES:
            raise MalformedPayload(f"tensor {f.name!r} has the base activity {code.base}")
        levels_left -= f.rows * has_rows + f.columns * has_columns
        if levels_left < 0:
            _limit("levels", limits.levels - levels_left, limits.levels)
        for present, columns in ((has_rows, False), (has_columns, True)):
            if not present:
                continue
            run = m.level.read_start(coder, f.columns if columns else f.rows)
            if body.static:
                runs.append((code, columns, run))
            else:
                code.set_levels(m.level.read(coder, run), columns=columns)
        if may_have_neighbours(f):
            code.depth = coder.uint(m.depth)
            if code.depth > MAX_DEPTH:
                raise MalformedPayload(f"tensor {f.name!r} has {code.depth} further phases")
        code.grouping = SHARED if serial else coder.uint(m.group)
        if code.grouping > NEW_SHARED:
            raise MalformedPayload(f"tensor {f.name!r} has the unknown grouping {code.grouping}")
        if code.grouping != SHARED or shared is None:
            _limit("segments", (1 + MAX_DEPTH) * (len(body.groups) + 1), limits.segments)
            body.groups.append([i])
            if code.grouping != ALONE:
                shared = body.groups[-1]
        else:
            shared.append(i)
    known = 0
    for _ in range(sets):
        table, known = _read_map(coder, m, known)
        body.maps.append(table)
    direct, mantissa = divmod(coder.uint(m.general), 4)
    if direct > 7 or mantissa > min(direct, 3):
        raise MalformedPayload(f"the token scheme ({direct}, {mantissa}) does not exist")
    body.scheme = TokenScheme(direct, mantissa)
    body.sparse = np.array([coder.bit(m.flag + 4) for _ in range(known)], np.bool_)
    body.segments = segments_of(body.groups, body.codes)
    if serial:
        if body.static:
            _read_side(coder, m, body, runs, [], rest)
        return body
    body.precision = coder.uint(m.general)
    if not 9 <= body.precision <= 14:
        raise MalformedPayload(f"the precision {body.precision} is outside [9, 14]")
    sizes = []
    kinds = m.kinds(body.sparse)
    _limit("table_slots", len(kinds) << body.precision, limits.table_slots)
    for kind in kinds:
        present = coder.bit(m.flag + 5)
        if body.static:
            sizes.append(kind.read_size(coder) if present else 0)
        else:
            body.tables.append(kind.read(coder) if present else [])
    left = len(rest)
    for segment in body.segments:
        segment.stream = _read_stream(coder, m, limits)
        segment.raw_bytes = coder.uint(m.raw)
        size = sum(phase_size(fields[i].size, body.codes[i].depth, p) for i, p in segment.parts)
        for _ in range(int(body.sparse.sum())):
            k = coder.uint(m.count)
            if k > size:
                raise MalformedPayload("a segment has more non-zeros than positions")
            segment.counts.append(k)
        segment.tail_symbols = coder.uint(m.tail)
        if segment.tail_symbols:
            segment.tail = _read_stream(coder, m, limits)
        left -= segment.nbytes
        if left < 0:  # checked here already, as each entry of the directory takes memory
            raise MalformedPayload("the segments are longer than the payload")
    if body.static:
        _read_side(coder, m, body, runs, sizes, rest)
    return body


def _write_stream(coder: AdaptiveEncoder, m: HeadModels, stream: LaneStream) -> None:
    coder.uint(m.lanes, stream.lanes - 1)
    if stream.lanes >= FEWEST_PACKED:
        coder.sint(m.state, 4 * stream.lanes - stream.state_bytes)
    coder.uint(m.words, stream.words)


def _read_stream(coder: AdaptiveDecoder, m: HeadModels, limits: Limits) -> LaneStream:
    lanes = coder.uint(m.lanes) + 1
    _limit("lanes", lanes, limits.lanes)
    state_bytes = 4 * lanes - (coder.sint(m.state) if lanes >= FEWEST_PACKED else 0)
    if not 0 <= state_bytes <= 5 * lanes:
        raise MalformedPayload(f"a stream states {state_bytes} bytes for {lanes} states")
    return LaneStream(lanes, state_bytes, coder.uint(m.words))


def _read_side(
    coder: AdaptiveDecoder,
    m: HeadModels,
    body: Body,
    runs: list[tuple[FieldCode, bool, LevelRun]],
    sizes: list[int],
    rest: bytes,
) -> None:
    """Read levels and tables that were left for the static coder."""
    side, body.side_bytes = open_side(coder, m.side, rest)
    for code, columns, run in runs:
        levels = side.levels(run.middle, run.top, run.count)
        code.set_levels(run.scaled(levels), columns=columns)
    for kind, size in zip(m.kinds(body.sparse) if sizes else (), sizes, strict=True):
        if size:
            kind.last = side.table(size, kind.last)
        body.tables.append(kind.last if size else [])
    side.close()


def _write_map(coder: AdaptiveEncoder, m: HeadModels, table: NDArray[np.uint8], known: int) -> int:
    for row, present in enumerate(table):
        used = np.flatnonzero(present != 255)
        coder.bit(m.present + row, bool(len(used)))
        if not len(used):
            continue
        first, last = int(used[0]), int(used[-1])
        coder.uint(m.range, first)
        coder.uint(m.range, last - first)
        previous = -1
        for a in range(first, last + 1):
            cluster = int(present[a]) if present[a] != 255 else max(previous, 0)
            # 0: as the one before, 1: the next new one, else an older one by number.
            if cluster == previous:
                coder.uint(m.cluster, 0)
            elif cluster == known:
                coder.uint(m.cluster, 1)
                known += 1
            else:
                coder.uint(m.cluster, cluster + 2)
            previous = cluster
    return known


def _read_map(coder: AdaptiveDecoder, m: HeadModels, known: int) -> tuple[NDArray[np.uint8], int]:
    table = np.zeros((PREVIOUS_CLASSES, ACTIVITIES), np.uint8)
    for row in range(PREVIOUS_CLASSES):
        if not coder.bit(m.present + row):
            continue
        first = coder.uint(m.range)
        last = first + coder.uint(m.range)
        if last >= ACTIVITIES:
            raise MalformedPayload("a cluster map leaves the range of activities")
        previous = -1
        for a in range(first, last + 1):
            step = coder.uint(m.cluster)
            cluster = previous if step == 0 else known if step == 1 else step - 2
            known += step == 1
            if not 0 <= cluster < known or known > _MAX_CLUSTERS - 1:
                raise MalformedPayload(f"a cluster map names cluster {cluster} of {known}")
            table[row, a] = previous = cluster
    return table, known

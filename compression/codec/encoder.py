"""encode: tensors to one payload."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .container.forms import write_copies, write_forms
from .container.head import Body, segments_of, write_body, write_specs
from .container.wire import seal
from .context import Context, TensorSpec, spec_of
from .entropy.adaptive import AdaptiveEncoder
from .entropy.lanes import SymbolStream, rans_tables, write_segment
from .entropy.rans import RansTables
from .entropy.serial import SerialModels, write_serial
from .entropy.tables import quantised
from .entropy.tokens import TokenScheme
from .errors import TensorMismatch
from .modelling.classes import (
    ALONE,
    CODED,
    NEW_SHARED,
    STORED,
    FieldCode,
)
from .modelling.copies import find_copies, may_have_copies
from .modelling.fields import Field, split_tensor, to_z
from .modelling.forming import Formed, choose_forms
from .modelling.forms import all_fields, parted
from .modelling.observed import Observed
from .modelling.parts import Phase, histogram, split_phases, symbols_of
from .modelling.planning import build_maps, choose_scheme, entropy_bits, plan_field
from .packing import Packing, packed

__all__ = ["encode", "encode_body"]

# One symbol at a time takes microseconds each and saves some per cent: for what is small anyway.
_SERIAL_SYMBOLS = 4_000
_BITS_A_SYMBOL = 8
_ALONE = 1 << 17
_SHARED_MOST = 1 << 18
_MAX_LANES = 2048
_BYTES_A_LANE = 110
_STEPS = 350
_MOST_STEPS = 1 << 12
_LARGE = 20_000
_STATIC = 1000
_CENTRE_SAMPLE = 12
"""Logarithm of how many values tell where the centre is."""
_CENTRE_RANGE = 1 << 16
_CENTRE_TOKENS = TokenScheme(4, 1)
_SMALL_BYTES = 8192
_SMALL_SIZE = 1 << 18
_FINE = 1 << 18
_BYTE_SAMPLE = 18
"""Logarithm of how many bytes of a plane tell whether it can be compressed."""


def encode(
    tensors: Mapping[str, NDArray[Any]], *, context: Context | None = None, thorough: bool = False
) -> bytes:
    """Return one self-delimiting payload that decodes to exactly these tensors.

    Integer tensors (bool, int8 to int64, uint8 to uint64) and float tensors (float16 to float64,
    bit for bit) of any shape. See :class:`Context` for what both sides may already know.

    Args:
        tensors: by name.
        context: what the decoder knows.
        thorough: take more time for what is coded once and sent often: try the coders of the
            standard library wherever they may take fewer bytes, and not only on vectors of bytes.

    Raises:
        UnsupportedDtype: a tensor has another dtype.
        UnsupportedShape: a tensor has more than 32 dimensions, and the context no layout.
        TensorMismatch: a tensor contradicts the context.
        MaskViolation: a tensor is non-zero where the mask is False.

    >>> from prunecast.compression.codec import decode
    >>> decode(encode({"w": np.array([[0, -3], [1, 0]])}))["w"].tolist()
    [[0, -3], [1, 0]]
    """
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in tensors.items():
        array = np.asarray(value)
        arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    specs = {name: spec_of(name, array) for name, array in arrays.items()}
    context = context or Context()
    _check_layout(specs, context)
    formed = choose_forms(arrays, specs, context)

    def write(forms: Mapping[str, Formed], packs: Packing) -> bytes:
        return _write(arrays, specs, context, forms, packs)

    payload = write(formed, [])
    if formed and len(payload) <= _SMALL_BYTES:  # a form costs some bytes itself
        plain = write({}, [])
        if len(plain) <= len(payload):
            formed, payload = {}, plain
    return packed(arrays, specs, context, formed, payload, write, thorough=thorough)


def _write(
    arrays: Mapping[str, NDArray[Any]],
    specs: Mapping[str, TensorSpec],
    context: Context,
    formed: Mapping[str, Formed],
    packs: Packing,
) -> bytes:
    kept: dict[str, int] = {}
    parts: dict[str, list[NDArray[Any]]] = {}
    for name, array in arrays.items():
        if name in formed:
            parts[name] = formed[name][1]
            continue
        copies = find_copies(array) if may_have_copies(name, specs[name], context) else None
        parts[name] = [array] if copies is None else list(copies)
        if copies is not None:
            kept[name] = len(copies[1])
    forms = {name: form for name, (form, _) in formed.items()}
    by_tensor = all_fields(specs, context, kept, forms)
    fields = [f for group in by_tensor.values() for f in group]

    def written(*, levels: bool) -> tuple[bytes, Body]:
        coder = AdaptiveEncoder()
        if context.layout is None:
            write_specs(coder, specs)
        write_copies(coder, specs, context, kept)
        if forms:
            write_forms(coder, specs, context, kept, forms, [one for one, _ in packs])
        values = (v for n, group in by_tensor.items() for v in _split(parts[n], group))
        rest, body = encode_body(coder, fields, values, levels=levels)
        rest += b"".join(data for _, data in packs)
        return seal(context, coder.finish(), rest, forms=bool(forms)), body

    payload, body = written(levels=True)
    # What levels save is an estimate, and too good where there is little to learn from.
    small = len(payload) <= _SMALL_BYTES and sum(f.size for f in fields) <= _SMALL_SIZE
    if small and any(c.rows is not None or c.columns is not None for c in body.codes):
        payload = min(payload, written(levels=False)[0], key=len)
    return payload


def _split(parts: list[NDArray[Any]], fields: list[Field]) -> Iterator[NDArray[Any]]:
    for part, own in zip(parts, parted(fields), strict=True):
        yield from split_tensor(part, own)


def _check_layout(specs: Mapping[str, TensorSpec], context: Context) -> None:
    if context.layout is None or list(context.layout.items()) == list(specs.items()):
        return
    if list(context.layout) != list(specs):
        raise TensorMismatch(
            "the tensors are not those of the context's layout, in its order: "
            f"{sorted(set(context.layout) ^ set(specs)) or 'order differs'}"
        )
    for name, spec in specs.items():
        if spec != context.layout[name]:
            raise TensorMismatch(
                f"tensor {name!r} is {spec.dtype} {spec.shape}, the layout says "
                f"{context.layout[name].dtype} {context.layout[name].shape}"
            )


def _centre(v: NDArray[Any], f: Field) -> int:
    """A value to subtract: the only one, or what zigzag is cheapest around in a sample.

    Candidates are zero, the most frequent value and the median: of values of one sign zigzag would
    leave every other integer unused, and what is frequent should be small.
    """
    least, most = int(v.min()), int(v.max())
    if least == most:
        return least
    if f.conditioned:
        return 0
    sample = v[:: max(1, len(v) >> _CENTRE_SAMPLE)]
    low, reach = int(sample.min()), int(sample.max()) - int(sample.min())
    if reach < _CENTRE_RANGE:
        counts = np.bincount(sample - low)
        mode = low + int(counts.argmax())
        median = low + int(np.searchsorted(np.cumsum(counts), len(sample) / 2))
    else:
        values, counts = np.unique(sample, return_counts=True)
        mode = int(values[counts.argmax()])
        median = int(values[np.searchsorted(np.cumsum(counts), len(sample) / 2)])
    if abs(median) <= 1 and abs(mode) <= 1:
        return 0  # as lattices are; no candidate is worth its bits
    candidates = list(dict.fromkeys((0, median, mode)))
    bits = [_around(sample, c, f) for c in candidates]
    return candidates[bits.index(min(bits))]


def _around(sample: NDArray[Any], centre: int, f: Field) -> float:
    """Bits of a sample around a centre: of its tokens, and raw ones."""
    z = to_z(sample, centre, f)
    counts = np.bincount(_CENTRE_TOKENS.tokens(z), minlength=256)
    widths = np.where(counts > 0, _CENTRE_TOKENS.widths(), 0)
    own = 8.0 * (centre != 0)
    return float(entropy_bits(counts)) + float((counts * widths).sum()) + own


def encode_body(
    coder: AdaptiveEncoder,
    fields: list[Field],
    values: Iterable[NDArray[Any]],
    *,
    levels: bool = True,
) -> tuple[bytes, Body]:
    """Write the body's head into ``coder``; return the sections that follow it, and the body."""
    codes: list[FieldCode] = []
    zs: dict[int, NDArray[Any]] = {}
    sets: dict[int | None, int] = {}
    stored, largest = b"", 0
    everything = sum(f.size for f in fields)
    for i, (f, v) in enumerate(zip(fields, values, strict=True)):
        if not f.size:
            codes.append(FieldCode(CODED))
            continue
        if f.plane is None:
            centre = _centre(v, f)
        else:
            counts = np.bincount(v[:: max(1, f.size >> _BYTE_SAMPLE)] + 128, minlength=256)
            if _incompressible(counts):
                stored += v.astype(np.int8).tobytes()
                codes.append(FieldCode(STORED))
                continue
            centre = int(counts.argmax()) - 128
        z = to_z(v, centre, f)
        if f.plane is not None:
            z = z.astype(np.uint8)  # four of the planes take the place of one float
        seen = Observed(f, z)
        code = plan_field(f, seen, everything, levels=levels)
        code.centre = centre
        if code.mode == CODED:
            kind = None if f.plane is None else f.plane - f.spec.dtype.itemsize
            code.table_set = sets.setdefault(kind, len(sets))
            largest = max(largest, seen.largest)
            zs[i] = z
        codes.append(code)
        del v, z, seen  # the arrays of the next field should not add to these
    active = list(zs)
    total = sum(fields[i].size for i in active)
    scheme = choose_scheme(largest, total, list(zs.values()))

    parts = {i: split_phases(fields[i], codes[i], zs.pop(i)) for i in active}
    histograms = []
    for number in range(len(sets)):
        mine = [p for i in active if codes[i].table_set == number for p in parts[i]]
        histograms.append(histogram(mine, scheme))
    body = Body(codes, scheme=scheme)
    body.maps, body.sparse = build_maps(histograms)

    for i in active:
        table = body.maps[codes[i].table_set].reshape(-1)
        for part in parts[i]:
            part.place(table, body.sparse)
    work = sum(part.work for group in parts.values() for part in group)
    work += _extra_work(scheme, histograms)
    factor = 12 if total < 1 << 16 else 5 if total < 1 << 18 else 1
    body.serial = work <= factor * _SERIAL_SYMBOLS
    body.groups = _group(active, fields, codes, parts, serial=body.serial)
    body.segments = segments_of(body.groups, codes)
    if body.serial:
        body.static = _side_symbols(body) >= _STATIC
        side = write_body(coder, body, fields)
        models = SerialModels(coder, len(body.sparse))
        for segment in body.segments:
            members = [parts[i][phase] for i, phase in segment.parts]
            write_serial(coder, models, *symbols_of(members), body.sparse)
        return side + stored, body
    return _encode_lanes(coder, body, fields, parts) + stored, body


def _group(
    active: list[int],
    fields: list[Field],
    codes: list[FieldCode],
    parts: dict[int, list[Phase]],
    *,
    serial: bool,
) -> list[list[int]]:
    """Fields that share segments: small ones together, large ones alone."""
    if serial:
        return [active] if active else []
    groups: list[list[int]] = []
    shared: list[int] = []
    weight = 0
    for i in active:
        size = sum(part.work for part in parts[i])
        if size > _ALONE:
            codes[i].grouping = ALONE
            groups.append([i])
            continue
        if shared and weight + size > _SHARED_MOST:
            codes[i].grouping = NEW_SHARED
            shared, weight = [], 0
        if not shared:
            groups.append(shared)
        shared.append(i)
        weight += size
    return groups


def _encode_lanes(
    coder: AdaptiveEncoder,
    body: Body,
    fields: list[Field],
    parts: dict[int, list[Phase]],
) -> bytes:
    streams = []
    for segment in body.segments:
        members = [parts[i][phase] for i, phase in segment.parts]
        streams.append(SymbolStream(body, *symbols_of(members)))
        for part in members:
            part.release()
    count = len(body.sparse) + int(body.sparse.sum())
    h = np.zeros(count << 8, np.int64)
    for stream in streams:
        h += stream.histogram(count << 8)
    kinds = [int(s) for s in body.sparse] + [2] * int(body.sparse.sum())
    last: dict[int, list[int]] = {}
    for kind, row in zip(kinds, h.reshape(count, 256), strict=True):
        logs = quantised(row, last.get(kind, [])) if row.any() else []
        body.tables.append(logs)
        if logs:
            last[kind] = logs
    # Look-up tables take nine bytes a slot: many slots only where symbols abound.
    wide = max(len(t) for t in body.tables) > 48 and count <= 24
    size = sum(len(stream.tokens) for stream in streams)
    body.precision = 14 if wide and size > _FINE else 12
    tables = rans_tables(body)
    sizes = [_estimate(stream, tables) / 8 for stream in streams]
    fast = sum(sizes) > _LARGE
    data = [
        write_segment(tables, stream, _lanes(stream, nbytes, fast=fast), segment)
        for stream, nbytes, segment in zip(streams, sizes, body.segments, strict=True)
    ]
    body.static = _side_symbols(body) >= _STATIC
    return write_body(coder, body, fields) + b"".join(data)


def _lanes(stream: SymbolStream, nbytes: float, *, fast: bool) -> int:
    """Number of lanes: each saves steps and costs half a byte or more."""
    steps = len(stream.tokens) / _STEPS
    lanes = max(1, min(steps, nbytes / _BYTES_A_LANE))
    if fast:
        lanes = max(lanes, min(steps, max(nbytes / 75, min(len(stream.raw) / 2, nbytes / 40))))
    # Symbols that cost next to nothing should not take a step, so microseconds, each.
    lanes = max(lanes, len(stream.tokens) / _MOST_STEPS)
    return int(min(_MAX_LANES, lanes))


def _extra_work(scheme: TokenScheme, histograms: list[NDArray[np.int64]]) -> int:
    """Symbols that large values are worth: one at a time, each of their bits takes its time."""
    extra = scheme.widths().astype(np.int64) // _BITS_A_SYMBOL
    return sum(int((h.sum(0) * extra[: h.shape[1]]).sum()) for h in histograms)


def _side_symbols(body: Body) -> int:
    """Number of levels and table entries."""
    levels = sum(len(x) for c in body.codes for x in (c.rows, c.columns) if x is not None)
    return levels + sum(map(len, body.tables))


def _estimate(stream: SymbolStream, tables: RansTables) -> float:
    cost = tables.precision - np.log2(np.maximum(tables.frequencies, 1))
    counts = stream.histogram(cost.shape[0] << 8).reshape(-1, 256)[:, : cost.shape[1]]
    return float((counts * cost).sum()) + 8 * len(stream.raw)


def _incompressible(counts: NDArray[np.int64]) -> bool:
    """Whether bytes are cheaper as they are, given how often each occurs."""
    used = int(np.count_nonzero(counts))
    return used > 1 and float(entropy_bits(counts)) + 5 * used > 7.8 * int(counts.sum())

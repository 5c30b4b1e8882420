"""encode: tensors to one payload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adaptive import AdaptiveEncoder
from .classes import ACTIVITIES, CODED, STORED, FieldCode, clusters_of, raw_contexts
from .context import Context, TensorSpec, spec_of
from .errors import TensorMismatch
from .fields import PREVIOUS_CLASSES, Field, fields_of, split_tensor, to_z
from .head import Body, write_body, write_specs
from .lanes import SymbolStream, rans_tables, write_segment
from .planning import build_maps, choose_scheme, plan_field
from .serial import write_serial
from .symbols import Placement, collect
from .tables import quantised
from .wire import seal

__all__ = ["encode"]

_SERIAL_SYMBOLS = 4000
_OWN_SEGMENT = 1 << 15
_MAX_LANES = 4096


def encode(tensors: Mapping[str, NDArray[Any]], *, context: Context | None = None) -> bytes:
    """Return one self-delimiting payload that decodes to exactly these tensors.

    Integer tensors (bool, int8 to int64, uint8 to uint64) and float tensors (float16 to float64,
    bit for bit) of any shape. See :class:`Context` for what both sides may already know.

    Raises:
        UnsupportedDtype: a tensor has another dtype.
        TensorMismatch: a tensor contradicts the context.
        MaskViolation: a tensor is non-zero where the mask is False.

    >>> from prunecast.compression.codec import decode
    >>> decode(encode({"w": np.array([[0, -3], [1, 0]])}))["w"].tolist()
    [[0, -3], [1, 0]]
    """
    context = context or Context()
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in tensors.items():
        array = np.asarray(value)
        arrays[name] = array.astype(array.dtype.newbyteorder("="), copy=False)
    specs = {name: spec_of(name, array) for name, array in arrays.items()}
    _check_layout(specs, context)
    by_tensor = fields_of(specs, context)
    fields = [f for group in by_tensor.values() for f in group]
    values = [
        v
        for name, group in by_tensor.items()
        for v in (split_tensor(arrays[name], group) if group[0].size else [None] * len(group))
    ]
    coder = AdaptiveEncoder()
    if context.layout is None:
        write_specs(coder, specs)
    rest = _encode_body(coder, fields, values)
    return seal(context, coder.finish(), rest)


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
    """A value to subtract: the only one, or the most frequent byte of a plane."""
    if f.plane is not None:
        counts = np.bincount(v + 128, minlength=256)
        return int(counts.argmax()) - 128
    first = int(v[0])
    return first if first and (v == v[0]).all() else 0


def _encode_body(coder: AdaptiveEncoder, fields: list[Field], values: list[Any]) -> bytes:
    codes: list[FieldCode] = []
    zs: list[NDArray[Any]] = []
    sets: dict[int | None, int] = {}
    stored = b""
    for f, v in zip(fields, values, strict=True):
        if not f.size:
            codes.append(FieldCode(CODED))
            zs.append(np.zeros(0, np.uint32))
            continue
        centre = _centre(v, f)
        z = to_z(v, centre, f)
        if f.plane is not None and f.size >= 64 and _incompressible(z):
            stored += v.astype(np.int8).tobytes()
            codes.append(FieldCode(STORED))
            zs.append(z)
            continue
        code = plan_field(f, z, 0)
        code.centre = centre
        if code.mode == CODED:
            key = None if f.plane is None else f.plane - f.spec.dtype.itemsize
            code.table_set = sets.setdefault(key, len(sets))
        codes.append(code)
        zs.append(z)
    active = [i for i, c in enumerate(codes) if c.mode == CODED and fields[i].size]
    largest = max((int(zs[i].max()) for i in active), default=0)
    total = sum(fields[i].size for i in active)
    scheme = choose_scheme(largest, total)

    raw = PREVIOUS_CLASSES * ACTIVITIES
    histograms = [np.zeros((raw, 256), np.int64) for _ in sets]
    nonzeros = 0
    for i in active:
        tokens = scheme.split(zs[i])[0]
        key = raw_contexts(fields[i], codes[i]).astype(np.int64) << 8
        key |= tokens
        h = np.bincount(key, minlength=raw << 8)
        histograms[codes[i].table_set] += h.reshape(raw, 256)
        nonzeros += int(np.count_nonzero(tokens))
    body = Body(codes, scheme=scheme)
    body.maps, body.sparse = build_maps(histograms, 3.0)
    body.maps = [m for m in body.maps]

    placements = {}
    for i in active:
        clusters = clusters_of(fields[i], codes[i], body.maps)
        placements[i] = Placement.of(clusters, body.sparse)
    dense_symbols = sum(len(p.dense_cluster) for p in placements.values())
    work = 2 * nonzeros + dense_symbols
    body.serial = work <= 2 * _SERIAL_SYMBOLS
    if body.serial:
        write_body(coder, body, fields)
        if active:
            symbols = collect([placements[i] for i in active], [zs[i] for i in active])
            cluster = np.concatenate([placements[i].dense_cluster for i in active])
            write_serial(coder, symbols, cluster, body.sparse)
        return stored
    return _encode_lanes(coder, body, fields, zs, active, placements) + stored


def _encode_lanes(
    coder: AdaptiveEncoder,
    body: Body,
    fields: list[Field],
    zs: list[NDArray[Any]],
    active: list[int],
    placements: dict[int, Placement],
) -> bytes:
    groups: list[list[int]] = []
    weight = 0
    for i in active:
        size = int(np.count_nonzero(zs[i])) + len(placements[i].dense_cluster)
        if (
            not groups
            or weight + size > _OWN_SEGMENT
            or fields[i].bits != fields[groups[-1][0]].bits
        ):
            groups.append([])
            weight = 0
            body.codes[i].starts_segment = True
        groups[-1].append(i)
        weight += size
    streams = []
    for group in groups:
        symbols = collect([placements[i] for i in group], [zs[i] for i in group])
        cluster = np.concatenate([placements[i].dense_cluster for i in group])
        streams.append(SymbolStream(body, symbols, cluster))
    count = len(body.sparse) + int(body.sparse.sum())
    h = np.zeros(count << 8, np.int64)
    for s in streams:
        h += np.bincount((s.tables.astype(np.int64) << 8) | s.tokens, minlength=count << 8)
    body.tables = [quantised(row) if row.any() else [] for row in h.reshape(count, 256)]
    tables = rans_tables(body)
    data = []
    for group, stream in zip(groups, streams, strict=True):
        bits = _estimate(stream, tables)
        lanes = int(min(_MAX_LANES, max(1, bits / 8 / 200)))
        segment, part = write_segment(tables, stream, lanes)
        segment.fields = group
        body.segments.append(segment)
        data.append(part)
    write_body(coder, body, fields)
    return b"".join(data)


def _estimate(stream: SymbolStream, tables: Any) -> float:
    f = tables.frequencies
    key = stream.tables.astype(np.int64) * f.shape[1] + stream.tokens
    h = np.bincount(key, minlength=f.size)
    cost = tables.precision - np.log2(np.maximum(f.ravel(), 1))
    return float((h * cost).sum()) + float(stream.widths.sum(dtype=np.int64))


def _incompressible(z: NDArray[Any]) -> bool:
    h = np.bincount(z, minlength=256)
    p = h[h > 0] / len(z)
    return float(-(p * np.log2(p)).sum()) > 7.9 or (
        len(z) < 2048 and np.count_nonzero(h) > 0.6 * min(len(z), 256)
    )

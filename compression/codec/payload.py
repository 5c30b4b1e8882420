"""open_payload and decode: one payload to tensors, all at once or one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adaptive import AdaptiveDecoder
from .classes import CODED, CONSTANT, STORED, clusters_of
from .context import Context, Limits, TensorSpec
from .errors import CodecError, LimitExceeded, MalformedPayload
from .fields import Field, assemble, fields_of, from_z
from .head import read_body, read_specs
from .lanes import rans_tables, read_segment
from .rans import RansTables
from .serial import read_serial
from .symbols import Placement, distribute
from .wire import unseal

__all__ = ["Payload", "decode", "open_payload"]


class Payload(Mapping[str, NDArray[Any]]):
    """A payload whose tensors are decoded when asked for.

    The head is checked and read at construction; ``payload[name]`` decodes that tensor (and the
    small ones that share its segment, which are kept until another segment is asked for).
    """

    def __init__(self, payload: bytes, context: Context, limits: Limits) -> None:
        envelope = unseal(payload, context, limits)
        coder = AdaptiveDecoder(envelope.head)
        if context.layout is None:
            specs = read_specs(coder, limits)
        else:
            specs = dict(context.layout)
        _check_size(specs, limits, len(payload), trusted=context.layout is not None)
        self.specs: Mapping[str, TensorSpec] = specs
        self._by_tensor = fields_of(specs, context)
        self._fields: list[Field] = []
        self._index: dict[str, list[int]] = {}
        for name, group in self._by_tensor.items():
            self._index[name] = list(range(len(self._fields), len(self._fields) + len(group)))
            self._fields += group
        self._coder = coder
        self._body = read_body(coder, self._fields, limits, len(payload))
        self._rest = envelope.rest
        self._offsets: list[int] = []
        self._segment_of: dict[int, int] = {}
        self._stored_at: dict[int, int] = {}
        self._lay_out()
        self._tables: RansTables | None = None
        self._kept: tuple[int, dict[int, NDArray[Any]]] = (-1, {})

    def _lay_out(self) -> None:
        at = 0
        for s, segment in enumerate(self._body.segments):
            self._offsets.append(at)
            at += segment.nbytes
            for i in segment.fields:
                self._segment_of[i] = s
        for i, (f, code) in enumerate(zip(self._fields, self._body.codes, strict=True)):
            if f.size and code.mode == STORED:
                self._stored_at[i] = at
                at += f.size * f.width // 8
        if at != len(self._rest):
            raise MalformedPayload(f"the sections take {at} bytes, but {len(self._rest)} follow")

    def __getitem__(self, name: str) -> NDArray[Any]:
        fields = self._by_tensor[name]
        try:
            parts = [self._values(i) for i in self._index[name]]
            return assemble(parts, fields)
        except CodecError:
            raise
        except (ArithmeticError, ValueError, LookupError, TypeError) as error:
            raise MalformedPayload(f"tensor {name!r} cannot be decoded: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def _values(self, i: int) -> NDArray[Any]:
        f, code = self._fields[i], self._body.codes[i]
        dtype: Any = np.int32 if f.bits == 32 else np.int64
        if not f.size:
            return np.zeros(0, dtype)
        if code.mode == CONSTANT:
            return np.full(f.size, code.centre, dtype)
        if code.mode == STORED:
            at = self._stored_at[i]
            data = self._rest[at : at + f.size * f.width // 8]
            return np.frombuffer(data, f"<i{f.width // 8}").astype(dtype)
        segment = self._segment_of.get(i, 0)
        if self._kept[0] != segment:
            self._kept = (-1, {})
            self._kept = (segment, self._decode_segment(segment))
        return from_z(self._kept[1][i], code.centre, f)

    def _decode_segment(self, number: int) -> dict[int, NDArray[Any]]:
        body = self._body
        if body.serial:
            members = [
                i
                for i, (f, c) in enumerate(zip(self._fields, body.codes, strict=True))
                if f.size and c.mode == CODED
            ]
        else:
            members = body.segments[number].fields
        placements = []
        for i in members:
            clusters = clusters_of(self._fields[i], body.codes[i], body.maps)
            if len(clusters) and int(clusters.max()) >= len(body.sparse):
                raise MalformedPayload("a position belongs to no cluster")
            placements.append(Placement.of(clusters, body.sparse))
        bits = max(self._fields[i].bits for i in members)
        dense = np.concatenate([p.dense_cluster for p in placements])
        if body.serial:
            sizes = np.sum([p.counts for p in placements], axis=0)
            symbols = read_serial(self._coder, dense, body.sparse, sizes, bits)
        else:
            if self._tables is None:
                self._tables = rans_tables(body)
            segment = body.segments[number]
            at = self._offsets[number]
            data = self._rest[at : at + segment.nbytes]
            symbols = read_segment(body, self._tables, segment, data, dense, bits)
        return dict(zip(members, distribute(placements, symbols), strict=True))


def _check_size(
    specs: Mapping[str, TensorSpec], limits: Limits, payload_bytes: int, *, trusted: bool
) -> None:
    elements = sum(s.size for s in specs.values())
    nbytes = sum(s.nbytes for s in specs.values())
    if len(specs) > limits.tensors:
        raise LimitExceeded(f"{len(specs)} tensors, above Limits.tensors = {limits.tensors}")
    if elements > limits.elements:
        raise LimitExceeded(
            f"the payload states {elements} elements, above Limits.elements = {limits.elements}; "
            "raise that limit if you trust the sender"
        )
    if nbytes > limits.decoded_bytes:
        raise LimitExceeded(
            f"the payload states {nbytes} decoded bytes, above Limits.decoded_bytes = "
            f"{limits.decoded_bytes}; raise that limit if you trust the sender"
        )
    if not trusted and nbytes > limits.free_bytes + limits.expansion * payload_bytes:
        raise LimitExceeded(
            f"{payload_bytes} bytes of payload state {nbytes} decoded bytes, above "
            f"Limits.free_bytes = {limits.free_bytes} + Limits.expansion = {limits.expansion} "
            "for each; give the layout in the context, or raise a limit if you trust the sender"
        )


def open_payload(
    payload: bytes, *, context: Context | None = None, limits: Limits | None = None
) -> Payload:
    """Check a payload and return its tensors as a lazy mapping.

    Raises:
        CodecError: a subclass for each way in which the bytes may be wrong; see ``errors``.
    """
    try:
        return Payload(bytes(payload), context or Context(), limits or Limits())
    except CodecError:
        raise
    except (ArithmeticError, ValueError, LookupError, TypeError) as error:
        raise MalformedPayload(f"the payload cannot be read: {error}") from error


def decode(
    payload: bytes, *, context: Context | None = None, limits: Limits | None = None
) -> dict[str, NDArray[Any]]:
    """Return all tensors of a payload.

    Raises:
        CodecError: a subclass for each way in which the bytes may be wrong; see ``errors``.
    """
    opened = open_payload(payload, context=context, limits=limits)
    return {name: opened[name] for name in opened}

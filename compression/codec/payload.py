"""open_payload and decode: one payload to tensors, all at once or one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .container.forms import read_copies, read_forms
from .container.head import read_body, read_specs
from .container.wire import unseal
from .context import Context, Limits, TensorSpec, check_dtype
from .entropy.adaptive import AdaptiveDecoder
from .entropy.lanes import rans_tables, read_segment
from .entropy.packs import Pack, member_of, unpack
from .entropy.rans import RansTables
from .entropy.serial import SerialModels, read_serial
from .entropy.symbols import FieldValues, Placement, Symbols, distribute
from .entropy.tokens import zigzag
from .errors import CodecError, LimitExceeded, MalformedPayload
from .modelling.classes import (
    CONSTANT,
    STORED,
    Classifier,
    flip_signs,
    neighbour_sums,
    phase_slice,
)
from .modelling.copies import expand_copies
from .modelling.fields import Field, assemble, check_width, from_z, integers_at
from .modelling.forms import Equal, Form, Packed, all_fields, expand, parted

__all__ = ["Payload", "decode", "open_payload"]


_CHUNK = 1 << 17
# What numpy and Python raise on values that no check foresaw.
_FOREIGN = (ArithmeticError, ValueError, LookupError, TypeError, MemoryError)


def _wrapped(error: Exception, what: str) -> CodecError:
    """Return the error to raise for one of _FOREIGN."""
    if isinstance(error, MemoryError):
        return LimitExceeded(
            f"{what} needs more memory than there is; lower Limits.decoded_bytes to refuse earlier"
        )
    return MalformedPayload(f"{what} cannot be decoded: {error}")


class Payload(Mapping[str, NDArray[Any]]):
    """A payload whose tensors are decoded when asked for.

    The head is checked and read at construction; ``payload[name]`` decodes that tensor (and the
    small ones that share its segments, which are kept until another group is asked for). Not
    for concurrent use by several threads.
    """

    def __init__(self, payload: bytes, context: Context, limits: Limits) -> None:
        envelope = unseal(payload, context, limits)
        coder = AdaptiveDecoder(envelope.head)
        specs: dict[str, TensorSpec]
        if context.layout is None:
            specs = read_specs(coder, limits)
        else:
            specs = dict(context.layout)
            for name, spec in specs.items():
                check_dtype(name, spec.dtype)
        _check_size(specs, limits, len(payload), trusted=context.layout is not None)
        self.specs: Mapping[str, TensorSpec] = specs
        self._copies = read_copies(coder, specs, context)
        self._forms: Mapping[str, Form] = {}
        self._packs: list[Pack] = []
        if envelope.forms:
            self._forms, self._packs = read_forms(coder, specs, context, self._copies)
        self._by_tensor = all_fields(specs, context, self._copies, self._forms)
        self._fields: list[Field] = []
        self._index: dict[str, list[int]] = {}
        for name, group in self._by_tensor.items():
            self._index[name] = list(range(len(self._fields), len(self._fields) + len(group)))
            self._fields += group
        self._coder = coder
        self._rest = envelope.rest
        self._body = read_body(coder, self._fields, limits, self._rest)
        self._offsets: list[int] = []
        self._group_of: dict[int, int] = {}
        self._first_segment: list[int] = []
        self._stored_at: dict[int, int] = {}
        self._pack_at: list[int] = []
        # Kept, so that tensors which lead to the same one take its time once.
        self._unpacked: dict[int, bytes] = {}
        self._sources: dict[str, NDArray[Any]] = {}
        self._most_steps, self._steps = limits.steps, 0
        self._tables: RansTables | None = None
        # Serial symbols can be read once only, as the coder's state moves on.
        self._serial_read = False
        self._serial_left = limits.serial_symbols
        self._counted: set[int] = set()
        self._kept: tuple[int, dict[int, FieldValues]] = (-1, {})
        self._lay_out()

    def __getitem__(self, name: str) -> NDArray[Any]:
        if name not in self.specs:
            raise KeyError(name)
        try:
            return self._tensor(name)
        except _FOREIGN as error:
            raise _wrapped(error, f"tensor {name!r}") from error

    def _tensor(self, name: str) -> NDArray[Any]:
        spec, form = self.specs[name], self._forms.get(name)
        if isinstance(form, Equal):
            if form.source not in self._sources:
                self._sources[form.source] = self._tensor(form.source)
            return self._sources[form.source].reshape(spec.shape).copy()
        if name in self._sources:
            return self._sources[name].copy()
        if isinstance(form, Packed):
            return self._of_pack(form.number, name)
        parts = self.parts(name)
        if form is not None:
            return expand(form, parts, spec)
        return parts[0] if len(parts) == 1 else expand_copies(parts[0], parts[1], spec)

    def _of_pack(self, number: int, name: str) -> NDArray[Any]:
        one = self._packs[number]
        specs = [self.specs[member] for member in one.members]
        if number not in self._unpacked:
            at = self._pack_at[number]
            size = sum(spec.nbytes for spec in specs)
            self._unpacked[number] = unpack(self._rest[at : at + one.nbytes], one.coder, size)
        return member_of(self._unpacked[number], one.shuffled, specs, one.members.index(name))

    def parts(self, name: str) -> list[NDArray[Any]]:
        """Return what is coded of a tensor: itself, or what its form or its rows consist of."""
        values = (self._values(i) for i in self._index[name])
        return [assemble(values, part) for part in parted(self._by_tensor[name])]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def _lay_out(self) -> None:
        body = self._body
        at, first = body.side_bytes, 0
        for g, group in enumerate(body.groups):
            self._first_segment.append(first)
            first += 1 + max(body.codes[i].depth for i in group)
            for i in group:
                self._group_of[i] = g
        for segment in body.segments:
            self._offsets.append(at)
            at += segment.nbytes
        for i, (f, code) in enumerate(zip(self._fields, body.codes, strict=True)):
            if f.size and code.mode == STORED:
                self._stored_at[i] = at
                at += f.size * f.width // 8
        for one in self._packs:
            self._pack_at.append(at)
            at += one.nbytes
        if at != len(self._rest):
            raise MalformedPayload(f"the sections take {at} bytes, but {len(self._rest)} follow")

    def _admit(self, steps: int) -> None:
        """Count the steps of a segment; LimitExceeded, and nothing counted, if they are too many.

        Only what is let in counts: tensors read before can be read again.
        """
        if self._steps + steps > self._most_steps:
            raise LimitExceeded(
                f"the payload's segments take more than Limits.steps = {self._most_steps} steps; "
                "raise that limit if you trust the sender"
            )
        self._steps += steps

    def nonzeros(self, name: str) -> tuple[NDArray[Any], NDArray[Any]]:
        """Where a tensor is not zero, and its values there.

        Of an integer tensor that is mostly zeros this takes less time and memory than the tensor.

        Returns:
            Indices of coded positions (see :meth:`positions`), in no particular order; and the
            values there, in the tensor's dtype.

        Raises:
            CodecError: as reading the tensor does.
        """
        if name not in self.specs:
            raise KeyError(name)
        i, formed = self._index[name][0] if self._index[name] else -1, name in self._forms
        dense = formed or name in self._copies or self.specs[name].dtype.kind not in "iu"
        if dense or self._body.codes[i].centre:
            flat, selected = self[name].reshape(-1), self.positions(name)
            flat = flat if selected is None else flat[selected]
            at = np.flatnonzero(flat)
            return at, flat[at]
        f = self._fields[i]
        try:
            at, z = self._coded(i).nonzeros()
            return at, integers_at(from_z(z, 0, f), at, f)
        except _FOREIGN as error:
            raise _wrapped(error, f"tensor {name!r}") from error

    def positions(self, name: str) -> NDArray[np.int64] | None:
        """Flat indices of a tensor's coded positions: those under its mask. None: all of them."""
        whole = name in self._copies or name in self._forms
        return None if whole else self._by_tensor[name][0].selected

    def _values(self, i: int) -> NDArray[Any]:
        return from_z(self._coded(i).whole(), self._body.codes[i].centre, self._fields[i])

    def _coded(self, i: int) -> FieldValues:
        """Values of a field less its centre, as zigzag."""
        f, code = self._fields[i], self._body.codes[i]
        if not f.size or code.mode == CONSTANT:
            return FieldValues.zeros(f.size, f.bits)
        if code.mode == STORED:
            at = self._stored_at[i]
            data = self._rest[at : at + f.size * f.width // 8]
            stored = np.frombuffer(data, f"<i{f.width // 8}")
            return FieldValues.all_of(zigzag(stored.astype(f"i{f.bits // 8}")))
        group = self._group_of[i]
        if self._kept[0] != group:
            if self._body.serial and self._serial_read:
                raise MalformedPayload("an earlier tensor of this payload could not be decoded")
            self._serial_read = True
            if len(self._body.groups[group]) == 1 and not self._body.serial:
                return self._decode_group(group)[i]
            self._kept = (-1, {})
            self._kept = (group, self._decode_group(group))
        return self._kept[1][i]

    def _decode_group(self, number: int) -> dict[int, FieldValues]:
        body = self._body
        members = body.groups[number]
        bits = max(self._fields[i].bits for i in members)
        depths = {i: body.codes[i].depth for i in members}
        looks = {i: Classifier(self._fields[i], body.codes[i]) for i in members}
        whole: dict[int, NDArray[Any]] = {}
        found: dict[int, FieldValues] = {}
        models = SerialModels(self._coder, len(body.sparse)) if body.serial else None
        for phase in range(1 + max(depths.values())):
            index = self._first_segment[number] + phase
            segment = body.segments[index]
            placements, around = [], {}
            for i, _ in segment.parts:
                if phase:
                    around[i] = neighbour_sums(whole[i], depths[i], phase)
                table = body.maps[body.codes[i].table_set]
                clusters = looks[i].look_up(table, phase, around.get(i))
                if len(clusters) and int(clusters.max()) >= len(body.sparse):
                    raise MalformedPayload("a position belongs to no cluster")
                placements.append(Placement.of(clusters, body.sparse))
            parts = [p.dense_cluster for p in placements]
            dense = parts[0] if len(parts) == 1 else np.concatenate(parts)
            del clusters, parts
            sizes = np.sum([p.counts for p in placements], axis=0)
            if models is not None:
                symbols = read_serial(
                    self._coder, models, dense, body.sparse, sizes, bits, self._serial_left
                )
                self._serial_left -= len(symbols.dense) + 2 * len(symbols.gaps)
            else:
                if (sizes[body.sparse] < segment.counts).any():
                    raise MalformedPayload("a cluster has more non-zeros than positions")
                symbols = self._read_lanes(index, dense, bits)
            for (i, _), values in zip(segment.parts, distribute(placements, symbols), strict=True):
                f = self._fields[i]
                if not depths[i]:
                    found[i] = values
                    continue
                z = values.whole()
                if not phase:
                    whole[i] = np.zeros(f.size, np.uint32)
                check_width(z, f)
                part = whole[i][phase_slice(depths[i], phase)]
                for s in range(0, len(z), _CHUNK):  # in chunks, to bound temporary arrays
                    piece = z[s : s + _CHUNK]
                    if phase:
                        piece = flip_signs(piece, around[i][s : s + _CHUNK], f.width)
                    part[s : s + _CHUNK] = piece
            del placements, dense, symbols, around
        return found | {i: FieldValues.all_of(z) for i, z in whole.items()}

    def _read_lanes(self, index: int, dense: NDArray[np.uint8], bits: int) -> Symbols:
        if self._tables is None:
            self._tables = rans_tables(self._body)
        segment, at = self._body.segments[index], self._offsets[index]
        if index not in self._counted:
            self._admit(segment.steps(len(dense)))
            self._counted.add(index)
        data = self._rest[at : at + segment.nbytes]
        return read_segment(self._body, self._tables, segment, data, dense, bits)


def _check_size(
    specs: Mapping[str, TensorSpec], limits: Limits, payload_bytes: int, *, trusted: bool
) -> None:
    elements = sum(s.size for s in specs.values())
    nbytes = sum(max(s.nbytes, 4 * s.size) for s in specs.values())
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
    except _FOREIGN as error:
        raise _wrapped(error, "the payload") from error


def decode(
    payload: bytes, *, context: Context | None = None, limits: Limits | None = None
) -> dict[str, NDArray[Any]]:
    """Return all tensors of a payload.

    Raises:
        CodecError: a subclass for each way in which the bytes may be wrong; see ``errors``.
    """
    opened = open_payload(payload, context=context, limits=limits)
    return {name: opened[name] for name in opened}

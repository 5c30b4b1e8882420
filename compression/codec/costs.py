"""Where a payload's bytes go: by section, and by tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .container.forms import read_copies, read_forms
from .container.metering import Cell, HeadMeter, measured_body, measured_specs, side_bits
from .container.wire import unseal
from .context import Context, Limits, TensorSpec
from .entropy.packs import Pack
from .modelling.classes import STORED
from .modelling.forms import Form, all_fields
from .payload import open_payload
from .shares import Shares

__all__ = ["PayloadCosts", "TensorCost", "measure_costs"]

SECTIONS = (
    "envelope", "layout", "coding", "levels", "clusters", "tables", "directory", "symbols",
    "segments", "stored", "packs",
)  # fmt: skip


@dataclass
class TensorCost:
    """Bytes of one tensor.

    Attributes:
        spec: its dtype and shape.
        sections: section to bytes; zeros are left out.
        shared: whether its symbols lie among those of other tensors, so that ``symbols`` or
            ``segments`` is its share by ideal code length, and not a length.
    """

    spec: TensorSpec
    sections: dict[str, int] = field(default_factory=dict)
    shared: bool = False

    @property
    def nbytes(self) -> int:
        """All of its bytes."""
        return sum(self.sections.values())


@dataclass(frozen=True)
class PayloadCosts:
    """Bytes of a payload; all sums agree with its length exactly.

    Attributes:
        nbytes: the payload's length.
        sections: section to bytes, in the order of the payload. ``envelope``: magic, version,
            lengths, context tag, checksum. In the head: ``layout`` (names, dtypes, shapes),
            ``coding`` (how each field is coded), ``levels`` of rows and columns, ``clusters``,
            ``tables``, ``directory`` of the segments, ``symbols`` of a small payload. After the
            head: ``levels`` and ``tables`` of a large payload, ``segments``, ``stored``, ``packs``.
        tensors: name to its bytes.
    """

    nbytes: int
    sections: dict[str, int]
    tensors: dict[str, TensorCost]

    @property
    def common(self) -> int:
        """Bytes that belong to no tensor: envelope, clusters, tables."""
        return self.nbytes - sum(cost.nbytes for cost in self.tensors.values())


def measure_costs(
    payload: bytes, *, context: Context | None = None, limits: Limits | None = None
) -> PayloadCosts:
    """Say what every section and every tensor of a payload costs, in bytes.

    A tensor with segments of its own costs exactly those. Tensors that share a segment share its
    bytes in proportion to the ideal code lengths of their symbols: under the segment's tables,
    zeros of sparse clusters under the share of zeros there. The head is measured by decoding it.

    Raises:
        CodecError: a subclass for each way in which the bytes may be wrong; see ``errors``.
    """
    context, limits = context or Context(), limits or Limits()
    tensors = open_payload(payload, context=context, limits=limits)  # checks everything first
    envelope = unseal(payload, context, limits)
    meter = HeadMeter(envelope.head)
    named: dict[Cell, float] = {}
    if context.layout is None:
        _, named = measured_specs(meter, limits)
    first = len(meter.notes)
    kept = read_copies(meter, tensors.specs, context)
    forms: dict[str, Form] = {}
    packs: list[Pack] = []
    if envelope.forms:
        forms, packs = read_forms(meter, tensors.specs, context, kept)
    named["coding", None] = sum(cost for _, cost in meter.notes[first:])
    by_tensor = all_fields(tensors.specs, context, kept, forms)
    fields = [f for group in by_tensor.values() for f in group]
    owner = [number for number, group in enumerate(by_tensor.values()) for _ in group]
    body, coded = measured_body(meter, fields, limits, envelope.rest)
    shares = Shares(body, by_tensor, tensors)

    bits: dict[Cell, float] = defaultdict(float, named)
    for (section, part), cost in coded.items():
        if section == "directory" and part is not None:
            for tensor, share in shares.of_segment(part).items():
                bits[section, tensor] += cost * share
        else:
            bits[section, None if part is None else owner[part]] += cost
    if body.serial and body.segments:
        left = max(8.0 * len(envelope.head) - meter.spent, 0.0)
        for tensor, share in shares.of_serial().items():
            bits["symbols", tensor] += left * share
    cells = _head_bytes(len(envelope.head), bits)
    if body.static:
        for (section, part), nbytes in apportioned(body.side_bytes, side_bits(body)).items():
            cells[section, None if part is None else owner[part]] += nbytes
    cells["envelope", None] = len(payload) - len(envelope.head) - len(envelope.rest)
    if not body.serial:
        for index, segment in enumerate(body.segments):
            for tensor, nbytes in apportioned(segment.nbytes, shares.of_segment(index)).items():
                cells["segments", tensor] += nbytes
    for i, (f, code) in enumerate(zip(fields, body.codes, strict=True)):
        if f.size and code.mode == STORED:
            cells["stored", owner[i]] += f.size * f.width // 8

    number_of = {name: number for number, name in enumerate(tensors.specs)}
    for one in packs:
        weights = {number_of[name]: tensors.specs[name].nbytes for name in one.members}
        for tensor, nbytes in apportioned(one.nbytes, weights).items():
            cells["packs", tensor] += nbytes
    sections = dict.fromkeys(SECTIONS, 0)
    costs = [TensorCost(spec) for spec in tensors.specs.values()]
    for (name, number), nbytes in cells.items():
        sections[name] += nbytes
        if number is not None and nbytes:
            costs[number].sections[name] = nbytes
    together = (number_of[n] for one in packs if len(one.members) > 1 for n in one.members)
    for number in (*shares.sharing, *together):
        costs[number].shared = True
    return PayloadCosts(len(payload), sections, dict(zip(tensors.specs, costs, strict=True)))


def _head_bytes(nbytes: int, bits: Mapping[Cell, float]) -> defaultdict[Cell, int]:
    """Bits of the head as whole bytes that sum to its length: by section first, then within."""
    by_section: dict[str, dict[Cell, float]] = defaultdict(dict)
    for cell, cost in bits.items():
        by_section[cell[0]][cell] = cost
    totals = {name: sum(parts.values()) for name, parts in by_section.items()}
    result: defaultdict[Cell, int] = defaultdict(int)
    for name, part in apportioned(nbytes, totals).items():
        result.update(apportioned(part, by_section[name]))
    return result


def apportioned(total: int, weights: Mapping[Any, float]) -> dict[Any, int]:
    """Split a number into integers in proportion to weights: by largest remainders."""
    whole = sum(weights.values())
    exact = {key: total * (w / whole if whole else 1 / len(weights)) for key, w in weights.items()}
    result = {key: int(value) for key, value in exact.items()}
    left = total - sum(result.values())
    for key in sorted(exact, key=lambda k: result[k] - exact[k])[: max(left, 0)]:
        result[key] += 1
    return result

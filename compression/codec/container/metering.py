"""What each decision of a head costs, measured by decoding it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from ..context import Limits, TensorSpec
from ..entropy.adaptive import AdaptiveDecoder, AdaptiveEncoder
from ..modelling.fields import Field
from .head import Body, HeadModels, read_body, read_specs
from .levels import centred
from .side import SideWriter

__all__ = ["Cell", "HeadMeter", "measured_body", "measured_specs", "side_bits"]

Cell = tuple[str, int | None]
"""Section, and the tensor, field or segment it belongs to (None: to all)."""

# Decisions by the attribute of `HeadModels` that codes them.
_OF_A_FIELD = {"mode", "centre", "set", "base", "depth", "group"}
_OF_A_SEGMENT = {"lanes", "state", "words", "raw", "count", "tail"}
_OF_CLUSTERS = {"present", "range", "cluster", "general"}
# The contexts of `HeadModels.flag` have meanings of their own (docs/format.md, section 4).
_FLAGS = ("coding", "coding", "coding", "coding", "clusters", "tables", "tables", "tables")


class HeadMeter(AdaptiveDecoder):
    """A decoder that notes the bits which every call took, by the first context of its model."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.notes: list[tuple[int, float]] = []
        self._inside = False
        self._before = 0.0

    @property
    def spent(self) -> float:
        """Bits taken in so far: what was shifted in, less what the range still leaves open."""
        return 8.0 * (self._pos - 5) + 40 - math.log2(self._range)

    def _note(self, first: int) -> None:
        self.notes.append((first, self.spent - self._before))
        self._before = self.spent

    def bit(self, i: int) -> int:
        """Decode one decision."""
        if self._inside:
            return super().bit(i)
        value = super().bit(i)
        self._note(i)
        return value

    def uint(self, first: int) -> int:
        """Decode an integer."""
        outer, self._inside = self._inside, True
        value = super().uint(first)
        self._inside = outer
        if not outer:
            self._note(first)
        return value

    def levels(self, models: list[int], middle: int, most: int, count: int) -> bytes:
        """Decode levels."""
        self._inside = True
        value = super().levels(models, middle, most, count)
        self._inside = False
        self._note(models[0])
        return value


def measured_specs(
    meter: HeadMeter, limits: Limits
) -> tuple[dict[str, TensorSpec], dict[Cell, float]]:
    """Read the layout; return it with the bits of each tensor's name, dtype and shape."""
    specs = read_specs(meter, limits)
    notes = iter(meter.notes)
    bits: dict[Cell, float] = defaultdict(float)
    bits["layout", None] = next(notes)[1]
    for number, (name, spec) in enumerate(specs.items()):
        # Length, eight decisions for each byte, kind, dimensions.
        calls = 2 + 8 * len(name.encode("utf-8", "surrogatepass")) + len(spec.shape)
        bits["layout", number] = sum(next(notes)[1] for _ in range(calls))
    return specs, bits


def measured_body(
    meter: HeadMeter, fields: Sequence[Field], limits: Limits, rest: bytes
) -> tuple[Body, dict[Cell, float]]:
    """Read the body's head; return it with the bits of its sections.

    Sections: ``coding`` and ``levels`` by field, ``directory`` by segment, ``clusters`` and
    ``tables`` as a whole.
    """
    first, done = len(meter.p), len(meter.notes)
    body = read_body(meter, list(fields), limits, rest)
    owners = _owners(first)
    sized = iter([i for i, f in enumerate(fields) if f.size])
    bits: dict[Cell, float] = defaultdict(float)
    field, segment, in_tail = -1, -1, False
    starts = sorted(owners)
    for context, cost in meter.notes[done:]:
        owner = starts[bisect_right(starts, context) - 1]
        name = owners[owner]
        if name == "mode":
            field = next(sized)
        elif name == "lanes":
            segment += not in_tail
            in_tail = False
        elif name == "tail":
            in_tail = body.segments[segment].tail_symbols > 0
        if name == "flag":
            section = _FLAGS[context - owner]
            bits[section, field if section == "coding" and context > owner else None] += cost
        elif name == "level":
            bits["levels", field] += cost
        elif name in _OF_A_FIELD:
            bits["coding", field] += cost
        elif name in _OF_A_SEGMENT:
            bits["directory", segment] += cost
        else:
            bits["clusters" if name in _OF_CLUSTERS else "tables", None] += cost
    return body, bits


def side_bits(body: Body) -> dict[Cell, float]:
    """Ideal bits of static side information: ``levels`` by field, ``tables`` as a whole."""
    writer = SideWriter()
    cells: list[Cell] = []
    for number, code in enumerate(body.codes):
        for levels in (code.rows, code.columns):
            if levels is not None:
                writer.add_levels(centred(levels)[0])
                cells.append(("levels", number))
    models = HeadModels(AdaptiveEncoder())
    for kind, logs in zip(models.kinds(body.sparse), body.tables, strict=not body.serial):
        if logs:
            writer.add_table(kind, logs)
            cells.append(("tables", None))
    bits: dict[Cell, float] = defaultdict(float)
    for cell, cost in zip(cells, writer.bits(), strict=True):
        bits[cell] += cost
    return bits


def _owners(first: int) -> dict[int, str]:
    """First context of every model of a head whose contexts start at ``first``, to its name."""
    coder = AdaptiveEncoder()
    coder.contexts(first)
    models = HeadModels(coder)
    return {start: name for name, part in vars(models).items() for start in _starts(part)}


def _starts(part: Any) -> Iterator[int]:
    if isinstance(part, int):
        yield part
        return
    for item in part if isinstance(part, list) else vars(part).values():
        yield from _starts(item)

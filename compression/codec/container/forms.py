"""What the head says of forms: which tensor has which, and of packs."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from ..context import Context, TensorSpec
from ..entropy.adaptive import UINT_CONTEXTS, AdaptiveDecoder, AdaptiveEncoder
from ..entropy.packs import CODERS, Pack
from ..errors import MalformedPayload
from ..modelling.copies import may_have_copies
from ..modelling.forms import (
    MOST_COLOURS,
    PER_COLUMN,
    WHOLE,
    Equal,
    Form,
    Lattice,
    Packed,
    Palette,
    Rounded,
    may_be_rounded,
    may_have_form,
)

__all__ = ["read_copies", "read_forms", "write_copies", "write_forms"]

_PLAIN, _EQUAL, _LATTICE, _PALETTE, _PACKED = range(5)


def write_copies(
    coder: AdaptiveEncoder,
    specs: Mapping[str, TensorSpec],
    context: Context,
    kept: Mapping[str, int],
) -> None:
    """Write which tensors have copied rows, and how many rows of these were kept."""
    flag, number = coder.contexts(1), coder.contexts(UINT_CONTEXTS)
    for name, spec in specs.items():
        if may_have_copies(name, spec, context):
            coder.bit(flag, name in kept)
            if name in kept:
                coder.uint(number, kept[name])


def read_copies(
    coder: AdaptiveDecoder, specs: Mapping[str, TensorSpec], context: Context
) -> dict[str, int]:
    """Read what :func:`write_copies` wrote."""
    flag, number = coder.contexts(1), coder.contexts(UINT_CONTEXTS)
    kept: dict[str, int] = {}
    for name, spec in specs.items():
        if may_have_copies(name, spec, context) and coder.bit(flag):
            kept[name] = coder.uint(number)
            if not 0 < kept[name] < spec.shape[0]:
                raise MalformedPayload(
                    f"tensor {name!r} keeps {kept[name]} of its {spec.shape[0]} rows"
                )
    return kept


class _Models:
    """Contexts of everything that is said of forms."""

    def __init__(self, coder: AdaptiveEncoder | AdaptiveDecoder) -> None:
        self.kind, self.source, self.axis, self.count, self.pack, self.length, self.zeros = (
            coder.contexts(UINT_CONTEXTS) for _ in range(7)
        )
        self.signed, self.shuffled = coder.contexts(1), coder.contexts(1)


def write_forms(
    coder: AdaptiveEncoder,
    specs: Mapping[str, TensorSpec],
    context: Context,
    kept: Mapping[str, int],
    forms: Mapping[str, Form],
    packs: list[Pack],
) -> None:
    """Write the form of every tensor that may have one, and the packs."""
    m = _Models(coder)
    place = {name: number for number, name in enumerate(specs)}
    begun = 0
    for name, spec in specs.items():
        form = forms.get(name)
        if may_be_rounded(name, spec, context):
            coder.uint(m.zeros, form.zeros if isinstance(form, Rounded) else 0)
            continue
        if not may_have_form(name, spec, context) or name in kept:
            continue
        if form is None:
            coder.uint(m.kind, _PLAIN)
        elif isinstance(form, Equal):
            coder.uint(m.kind, _EQUAL)
            coder.uint(m.source, place[name] - place[form.source] - 1)
        elif isinstance(form, Lattice):
            coder.uint(m.kind, _LATTICE)
            coder.uint(m.axis, form.axis)
            coder.bit(m.signed, form.signed)
            if form.axis == WHOLE:
                coder.bits(int.from_bytes(struct.pack(">d", form.step), "big"), 64)
        elif isinstance(form, Palette):
            coder.uint(m.kind, _PALETTE)
            coder.uint(m.count, form.count - 1)
        elif isinstance(form, Packed):
            coder.uint(m.kind, _PACKED)
            coder.uint(m.pack, 0 if form.number == begun else begun - form.number)
            begun += form.number == begun
    for one in packs:
        coder.uint(m.axis, one.coder)
        coder.bit(m.shuffled, one.shuffled)
        coder.uint(m.length, one.nbytes)


def read_forms(
    coder: AdaptiveDecoder,
    specs: Mapping[str, TensorSpec],
    context: Context,
    kept: Mapping[str, int],
) -> tuple[dict[str, Form], list[Pack]]:
    """Read what :func:`write_forms` wrote, checked against the layout."""
    m = _Models(coder)
    names = list(specs)
    forms: dict[str, Form] = {}
    members: list[list[str]] = []
    for number, (name, spec) in enumerate(specs.items()):
        if may_be_rounded(name, spec, context):
            zeros = coder.uint(m.zeros)
            if zeros >= 8 * spec.dtype.itemsize:
                raise MalformedPayload(f"tensor {name!r} has {zeros} zero bits in each element")
            if zeros:
                forms[name] = Rounded(zeros)
            continue
        if not may_have_form(name, spec, context) or name in kept:
            continue
        kind = coder.uint(m.kind)
        if kind == _EQUAL:
            source = number - coder.uint(m.source) - 1
            forms[name] = Equal(names[_checked_source(names, specs, forms, number, source)])
        elif kind == _LATTICE:
            axis, signed = coder.uint(m.axis), bool(coder.bit(m.signed))
            if spec.dtype.kind != "f" or axis > PER_COLUMN or (axis and len(spec.shape) < 2):
                raise MalformedPayload(f"tensor {name!r} cannot be a lattice of axis {axis}")
            step = 0.0
            if axis == WHOLE:
                step = struct.unpack(">d", coder.bits(64).to_bytes(8, "big"))[0]
            forms[name] = Lattice(axis, signed, step)
        elif kind == _PALETTE:
            count = coder.uint(m.count) + 1
            if spec.dtype.kind == "b" or count > min(MOST_COLOURS, spec.size):
                raise MalformedPayload(f"tensor {name!r} has a palette of {count} values")
            forms[name] = Palette(count)
        elif kind == _PACKED:
            back = coder.uint(m.pack)
            if back > len(members):
                raise MalformedPayload(f"tensor {name!r} is in a pack that does not exist")
            if not back:
                members.append([])
            at = len(members) - (back or 1)
            members[at].append(name)
            forms[name] = Packed(at)
        elif kind != _PLAIN:
            raise MalformedPayload(f"tensor {name!r} has the unknown form {kind}")
    packs = []
    for held in members:
        chosen = coder.uint(m.axis)
        if chosen >= len(CODERS):
            raise MalformedPayload(f"a pack has the unknown coder {chosen}")
        shuffled = bool(coder.bit(m.shuffled))
        packs.append(Pack(chosen, shuffled, coder.uint(m.length), held))
    return forms, packs


def _checked_source(
    names: list[str],
    specs: Mapping[str, TensorSpec],
    forms: Mapping[str, Form],
    number: int,
    source: int,
) -> int:
    """MalformedPayload unless a tensor may be equal to the one of that number."""
    name, spec = names[number], specs[names[number]]
    if source < 0:
        raise MalformedPayload(f"tensor {name!r} is equal to one that does not exist")
    other = specs[names[source]]
    if isinstance(forms.get(names[source]), Equal) or (other.dtype, other.size) != (
        spec.dtype,
        spec.size,
    ):
        raise MalformedPayload(f"tensor {name!r} cannot be equal to {names[source]!r}")
    return source

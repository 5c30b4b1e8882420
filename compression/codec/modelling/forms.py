"""Forms: what a tensor is coded as where it is not coded as its own values.

A tensor may be *equal* to an earlier one, a *lattice* (integers times steps, bit for bit), a
*palette* (indices into a few values), or *packed* together with others by a coder of the standard
library. Its *parts* are tensors of their own, which the fields are made of. Floats with a previous
value have one form only: *rounded*, which leaves out the low bits that all of them have as zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..context import Context, TensorSpec
from ..errors import MalformedPayload
from .copies import copied_fields
from .fields import CHUNK, Field, fields_of

__all__ = [
    "MOST_COLOURS",
    "PER_COLUMN",
    "PER_ROW",
    "WHOLE",
    "Equal",
    "Form",
    "Lattice",
    "Packed",
    "Palette",
    "Rounded",
    "all_fields",
    "expand",
    "lattice_values",
    "may_be_rounded",
    "may_have_form",
    "parted",
    "rows_and_columns",
]

MOST_COLOURS = 1 << 16
# What the steps of a lattice belong to.
WHOLE, PER_ROW, PER_COLUMN = 0, 1, 2


@dataclass(frozen=True)
class Equal:
    """Has the bits of an earlier tensor of the same dtype and size."""

    source: str


@dataclass(frozen=True)
class Lattice:
    """Floats that are integers times a step.

    Attributes:
        axis: one step for the whole, for each row, or for each column.
        signed: whether the integers tell minus zero: -1 stands for it, and -1 - k for -k.
        step: of the whole.
    """

    axis: int = WHOLE
    signed: bool = False
    step: float = 0.0


@dataclass(frozen=True)
class Palette:
    """Indices into ``count`` values."""

    count: int


@dataclass(frozen=True)
class Packed:
    """Lies in the pack of that number."""

    number: int


@dataclass(frozen=True)
class Rounded:
    """Floats whose lowest ``zeros`` bits are zero, as those of the previous value should be."""

    zeros: int


Form = Equal | Lattice | Palette | Packed | Rounded


def may_have_form(name: str, spec: TensorSpec, context: Context) -> bool:
    """Whether a tensor may have a form: it is not empty, and nothing conditions it."""
    return (
        spec.size > 0 and name not in (context.mask or {}) and name not in (context.previous or {})
    )


def may_be_rounded(name: str, spec: TensorSpec, context: Context) -> bool:
    """Whether a tensor may be `Rounded`: floats, not empty, with a previous value and no mask."""
    return (
        spec.size > 0
        and spec.dtype.kind == "f"
        and name not in (context.mask or {})
        and name in (context.previous or {})
    )


def rows_and_columns(spec: TensorSpec) -> tuple[int, int]:
    """First dimension and product of the others (a vector is one row)."""
    if len(spec.shape) < 2:
        return 1, spec.size
    return spec.shape[0], math.prod(spec.shape[1:])


def _part_specs(spec: TensorSpec, form: Form) -> list[TensorSpec]:
    if isinstance(form, Lattice):
        integers = TensorSpec(np.dtype(np.int32), spec.shape)
        if form.axis == WHOLE:
            return [integers]
        steps = rows_and_columns(spec)[form.axis - PER_ROW]
        return [TensorSpec(np.dtype(np.float64), (steps,)), integers]
    if isinstance(form, Palette):
        index = np.dtype(np.uint8 if form.count <= 256 else np.uint16)
        return [TensorSpec(spec.dtype, (form.count,)), TensorSpec(index, spec.shape)]
    return []


def all_fields(
    specs: Mapping[str, TensorSpec],
    context: Context,
    kept: Mapping[str, int],
    forms: Mapping[str, Form],
) -> dict[str, list[Field]]:
    """Return every tensor's fields; ``kept`` has the rows kept of those with copied rows."""
    rounded = {n: form for n, form in forms.items() if isinstance(form, Rounded)}
    plain = {n: s for n, s in specs.items() if n not in kept and (n not in forms or n in rounded)}
    found = fields_of(plain, context)
    result: dict[str, list[Field]] = {}
    for name, spec in specs.items():
        if name in kept:
            result[name] = copied_fields(name, spec, kept[name])
        elif name in rounded:
            result[name] = [replace(f, zeros=rounded[name].zeros) for f in found[name]]
        elif name in forms:
            parts = _part_specs(spec, forms[name])
            result[name] = [f for part in parts for f in fields_of({name: part}, Context())[name]]
        else:
            result[name] = found[name]
    return result


def parted(fields: Sequence[Field]) -> list[list[Field]]:
    """A tensor's fields by the part that they belong to."""
    groups: list[list[Field]] = []
    for f in fields:
        if f.plane:
            groups[-1].append(f)
        else:
            groups.append([f])
    return groups


def expand(form: Form, parts: Sequence[NDArray[Any]], spec: TensorSpec) -> NDArray[Any]:
    """The values of a tensor from its parts.

    Raises:
        MalformedPayload: a step is no positive number, or an index leads nowhere.
    """
    if isinstance(form, Rounded):
        return parts[0]
    if isinstance(form, Lattice):
        steps = np.array([form.step]) if form.axis == WHOLE else parts[0]
        if not (np.isfinite(steps).all() and (steps > 0).all()):
            raise MalformedPayload("a lattice step is not a positive number")
        return lattice_values(parts[-1], steps, form, spec)
    assert isinstance(form, Palette)
    colours, index = parts
    if int(index.max()) >= form.count:
        raise MalformedPayload(f"an index leads beyond the {form.count} values of a palette")
    return colours.take(index)


def lattice_values(
    integers: NDArray[Any], steps: NDArray[np.float64], form: Lattice, spec: TensorSpec
) -> NDArray[Any]:
    """Integers times steps, each product in float64 and rounded once to the tensor's dtype."""
    rows, columns = rows_and_columns(spec)
    grid = integers.reshape(rows, columns)
    out = np.empty((rows, columns), spec.dtype)
    some = max(1, CHUNK // columns)
    with np.errstate(over="ignore", under="ignore"):
        for r in range(0, rows, some):  # in chunks, to bound temporary arrays
            for c in range(0, columns, CHUNK):
                at = slice(r, r + some), slice(c, c + CHUNK)
                real = grid[at].astype(np.float64)
                if form.signed:
                    real = np.where(grid[at] < 0, -(-1.0 - real), real)
                if form.axis == WHOLE:
                    real *= steps[0]
                else:
                    real *= steps[at[0], None] if form.axis == PER_ROW else steps[None, at[1]]
                out[at] = real
    return out.reshape(spec.shape)

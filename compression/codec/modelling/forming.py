"""The encoder's search for forms. Decoders never run this."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..context import Context, TensorSpec
from .fields import CHUNK
from .forms import (
    MOST_COLOURS,
    PER_COLUMN,
    PER_ROW,
    WHOLE,
    Equal,
    Form,
    Lattice,
    Palette,
    Rounded,
    lattice_values,
    may_be_rounded,
    may_have_form,
    rows_and_columns,
)
from .planning import entropy_bits

__all__ = ["Formed", "choose_forms"]

_LEAST = 32  # elements; a step or a palette costs some bytes
_LEAST_EQUAL = 16
_PROBES = 64
_SAMPLE = 256
_COLOUR_SAMPLE = 1024
_COST_SAMPLE = 1 << 14
_FEW = 512  # values in that sample, of what may be a palette
_DENSE = 64  # reach of integers that have tokens of their own
_MOST_INTEGER = 1 << 20  # of a lattice; as many bits are no shorter than the float
_LEAST_LINE, _MOST_LINES = 32, 1 << 13  # elements for each step, and steps, where they are several
_EPSILON = {2: 2.0**-11, 4: 2.0**-24, 8: 2.0**-53}
_EUCLID, _CLEAR = 64, 16
_GAIN = 0.9
_LEAST_BITS = 64  # raw bits that zeros must save
_FLOATS = 1.05  # what bytes of few floats take at least, of what each would take by itself

Formed = tuple[Form, list[NDArray[Any]]]


def choose_forms(
    arrays: Mapping[str, NDArray[Any]], specs: Mapping[str, TensorSpec], context: Context
) -> dict[str, Formed]:
    """Return the forms that pay, each with its parts."""
    chosen: dict[str, Formed] = {}
    seen: dict[tuple[Any, ...], list[str]] = {}
    for name, spec in specs.items():
        if may_be_rounded(name, spec, context):
            previous = np.asarray((context.previous or {})[name])
            if (rounded := _rounded(arrays[name], previous)) is not None:
                chosen[name] = rounded
            continue
        if not may_have_form(name, spec, context):
            continue
        flat = np.ascontiguousarray(arrays[name]).reshape(-1)
        if spec.size >= _LEAST_EQUAL:
            raw = flat.view(f"u{flat.itemsize}")
            key = (spec.dtype, spec.size, raw[:: max(1, spec.size // _PROBES)].tobytes())
            others = seen.setdefault(key, [])
            source = next((o for o in others if _same(arrays[o], raw)), None)
            if source is not None:
                chosen[name] = (Equal(source), [])
                continue
            others.append(name)
        if spec.size < _LEAST or spec.dtype.kind == "b":
            continue
        found = _lattice(flat, spec) if spec.dtype.kind == "f" else None
        bits = np.inf if found is None else _lattice_bits(flat, found)
        palette, palette_bits = _palette(flat, spec)
        if palette is not None and palette_bits < bits:
            found, bits = palette, 0.0
        if found is not None and bits < np.inf:
            chosen[name] = found
    return chosen


def _same(other: NDArray[Any], bits: NDArray[Any]) -> bool:
    return np.array_equal(np.ascontiguousarray(other).reshape(-1).view(bits.dtype), bits)


def _rounded(array: NDArray[Any], previous: NDArray[Any]) -> Formed | None:
    """How many low bits are zero in all elements, now and before; None where that saves little."""
    if previous.shape != array.shape or previous.dtype.newbyteorder("=") != array.dtype:
        return None  # the fields refuse it
    new, old = (
        np.ascontiguousarray(a, array.dtype).reshape(-1).view(f"u{array.itemsize}")
        for a in (array, previous)
    )
    used = int(np.bitwise_or.reduce(new) | np.bitwise_or.reduce(old))
    zeros = (used & -used).bit_length() - 1
    if zeros < 1 or zeros * int(np.count_nonzero(new != old)) < _LEAST_BITS:
        return None
    return Rounded(zeros), [array]


def _lattice(flat: NDArray[Any], spec: TensorSpec) -> Formed | None:
    """Integers and steps whose products have the same bits; None where there are no such."""
    rows, columns = rows_and_columns(spec)
    grid = flat.reshape(rows, columns)
    step = _step_of(flat)
    if step is not None:
        return _exact(grid, np.array([step]), WHOLE, spec)
    for axis, lines in ((PER_ROW, grid), (PER_COLUMN, grid.T)):
        count, length = lines.shape
        if len(spec.shape) < 2 or length < _LEAST_LINE or not 1 < count <= _MOST_LINES:
            continue
        if any(_step_of(lines[i]) is None for i in {0, count // 2, count - 1}):
            continue
        steps = [_step_of(line) for line in lines]
        if all(s is not None for s in steps):
            return _exact(grid, np.array(steps, np.float64), axis, spec)
    return None


def _exact(
    grid: NDArray[Any], steps: NDArray[np.float64], axis: int, spec: TensorSpec
) -> Formed | None:
    """The form if it gives back every bit."""
    integers = np.empty(grid.shape, np.int32)
    signed = False
    rows = max(1, CHUNK // grid.shape[1])
    with np.errstate(all="ignore"):
        for r in range(0, len(grid), rows):  # in chunks, to bound temporary arrays
            part = grid[r : r + rows].astype(np.float64)
            by = steps[r : r + rows, None] if axis == PER_ROW else steps
            real = np.rint(part / by)
            if not np.abs(real).max() < _MOST_INTEGER:  # NaN is refused as well
                return None
            integers[r : r + rows] = real
            signed = signed or bool(((part == 0) & np.signbit(part)).any())
    if signed:
        integers -= np.signbit(grid)
    form = Lattice(axis, signed, float(steps[0]) if axis == WHOLE else 0.0)
    again = lattice_values(integers, steps, form, spec).reshape(-1)
    if not np.array_equal(
        again.view(f"u{again.itemsize}"), grid.reshape(-1).view(f"u{again.itemsize}")
    ):
        return None
    integers = integers.reshape(spec.shape)
    return form, [integers] if axis == WHOLE else [steps, integers]


def _lattice_bits(flat: NDArray[Any], found: Formed) -> float:
    """Bits of the integers, from a sample; infinite where the floats themselves take fewer.

    Values of few bits, such as powers of two, are multiples of a step that is tiny beside them.
    """
    every = max(1, len(flat) // _COST_SAMPLE)
    integers, floats = found[1][-1].reshape(-1)[::every], flat[::every]
    bits = _token_bits(integers, *np.unique(integers, return_counts=True))
    plain = _plane_bits(*np.unique(floats.view(f"u{flat.itemsize}"), return_counts=True))
    return bits * every if bits < plain else np.inf


def _step_of(line: NDArray[Any]) -> float | None:
    """A step of which a line's values may be multiples; None if there is none."""
    few = _sizes(line[:: max(1, len(line) // _SAMPLE)])
    if not len(few):
        few = _sizes(line)
    if not len(few):
        return 1.0
    with np.errstate(all="ignore"):
        step = _common_step(few, _EPSILON[line.itemsize]) if np.isfinite(few[-1]) else None
        return None if step is None else _refined(_sizes(line), step, line.dtype)


def _sizes(line: NDArray[Any]) -> NDArray[np.float64]:
    """The magnitudes that occur, in order, without zero."""
    size = np.unique(np.abs(line)).astype(np.float64)
    return size[size > 0]


def _common_step(values: NDArray[np.float64], epsilon: float) -> float | None:
    """Euclid's algorithm on values in ascending order, each known to a relative ``epsilon``."""
    step, error = float(values[0]), float(values[0]) * epsilon
    for _ in range(_EUCLID):
        times = np.rint(values / step)
        if times[-1] >= _MOST_INTEGER:
            return None
        rest = np.abs(values - times * step)
        unsure = 4 * epsilon * values + times * error
        clear = unsure < step / 4
        off = clear & (rest > unsure)
        if off.any():
            at = int(np.where(off, rest, np.inf).argmin())
            step, error = float(rest[at]), float(unsure[at])
            if step < _CLEAR * error:
                return None
            continue
        if clear.all():
            return float(values[-1] / times[-1])
        at = int(np.flatnonzero(clear)[-1]) if clear.any() else 0
        better = 2 * epsilon * float(values[at]) / max(float(times[at]), 1.0)
        if better >= error:
            return None
        step, error = float(values[at] / times[at]), better
    return None


def _refined(values: NDArray[np.float64], step: float, dtype: np.dtype[Any]) -> float | None:
    """The step from which rounding gives these very values."""
    times = np.rint(values / step)
    if not (times[0] >= 1 and times[-1] < _MOST_INTEGER):  # infinity and NaN come last
        return None
    if dtype.itemsize == 8:
        near = float(values[0] / times[0])
        tried = [near]
        for _ in range(2):
            tried += [float(np.nextafter(tried[-1], np.inf)), float(np.nextafter(near, 0))]
        exact = (c for c in tried if np.array_equal(times * c, values))
        return next(exact, None)
    single = values.astype(dtype)
    above = (values + np.nextafter(single, dtype.type(np.inf)).astype(np.float64)) / 2
    below = (values + np.nextafter(single, dtype.type(0)).astype(np.float64)) / 2
    low, high = float((below / times).max()), float((above / times).min())
    if not low <= high:
        return None
    middle = low + (high - low) / 2
    short = float(np.float32(middle))
    return short if low < short < high else middle


def _palette(flat: NDArray[Any], spec: TensorSpec) -> tuple[Formed | None, float]:
    """Values and indices, in the order of the values, and bits; None where they do not pay."""
    nothing = None, np.inf
    sample = flat[:: max(1, len(flat) // _COLOUR_SAMPLE)]
    floating = spec.dtype.kind == "f"
    if not floating and int(sample.max()) - int(sample.min()) < _DENSE:
        return nothing
    found = np.unique(sample.view(f"u{flat.itemsize}"), return_counts=True)
    if len(found[0]) > min(_FEW, len(sample) // 2):
        return nothing
    if not floating and float(entropy_bits(found[1])) > _GAIN * _token_bits(sample, *found):
        return nothing
    colours, index, counts = np.unique(
        flat.view(f"u{flat.itemsize}"), return_inverse=True, return_counts=True
    )
    if len(colours) > min(MOST_COLOURS, spec.size // 4):
        return nothing
    plain = (
        _plane_bits(colours, counts)
        if spec.dtype.kind == "f"
        else _token_bits(flat, colours, counts)
    )
    cost = float(entropy_bits(counts[None])[0]) + 8.0 * flat.itemsize * len(colours) + 64
    if cost > (_FLOATS if floating else _GAIN) * plain:
        return nothing
    values = colours.view(flat.dtype)
    order = np.argsort(values, kind="stable")
    rank = np.empty(len(order), np.uint8 if len(colours) <= 256 else np.uint16)
    rank[order] = np.arange(len(order))
    return (Palette(len(colours)), [values[order], rank[index].reshape(spec.shape)]), cost


def _plane_bits(colours: NDArray[Any], counts: NDArray[np.int64]) -> float:
    """Bits of floats, byte by byte."""
    width = 8 * colours.itemsize
    turned = (colours << 1) | (colours >> (width - 1))
    planes = ((turned >> (8 * i)) & 255 for i in range(colours.itemsize))
    return float(sum(entropy_bits(np.bincount(p, counts, 256)[None])[0] for p in planes))


def _token_bits(flat: NDArray[Any], colours: NDArray[Any], counts: NDArray[np.int64]) -> float:
    """Bits of integers around the most frequent, where what is far is mostly raw bits."""
    values = colours.view(f"i{flat.itemsize}").astype(np.float64)
    far = np.abs(values - values[counts.argmax()])
    raw = np.maximum(np.floor(np.log2(np.maximum(far, 1))) - 4, 0)
    octave = np.floor(4 * np.log2(np.maximum(far, 1))).astype(np.int64)
    tokens = np.bincount(octave + (far > 0), counts)
    return float(entropy_bits(tokens[None])[0]) + float((counts * raw).sum())

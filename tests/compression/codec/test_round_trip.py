"""Whatever goes in comes out, bit for bit, with every kind of context."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.codec import (
    Context,
    Payload,
    TensorSpec,
    decode,
    encode,
    encoder,
    open_payload,
)
from support.codec_cases import cases, forced

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
FLOATS = ["float16", "float32", "float64"]
CASES = cases()
SHAPES = [(), (0,), (0, 5), (3, 0, 2), (1,), (7,), (1, 300), (300, 1), (40, 3, 3, 3), (90, 110)]


def assert_same(expected: Any, actual: np.ndarray) -> None:
    expected = np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.tobytes() == expected.tobytes()


def round_trip(tensors: dict[str, Any], context: Context | None = None) -> bytes:
    payload = encode(tensors, context=context)
    decoded = decode(payload, context=context)
    assert list(decoded) == list(tensors)
    for name, value in tensors.items():
        assert_same(value, decoded[name])
    opened = open_payload(payload, context=context)
    for name in reversed(list(tensors)):
        assert_same(tensors[name], opened[name])
    shared = replace(context or Context(), derived={})
    for _ in range(2):  # the second payload finds what the first derived
        opened = open_payload(payload, context=shared)
        for name, value in tensors.items():
            assert_same(value, scattered(opened, name))
    return payload


def scattered(opened: Payload, name: str) -> np.ndarray:
    """A tensor from its non-zeros."""
    at, values = opened.nonzeros(name)
    assert len(np.unique(at)) == len(at) == len(values)
    assert (values != 0).all()
    spec, kept = opened.specs[name], opened.positions(name)
    whole = np.zeros(spec.size, spec.dtype)
    whole[at if kept is None else kept[at]] = values
    if spec.dtype.kind == "f":  # negative zeros are zeros
        negative = opened[name].reshape(-1)
        whole[np.signbit(negative) & (negative == 0)] = -0.0
    return whole.reshape(spec.shape)


def draw(dtype: str, shape: tuple[int, ...], density: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return np.asarray(rng.random(shape) < density)
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    return np.asarray(np.where(rng.random(shape) < density, values, 0), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("density", [1.0, 0.03])
def test_integers(dtype: str, shape: tuple[int, ...], density: float) -> None:
    values = draw(dtype, shape, density, 1)
    round_trip({"a": values})
    mask = draw("bool", shape, 0.3, 2)
    masked = np.asarray(values & mask if dtype == "bool" else values * mask, dtype)
    layout = {"a": TensorSpec(masked.dtype, masked.shape)}
    round_trip({"a": masked}, Context(layout=layout, mask={"a": mask}))
    for previous in (draw("int8", shape, 0.2, 3), draw("int64", shape, 1.0, 4), values):
        if previous.dtype == bool:
            previous = previous.view(np.uint8)
        round_trip({"a": values}, Context(previous={"a": previous}))
        round_trip({"a": masked}, Context(mask={"a": mask}, previous={"a": previous}))


@pytest.mark.parametrize("dtype", [d for d in INTEGERS if d != "bool"])
@pytest.mark.parametrize("end", ["min", "max"])
def test_constant_extremes(dtype: str, end: str) -> None:
    value = getattr(np.iinfo(dtype), end)
    round_trip({"a": np.full((20, 30), value, dtype), "b": np.array(value, dtype)})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats(dtype: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    size = int(np.prod(shape))
    smooth = np.asarray(rng.normal(size=shape) * 0.05).astype(dtype)
    noise = np.frombuffer(rng.bytes(size * np.dtype(dtype).itemsize), dtype).reshape(shape)
    near = np.asarray(smooth * np.asarray(1 + 1e-3 * rng.normal(size=shape))).astype(dtype)
    for values in (smooth, noise, near):
        round_trip({"a": values})
        round_trip({"a": values}, Context(previous={"a": smooth}))
        round_trip({"a": values}, Context(previous={"a": noise}))


def specials(dtype: str) -> np.ndarray:
    """Zeros, subnormals, extremes, infinities and NaNs of every kind, with either sign."""
    width = 8 * np.dtype(dtype).itemsize
    mantissa = {16: 10, 32: 23, 64: 52}[width]
    infinity = ((1 << (width - 1 - mantissa)) - 1) << mantissa
    quiet = infinity | 1 << (mantissa - 1)
    positive = [0, 1, (1 << mantissa) - 1, 1 << mantissa, infinity - 1, infinity]
    positive += [infinity + 1, quiet - 1, quiet, quiet + 1, (1 << width - 1) - 1]
    bits = positive + [1 << (width - 1) | b for b in positive]
    return np.array(bits, f"u{width // 8}").view(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_float_specials_survive(dtype: str) -> None:
    values = specials(dtype)
    round_trip({"a": values})
    round_trip({"a": np.tile(values, 500)})
    round_trip({"a": values}, Context(previous={"a": values[::-1].copy()}))
    pairs = np.stack(np.meshgrid(values, values))
    round_trip({"a": pairs[0]}, Context(previous={"a": pairs[1]}))
    # Under a mask, -0.0 and NaN are no zeros either.
    mask = np.arange(len(values)) % 3 != 0
    kept = np.where(mask, values, values.dtype.type(0))
    round_trip({"a": kept}, Context(mask={"a": mask}))
    round_trip({"a": kept}, Context(mask={"a": mask}, previous={"a": values}))


@pytest.mark.parametrize("dtype", [d for d in INTEGERS if d != "bool"])
@pytest.mark.parametrize("kind", ["int8", "int64", "uint64"])
def test_integer_extremes_against_extremes(dtype: str, kind: str) -> None:
    """Every extreme of one type as the change of every extreme of another."""

    def extremes(d: str) -> list[int]:
        low, high = np.iinfo(d).min, np.iinfo(d).max
        return [low, low + 1, -1 if low else 0, 0, 1, high - 1, high]

    values, previous = np.meshgrid(np.array(extremes(dtype), dtype), np.array(extremes(kind), kind))
    for times in (1, 150):
        tall = np.tile(values, (times, 1))
        round_trip({"a": tall})
        round_trip({"a": tall}, Context(previous={"a": np.tile(previous, (times, 1))}))


@pytest.mark.parametrize("dtype", INTEGERS + FLOATS)
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (3, None, 0), (0, 0, None)], ids=str)
def test_empty_tensors_of_any_size(dtype: str, dims: tuple[int | None, ...]) -> None:
    """No element, but a dimension as large as numpy allows."""
    most = (1 << 62) // np.dtype(dtype).itemsize // 4 - 1
    shape = tuple(most if d is None else d for d in dims)
    empty = np.zeros(shape, dtype)
    assert len(round_trip({"a": empty, "b": np.ones(2, dtype)})) < 100
    layout = {"a": TensorSpec(empty.dtype, shape)}
    round_trip({"a": empty}, Context(layout=layout, mask={"a": np.zeros(shape, bool)}))
    round_trip(
        {"a": empty}, Context(previous={"a": empty.astype("i1")} if dtype in INTEGERS else None)
    )


def test_many_tensors_in_one_payload() -> None:
    rng = np.random.default_rng(6)
    tensors: dict[str, Any] = {}
    for i in range(40):
        scale = 10.0 ** rng.uniform(-1, 2)
        tensors[f"layer{i}.weight"] = (rng.normal(size=(60, 70)) * scale).astype(np.int32)
        tensors[f"layer{i}.bias"] = (rng.normal(size=60) * scale).astype(np.int16)
        tensors[f"layer{i}.count"] = np.array(i, np.int64)
        tensors[f"layer{i}.mean"] = rng.normal(size=60).astype(np.float32)
    tensors["zeros"] = np.zeros((100, 100), np.int32)
    tensors["wide"] = rng.integers(-(2**60), 2**60, (50, 50))
    round_trip(tensors)


@pytest.mark.parametrize("values", [2, 3, 16, 200, 256])
def test_incompressible_values_cost_little_more_than_themselves(values: int) -> None:
    # All final states lie in the top octave where every symbol takes a whole number of bits.
    rng = np.random.default_rng(values)
    drawn = rng.integers(0, values, (300, 1000))
    for array in (drawn.astype(np.uint8), drawn.astype(bool) if values == 2 else drawn):
        payload = round_trip({"a": array, "b": array[:3, :5]})
        assert len(payload) * 8 < 1.01 * np.log2(values) * drawn.size + 2000


def test_values_that_cancel_previous_are_nearly_free() -> None:
    rng = np.random.default_rng(7)
    previous = rng.integers(-40, 41, (200, 200)).astype(np.int32)
    pruned = rng.random(previous.shape) < 0.5
    delta = np.where(pruned, -previous, 0).astype(np.int32)
    layout = {"a": TensorSpec(delta.dtype, delta.shape)}
    payload = round_trip({"a": delta}, Context(layout=layout, previous={"a": previous}))
    assert len(payload) * 8 < 1.03 * delta.size


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_that_repeat(data: st.DataObject) -> None:
    rows, columns = data.draw(st.integers(64, 200)), data.draw(st.integers(8, 20))
    distinct, zeros = data.draw(st.integers(1, 30)), data.draw(st.floats(0, 0.9))
    dtype = data.draw(st.sampled_from([d for d in INTEGERS if d != "bool"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    info = np.iinfo(dtype)
    pool = rng.integers(info.min, info.max, (distinct, columns), dtype=dtype, endpoint=True)
    table = pool[rng.integers(0, distinct, rows)]
    table[rng.random(rows) < zeros] = 0
    payload = round_trip({"table": table, "flags": table > 0, "deep": table.reshape(rows, -1, 1)})
    if distinct < 10 and zeros < 0.1 and info.bits > 8:
        assert len(payload) < 0.5 * table.nbytes


def test_rows_that_repeat_cost_a_reference() -> None:
    rng = np.random.default_rng(8)
    pool = rng.integers(-3, 4, (100, 64)).astype(np.int32)
    table = np.zeros((4000, 64), np.int32)
    table[rng.random(4000) < 0.2] = 1
    at = np.flatnonzero(table[:, 0])
    table[at] = pool[rng.integers(0, 100, len(at))]
    payload = round_trip({"table": table})
    once = len(encode({"pool": pool}))
    assert len(payload) < 1.1 * (once + len(at) * np.log2(100) / 8 + 4000 * 0.73 / 8) + 150


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_integers_with_any_context(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    dtype = data.draw(st.sampled_from(INTEGERS))
    values = data.draw(hnp.arrays(dtype, shape))
    kwargs: dict[str, Any] = {}
    if data.draw(st.booleans()):
        mask = np.asarray(data.draw(hnp.arrays(bool, shape)))
        values = np.asarray(values & mask if dtype == "bool" else values * mask, dtype)
        kwargs["mask"] = {"name": mask}
    if data.draw(st.booleans()):
        kind = data.draw(st.sampled_from(INTEGERS[:-1]))
        kwargs["previous"] = {"name": np.asarray(data.draw(hnp.arrays(kind, shape)))}
    if data.draw(st.booleans()):
        kwargs["layout"] = {"name": TensorSpec(values.dtype, values.shape)}
    round_trip({"name": values}, Context(**kwargs))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_floats(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    dtype = data.draw(st.sampled_from(FLOATS))
    values = np.asarray(data.draw(hnp.arrays(dtype, shape)))
    previous = np.asarray(data.draw(hnp.arrays(dtype, shape)))
    round_trip({"x": values})
    round_trip({"x": values}, Context(previous={"x": previous}))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_every_depth_of_neighbour_contexts(
    depth: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = encoder.plan_field

    def deep(*args: Any, **options: Any) -> Any:
        code = plan(*args, **options)
        code.depth = depth
        return code

    monkeypatch.setattr(encoder, "plan_field", deep)
    rng = np.random.default_rng(depth)
    info = np.iinfo(dtype)
    for size in (1, 2, 3, 7, 8, 9, 1000, 60_001):
        smooth = np.rint(np.cumsum(rng.normal(size=size))).astype(dtype)
        smooth[rng.random(size) < 0.01] = info.min
        smooth[rng.random(size) < 0.01] = info.max
        round_trip({"a": smooth, "b": -smooth})


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_payload(name: str) -> None:
    tensors, context = CASES[name]
    round_trip(tensors, context)
    with forced(lanes=True):
        round_trip(tensors, context)
    with forced(lanes=True, static=True):
        round_trip(tensors, context)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["dense", "smooth", "sparse", "widths", "wide"])
def test_every_depth_of_every_kind(name: str, depth: int) -> None:
    tensors, context = CASES[name]
    for lanes in (False, True):
        with forced(depth=depth, lanes=lanes):
            round_trip(tensors, context)


def test_large_fields_are_planned_on_a_sample() -> None:
    """Rows are sampled, levels are chosen, and sums go beyond what float32 holds."""
    rng = np.random.default_rng(4)
    scale = np.exp(rng.normal(size=(300, 1)) * 2) * np.exp(rng.normal(size=(1, 900)))
    large = np.rint(rng.laplace(size=scale.shape) * scale)
    for w in (
        large.astype("i4"),
        (large * 1e6).clip(-(2.0**31), 2.0**31 - 1).astype("i4"),
        (large * 1e15).clip(-(2.0**62), 2.0**62).astype("i8"),
    ):
        round_trip({"w": w})
        round_trip({"w": w}, Context(previous={"w": np.roll(w, 1)}))


def test_groups_of_fields_may_be_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_SHARED_MOST", 5000)
    round_trip(*CASES["many"])

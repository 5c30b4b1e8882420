"""Forms: equal tensors, hidden lattices, palettes, packs; bit for bit, and close to the entropy."""

from __future__ import annotations

import bz2
import lzma
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunecast.compression.codec import (
    Context,
    LimitExceeded,
    Limits,
    MalformedPayload,
    TensorSpec,
    decode,
    encode,
    measure_costs,
    open_payload,
    outline_payload,
)
from prunecast.compression.codec.container.forms import write_forms
from prunecast.compression.codec.container.head import write_specs
from prunecast.compression.codec.container.wire import seal
from prunecast.compression.codec.encoder import encode_body
from prunecast.compression.codec.entropy.adaptive import AdaptiveEncoder
from prunecast.compression.codec.entropy.packs import CODERS, Pack
from prunecast.compression.codec.modelling.forms import Equal, Packed

RNG = np.random.default_rng(23)
SHAPE = (128, 256)
DRAWN = np.rint(RNG.normal(0, 6, SHAPE))
GRID = DRAWN.astype("f4")


def check(tensors: dict[str, Any], payload: bytes, context: Context | None = None) -> None:
    """The payload gives back every bit, in any order, and its costs add up."""
    opened = open_payload(payload, context=context)
    for name in [*tensors, *reversed(tensors)]:
        found, wanted = opened[name], tensors[name]
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        assert found.tobytes() == wanted.tobytes()
        found[...] = 0  # what one reader does to it is not seen by the next
        at, values = opened.nonzeros(name)
        assert wanted.reshape(-1)[np.sort(at)].tobytes() == values[np.argsort(at)].tobytes()
    costs = measure_costs(payload, context=context)
    assert sum(costs.sections.values()) == costs.nbytes == len(payload)


def entropy_bytes(array: np.ndarray) -> float:
    """Zeroth-order entropy of the values."""
    counts = np.unique(array.reshape(-1).view(f"u{array.itemsize}"), return_counts=True)[1]
    share = counts / counts.sum()
    return float(-(share * np.log2(share)).sum() * array.size / 8)


def stretched(values: np.ndarray, *shape: int) -> np.ndarray:
    return np.exp(RNG.normal(size=shape)).astype("f4") * np.float32(0.01) * values


FEW: dict[str, np.ndarray] = {
    "uint8 around 119": np.rint(RNG.normal(119, 1.4, SHAPE)).astype("u1"),
    "uint8 around 128": np.rint(RNG.normal(128, 1.4, SHAPE)).astype("u1"),
    "int16 around -3000": np.rint(RNG.normal(-3000, 3, SHAPE)).astype("i2"),
    "uint32 around 2**31": (np.rint(RNG.normal(0, 3, SHAPE)) + 2**31).astype("u4"),
    "int64 far away": DRAWN.astype("i8") + 10**15,
    "two signs around 40": np.rint(RNG.normal(40, 20, SHAPE)).astype("i4"),
    "float32 by 0.0123": GRID * np.float32(0.0123),
    "float16 by 0.0123": (GRID * np.float32(0.0123)).astype("f2"),
    "float64 by 0.1": DRAWN * 0.1,
    "rounded from double": (DRAWN * (1 / 3)).astype("f4"),
    "integers as float32": GRID,
    "without the first multiples": (np.abs(GRID) + 7) * np.float32(0.37),
    "float32 of five values": RNG.normal(size=5).astype("f4")[RNG.integers(0, 5, SHAPE)],
    "float16 with NaN": np.array([np.nan, 1.5, -0.0], "f2")[RNG.integers(0, 3, SHAPE)],
    "int64 of three values": np.array([-(2**40), 7, 2**50])[RNG.integers(0, 3, SHAPE)],
    "powers of two": (2.0 ** RNG.integers(-9, 9, SHAPE)).astype("f4"),
    "one bit of mantissa": np.abs(RNG.normal(size=SHAPE))
    .astype("f4")
    .view("u4")
    .__and__(np.uint32(0xFFC00000))
    .view("f4"),
    "uint8 of odd values": np.array([3, 200, 90, 41], "u1")[RNG.integers(0, 4, SHAPE)],
}


@pytest.mark.parametrize("name", FEW)
def test_few_values_cost_about_their_entropy(name: str) -> None:
    tensors = {"w": FEW[name]}
    payload = encode(tensors)
    check(tensors, payload)
    assert len(payload) < 1.03 * entropy_bytes(FEW[name]) + 120


@pytest.mark.parametrize("shape", [(SHAPE[0], 1), (1, SHAPE[1])], ids=["rows", "columns"])
def test_a_step_for_each_row_or_column(shape: tuple[int, int]) -> None:
    tensors = {"w": stretched(GRID, *shape)}
    payload = encode(tensors)
    check(tensors, payload)
    assert len(payload) < 1.03 * entropy_bytes(GRID) + 8 * max(shape) + 120


def test_steps_of_a_convolution() -> None:
    tensors = {"w": stretched(GRID.reshape(64, 8, 8, 8), 64, 1, 1, 1)}
    payload = encode(tensors)
    check(tensors, payload)
    assert len(payload) < 1.03 * entropy_bytes(GRID) + 64 * 8 + 120


@pytest.mark.parametrize("odd", [np.nan, np.inf, 1e-30, 3.1415927])
def test_one_value_off_the_lattice_is_kept(odd: float) -> None:
    values = GRID * np.float32(0.0123)
    values[7, 9] = odd
    check({"w": values}, encode({"w": values}))


def test_equal_tensors_are_coded_once() -> None:
    noise = RNG.normal(size=SHAPE).astype("f4")
    one = len(encode({"a": noise}))
    tensors = {"a": noise, "other": noise + 1, "b": noise.copy(), "flat": noise.reshape(-1).copy()}
    payload = encode(tensors)
    check(tensors, payload)
    assert len(payload) < 2 * one + 60
    # other bits, or another dtype, are another tensor
    near = noise.copy()
    near[-1, -1] = np.nextafter(near[-1, -1], np.float32(9))
    tensors = {"a": noise, "near": near, "bits": noise.view("i4"), "minus": -noise}
    check(tensors, encode(tensors))


def test_equal_tensors_of_a_known_layout() -> None:
    noise = RNG.normal(size=300)
    tensors = {"a": noise, "b": noise.copy()}
    context = Context(layout={n: TensorSpec(a.dtype, a.shape) for n, a in tensors.items()})
    payload = encode(tensors, context=context)
    check(tensors, payload, context)
    assert len(payload) < noise.nbytes + 100


def text() -> np.ndarray:
    return np.frombuffer((__doc__ or "").encode() * 30, np.uint8)


REPEATING: dict[str, Callable[[], dict[str, Any]]] = {
    "ramp": lambda: {"w": np.arange(5000)},
    "triangle": lambda: {"w": np.tril(np.ones((200, 200), bool))},
    "text": lambda: {"w": text()},
    "tiled": lambda: {"w": np.tile(RNG.normal(size=(20, 50)).astype("f4"), (9, 1))},
    "rolled": lambda: {"a": text(), "b": np.roll(text(), 7) + np.uint8(0)},
    "smooth": lambda: {"w": np.sin(np.arange(9000) / 700)},
    "large, repeated far away": lambda: {
        "a": (noise := RNG.normal(size=90_000).astype("f4")),
        "b": np.concatenate([noise[50_000:], noise[:50_000]]),
    },
}


@pytest.mark.parametrize("kind", [*REPEATING, *FEW])
def test_never_larger_than_the_standard_library(kind: str) -> None:
    tensors = REPEATING[kind]() if kind in REPEATING else {"w": FEW[kind]}
    plain = b"".join(a.tobytes() for a in tensors.values())
    planes = b"".join(
        np.ascontiguousarray(a).reshape(-1).view(np.uint8).reshape(-1, a.itemsize).T.tobytes()
        for a in tensors.values()
    )
    best = min(
        len(squeeze(data))
        for data in (plain, planes)
        for squeeze in (lambda d: zlib.compress(d, 9), bz2.compress, lzma.compress)
    )
    payload = encode(tensors, thorough=True)
    check(tensors, payload)
    assert len(payload) <= best + 40 + 10 * len(tensors)


def test_what_uses_no_form_stays_readable_by_2_0() -> None:
    plain = encode({"w": RNG.integers(-9, 9, SHAPE)}, thorough=True)
    assert (outline_payload(plain).version, outline_payload(plain).flags) == ((2, 0), 0)
    formed = encode({"w": FEW["float32 by 0.0123"]})
    assert (outline_payload(formed).version, outline_payload(formed).flags) == ((2, 1), 16)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_lattice_palette_and_copy(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(["f2", "f4", "f8"]))
    shape = draw(st.sampled_from([(40,), (6, 40), (40, 40), (50, 4, 3), (33, 33, 1)]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    reach = draw(st.sampled_from([1, 5, 127, 2000, 60_000]))
    step = draw(st.floats(1e-6, 1e3)) if draw(st.booleans()) else 2.0 ** draw(st.integers(-12, 9))
    steps = step
    if draw(st.booleans()):
        steps = step * rng.random((shape[0], *[1] * (len(shape) - 1))) + step / 9
    with np.errstate(over="ignore"):
        values = (rng.integers(-reach, reach + 1, shape) * steps).astype(dtype)
        odd = np.array(draw(st.sampled_from([-0.0, np.inf, np.nan, 5e-324, 1e9]))).astype(dtype)
    if draw(st.booleans()):
        values[rng.random(shape) < 0.1] = odd
    few = values.reshape(-1)[: draw(st.integers(1, 20))]
    tensors = {
        "w": values,
        "few": few[rng.integers(0, len(few), 300)],
        "ints": rng.integers(-(2**62), 2**62, 3)[rng.integers(0, 3, 99)],
        "again": values.copy(),
    }
    check(tensors, encode(tensors))
    check(tensors, encode(tensors, thorough=True))


def rounded(values: np.ndarray, zeros: int) -> np.ndarray:
    """Floats whose last bits are cut off."""
    width = 8 * values.itemsize
    mask = np.array((1 << width) - (1 << zeros), f"u{values.itemsize}")
    return np.asarray((values.view(mask.dtype) & mask).view(values.dtype))


@pytest.mark.parametrize(("change", "most"), [(0.05, 600), (0.003, 170)])
def test_rounded_floats_cost_what_changed_of_them(change: float, most: int) -> None:
    """As running statistics of 928 channels, six bits of mantissa: 544 and 154 bytes."""
    rng = np.random.default_rng(0)
    old = rng.normal(size=928).astype("f4")
    new = (old * (1 + change * rng.normal(size=928))).astype("f4")
    context = Context(previous={"a": rounded(old, 17)})
    payload = encode({"a": rounded(new, 17)}, context=context)
    check({"a": rounded(new, 17)}, payload, context)
    assert len(payload) < most
    assert len(encode({"a": rounded(new, 17)}, context=Context(previous={"a": old}))) > 3 * most


def test_floats_without_zeros_are_coded_as_ever() -> None:
    old = RNG.normal(size=500).astype("f4")
    context = Context(previous={"a": rounded(old, 12)})
    odd = rounded(old * np.float32(1.01), 12)
    odd[77] = np.nextafter(odd[77], np.float32(9))  # one of them is enough
    plain = encode({"a": odd}, context=context)
    assert (outline_payload(plain).version, outline_payload(plain).flags) == ((2, 0), 4)
    assert outline_payload(encode({"a": rounded(old, 12)}, context=context)).flags == 4  # unchanged


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_rounded_floats(data: st.DataObject) -> None:
    """Whatever is zero in how many bits, whatever the bits mean, beside anything else."""
    draw = data.draw
    dtype = draw(st.sampled_from(["f2", "f4", "f8"]))
    width = 8 * np.dtype(dtype).itemsize
    shape = draw(st.sampled_from([(), (1,), (40,), (6, 40), (50, 4, 3)]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    raw = rng.integers(0, 1 << width, shape, f"u{width // 8}") if draw(st.booleans()) else None
    old = rng.normal(size=shape).astype(dtype) if raw is None else raw.view(dtype)
    odd = st.sampled_from([-0.0, 0.0, np.inf, -np.inf, np.nan, 5e-324, 6e-8, 1e300])
    with np.errstate(all="ignore"):
        new = np.asarray(old.astype("f8") * draw(st.sampled_from([1.0, 1.05, -1.0]))).astype(dtype)
        for values in (old, new):
            values[rng.random(shape) < 0.1] = np.array(draw(odd)).astype(dtype)
    zeros = st.integers(0, width - 1)
    old, new = rounded(old, draw(zeros)), rounded(new, draw(zeros))
    tensors = {"w": new, "ints": rng.integers(-9, 9, 50), "few": np.tile(new.reshape(-1)[:1], 80)}
    check(tensors, encode(tensors))
    for known in ({"w": old}, {"w": old, "ints": np.arange(50)}):
        check(tensors, encode(tensors, context=Context(previous=known)), Context(previous=known))
        thorough = encode(tensors, context=Context(previous=known), thorough=True)
        check(tensors, thorough, Context(previous=known))
    mask = np.asarray(new.view(f"u{width // 8}") != 0)  # a mask leaves no form
    context = Context(previous={"w": old}, mask={"w": mask})
    found = decode(encode(tensors, context=context), context=context)
    assert all(found[name].tobytes() == array.tobytes() for name, array in tensors.items())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_pack(data: st.DataObject) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    dtypes = st.sampled_from(["?", "i1", "u2", "i4", "u8", "f2", "f4", "f8"])
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, unique=True))
    tensors = {
        n: (rng.random(draw(st.integers(1, 60))) * draw(st.sampled_from([1, 200]))).astype(
            draw(dtypes)
        )
        for n in names
    }
    specs = {n: TensorSpec(a.dtype, a.shape) for n, a in tensors.items()}
    packs: list[Pack] = []
    forms: dict[str, Any] = {}
    for name in names:
        number = draw(st.integers(0, len(packs)))
        if number == len(packs):
            packs.append(Pack(draw(st.integers(0, 2)), draw(st.booleans())))
        packs[number].members.append(name)
        forms[name] = Packed(number)
    from prunecast.compression.codec.entropy.packs import pack

    bodies = [
        pack([tensors[m] for m in one.members], one.coder, shuffle=one.shuffled) for one in packs
    ]
    check(tensors, sealed(specs, forms, list(zip(packs, bodies, strict=True))))


def sealed(
    specs: dict[str, TensorSpec], forms: dict[str, Any], packs: list[tuple[Pack, bytes]]
) -> bytes:
    """A payload of nothing but tensors in packs, and some that are equal to them."""
    coder = AdaptiveEncoder()
    write_specs(coder, specs)
    for one, data in packs:
        one.nbytes = len(data)
    write_forms(coder, specs, Context(), {}, forms, [one for one, _ in packs])
    rest, _ = encode_body(coder, [], [])
    return seal(Context(), coder.finish(), rest + b"".join(d for _, d in packs), forms=True)


@pytest.mark.parametrize("coder", range(len(CODERS)))
def test_a_bomb_unpacks_no_more_than_it_states(coder: int) -> None:
    data = CODERS[coder][0](bytes(1 << 26))
    payload = sealed(
        {"w": TensorSpec(np.dtype("u1"), (1 << 16,))},
        {"w": Packed(0)},
        [(Pack(coder, False), data)],
    )
    opened = open_payload(payload)
    tracemalloc.start()
    try:
        with pytest.raises(MalformedPayload, match="pack"):
            opened["w"]
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_a_pack_is_held_to_the_limits_of_its_tensors() -> None:
    data = CODERS[2][0](bytes(1 << 26))
    spec = TensorSpec(np.dtype("u1"), (1 << 26,))
    payload = sealed({"w": spec}, {"w": Packed(0)}, [(Pack(2, False), data)])
    with pytest.raises(LimitExceeded, match="expansion"):
        open_payload(payload)
    with pytest.raises(LimitExceeded, match="decoded_bytes"):
        open_payload(payload, limits=Limits(decoded_bytes=1 << 25))


def test_many_tensors_that_lead_to_one_take_its_time_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from prunecast.compression.codec import payload as module

    calls = []
    real = module.unpack
    monkeypatch.setattr(module, "unpack", lambda *a: calls.append(1) or real(*a))
    spec = TensorSpec(np.dtype("u1"), (64,))
    names = ["a", "b", *(f"t{i}" for i in range(200))]
    specs = dict.fromkeys(names, spec)
    forms: dict[str, Any] = {"a": Packed(0), "b": Packed(1)}
    forms |= {n: Equal("ab"[i % 2]) for i, n in enumerate(names[2:])}
    packs = [(Pack(0, False), CODERS[0][0](bytes([i]) * 64)) for i in range(2)]
    decoded = decode(sealed(specs, forms, packs))
    assert [decoded[n][0] for n in names[:4]] == [0, 1, 0, 1]
    assert len(calls) == 2

"""Where the bytes go: sums are exact, own segments are exact, the rest is fair."""

from __future__ import annotations

import zlib
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.codec import (
    CodecError,
    Context,
    ContextMismatch,
    Limits,
    PayloadCosts,
    TensorSpec,
    encode,
    measure_costs,
    open_payload,
    outline_payload,
    payload_length,
    quantise,
)

Tensors = dict[str, np.ndarray]


def network(seed: int = 3) -> Tensors:
    """A small network on a lattice: large matrices, small ones, vectors."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        rows = np.exp(0.8 * rng.normal(size=(shape[0], *[1] * (len(shape) - 1))))
        return quantise(rng.laplace(size=shape) * rows, 0.4)

    return {
        "conv.weight": draw(16, 1, 3, 3),
        "conv.bias": draw(16),
        "fc1.weight": draw(500, 400),
        "fc1.bias": draw(500),
        "fc2.weight": draw(100, 500),
        "fc2.bias": draw(100),
        "empty": np.zeros((0, 3), np.int32),
        "ones": np.ones((30, 30), np.int32),
    }


def cases() -> dict[str, tuple[Tensors, Context]]:
    rng = np.random.default_rng(11)
    dense = network()
    pruned = {k: (q * (rng.random(q.shape) < 0.05)).astype(q.dtype) for k, q in dense.items()}
    layout = {k: TensorSpec(q.dtype, q.shape) for k, q in dense.items()}
    smooth = np.rint(np.cumsum(rng.normal(size=(100, 2000)), 1)).astype("i2")
    return {
        "lanes": (dense, Context()),
        "sparse": (pruned, Context()),
        "sparse lanes": (
            {k: np.concatenate([q] * 32, axis=1) for k, q in pruned.items() if q.ndim == 2},
            Context(),
        ),
        "layout": (dense, Context(layout=layout)),
        "delta": (pruned, Context(layout=layout, previous=dense)),
        "masked": (pruned, Context(mask={"fc1.weight": pruned["fc1.weight"] != 0})),
        "phases": ({"a": smooth, "b": -smooth[:2], "c": smooth[:1, :40]}, Context()),
        "floats": ({k: (v * 0.1).astype("f4") for k, v in dense.items()}, Context()),
        "serial": ({"a": np.arange(60), "b": np.zeros(9, "i1"), "c": -np.arange(9)}, Context()),
        "serial phases": ({"a": smooth[0], "b": smooth[1, :40]}, Context()),
        "serial sparse": ({k: v[:20] for k, v in pruned.items() if v.ndim > 1}, Context()),
        "nothing": ({}, Context()),
        "nothing of a layout": ({}, Context(layout={})),
    }


CASES = cases()


@cache
def payload_of(name: str) -> bytes:
    tensors, context = CASES[name]
    return encode(tensors, context=context)


def measured(tensors: Tensors, context: Context | None = None) -> tuple[bytes, PayloadCosts]:
    payload = encode(tensors, context=context)
    costs = measure_costs(payload, context=context)
    check_sums(payload, costs)
    return payload, costs


def check_sums(payload: bytes, costs: PayloadCosts) -> None:
    assert costs.nbytes == len(payload)
    assert sum(costs.sections.values()) == len(payload)
    assert costs.common + sum(t.nbytes for t in costs.tensors.values()) == len(payload)
    assert costs.common >= 0
    for section, nbytes in costs.sections.items():
        parts = [t.sections.get(section, 0) for t in costs.tensors.values()]
        assert min(parts, default=0) >= 0
        assert sum(parts) <= nbytes


@pytest.mark.parametrize("name", CASES)
def test_sums_are_exact(name: str) -> None:
    tensors, context = CASES[name]
    costs = measure_costs(payload_of(name), context=context)
    check_sums(payload_of(name), costs)
    assert list(costs.tensors) == list(tensors)
    for key, q in tensors.items():
        assert costs.tensors[key].spec == TensorSpec(q.dtype, q.shape)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=8),
        hnp.arrays(
            st.sampled_from([np.int8, np.int64, np.float32, np.bool_]),
            hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=30),
        ),
        max_size=6,
    )
)
def test_sums_are_exact_whatever_the_tensors(tensors: Tensors) -> None:
    measured(tensors)


@pytest.mark.parametrize("name", ["lanes", "sparse lanes", "phases", "floats"])
def test_own_segments_are_exact(name: str) -> None:
    payload, context = payload_of(name), CASES[name][1]
    costs = measure_costs(payload, context=context)
    opened = open_payload(payload, context=context)
    body, index = opened._body, opened._index
    alone = 0
    for key, numbers in index.items():
        mine = [s for s in body.segments if {i for i, _ in s.parts} & set(numbers)]
        if any({i for i, _ in s.parts} - set(numbers) for s in mine):
            assert costs.tensors[key].shared
            continue
        assert not costs.tensors[key].shared
        assert costs.tensors[key].sections.get("segments", 0) == sum(s.nbytes for s in mine)
        alone += bool(mine)
    assert alone >= 1
    assert costs.sections["segments"] == sum(s.nbytes for s in body.segments)


@pytest.mark.parametrize("name", ["lanes", "floats", "serial", "phases"])
def test_the_layouts_bytes_are_those_it_adds(name: str) -> None:
    tensors, _ = CASES[name]
    layout = {k: TensorSpec(q.dtype, q.shape) for k, q in tensors.items()}
    without = len(encode(tensors, context=Context(layout=layout))) - 4  # the context's tag
    costs = measure_costs(payload_of(name))
    assert abs(costs.sections["layout"] - (len(payload_of(name)) - without)) <= 2


def test_names_are_charged_to_their_tensors() -> None:
    rng = np.random.default_rng(2)
    names = ["a", "a.rather.long.name.of.some.tensor", "b"]
    _, costs = measured({name: rng.integers(-3, 4, (200, 200)) for name in names})
    layout = [costs.tensors[name].sections["layout"] for name in names]
    assert layout[1] > 12 > layout[0]
    assert layout[1] > 12 > layout[2]


def test_levels_are_charged_where_rows_differ() -> None:
    rng = np.random.default_rng(2)
    scale = np.exp(2 * rng.normal(size=(300, 1)))
    even = np.rint(rng.laplace(size=(300, 300)) * 3).astype(np.int32)
    uneven = np.rint(rng.laplace(size=(300, 300)) * scale).astype(np.int32)
    _, costs = measured({"even": even, "uneven": uneven})
    assert costs.tensors["uneven"].sections["levels"] > 50
    assert costs.tensors["even"].sections.get("levels", 0) == 0
    assert costs.sections["levels"] == costs.tensors["uneven"].sections["levels"]


@pytest.mark.parametrize("density", [1.0, 0.03])
@pytest.mark.parametrize("size", [100, 1000])
def test_a_shared_segment_is_shared_fairly(size: int, density: float) -> None:
    """Twice the values cost twice the bytes; values twice as wide cost a bit more each."""
    rng = np.random.default_rng(4)

    def draw(n: int, scale: float) -> np.ndarray:
        kept = rng.random(n) < density
        return (np.rint(rng.laplace(size=n) * scale) * kept).astype(np.int32)

    tensors = {"one": draw(10 * size, 8), "two": draw(20 * size, 8), "wide": draw(10 * size, 16)}
    _, costs = measured(tensors)
    assert all(t.shared for t in costs.tensors.values())
    part = "symbols" if costs.sections["symbols"] else "segments"
    one, two, wide = (costs.tensors[k].sections[part] * 8 for k in tensors)
    nonzero = np.count_nonzero(tensors["one"])
    assert two / one == pytest.approx(2, rel=0.12)
    assert (wide - one) / nonzero == pytest.approx(1, abs=0.45)


@pytest.mark.parametrize("density", [1.0, 0.03])
def test_shares_do_not_depend_on_the_order(density: float) -> None:
    """The gap before a tensor's first non-zero is not charged to it alone."""
    rng = np.random.default_rng(5)
    tensors = {
        f"t{i}": (rng.integers(-3, 4, 4000) * (rng.random(4000) < density)).astype(np.int32)
        for i in range(12)
    }
    _, forwards = measured(tensors)
    _, backwards = measured(dict(reversed(tensors.items())))
    part = "symbols" if forwards.sections["symbols"] else "segments"
    for name in tensors:
        assert forwards.tensors[name].shared
        there, here = (c.tensors[name].sections[part] for c in (forwards, backwards))
        assert abs(there - here) <= 2


def test_what_the_envelope_says_needs_no_context() -> None:
    payload = payload_of("delta")
    said = outline_payload(payload)
    assert said.needs == ("layout", "previous")
    assert said.nbytes == len(payload) == payload_length(payload[:16])
    assert said.version == (2, 0)
    assert said.context_tag == CASES["delta"][1].digest[:4]
    assert outline_payload(payload_of("lanes")).needs == ()
    with pytest.raises(ContextMismatch, match=r"layout \+ previous"):
        measure_costs(payload)


@pytest.mark.parametrize("name", CASES)
def test_truncated_envelopes_are_refused(name: str) -> None:
    payload = payload_of(name)
    for cut in range(min(len(payload), 40)):
        with pytest.raises(CodecError):
            outline_payload(payload[:cut])
    for cut in range(7):
        with pytest.raises(CodecError):
            payload_length(payload[:cut])


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_payloads(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([n for n in CASES if len(payload_of(n)) > 40]))
    payload, context = payload_of(name), CASES[name][1]
    mutated = bytearray(payload)
    near = st.integers(12, min(len(payload) - 5, 300))
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(near)] = data.draw(st.integers(0, 255))
    sealed = bytes(mutated[:-4]) + zlib.crc32(bytes(mutated[:-4])).to_bytes(4, "little")
    limits = Limits(elements=1 << 19, decoded_bytes=1 << 21, serial_symbols=1 << 16)
    outcome: Any = None
    try:
        outcome = measure_costs(sealed, context=context, limits=limits)
    except CodecError:
        return
    check_sums(sealed, outcome)

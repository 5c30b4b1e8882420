"""What every scheme promises, whichever it is: one suite for all of them and both codings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from prunecast.compression.codec import NonFiniteError
from prunecast.compression.schemes import (
    BadConfig,
    LayoutMismatch,
    StateError,
    UnknownScheme,
    UnsupportedTensor,
    WrongScheme,
)
from prunecast.compression.schemes.interface import Scheme
from prunecast.compression.schemes.layout import State, layout_of, pack_state, unpack_state
from prunecast.compression.schemes.registry import SCHEMES, decode_payload, inspect, scheme

Tensors = dict[str, NDArray[Any]]

FEEDBACK = {
    "topk": {"accumulate": True},
    "stc": {"error_feedback": True},
    "qsgd": {"error_feedback": True},
    "signsgd": {"error_feedback": True, "step": 0.0},
    "int8": {"error_feedback": True},
    "int4": {"error_feedback": True},
    "fp16": {"error_feedback": True},
}
STOCHASTIC: list[tuple[str, dict[str, Any]]] = [
    ("qsgd", {}),
    ("int8", {"rounding": "stochastic"}),
    ("int4", {"rounding": "stochastic"}),
]


@pytest.fixture(params=["paper", "prunecast"])
def coding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(SCHEMES))
def compressor(request: pytest.FixtureRequest, coding: str) -> Scheme:
    return scheme(request.param, coding=coding)


def update(seed: int = 3) -> Tensors:
    rng = np.random.default_rng(seed)
    return {
        "conv": rng.laplace(size=(8, 3, 3, 3)).astype("f4"),
        "bias": rng.normal(size=8).astype("f4"),
        "größe/1": (1e-3 * rng.normal(size=(40, 50))).astype("f4"),
        "gain": np.float32(0.25).reshape(()),
    }


def same(a: Tensors, b: Tensors) -> bool:
    return list(a) == list(b) and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].tobytes() == b[n].tobytes()
        for n in a
    )


def test_decodes_to_float32_of_the_same_names_and_shapes(compressor: Scheme) -> None:
    tensors = update()
    payload, _ = compressor.encode(tensors, compressor.init(layout_of(tensors)), key=1)
    decoded = compressor.decode(payload)
    assert layout_of(decoded) == layout_of(tensors)
    assert all(array.dtype == np.float32 for array in decoded.values())
    assert same(decoded, decode_payload(payload))
    assert any(array.any() for array in decoded.values())


def test_same_key_same_bytes_and_the_state_given_does_not_change(compressor: Scheme) -> None:
    tensors = update()
    kept = {name: array.copy() for name, array in tensors.items()}
    state = compressor.init(layout_of(tensors))
    _, state = compressor.encode(tensors, state, key=1)
    before = pack_state(state)
    first, after = compressor.encode(tensors, state, key=5)
    second, again = compressor.encode(tensors, state, key=5)
    assert first == second
    assert pack_state(after) == pack_state(again)
    assert pack_state(state) == before
    assert (state.step, after.step) == (1, 2)
    assert same(tensors, kept)


@pytest.mark.parametrize(("name", "options"), STOCHASTIC)
def test_another_key_rounds_otherwise(name: str, options: dict[str, Any]) -> None:
    compressor = scheme(name, **options)
    state = compressor.init(layout_of(update()))
    payloads = {compressor.encode(update(), state, key=key)[0] for key in (0, 1, 2**64 - 1)}
    assert len(payloads) == 3


def test_both_codings_carry_the_same_tensors() -> None:
    for name in SCHEMES:
        decoded = []
        for coding in ("paper", "prunecast"):
            one = scheme(name, coding=coding)
            payload, _ = one.encode(update(), one.init(layout_of(update())), key=9)
            assert inspect(payload).coding == coding
            decoded.append(one.decode(payload))
        assert same(*decoded), name


SHAPES: dict[str, Tensors] = {
    "no tensor": {},
    "scalar": {"s": np.float32(-1.5).reshape(())},
    "zero scalar": {"s": np.zeros((), "f4")},
    "one": {"w": np.ones(1, "f4")},
    "empty": {"w": np.zeros((0,), "f4")},
    "empty rows": {"w": np.zeros((0, 7), "f4"), "v": np.ones((2, 2), "f4")},
    "empty and huge": {"w": np.zeros((2**40, 0, 3), "f4"), "v": np.ones(3, "f4")},
    "all zero": {"w": np.zeros((3, 5), "f4")},
    "many dimensions": {"w": np.ones((1,) * 20 + (2,), "f4")},
    "empty name": {"": np.ones(3, "f4")},
    "tiny numbers": {"w": np.array([1e-45, -3e-40, 0], "f4")},
    "not contiguous": {"w": np.arange(24, dtype="f4").reshape(4, 6)[::2, ::-3]},
    "half and double": {"h": np.ones(3, "f2"), "d": np.linspace(-1, 1, 9)},
}


@pytest.mark.parametrize("case", SHAPES)
def test_odd_shapes(compressor: Scheme, case: str) -> None:
    tensors = SHAPES[case]
    state = compressor.init(layout_of(tensors))
    for key in range(2):
        payload, state = compressor.encode(tensors, state, key=key)
        decoded = compressor.decode(payload)
        assert layout_of(decoded) == layout_of(tensors)
        assert all(np.isfinite(array).all() for array in decoded.values())


def test_the_largest_numbers_stay_finite(compressor: Scheme) -> None:
    top = np.finfo(np.float32).max
    tensors = {"w": np.array([top, -top, top / 3, 0], "f4") / np.float32(2)}
    if compressor.name == "fp16":
        compressor = scheme("fp16", overflow="saturate", coding=compressor.coding)
    payload, _ = compressor.encode(tensors, compressor.init(layout_of(tensors)), key=0)
    assert np.isfinite(compressor.decode(payload)["w"]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_an_error_that_names_the_tensor(
    compressor: Scheme, bad: float
) -> None:
    tensors = update()
    tensors["bias"][3] = bad
    with pytest.raises(NonFiniteError, match="'bias'"):
        compressor.encode(tensors, compressor.init(layout_of(tensors)), key=0)


def test_a_double_beyond_float32_is_an_error_that_names_the_tensor(compressor: Scheme) -> None:
    tensors = {"d": np.array([1e300])}
    with pytest.raises(NonFiniteError, match="'d'"):
        compressor.encode(tensors, compressor.init(layout_of(tensors)), key=0)


def test_layout_mismatch(compressor: Scheme) -> None:
    state = compressor.init({"a": (2, 3), "b": (4,)})
    good: Tensors = {"a": np.ones((2, 3), "f4"), "b": np.ones(4, "f4")}
    compressor.encode(good, state, key=0)
    others: list[Tensors] = [
        {"a": good["a"]},
        {**good, "c": good["b"]},
        {"b": good["b"], "a": good["a"]},
        {"a": good["a"], "c": good["b"]},
        {"a": good["a"].T, "b": good["b"]},
        {"a": good["a"], "b": np.ones((4, 1), "f4")},
    ]
    for tensors in others:
        with pytest.raises(LayoutMismatch):
            compressor.encode(tensors, state, key=0)


def test_tensors_that_are_no_floats(compressor: Scheme) -> None:
    for array in (np.arange(3), np.ones(3, bool), np.ones(3, complex)):
        with pytest.raises(UnsupportedTensor, match="'n'"):
            compressor.encode({"n": array}, compressor.init({"n": (3,)}), key=0)


def test_names_that_cannot_be_written(compressor: Scheme) -> None:
    for name in ("x" * 70_000, "\ud800"):
        with pytest.raises(UnsupportedTensor):
            compressor.encode({name: np.ones(1, "f4")}, compressor.init({name: (1,)}), key=0)


@pytest.mark.parametrize("key", [-1, 2**64])
def test_keys_out_of_range(compressor: Scheme, key: int) -> None:
    with pytest.raises(BadConfig, match="key"):
        compressor.encode({}, compressor.init({}), key=key)


@pytest.mark.parametrize("name", FEEDBACK)
def test_error_feedback_loses_nothing(name: str, coding: str) -> None:
    """What was received and what is still held add up to everything that was to be sent."""
    compressor = scheme(name, coding=coding, **FEEDBACK[name])
    state = compressor.init(layout_of(update()))
    wanted = {n: np.zeros(a.shape) for n, a in update().items()}
    received = {n: np.zeros(a.shape) for n, a in update().items()}
    for step in range(6):
        tensors = update(seed=step)
        before = state
        payload, state = compressor.encode(tensors, state, key=step)
        decoded = compressor.decode(payload)
        for n, array in tensors.items():
            # Exactly what the receiver lacks, to the bit.
            left = (array + before.buffers["residual"][n]) - decoded[n]
            assert np.array_equal(left, state.buffers["residual"][n])
            wanted[n] += array
            received[n] += decoded[n]
    for n, total in wanted.items():
        held = state.buffers["residual"][n]
        np.testing.assert_allclose(received[n] + held, total, rtol=1e-5, atol=1e-5)
    if name in ("stc", "topk"):  # of the small tensor, most waited
        assert np.abs(state.buffers["residual"]["größe/1"]).sum() > 0


@pytest.mark.parametrize("name", FEEDBACK)
def test_a_stored_state_goes_on_as_if_it_had_never_been_stored(name: str) -> None:
    compressor = scheme(name, **FEEDBACK[name])
    start = compressor.init(layout_of(update()))
    _, state = compressor.encode(update(), start, key=1)
    restored = unpack_state(pack_state(state), start)
    assert (
        compressor.encode(update(4), restored, key=2)[0]
        == (compressor.encode(update(4), state, key=2)[0])
    )
    with pytest.raises(StateError):
        unpack_state(pack_state(state)[:-1], start)
    with pytest.raises(StateError):
        unpack_state(pack_state(state), compressor.init({"other": (1,)}))
    with pytest.raises(StateError):
        unpack_state(pack_state(State(start.layout)), start)


def test_a_state_of_another_scheme_is_refused() -> None:
    with pytest.raises(StateError):
        scheme("stc").encode({}, scheme("int8").init({}), key=0)


def test_a_payload_of_another_scheme_is_refused() -> None:
    for name in SCHEMES:
        one = scheme(name)
        payload, _ = one.encode({"w": np.ones(3, "f4")}, one.init({"w": (3,)}), key=0)
        assert inspect(payload).scheme == name
        for other in SCHEMES:
            if other != name:
                with pytest.raises(WrongScheme):
                    scheme(other).decode(payload)


def test_a_payload_decodes_whatever_the_receivers_options(coding: str) -> None:
    sender = scheme("qsgd", levels=3, bucket=17, elias="dense", coding=coding)
    payload, _ = sender.encode(update(), sender.init(layout_of(update())), key=0)
    assert same(scheme("qsgd").decode(payload), sender.decode(payload))


def test_inspect_counts_every_byte(compressor: Scheme) -> None:
    payload, _ = compressor.encode(update(), compressor.init(layout_of(update())), key=0)
    info = inspect(payload)
    assert info.layout == layout_of(update())
    assert info.head_bytes + info.body_bytes == len(payload)
    # 24 before the layout, a checksum of 4; per tensor 3 bytes, its name and 8 per dimension.
    names = sum(len(n.encode()) for n in info.layout)
    dimensions = sum(map(len, info.layout.values()))
    assert info.head_bytes == 28 + 3 * len(info.layout) + names + 8 * dimensions


def test_config_makes_an_equal_scheme(compressor: Scheme) -> None:
    assert scheme(compressor.name, **compressor.config()) == compressor
    assert set(compressor.config()) == set(type(compressor).options())


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("stc", {"density": 0}, "density"),
        ("stc", {"density": 1.5}, "density"),
        ("stc", {"density": float("nan")}, "density"),
        ("stc", {"density": "much"}, "density"),
        ("stc", {"scope": "model"}, "scope"),
        ("stc", {"error_feedback": 1}, "error_feedback"),
        ("stc", {"coding": "zip"}, "coding"),
        ("stc", {"sparsity": 0.9}, "sparsity"),
        ("topk", {"density": -1}, "density"),
        ("topk", {"momentum": 1}, "momentum"),
        ("topk", {"momentum": 0.9, "accumulate": False}, "momentum"),
        ("topk", {"clip": -1}, "clip"),
        ("topk", {"nodes": 0}, "nodes"),
        ("topk", {"warmup": -1}, "warmup"),
        ("topk", {"value_bits": 7}, "value_bits"),
        ("topk", {"scope": ""}, "scope"),
        ("qsgd", {"levels": 0}, "levels"),
        ("qsgd", {"levels": 2.0}, "levels"),
        ("qsgd", {"bucket": -1}, "bucket"),
        ("qsgd", {"bucket": 15}, "bucket"),
        ("qsgd", {"norm": "l1"}, "norm"),
        ("qsgd", {"elias": "gamma"}, "elias"),
        ("signsgd", {"step": -1}, "step"),
        ("signsgd", {"ties": "negative"}, "ties"),
        ("int8", {"rounding": "up"}, "rounding"),
        ("fp16", {"overflow": "wrap"}, "overflow"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadConfig, match=says):
        scheme(name, **options)


def test_unknown_scheme() -> None:
    with pytest.raises(UnknownScheme, match="stc"):
        scheme("zip")

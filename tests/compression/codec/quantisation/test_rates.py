"""Rate control: the real payload meets the wanted bits per parameter, in few encodings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.codec import (
    Context,
    NonFiniteError,
    QuantiseError,
    TensorSpec,
    encode,
    quantise,
    step_for_bits,
)
from prunecast.compression.codec.quantisation import rates


def values(kind: str, seed: int = 0, shape: tuple[int, int] = (200, 300)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = {
        "gauss": lambda: rng.normal(size=shape),
        "laplace": lambda: rng.laplace(size=shape) * 1e-4,
        "pruned": lambda: rng.normal(size=shape) * (rng.random(shape) < 0.1),
        "scaled": lambda: (
            rng.laplace(size=shape)
            * np.exp(0.8 * rng.normal(size=(shape[0], 1)))
            * np.exp(0.6 * rng.normal(size=(1, shape[1])))
        ),
        "uniform": lambda: rng.random(shape) - 0.5,
    }[kind]()
    return x.astype(np.float32)


def rate(
    tensors: dict[str, np.ndarray],
    steps: dict[str, float],
    dead_zone: float = 0.5,
    context: Context | None = None,
) -> float:
    q = {k: quantise(x, steps[k], dead_zone=dead_zone) for k, x in tensors.items()}
    return len(encode(q, context=context)) * 8 / sum(x.size for x in tensors.values())


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    lengths: list[int] = []
    real = rates.encode

    def counting(*args: Any, **kwargs: Any) -> bytes:
        payload = real(*args, **kwargs)
        lengths.append(len(payload))
        return payload

    monkeypatch.setattr(rates, "encode", counting)
    return lengths


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        (kind, bits)
        for kind in ("gauss", "laplace", "pruned", "scaled", "uniform")
        for bits in (4.0, 2.0, 1.0, 0.5, 0.1)
        if (kind, bits) != ("pruned", 4.0)  # 10 % of float32 values hold less than that
    ],
)
def test_within_two_per_cent(kind: str, bits: float, encodings: list[int]) -> None:
    tensors = {"w": values(kind)}
    steps = step_for_bits(tensors, bits)
    assert len(encodings) <= 7
    assert abs(rate(tensors, steps) / bits - 1) <= 0.02 + 1e-9
    assert steps["w"] == float(np.float32(steps["w"]))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["gauss", "laplace", "pruned", "scaled", "uniform"]),
    st.floats(0.1, 2.0),
    st.integers(0, 2**32),
    st.sampled_from([0.5, 0.66]),
)
def test_any_rate(kind: str, bits: float, seed: int, dead_zone: float) -> None:
    tensors = {"w": values(kind, seed, (150, 160)), "b": values(kind, seed + 1, (1, 40))}
    steps = step_for_bits(tensors, bits, dead_zone=dead_zone)
    assert abs(rate(tensors, steps, dead_zone) / bits - 1) <= 0.02 + 1e-9


def test_steps_in_proportion() -> None:
    tensors = {"w": values("gauss"), "v": values("laplace", 1, (50, 60))}
    assert len(set(step_for_bits(tensors, 1.5).values())) == 1
    steps = step_for_bits(tensors, 1.5, relative_to="std")
    ratio = tensors["w"].std(dtype=np.float64) / tensors["v"].std(dtype=np.float64)
    assert steps["w"] / steps["v"] == pytest.approx(ratio, rel=1e-6)
    assert abs(rate(tensors, steps) / 1.5 - 1) <= 0.02 + 1e-9


def test_with_a_context() -> None:
    x = values("gauss")
    mask = np.random.default_rng(5).random(x.shape) < 0.1
    tensors = {"w": x * mask}
    layout = {"w": TensorSpec(np.dtype(np.int32), x.shape)}
    context = Context(layout=layout, mask={"w": mask})
    steps = step_for_bits(tensors, 0.3, context=context)
    assert abs(rate(tensors, steps, context=context) / 0.3 - 1) <= 0.02 + 1e-9
    assert rate(tensors, steps) > 0.5  # without the mask the same integers cost more


def test_what_else_is_sent_can_be_measured() -> None:
    tensors = {"w": values("gauss")}
    size = tensors["w"].size
    steps = step_for_bits(
        tensors, 2.0, measure=lambda q, steps: 5000 + len(encode(q)), parameters=2 * size
    )
    total = 5000 + rate(tensors, steps) * size / 8
    assert abs(total * 8 / (2 * size) / 2.0 - 1) <= 0.02 + 1e-9


def test_a_head_larger_than_the_target_is_named() -> None:
    tensors = {f"layer{i}.weight": values("gauss", i, (2, 3)) for i in range(5)}
    with pytest.raises(QuantiseError, match=r"payload still takes (\d+) bytes, .* ask for more"):
        step_for_bits(tensors, 0.5)


def test_a_target_beyond_an_int32_is_named(encodings: list[int]) -> None:
    with pytest.raises(QuantiseError, match=r"finest step that int32 allows takes 3\d\.\d+; ask"):
        step_for_bits({"w": values("gauss", shape=(40, 50))}, 40.0)
    assert len(encodings) == 1


def test_a_jump_over_the_target_names_both_sides() -> None:
    signs = np.where(np.random.default_rng(1).random((100, 100)) < 0.5, -1, 1).astype(np.float32)
    with pytest.raises(QuantiseError, match=r"the nearest are 0\.\d+ and 1\.\d+"):
        step_for_bits({"w": signs}, 0.5)
    assert step_for_bits({"w": signs}, 1.0, tolerance=0.1)


def test_zeros_nothing_and_bad_arguments() -> None:
    with pytest.raises(QuantiseError, match="all values are zero"):
        step_for_bits({"w": np.zeros((30, 30), np.float32)}, 1.0)
    with pytest.raises(QuantiseError, match="nothing to quantise"):
        step_for_bits({}, 1.0)
    with pytest.raises(NonFiniteError, match="'w'"):
        step_for_bits({"w": np.array([np.nan], np.float32)}, 1.0)
    for bits in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(QuantiseError, match="above 0"):
            step_for_bits({"w": values("gauss")}, bits)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=2, max_side=8),
        elements=st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-4),
    ),
    st.floats(0.01, 60),
)
def test_small_tensors_meet_the_rate_or_say_why_not(x: np.ndarray, bits: float) -> None:
    message = ""
    try:
        steps = step_for_bits({"w": x}, bits)
    except QuantiseError as error:
        message = str(error)
    assert "bits" in message if message else abs(rate({"w": x}, steps) / bits - 1) <= 0.02 + 1e-9

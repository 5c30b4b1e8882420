"""Steps by relative error: at or below the wanted one, and close to it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.codec import (
    NonFiniteError,
    QuantiseError,
    dequantise,
    quantise,
    relative_error,
    spread,
    step_for_error,
)


def error_at(tensors: dict[str, np.ndarray], steps: dict[str, float], dead_zone: float) -> float:
    """Relative L2 error over all tensors, written down once more."""
    lost = energy = 0.0
    for name, x in tensors.items():
        q = quantise(x, steps[name], dead_zone=dead_zone)
        back = dequantise(q, steps[name], x.dtype).astype(np.float64)
        lost += float(((x.astype(np.float64) - back) ** 2).sum())
        energy += float((x.astype(np.float64) ** 2).sum())
    return float(np.sqrt(lost / energy)) if energy else 0.0


def values(kind: str, seed: int, dtype: str = "float32") -> np.ndarray:
    rng = np.random.default_rng(seed)
    shape = (150, 200)
    x = {
        "gauss": lambda: rng.normal(size=shape),
        "laplace": lambda: rng.laplace(size=shape) * 1e-4,
        "pruned": lambda: rng.normal(size=shape) * (rng.random(shape) < 0.1),
        "rows": lambda: rng.laplace(size=shape) * np.exp(2 * rng.normal(size=(shape[0], 1))),
    }[kind]()
    return x.astype(dtype)


@pytest.mark.parametrize("kind", ["gauss", "laplace", "pruned", "rows"])
@pytest.mark.parametrize("wanted", [0.6, 0.1, 0.01, 1e-4])
@pytest.mark.parametrize("dead_zone", [0.5, 0.66])
def test_lands_just_below_the_wanted_error(kind: str, wanted: float, dead_zone: float) -> None:
    x = values(kind, 1)
    step = step_for_error(x, wanted, dead_zone=dead_zone)
    got = error_at({"": x}, {"": step}, dead_zone)
    assert got <= wanted
    # In "rows", a few values hold most of the energy, so the error jumps with the step.
    assert got >= (0.97 if kind == "rows" else 0.99) * wanted
    assert step == float(np.float32(step))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_error_is_that_of_the_restored_dtype(dtype: str) -> None:
    x = values("gauss", 2, dtype)
    step = step_for_error(x, 0.003)
    assert relative_error(x, dequantise(quantise(x, step), step, dtype)) <= 0.003


def test_one_step_for_all_or_each_its_own() -> None:
    tensors = {"a": values("gauss", 3), "b": values("laplace", 4), "z": np.zeros(5, np.float32)}
    common = step_for_error(tensors, 0.05)
    assert len(set(common.values())) == 1
    assert 0.0495 <= error_at(tensors, common, 0.5) <= 0.05
    own = step_for_error(tensors, 0.05, per_tensor=True)
    for name in ("a", "b"):
        assert 0.0495 <= error_at({name: tensors[name]}, own, 0.5) <= 0.05
    assert own["z"] == 1.0
    assert list(own) == list(common) == list(tensors)


@pytest.mark.parametrize("kind", ["std", "rms"])
def test_steps_in_proportion_to_the_spread(kind: str) -> None:
    tensors = {"a": values("gauss", 3) + 1, "b": values("laplace", 4)}
    steps = step_for_error(tensors, 0.02, relative_to=kind)
    ratio = spread(tensors["a"], kind) / spread(tensors["b"], kind)
    assert steps["a"] / steps["b"] == pytest.approx(ratio, rel=1e-6)
    assert 0.0198 <= error_at(tensors, steps, 0.5) <= 0.02
    by_hand = step_for_error(tensors, 0.02, relative_to={"a": 3.0, "b": 1.5})
    assert by_hand["a"] == pytest.approx(2 * by_hand["b"])


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=2, max_side=12),
        elements=st.floats(-1e4, 1e4, width=32).filter(lambda v: v == 0 or abs(v) > 1e-4),
    ),
    st.floats(1e-4, 0.9),
    st.sampled_from([0.5, 0.75, 1.0]),
)
def test_whatever_the_values_the_error_is_not_exceeded(
    x: np.ndarray, wanted: float, dead_zone: float
) -> None:
    step = step_for_error(x, wanted, dead_zone=dead_zone)
    assert step > 0
    assert error_at({"": x}, {"": step}, dead_zone) <= wanted


def test_few_passes_over_the_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunecast.compression.codec.quantisation.steps import Lattice

    calls = 0
    measured = Lattice.error

    def counting(self: Lattice, exponent: float, dead_zone: float) -> float:
        nonlocal calls
        calls += 1
        return measured(self, exponent, dead_zone)

    monkeypatch.setattr(Lattice, "error", counting)
    for kind in ("gauss", "laplace", "pruned", "rows"):
        calls = 0
        step_for_error(values(kind, 7), 0.05)
        assert calls <= 6, kind


def test_what_cannot_be_reached_is_said() -> None:
    x = np.array([1.0, 1e-3, 0.3], np.float64)
    with pytest.raises(QuantiseError, match=r"no step leaves .* at the finest one it is \d"):
        step_for_error(x, 1e-12)
    with pytest.raises(QuantiseError, match="beyond float32"):
        step_for_error(np.array([1e60, 1.0]), 0.1)
    with pytest.raises(QuantiseError, match="too small or too uneven"):
        step_for_error(np.array([1e-42, 1e-41], np.float32), 0.1)
    with pytest.raises(NonFiniteError, match="'bad'"):
        step_for_error({"bad": np.array([np.inf])}, 0.1)
    for wrong in ({"error": 0.0}, {"error": 1.0}, {"error": 0.1, "dead_zone": 0.0}):
        with pytest.raises(QuantiseError):
            step_for_error({"a": np.ones(3)}, **wrong)
    with pytest.raises(QuantiseError, match="relative to nothing"):
        step_for_error({"a": np.ones(3)}, 0.1, per_tensor=True, relative_to="std")
    with pytest.raises(QuantiseError, match="'a'"):
        step_for_error({"a": np.ones(3)}, 0.1, relative_to={"b": 1.0})
    with pytest.raises(QuantiseError, match="not 'mean'"):
        step_for_error({"a": np.ones(3)}, 0.1, relative_to="mean")  # type: ignore[arg-type]


def test_zeros_and_nothing() -> None:
    assert step_for_error(np.zeros((2, 2)), 0.1) == 1.0
    assert step_for_error({}, 0.1) == {}
    assert step_for_error({"empty": np.zeros((0, 4), np.float32)}, 0.1) == {"empty": 1.0}


def test_relative_error() -> None:
    assert relative_error(np.zeros(3), np.zeros(3)) == 0.0
    assert relative_error(np.zeros(3), np.ones(3)) == np.inf
    x = np.arange(1, 300_001, dtype=np.float32)
    assert relative_error(x, np.zeros_like(x)) == 1.0


def test_spread_is_the_federations_unit() -> None:
    """The publisher and the clients compute their steps from these very expressions."""
    x = values("rows", 9)
    assert spread(x) == float(np.std(x, dtype=np.float64))
    mask = x > 0
    kept = x * mask
    energy = float(np.sum(np.square(kept, dtype=np.float64)))
    assert spread(kept, "rms", count=int(mask.sum())) == np.sqrt(energy / int(mask.sum()))
    assert spread(np.zeros((0, 2))) == 0.0

"""Steps of a lattice, and how they follow the version that devices hold."""

from __future__ import annotations

import numpy as np
import pytest

from prunecast.compression.onnx import ForeignModel
from prunecast.compression.onnx.lattice import STEPS, snap
from prunecast.compression.versions import LatticeTensor, RawTensor


def _weights(scale: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "w": (rng.standard_normal((40, 30)) * scale).astype(np.float32),
        "b": rng.standard_normal(30).astype(np.float32),
        "i": np.arange(400),
    }


def _lattice(tensor: object) -> LatticeTensor:
    assert isinstance(tensor, LatticeTensor)
    return tensor


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_kernels_go_on_the_lattice_and_nothing_else(bits: int, steps: str) -> None:
    arrays = _weights()
    model = snap(arrays, {"w"}, bits=bits, steps=steps)  # type: ignore[arg-type]
    w = _lattice(model["w"])
    assert np.abs(w.q).max() <= 2 ** (bits - 1) - 1
    assert isinstance(model["b"], RawTensor)
    assert np.array_equal(model["i"].dense(), arrays["i"])
    if steps != "error":  # which clips
        assert np.abs(w.dense() - arrays["w"]).max() <= 0.5001 * w.step


def test_without_bits_every_value_stays() -> None:
    arrays = _weights()
    model = snap(arrays, {"w"}, bits=None)
    assert all(a.tobytes() == model[n].dense().tobytes() for n, a in arrays.items())


def test_the_step_of_least_error_has_less_error() -> None:
    arrays = _weights()

    def error(steps: str) -> float:
        made = snap(arrays, {"w"}, bits=4, steps=steps)["w"].dense()  # type: ignore[arg-type]
        return float(np.square(made - arrays["w"]).sum())

    assert error("error") < 0.9 * error("range")


def test_a_held_step_stays_while_the_weights_fit() -> None:
    first = snap(_weights(), {"w"}, bits=8)
    for scale in (0.95, 1.0, 1.05):
        again = snap(_weights(scale), {"w"}, bits=8, held=first)
        assert _lattice(again["w"]).step == _lattice(first["w"]).step
    same = snap(_weights(), {"w"}, bits=8, held=first)
    assert np.array_equal(_lattice(same["w"]).q, _lattice(first["w"]).q)


@pytest.mark.parametrize("scale", [1.3, 3.0, 1000.0, 0.1, 1e-6])
def test_weights_that_leave_the_range_change_the_step_by_a_power_of_two(scale: float) -> None:
    first = snap(_weights(), {"w"}, bits=8)
    again = snap(_weights(scale), {"w"}, bits=8, held=first)
    shift = np.log2(_lattice(again["w"]).step / _lattice(first["w"]).step)
    assert shift == np.round(shift) != 0
    assert 50 <= np.abs(_lattice(again["w"]).q.astype(int)).max() <= 127


def test_zeros_and_another_shape() -> None:
    first = snap({"w": np.ones((4, 4), np.float32)}, {"w"}, bits=8)
    gone = snap({"w": np.zeros((4, 4), np.float32)}, {"w"}, bits=8, held=first)
    assert _lattice(gone["w"]).step == _lattice(first["w"]).step
    assert not _lattice(gone["w"]).q.any()
    other = snap({"w": np.full((2, 2), 5, np.float32)}, {"w"}, bits=8, held=first)
    assert np.abs(_lattice(other["w"]).q).max() > 100


def test_what_cannot_be_quantised_is_named() -> None:
    with pytest.raises(ForeignModel, match="'w' holds a value that is not finite"):
        snap({"w": np.full((2, 2), np.nan, np.float32)}, {"w"}, bits=8)
    with pytest.raises(ForeignModel, match="from 2 to 16"):
        snap({}, set(), bits=1)
    with pytest.raises(ForeignModel, match="steps are chosen by"):
        snap({}, set(), bits=8, steps="best")  # type: ignore[arg-type]

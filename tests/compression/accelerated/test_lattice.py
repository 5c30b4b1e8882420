"""quantise and dequantise give numpy's values, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression import accelerated, codec
from prunecast.compression.codec import NonFiniteError, QuantiseError
from support.devices import on_every_device

STEPS = st.floats(2.0**-40, 2.0**40) | st.sampled_from([0.1, 1 / 3, 1e-3, 0.5])


@on_every_device
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@settings(max_examples=80, deadline=None)
@given(data=st.data(), step=STEPS, dead_zone=st.floats(0.01, 1))
def test_quantise(
    device: str, dtype: str, data: st.DataObject, step: float, dead_zone: float
) -> None:
    finite = st.floats(allow_nan=False, allow_infinity=False, width=int(dtype[5:]))
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=30))
    values = np.asarray(data.draw(hnp.arrays(dtype, shape, elements=finite)))
    tensor = torch.from_numpy(values.copy()).to(device)
    try:
        expected = codec.quantise(values, step, dead_zone=dead_zone)
    except QuantiseError as error:
        with pytest.raises(type(error)):
            accelerated.quantise(tensor, step, dead_zone=dead_zone)
        return
    found = accelerated.quantise(tensor, step, dead_zone=dead_zone)
    assert found.dtype == torch.int32
    assert found.device == tensor.device
    assert found.cpu().numpy().tobytes() == expected.tobytes()
    assert tensor.cpu().numpy().tobytes() == values.tobytes()


@on_every_device
def test_quotients_beside_a_threshold(device: str) -> None:
    """Where a multiplication with the reciprocal would round to another integer."""
    steps = np.random.default_rng(6).uniform(0.01, 1, 200).astype(np.float32)
    for step in steps.tolist():
        k = np.arange(-200, 200)
        values = np.concatenate([np.nextafter(k * step, side) for side in (-1e9, 1e9)])
        values = np.concatenate([values, k * step, (k + 0.5) * step])
        found = accelerated.quantise(torch.from_numpy(values).to(device), step, dead_zone=1.0)
        assert found.cpu().numpy().tobytes() == codec.quantise(values, step, dead_zone=1).tobytes()


@on_every_device
@pytest.mark.parametrize("q", ["int8", "int16", "int32", "int64", "uint8", "uint32", "uint64"])
@settings(max_examples=40, deadline=None)
@given(data=st.data(), step=st.floats(2.0**-149, 2.0**127, width=32))
def test_dequantise(device: str, q: str, data: st.DataObject, step: float) -> None:
    values = np.asarray(data.draw(hnp.arrays(q, st.integers(0, 30))))
    for dtype in ("float16", "float32", "float64"):
        expected = codec.dequantise(values, step, dtype)
        found = accelerated.dequantise(
            torch.from_numpy(values.copy()).to(device), step, getattr(torch, dtype)
        )
        assert found.cpu().numpy().tobytes() == expected.tobytes()
        assert found.cpu().numpy().dtype == expected.dtype


@on_every_device
def test_negative_zero_never_appears(device: str) -> None:
    found = accelerated.dequantise(torch.tensor([-1, 0], device=device), 2.0**-149, torch.float16)
    assert not torch.signbit(found).any()


@pytest.mark.parametrize(
    ("values", "arguments", "error"),
    [
        ([1.0, float("nan")], {}, NonFiniteError),
        ([1.0, -float("inf")], {}, NonFiniteError),
        ([1.0], {"step": 0.0}, QuantiseError),
        ([1.0], {"step": float("inf")}, QuantiseError),
        ([1.0], {"dead_zone": 0.0}, QuantiseError),
        ([3e9], {}, QuantiseError),
        ([1], {}, QuantiseError),
    ],
)
def test_wrong_arguments(
    values: list[Any], arguments: dict[str, float], error: type[Exception]
) -> None:
    given = {"step": 1.0, **arguments}
    with pytest.raises(error) as caught:
        accelerated.quantise(torch.tensor(values), name="w", **given)
    with pytest.raises(error) as expected:
        codec.quantise(np.array(values), name="w", **given)
    assert str(caught.value) == str(expected.value)


def test_other_dtypes_are_named() -> None:
    with pytest.raises(QuantiseError, match="bfloat16"):
        accelerated.quantise(torch.ones(2, dtype=torch.bfloat16), 1.0)
    with pytest.raises(QuantiseError, match="uint64"):
        accelerated.quantise(torch.ones(2, dtype=torch.uint64), 1.0)
    with pytest.raises(QuantiseError, match="float32"):
        accelerated.dequantise(torch.ones(2), 1.0)
    with pytest.raises(QuantiseError, match="int32"):
        accelerated.dequantise(torch.ones(2, dtype=torch.int32), 1.0, torch.int32)
    with pytest.raises(QuantiseError, match="step"):
        accelerated.dequantise(torch.ones(2, dtype=torch.int32), -1.0)

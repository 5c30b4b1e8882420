"""The payload is the codec's, byte for byte, and so are the values read from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression import accelerated, codec
from prunecast.compression.accelerated import decoder
from prunecast.compression.codec import (
    Context,
    MaskViolation,
    TensorMismatch,
    TensorSpec,
    UnsupportedDtype,
    encoder,
)
from support.accelerated import assert_same_bytes, tensors_of
from support.codec_cases import cases, forced
from support.devices import on_every_device

INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"]
FLOATS = ["float16", "float32", "float64"]
CASES = cases()


@on_every_device
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_payload(device: str, name: str) -> None:
    arrays, context = CASES[name]
    assert_same_bytes(arrays, context, device)
    with forced(lanes=True):
        assert_same_bytes(arrays, context, device)
    with forced(lanes=True, static=True):
        assert_same_bytes(arrays, context, device)


@on_every_device
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["dense", "smooth", "sparse", "widths", "wide"])
def test_every_depth(device: str, name: str, depth: int) -> None:
    arrays, context = CASES[name]
    with forced(depth=depth):
        assert_same_bytes(arrays, context, device)
    with forced(depth=depth, lanes=True):
        assert_same_bytes(arrays, context, device)


@on_every_device
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_integers_with_any_context(device: str, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    dtype = data.draw(st.sampled_from(INTEGERS))
    values = np.asarray(data.draw(hnp.arrays(dtype, shape)))
    known: dict[str, Any] = {}
    if data.draw(st.booleans()):
        mask = np.asarray(data.draw(hnp.arrays(bool, shape)))
        values = np.asarray(values & mask if dtype == "bool" else values * mask, dtype)
        known["mask"] = {"name": mask}
    if data.draw(st.booleans()):
        kind = data.draw(st.sampled_from(INTEGERS))
        known["previous"] = {"name": np.asarray(data.draw(hnp.arrays(kind, shape)))}
    if data.draw(st.booleans()):
        known["layout"] = {"name": TensorSpec(values.dtype, values.shape)}
    with forced(
        depth=data.draw(st.none() | st.integers(0, 3)),
        lanes=data.draw(st.booleans()),
        static=data.draw(st.booleans()),
    ):
        assert_same_bytes({"name": values}, Context(**known), device)


@on_every_device
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_floats(device: str, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    dtype = data.draw(st.sampled_from(FLOATS))
    values, previous = (np.asarray(data.draw(hnp.arrays(dtype, shape))) for _ in range(2))
    with forced(lanes=data.draw(st.booleans())):
        assert_same_bytes({"x": values}, None, device)
        assert_same_bytes({"x": values}, Context(previous={"x": previous}), device)


@on_every_device
def test_large_fields_are_planned_on_the_same_sample(device: str) -> None:
    """Rows are sampled, levels are chosen, and sums go beyond what float32 holds."""
    rng = np.random.default_rng(4)
    scale = np.exp(rng.normal(size=(300, 1)) * 2) * np.exp(rng.normal(size=(1, 900)))
    large = np.rint(rng.laplace(size=scale.shape) * scale)
    for arrays in (
        {"w": large.astype("i4")},
        {"w": (large * 1e6).clip(-(2.0**31), 2.0**31 - 1).astype("i4")},
        {"w": (large * 1e15).clip(-(2.0**62), 2.0**62).astype("i8")},
    ):
        assert_same_bytes(arrays, None, device)
        previous = {"w": np.roll(arrays["w"], 1)}
        assert_same_bytes(arrays, Context(previous=previous), device)


@on_every_device
def test_groups_of_fields_share_memory_only_up_to_a_bound(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays, context = CASES["many"]
    monkeypatch.setattr(encoder, "_SHARED_MOST", 5000)
    payload = codec.encode(arrays, context=context)
    for together in (0, 10_000, 1 << 26):
        monkeypatch.setattr(decoder, "_TOGETHER", together)
        decoded = accelerated.decode(payload, context=context, device=device)
        assert all((decoded[name].cpu().numpy() == arrays[name]).all() for name in arrays)


@on_every_device
def test_views_and_gradients_are_taken_as_values(device: str) -> None:
    weight = torch.arange(24.0).reshape(4, 6).requires_grad_()
    turned = weight.t()
    payload = accelerated.encode({"w": turned}, device=device)
    assert payload == codec.encode({"w": turned.detach().numpy()})
    assert accelerated.decode(payload, device=device)["w"].tolist() == turned.tolist()


@on_every_device
def test_what_contradicts_the_context_is_refused(device: str) -> None:
    w = torch.ones(2, 3, dtype=torch.int32)

    def refused(error: type[Exception], tensor: torch.Tensor, **known: Any) -> None:
        with pytest.raises(error, match="'w'"):
            accelerated.encode({"w": tensor}, device=device, context=Context(**known))

    refused(MaskViolation, w, mask={"w": np.zeros((2, 3), bool)})
    refused(MaskViolation, -0.0 * w.to(torch.float32), mask={"w": np.zeros((2, 3), bool)})
    refused(TensorMismatch, w, mask={"w": np.ones(3, bool)})
    refused(TensorMismatch, w, previous={"w": np.ones((2, 3), "f4")})
    refused(TensorMismatch, w, layout={"w": TensorSpec(np.dtype("i4"), (3, 2))})
    refused(UnsupportedDtype, w.to(torch.bfloat16))
    refused(UnsupportedDtype, w.to(torch.complex64))
    refused(UnsupportedDtype, w.to(torch.float32).to_sparse())


def test_tensors_of_the_test_are_those_of_numpy() -> None:
    arrays = CASES["widths"][0]
    for name, tensor in tensors_of(arrays).items():
        assert tensor.numpy().tobytes() == arrays[name].tobytes()

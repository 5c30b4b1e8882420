"""Statistics: what survives the way, what is refused, how nodes' values are averaged."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.pruning.masks import contribute_statistics, holding, wanted_statistics
from prunecast.compression.pruning.statistics import (
    ACTIVATION,
    StatisticsMean,
    pack_statistics,
    statistic_shape,
)
from prunecast.compression.versions import BadPayload, VersionsError, encode_plain

SHAPES = {"w": (4, 5), "b": (3,)}


def some() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return {"g": {n: rng.lognormal(-9, 3, shape) for n, shape in SHAPES.items()}}


def unpacked(payload, wanted=("g",), shapes=SHAPES):
    mean = StatisticsMean()
    try:
        mean.add(payload, wanted, shapes)
    except VersionsError:
        assert mean.take() == {}  # nothing was counted
        raise
    return mean.take()


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=3, max_side=8),
        elements=st.floats(-(2.0**99), 2.0**99, width=32),
    )
)
def test_values_arrive_within_twenty_percent(values):
    found = unpacked(pack_statistics({"g": {"w": values}}), shapes={"w": values.shape})["g"]["w"]
    np.testing.assert_allclose(found, values, rtol=0.2001, atol=1e-38)


def test_what_is_beyond_is_clipped_and_what_is_not_finite_is_refused():
    found = unpacked(pack_statistics({"g": {"b": np.array([1e300, -np.inf, 1.0])}}))["g"]["b"]
    assert found == pytest.approx([1e30, -1e30, 1.0], rel=0.2001)
    with pytest.raises(BadPayload, match="'b' holds NaN"):
        unpacked(pack_statistics({"g": {"b": np.array([1.0, np.nan, 1.0])}}))


def test_activations_are_one_value_per_input_channel():
    shapes = {"w": (4, 5), "k": (4, 2, 3, 3)}
    values = {"w": np.arange(5.0)[None], "k": np.ones((1, 2, 1, 1))}
    found = unpacked(pack_statistics({ACTIVATION: values}), (ACTIVATION,), shapes)[ACTIVATION]
    assert {name: array.shape for name, array in found.items()} == {"w": (1, 5), "k": (1, 2, 1, 1)}
    for wrong in (np.ones((4, 5)), np.ones(5), np.ones((1, 1))):
        with pytest.raises(BadPayload, match="nobody asked for the statistic 'activation' of 'w'"):
            unpacked(pack_statistics({ACTIVATION: {"w": wrong}}), (ACTIVATION,), shapes)


def test_a_record_is_small():
    values = np.abs(np.random.default_rng(0).normal(size=(200, 300)))
    assert len(pack_statistics({"g": {"w": values}})) < 0.45 * values.size


def test_only_what_was_asked_for_is_counted():
    payload = pack_statistics(some())
    assert {n: a.shape for n, a in unpacked(payload)["g"].items()} == SHAPES
    for wanted, shapes in (
        (("other",), SHAPES),
        ((), SHAPES),
        (("g",), {"w": (4, 5), "b": (4,)}),
        (("g",), {"w": (4, 5)}),
        (("g",), {}),
    ):
        with pytest.raises(BadPayload):
            unpacked(payload, wanted, shapes)


@pytest.mark.parametrize(
    "arrays",
    [
        {"g\0b": np.zeros(3, np.float16)},
        {"g\0b": np.zeros(3, np.float64)},
        {"g\0b": np.array([np.nan, 0, 0], np.float32)},
        {"g\0b": np.array([3e38, 0, 0], np.float32)},
        {"g\0w": np.zeros((4, 5), np.float32), "g\0b": np.zeros((1 << 11, 1 << 11), np.float32)},
        {"gb": np.zeros(3, np.float32)},
    ],
)
def test_records_that_no_node_of_ours_makes_are_refused(arrays):
    with pytest.raises(BadPayload):
        unpacked(encode_plain(arrays))


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_damaged_records_raise_only_our_errors(data):
    payload = bytearray(pack_statistics(some()))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    try:
        found = unpacked(cut)
    except VersionsError:
        return
    assert all(np.isfinite(a).all() for tensors in found.values() for a in tensors.values())


def test_a_client_app_contributes_what_is_wanted():
    contribute_statistics("g", {"w": np.ones(2)})  # outside of a message: nobody asks
    assert wanted_statistics() == ()
    with holding({}, ("g",)) as found:
        assert wanted_statistics() == ("g",)
        contribute_statistics("other", {"nonsense": np.ones(2)})
        contribute_statistics("g", {"b": np.arange(3.0)})
    assert found == {"g": {"b": pytest.approx(np.arange(3.0))}}
    assert wanted_statistics() == ()
    with holding({}, ("g",)) as found:
        assert found == {}


def test_the_mean_is_weighted_and_begins_anew():
    def add(arrays, shapes, weight=1.0):
        mean.add(pack_statistics({"g": arrays}), ("g",), shapes, weight)

    mean = StatisticsMean()
    two = {"b": (2,), "w": (2,)}
    add({"b": np.array([1.0, 0.0])}, two)
    add({"b": np.array([4.0, 4.0]), "w": np.ones(2)}, two, 3)
    add({"w": np.zeros(2)}, two, float("nan"))  # no number of examples: counts once
    taken = mean.take()
    assert taken["g"]["b"].tolist() == [3.25, 3.0]
    assert taken["g"]["w"].tolist() == [0.75, 0.75]
    add({"b": np.zeros(2)}, two)
    add({"b": np.ones(3)}, {"b": (3,)})  # the model changed under way
    assert mean.take()["g"]["b"].tolist() == [1.0, 1.0, 1.0]
    assert mean.take() == {}


def test_a_bias_has_no_activations():
    mean, shapes = StatisticsMean(), {"w": (3, 2), "b": (3,), "scale": ()}
    for name in ("b", "scale"):
        shape = statistic_shape("activation", shapes[name])
        payload = pack_statistics({"activation": {name: np.ones(shape)}})
        with pytest.raises(
            BadPayload, match=f"nobody asked for the statistic 'activation' of '{name}'"
        ):
            mean.add(payload, ("activation",), shapes)
    mean.add(pack_statistics({"activation": {"w": np.ones((1, 2))}}), ("activation",), shapes)
    assert mean.take()["activation"].keys() == {"w"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_torch_are_contributed_as_they_are(dtype):
    gradient = torch.tensor([[1.0, -2.0]], dtype=dtype, requires_grad=True)
    with holding({}, ("gradient",)) as contributed:
        contribute_statistics("gradient", {"w": gradient})
    mean = StatisticsMean()
    mean.add(pack_statistics(contributed), ("gradient",), {"w": (1, 2)})
    assert mean.take()["gradient"]["w"].tolist() == [[1.0, -2.0]]

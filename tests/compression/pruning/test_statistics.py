"""Statistics: what survives the way, what is refused, how nodes' values are averaged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from prunecast.compression.pruning.statistics import (
    StatisticsError,
    StatisticsMean,
    collecting,
    contribute_statistics,
    pack_statistics,
    unpack_statistics,
    wanted_statistics,
)
from prunecast.compression.versions import BadPayload, VersionsError, WrongStream, encode_plain

VALUES = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=8),
    elements=st.floats(-(2.0**90), 2.0**90, width=32),
)
SHAPES = {"w": (4, 5), "b": (3,)}


def some() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return {"g": {n: rng.lognormal(-9, 3, shape) for n, shape in SHAPES.items()}}


@given(VALUES)
def test_values_arrive_within_nine_percent(values):
    payload = pack_statistics({"g": {"w": values}}, stream=b"s")
    got = unpack_statistics(payload, ("g",), {"w": values.shape}, stream=b"s")["g"]["w"]
    scale = np.abs(values).max(initial=0)
    deep = np.abs(values) < scale * 2.0**-31  # beyond 31 octaves: zero, or next to it
    assert np.abs(got[deep]).max(initial=0) <= scale * 2.0**-31
    np.testing.assert_allclose(got[~deep], values[~deep], rtol=0.091)


def test_a_record_is_small():
    values = np.random.default_rng(0).normal(size=(200, 300)).astype(np.float32) ** 2
    assert len(pack_statistics({"g": {"w": values}})) < 0.75 * values.size


def test_only_what_was_asked_for_is_unpacked():
    payload = pack_statistics(some(), stream=b"s")
    found = unpack_statistics(payload, ("g",), SHAPES, stream=b"s")
    assert {n: a.shape for n, a in found["g"].items()} == SHAPES
    for wanted, shapes in (
        (("other",), SHAPES),
        ((), SHAPES),
        (("g",), {"w": (4, 5), "b": (4,)}),
        (("g",), {"w": (4, 5)}),
        (("g",), {}),
    ):
        with pytest.raises(BadPayload):
            unpack_statistics(payload, wanted, shapes, stream=b"s")
    with pytest.raises(WrongStream):
        unpack_statistics(payload, ("g",), SHAPES, stream=b"t")


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"g\0b": np.zeros(3, np.int8)},
        {"g\0b": np.zeros(3, np.int8), "": np.zeros(2, np.float32)},
        {"g\0b": np.zeros(3, np.int8), "": np.zeros(1, np.float64)},
        {"g\0b": np.zeros(3, np.float32), "": np.zeros(1, np.float32)},
        {"g\0b": np.zeros(3, np.int8), "": np.array([np.nan], np.float32)},
        {"g\0b": np.zeros(3, np.int8), "": np.array([-1], np.float32)},
        {"g\0b": np.zeros(3, np.int8), "": np.array([1e38], np.float32)},
        {"g\0b": np.zeros((1 << 14, 1 << 14), np.int8), "": np.zeros(1, np.float32)},
        {"gb": np.zeros(3, np.int8), "": np.zeros(1, np.float32)},
    ],
)
def test_records_that_no_node_of_ours_makes_are_refused(arrays):
    with pytest.raises(BadPayload):
        unpack_statistics(encode_plain(arrays, stream=b"s"), ("g",), SHAPES, stream=b"s")


@given(st.data())
def test_damaged_records_raise_only_our_errors(data):
    payload = bytearray(pack_statistics(some(), stream=b"s"))
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    try:
        found = unpack_statistics(cut, ("g",), SHAPES, stream=b"s")
    except VersionsError:
        return
    assert all(np.isfinite(a).all() for tensors in found.values() for a in tensors.values())


def test_the_lowest_code_is_a_value_like_its_neighbour():
    arrays = {"g\0b": np.array([-128, -127, 0], np.int8), "": np.ones(1, np.float32)}
    found = unpack_statistics(encode_plain(arrays), ("g",), SHAPES)
    assert found["g"]["b"].tolist() == [-1.0, -1.0, 0.0]


def test_a_client_app_contributes_what_is_wanted():
    contribute_statistics("g", {"w": np.ones(2)})  # outside of a message: nobody asks
    assert wanted_statistics() == ()
    with collecting(("g",), SHAPES) as found:
        assert wanted_statistics() == ("g",)
        contribute_statistics("other", {"nonsense": np.ones(2)})
        contribute_statistics("g", {"b": np.arange(3.0)})
        for arrays, words in (
            ({"v": np.ones(3)}, "no such tensor"),
            ({"b": np.ones(4)}, r"\[4\]: the model holds \[3\]"),
            ({"b": np.array([1, np.nan, 2])}, "NaN"),
        ):
            with pytest.raises(StatisticsError, match=words):
                contribute_statistics("g", arrays)
    assert found == {"g": {"b": pytest.approx(np.arange(3.0))}}
    assert wanted_statistics() == ()


def test_the_mean_is_weighted_and_begins_anew():
    mean = StatisticsMean()
    mean.add({"g": {"b": np.array([1.0, 0.0])}}, 1)
    mean.add({"g": {"b": np.array([4.0, 4.0]), "w": np.ones(2)}}, 3)
    mean.add({"g": {"w": np.zeros(2)}}, float("nan"))  # no number of examples: counts once
    taken = mean.take()
    assert taken["g"]["b"].tolist() == [3.25, 3.0]
    assert taken["g"]["w"].tolist() == [0.75, 0.75]
    mean.add({"g": {"b": np.zeros(2)}})
    mean.add({"g": {"b": np.ones(3)}})
    assert mean.take()["g"]["b"].tolist() == [1.0, 1.0, 1.0]
    assert mean.take() == {}

"""Drop and grow: what nodes send of it, and where masks move by it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunecast.compression.pruning.growing import readjusted, strongest, to_grow
from prunecast.compression.pruning.statistics import (
    GROWTH,
    VOTES,
    StatisticsMean,
    asked,
    named,
    pack_statistics,
)
from prunecast.compression.versions import BadPayload

SHAPES = {"w": (40, 50)}


def mask_of(seed=0, kept=0.1):
    return {"w": np.random.default_rng(seed).random(SHAPES["w"]) < kept}


def gradients(seed=1):
    return {"w": np.random.default_rng(seed).normal(size=SHAPES["w"]).astype(np.float32)}


def test_a_node_sends_its_strongest_pruned_weights_and_no_others():
    masks, found = mask_of(), gradients()
    count = to_grow(masks["w"], 0.2)
    assert count == math.ceil(0.2 * masks["w"].sum())
    sent = strongest(GROWTH, found, masks, 0.2)["w"]
    assert np.count_nonzero(sent) == count
    assert not sent[masks["w"]].any()
    where = sent != 0
    np.testing.assert_array_equal(sent[where], found["w"][where])
    others = np.abs(found["w"][~where & ~masks["w"]])
    assert np.abs(sent[where]).min() >= others.max()
    votes = strongest(VOTES, found, masks, 0.2)["w"]
    np.testing.assert_array_equal(votes, np.sign(sent))


def test_what_a_node_cannot_measure_is_no_vote():
    masks = mask_of()
    wild = {"w": np.where(mask_of(5, 0.5)["w"], np.nan, np.inf).astype(np.float32)}
    assert not strongest(VOTES, wild, masks, 0.5)["w"].any()
    assert strongest(VOTES, {}, masks, 0.5) == {}
    assert strongest(VOTES, {"w": np.ones((2, 2))}, masks, 0.5) == {}
    assert strongest(VOTES, gradients(), {"w": np.ones(SHAPES["w"], bool)}, 0.5) == {}


def test_few_votes_cost_few_bytes():
    """A bitmap's entropy and a sign, and a tenth more."""
    rng = np.random.default_rng(0)
    masks = {"w": rng.random((300, 300)) < 0.1}
    votes = strongest(VOTES, {"w": rng.normal(size=(300, 300))}, masks, 0.1)
    share = np.count_nonzero(votes["w"]) / votes["w"].size
    bits = -share * math.log2(share) - (1 - share) * math.log2(1 - share) + share
    assert len(pack_statistics({VOTES: votes})) < 1.2 * bits * votes["w"].size / 8


@given(st.integers(0, 99), st.floats(0.01, 0.5), st.floats(0.05, 0.95))
def test_as_many_weights_as_before_are_kept_and_no_more_than_asked_have_moved(seed, share, kept):
    masks = mask_of(seed, kept)
    rng = np.random.default_rng(seed)
    scores = {"w": rng.integers(0, 5, SHAPES["w"]).astype(float)}
    votes = {"w": rng.integers(-1, 2, SHAPES["w"]) * rng.random(SHAPES["w"])}
    made, grown = readjusted(masks, scores, votes, share)
    before, after = masks["w"], made["w"]
    assert after.sum() == before.sum()
    moved = after & ~before
    assert moved.sum() <= to_grow(before, share)
    np.testing.assert_array_equal(grown["w"] != 0, moved)
    np.testing.assert_array_equal(grown["w"][moved], -np.sign(votes["w"][moved]))
    strength = np.abs(votes["w"])
    if moved.any():
        assert strength[moved].min() >= strength[~after & ~before].max(initial=0)
        dropped = before & ~after
        assert scores["w"][dropped].max() <= scores["w"][before & after].min(initial=9)


def test_opposite_votes_cancel_and_without_votes_nothing_moves():
    masks = mask_of()
    first = strongest(VOTES, gradients(1), masks, 0.3)
    mean = StatisticsMean()
    for vote in (first["w"], -first["w"]):
        mean.add(pack_statistics({VOTES: {"w": vote}}), (named(VOTES, 0.3),), SHAPES)
    made, grown = readjusted(masks, gradients(), mean.take()[VOTES], 0.3)
    np.testing.assert_array_equal(made["w"], masks["w"])
    assert grown == {}
    assert readjusted(masks, gradients(), {}, 0.3)[1] == {}


@pytest.mark.parametrize(
    ("statistic", "arrays", "said"),
    [
        (VOTES, {"w": np.ones(SHAPES["w"])}, "more than 20 values"),
        (GROWTH, {"w": np.ones(SHAPES["w"])}, "more than 20 values"),
        (VOTES, {"w": np.pad([[2.0]], ((0, 39), (0, 49)))}, "counts more than once"),
        (VOTES, {"v": np.ones((1, 1))}, "nobody asked"),
        ("gradient", {"w": np.ones(SHAPES["w"])}, "nobody asked"),
    ],
)
def test_hostile_votes_are_refused_and_count_nothing(statistic, arrays, said):
    mean = StatisticsMean()
    wanted = (named(VOTES if statistic == VOTES else GROWTH, 0.01),)
    with pytest.raises(BadPayload, match=said):
        mean.add(pack_statistics({statistic: arrays}), wanted, SHAPES)
    assert mean.take() == {}


@pytest.mark.parametrize(
    "name", ["votes@", "votes@nan", "votes@0", "votes@2", "votes@-1", "votes@x"]
)
def test_a_share_that_is_none_asks_for_nothing(name):
    assert asked([name]) == {}

"""The search for the most that a metric bears: where it ends, and what it never does."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from prunecast.compression.pruning.automatic import KNOBS, Knob, Search

SPARSITY = KNOBS["sparsity"]


def run(search, bears, rounds, *, dense=0.9, worse=0.1, dense_rounds=3):
    """Levels over rounds of a model whose metric falls where a level is higher than it bears."""
    levels = []
    for number in range(rounds):
        too_much = any(search.level(name) > most for name, most in bears.items())
        search.observe(dense - worse * too_much, may_rise=number >= dense_rounds)
        levels.append({name: search.level(name) for name in bears})
    return levels


@given(st.floats(0, 7), st.integers(1, 4))
def test_it_ends_at_the_highest_level_that_holds_to_within_its_least_step(bears, patience):
    search = Search([SPARSITY], 0.01, patience)
    found = run(search, {"sparsity": bears}, 3 + 7 + 6 * (patience + 3))
    assert search.done
    held = search.level("sparsity")
    assert held <= bears
    assert held > min(bears, SPARSITY.most) - SPARSITY.least or held == SPARSITY.most
    assert all(levels["sparsity"] == 0 for levels in found[:3])
    # to try twice what was kept, and what lies between, takes one failure for each halving
    fell = sum(b["sparsity"] < a["sparsity"] for a, b in itertools.pairwise(found))
    assert fell <= 1 + math.log2(SPARSITY.step / SPARSITY.least)


@given(st.floats(0, 6), st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]))
def test_knobs_are_turned_one_after_the_other(sparsity, lattice):
    search = Search([SPARSITY, KNOBS["lattice"]], 0.0, 2)
    found = run(search, {"sparsity": sparsity, "lattice": lattice}, 90)
    assert search.done
    last = found[-1]
    assert sparsity - SPARSITY.least < last["sparsity"] <= sparsity
    assert last["lattice"] == math.floor(lattice)  # in whole doublings
    moved = [n for n, (a, b) in enumerate(itertools.pairwise(found)) for k in a if a[k] != b[k]]
    kinds = [next(k for k in found[n] if found[n][k] != found[n + 1][k]) for n in moved]
    assert kinds == sorted(kinds, reverse=True)  # "sparsity" before "lattice"


def test_less_is_better_of_a_loss():
    search = Search([SPARSITY], 0.05, 1, higher=False)
    for loss in (2.0, 1.0, 0.5, 0.4, 0.44):
        search.observe(loss, may_rise=loss < 0.45)
    assert search.reference == 0.44  # the median of the last three
    for loss in (0.44, 0.44, 0.44, 0.44):
        search.observe(loss)
    assert search.level("sparsity") == 2
    search.observe(0.56)
    assert search.level("sparsity") == 1


def test_a_lucky_round_is_no_reference_and_later_gains_are():
    search = Search([SPARSITY], 0.01, 1)
    for value in (0.80, 0.90, 0.80, 0.80):
        search.observe(value, may_rise=False)
    assert search.reference == 0.80
    for value in (0.84, 0.85, 0.86):
        search.observe(value, may_rise=False)
    assert search.reference == 0.85


def test_nothing_higher_is_tried_while_the_model_still_learns_more_than_the_tolerance():
    search = Search([SPARSITY], 0.01, 1)
    for number in range(12):
        search.observe(0.5 + 0.02 * number)
        assert search.level("sparsity") <= 3  # of the first three, when nobody could know
    reached = search.level("sparsity")
    values = [0.72, 0.722, 0.724, 0.724, 0.725, 0.725]  # a point in three models, and then less
    levels = []
    for value in values:
        search.observe(value)
        levels.append(search.level("sparsity"))
    assert levels[0] == reached
    assert levels[-1] > reached
    # a level that has to recover what it cost is not held up by that
    search = Search([SPARSITY], 0.01, 2)
    for value in (0.9, 0.9, 0.9, 0.9, 0.8, 0.895):
        search.observe(value)
    assert search.level("sparsity") == 5


def test_a_level_gets_its_patience_to_recover():
    search = Search([SPARSITY], 0.01, 2)
    for value in (0.9, 0.9, 0.9):
        search.observe(value)
    assert search.level("sparsity") == 3
    levels = []
    for value in (0.8, 0.895, 0.8, 0.8):
        search.observe(value)
        levels.append(search.level("sparsity"))
    assert levels == [3, 4, 4, 3]


def test_one_lucky_model_of_three_is_not_enough_for_a_level():
    search = Search([SPARSITY], 0.01, 3)
    levels = []
    for value in (0.9, 0.9, 0.9, 0.9, 0.8, 0.9, 0.8, 0.8, 0.9, 0.8, 0.9):
        search.observe(value)
        levels.append(search.level("sparsity"))
    #                  two each     lucky once: it fails   and what held before holds on
    assert levels == [0, 1, 1, 2, 2, 2, 2, 1, 1, 1, 1.5]


@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 30))
def test_what_does_not_hold_any_more_falls_step_by_step_to_nothing(patience, before, after):
    search = Search([SPARSITY], 0.01, patience)
    for _ in range(before):
        search.observe(0.9)
    levels = [search.level("sparsity")]
    for _ in range(after):
        search.observe(0.5)
        levels.append(search.level("sparsity"))
    assert levels == sorted(levels, reverse=True)
    for _ in range(60 * patience):
        search.observe(float("nan"))
    assert search.level("sparsity") == 0


@pytest.mark.parametrize("arguments", [(-0.1, 1), (float("nan"), 1), (0.1, 0)])
def test_what_cannot_be_searched_is_refused(arguments):
    with pytest.raises(ValueError, match="no search"):
        Search([SPARSITY], *arguments)


@pytest.mark.parametrize("levels", [(-1, 1, 1), (1, 0.5, 1), (1, 1, 0), (math.inf, 1, 1)])
def test_knobs_that_cannot_be_turned_are_refused(levels):
    with pytest.raises(ValueError, match="knob 'k' cannot be searched"):
        Knob("k", *levels)


@pytest.mark.parametrize(
    "spoil",
    [lambda p: p[:-1], lambda p: (*p, 1.0), lambda p: (9.0, *p[1:]), lambda p: (0.5, *p[1:]),
     lambda p: (p[0], -1.0, *p[2:]), lambda p: (*p[:3], 7.0, *p[4:]),
     lambda p: (*p[:5], 2.0, *p[6:]), lambda p: (*p[:-1], 99.0), lambda p: (math.nan, *p[1:]),
     lambda p: ()],
)  # fmt: skip
def test_a_position_that_no_search_can_have_is_refused(spoil):
    search = Search([SPARSITY], 0.01, 2)
    run(search, {"sparsity": 3.3}, 8)
    with pytest.raises(ValueError, match=r"Search\.position"):
        Search([SPARSITY], 0.01, 2).resume(spoil(search.position))


class Searching(RuleBasedStateMachine):
    """Any metric, at any time; a copy that is resumed at every step does the same."""

    @initialize(
        patience=st.integers(1, 3),
        higher=st.booleans(),
        knobs=st.lists(st.sampled_from(sorted(KNOBS)), unique=True, min_size=1),
    )
    def begin(self, patience, higher, knobs):
        self.make = lambda: Search([KNOBS[k] for k in knobs], 0.02, patience, higher=higher)
        self.search, self.knobs, self.patience = self.make(), knobs, patience
        self.was, self.since_fall, self.was_done = self.levels(), 0, False

    def levels(self):
        return {name: self.search.level(name) for name in self.knobs}

    @rule(value=st.floats(0.5, 1.0) | st.just(float("nan")), may_rise=st.booleans())
    def observe(self, value, may_rise):
        other = self.make()
        other.resume(self.search.position)
        self.was, self.was_done = self.levels(), self.search.done
        for search in (self.search, other):
            search.observe(value, may_rise=may_rise)
        assert other.position == self.search.position
        now = self.levels()
        rose = [k for k in now if now[k] > self.was[k]]
        fell = [k for k in now if now[k] < self.was[k]]
        assert len(rose) + len(fell) <= 1
        assert not rose or may_rise
        assert not rose or math.isfinite(value)
        self.since_fall += 1
        if fell:
            assert self.since_fall >= self.patience
            self.since_fall = 0

    @precondition(lambda self: self.was_done)
    @rule()
    def stays_done(self):
        assert self.search.done

    @invariant()
    def levels_are_within_their_bounds(self):
        if hasattr(self, "search"):
            for name, level in self.levels().items():
                assert 0 <= level <= KNOBS[name].most


TestSearching = Searching.TestCase

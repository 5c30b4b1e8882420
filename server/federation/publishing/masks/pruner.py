"""What one stream prunes, version by version: where its schedule stands, and the masks it holds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.criteria import Knowledge
from prunecast.compression.pruning.growing import readjusted
from prunecast.compression.pruning.masks import Masks
from prunecast.compression.pruning.plan import PlanError, PruningPlan, Shares, tied_weights
from prunecast.compression.pruning.schedules import StaticSchedule
from prunecast.compression.pruning.statistics import Statistics, StatisticsMean, named
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.server.federation.errors import PolicyError
from prunecast.server.federation.knobs import GROWN_BY
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.masks.mask_state import (
    MaskState,
    fitting,
    narrowed_statistics,
)
from prunecast.server.federation.publishing.masks.progress import SUMS, Measurements, Progress
from prunecast.server.federation.publishing.masks.prunable import (
    check_prunable,
    say_emptied,
    say_left_alone,
    say_unmeasured,
)

__all__ = ["Pruner"]

_OTHER_CRITERIA = 0.25  # part of the lattice's step where masks do not follow from sizes
_EVENTS = 100  # that are kept where nobody asks for them


class Pruner:
    """Chooses the masks of one stream's versions.

    Where the policy holds masks they change at pruning events alone: versions in which the schedule
    removes more. What an event removes stays removed, and what it keeps is published as a
    value other than zero. Under "rigl" and "feddst" some weights are dropped, and as many grown, in
    between, see `prunecast.compression.pruning.growing`. Else ("dpf") they follow the master from
    version to version, as in dynamic pruning with feedback (Lin et al. 2020).

    Args:
        policy: of the run.
        plan: what is pruned; None for a record that is no model.

    Attributes:
        plan: as given, its schedule fitted to the number of rounds.
        statistics: what nodes contributed since the last version.
        measured: the policy's `pruning_metric` of the last version.
        search: what finds how much to prune; None where a schedule says it.
        halvings: of the weights that are kept, where a budget says how much is pruned.
        holds: whether masks are held.
        pruned: whether the last version has less than the one before by a pruning event.
    """

    def __init__(self, policy: Policy, plan: PruningPlan | None) -> None:
        self.policy, self.plan = policy, plan
        self.statistics, self.measured = StatisticsMean(), Measurements()
        self.holds, self.pruned = policy.mask_rule != "dpf", False
        self.progress = Progress(*policy.bounds())
        self.search = policy.search() if plan is not None else None
        self.halvings = 0
        self._clock = 0  # of the last version
        self._at = 0.0  # where the schedule stands; the clock, unless it follows learning
        self._before: Mapping[str, NDArray[Any]] = {}
        self._known: Statistics = {}
        self._accumulated: Mapping[str, NDArray[Any]] = {}
        self._versions = 0  # that masks were asked for
        self._state = MaskState()
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS)
        self._votes: Mapping[str, NDArray[Any]] = {}  # since the last version
        self._votes_by = GROWN_BY.get(policy.mask_rule, "")  # name of the statistic
        self._until = policy.moving_until()
        self._rewound: dict[str, NDArray[Any]] | None = None
        self._grown: dict[str, NDArray[np.float32]] = {}
        self._said_unmeasured = False
        # whether the next version is the one that was published before a resume, so that what was
        # measured is of itself
        self._is_known = False

    @property
    def state(self) -> MaskState:
        """What a resumed run needs beside `progress`."""
        waiting = self.statistics.so_far()
        known = self._with({name: a for name, a in waiting.items() if name != self._votes_by})
        return replace(self._state, known=known, accumulated=self._accumulated)

    @property
    def searched(self) -> tuple[float, ...]:
        """Where the search stands: `Measurements.position`, then `Search.position`; () for none."""
        if self.search is None:
            return ()
        return (*self.measured.position, *self.search.position)

    def resume(
        self, progress: Sequence[float], state: MaskState, searched: Sequence[float] = ()
    ) -> None:
        """Go on where another pruner was.

        Raises:
            ValueError: one of them is of no such pruner.
        """
        if progress:
            self.progress.resume(progress)
        if searched and self.search is not None:
            self.measured.resume(searched[:SUMS])
            self.search.resume(searched[SUMS:])
            self._search_says()
            self._is_known = True
        self._state, self._known, self._accumulated = state, state.known, state.accumulated

    def remove(self, plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Go on without the channels that a plan removes of the last version.

        Args:
            plan: of the channels.
            shapes: of the last version's tensors.

        Raises:
            PlanError: the plan is of another model; nothing was changed.
        """
        before, accumulated = plan.arrays(self._before), plan.arrays(self._accumulated)
        masks, early = plan.arrays(self._state.masks), plan.arrays(self._state.early)
        waiting = self.statistics.so_far()
        waiting.pop(self._votes_by, None)  # they are asked for again
        known = narrowed_statistics(self._with(waiting), plan, shapes)
        self.progress.remove(plan)  # the last that may raise
        self._before, self._accumulated, self._known = before, accumulated, known
        self._state = replace(self._state, masks=masks, early=early)
        self.statistics.take()

    def expect(self, rounds: int) -> None:
        """Fit the schedule to a number of rounds, those before a resume included."""
        if self.plan is None:
            return
        if self.search is None:
            self.plan = replace(self.plan, schedule=self.policy.pruning(rounds).schedule)
            self._thinned()
        self.progress.begin, self.progress.end = self.policy.bounds(rounds)
        self._until = self.policy.moving_until(rounds)

    @property
    def fineness(self) -> tuple[float, bool]:
        """As `Lattices.refine` takes them: the part of the usual step, and whether it is early."""
        # a kept weight that rounds to zero is lost: right only where the smallest go first
        by_size = not self.policy.target or self.by_size
        part = 1.0 if by_size else _OTHER_CRITERIA
        if self.search is not None:
            part *= 2.0 ** self.search.level("lattice")
        return self.progress.fineness * part, self.progress.early and by_size and not self.holds

    @property
    def by_size(self) -> bool:
        """Whether the smallest weights of a tensor are those that go."""
        return self.policy.pruning_criterion == "magnitude" and not self.policy.pruning_pattern

    @property
    def wanted(self) -> tuple[str, ...]:
        """Statistics to ask of the nodes that train from the last version."""
        if self.plan is None:
            return ()
        if self.search is not None and not self.search.done:  # every next model may have less
            return self.plan.criterion.statistics if self._begun(self._clock + 1) else ()
        ahead = 1 if self.policy.pruning_end else self.progress.stride
        names = self.plan.wanted(self._at, self._known, ahead)
        if self._moves(self._clock + 1):
            share = self._share(self._clock + 1)
            names = (*names, named(GROWN_BY[self.policy.mask_rule], share))
        return names

    def _moves(self, clock: int) -> bool:
        """Whether weights are to be dropped and grown in the version of a round."""
        if self.policy.mask_rule not in GROWN_BY or not self._state.masks:
            return False
        due = clock >= self._state.moved + self.policy.pruning_interval
        return due and clock < self._until and self._share(clock) > 0

    def _share(self, clock: int) -> float:
        """Of the kept weights, decayed by a cosine (Evci et al. 2020, section 3)."""
        turn = math.cos(math.pi * min(1.0, clock / self._until))
        return float(f"{self.policy.pruning_regrow / 2 * (1 + turn):.4g}")  # as it is asked for

    def observe(
        self, lattice: Mapping[str, NDArray[Any]], clock: int, *, waits: bool = False
    ) -> None:
        """Take in the weights of the next version, and what was measured of the last one.

        Args:
            lattice: the tensors of the master that lie on a lattice.
            clock: the round of the next version.
            waits: whether nothing more may be tried, since something that is to go is still there.
        """
        if self.plan is None:
            return
        self.progress.observe(lattice)
        known, self._is_known = self._is_known, False
        if self.search is None or known:
            return
        value = self.measured.take()
        begin, end = self.progress.begin, self.progress.end
        begun = self._begun(clock)
        before = self.levels
        if clock >= end and not all(map(self.search.is_settled, self.policy.tried_structures)):
            self.search.stop()  # so that rounds are left that train what remains
        if value is None:
            if begun and self.search.reference is None and not self._said_unmeasured:
                self._said_unmeasured = True
                say_unmeasured(self.policy)
            return
        self.search.observe(value, may_rise=begun and begin < clock < end and not waits)
        if self.levels == before:
            return
        self._search_says()
        rises = any(self.levels[name] > level for name, level in before.items())
        self._note("raised" if rises else "lowered", metric=value, reference=self.search.reference)

    def _begun(self, clock: int) -> bool:
        """Whether the search may turn up what the version of a round has."""
        return clock > self.progress.begin if self.policy.pruning_end else self.progress.has_begun

    def _search_says(self) -> None:
        if self.search is not None and self.plan is not None:
            sparsity = min(1 - 2.0 ** -self.search.level("sparsity"), self.policy.target)
            self.plan = replace(self.plan, schedule=StaticSchedule(sparsity))

    @property
    def may_thin(self) -> bool:
        """Whether the model has learned enough to lose weights, and the policy lets a budget."""
        return self.policy.thins and self.plan is not None and self.progress.has_begun

    def thin(self, halvings: int) -> None:
        """Keep half of the weights so many times over from the next version on."""
        if halvings != self.halvings:
            self.halvings = halvings
            self._thinned()
            self._events.append({"what": "raised", "levels": {"sparsity": float(halvings)}})

    def _thinned(self) -> None:
        if self.halvings and self.plan is not None:
            sparsity = min(1 - 2.0**-self.halvings, self.policy.target)
            self.plan = replace(self.plan, schedule=StaticSchedule(sparsity))

    @property
    def levels(self) -> dict[str, float]:
        """Levels of what the search turns."""
        search = self.search
        return {k: search.level(k) for k in self.policy.pruning_knobs} if search is not None else {}

    @property
    def left(self) -> Shares:
        """What the search leaves of all channels, heads and layers; 1 of what it does not turn."""
        if self.search is None:
            return Shares()
        return Shares(*(2.0 ** (-self.search.level(kind) / 2) for kind in Shares._fields))

    def take_events(self) -> list[dict[str, Any]]:
        """What happened to masks and levels since this was asked before."""
        events = list(self._events)
        self._events.clear()
        return events

    def _note(self, what: str, **more: Any) -> None:
        self._events.append({"what": what, "levels": self.levels, **more})

    def masks(
        self,
        lattice: Mapping[str, NDArray[Any]],
        clock: int,
        statistics: Statistics,
        *,
        model: Mapping[str, NDArray[Any]] | None = None,
        first: bool = False,
    ) -> dict[str, NDArray[np.bool_]]:
        """Masks of the next version.

        Args:
            lattice: the tensors of the master that lie on a lattice.
            clock: the round of the version.
            statistics: what nodes contributed since the last one; what is not given stays.
            model: all of the master, for criteria that look beside the weights; None: `lattice`.
            first: whether it is the first version of all.

        Raises:
            PolicyError: the model cannot be pruned as the policy says.
        """
        self._rewound, self.pruned = None, False
        if self.plan is None:
            return {}
        statistics = dict(statistics)
        self._votes = statistics.pop(self._votes_by, {})
        self._clock = clock
        self._known = self._with(statistics)
        self._versions += 1
        weights = self.plan.prunable(lattice)
        learned = self.progress.clock(clock)
        self._at = clock if self.policy.pruning_end else learned
        if first or (weights and self._versions <= 2):
            # again for ties, once weights that were only copied differ
            check_prunable(self.policy, self.plan, lattice, trained=self._versions == 2)
        if first and self.policy.target:
            say_left_alone(self.plan, lattice)
        known = self._knowledge(weights, lattice if model is None else model)
        asked = self._versions > 1 or self._known or self._state.masks
        if self.plan.criterion.once and not asked:
            return {}
        try:
            if self.holds:
                return self._held(known)
            stage = self.plan.stage(self._at, len(weights))
            if stage != self._state.stage:
                self._changed(stage)
            return self.plan.masks(self._at, known)
        except PlanError as error:
            raise PolicyError(f"the model cannot be pruned as the policy says: {error}") from error

    def _with(self, statistics: Statistics) -> Statistics:
        """What is known with what nodes contributed since; too late where they are asked once."""
        once = self.plan is not None and self.plan.criterion.once
        return self._known if once and self._known else {**self._known, **statistics}

    def adjusted(
        self, master: Mapping[str, NDArray[Any]], clock: int
    ) -> Mapping[str, NDArray[Any]]:
        """The master weights to publish, after `masks`.

        Those given, but for what an event did: all go back to the early ones that it rewinds to,
        and weights that were grown begin as near to zero as their sign can be told.

        Args:
            master: all of them, as they came from the strategy.
            clock: the round of the version.
        """
        if self.policy.pruning_rewind and self.plan is not None:
            rewinds = clock >= self.policy.pruning_rewind and not self._state.masks
            if rewinds and not self._state.early:
                self._state = replace(self._state, early=dict(master))
        early, self._rewound = self._rewound, None
        if early is not None and _shapes(early) == _shapes(master):
            self.progress.jump(early)
            master = early
        for name, up in self._grown.items():
            array = master[name]
            small = np.where(up, up * np.finfo(array.dtype).tiny, array).astype(array.dtype)
            master = {**master, name: small}
        self._grown = {}
        self._before = {name: master[name] for name in self._before}  # what nodes train from
        return master

    def _held(self, known: Knowledge) -> dict[str, NDArray[np.bool_]]:
        plan, weights = self.plan, known.weights
        assert plan is not None
        kept = {
            name: mask
            for name, mask in self._state.masks.items()
            if name in weights and mask.shape == weights[name].shape
        }
        stage = plan.stage(self._at, len(weights))
        # nodes are asked a version ahead, which the first has none of
        missing = any(not known.statistics.get(name) for name in plan.criterion.statistics)
        waits = missing and self._versions == 1
        if stage != self._state.stage and not waits:
            first = not kept
            kept = plan.masks(self._at, known, kept if stage > self._state.stage else None)
            if first:
                say_emptied(kept)
            self._changed(stage, kept)
            self._state = replace(self._state, moved=self._clock)
            self._rewound = dict(self._state.early) or None
        elif self._moves(self._clock) and self._votes:
            scores, votes = dict(plan.criterion.scores(known)), dict(self._votes)
            for name, voted in tied_weights(weights).items():  # nodes vote under one name
                scores[name] = scores[voted]
                votes |= {name: votes[voted]} if voted in votes else {}
            share = self._share(self._clock)
            kept, self._grown = readjusted(kept, scores, votes, share)
            self._state = replace(self._state, masks=kept, moved=self._clock)
            weights_grown = sum(int(np.count_nonzero(g)) for g in self._grown.values())
            self._note("moved", share=share, grown=weights_grown)
        return kept

    def _changed(self, stage: float, masks: Masks | None = None) -> None:
        """Note a pruning event."""
        self.pruned = stage > self._state.stage
        self._note("pruned" if stage > self._state.stage else "regrown", stage=stage)
        self._state = replace(self._state, stage=stage, masks=masks or {})

    def _knowledge(
        self, weights: Mapping[str, NDArray[Any]], model: Mapping[str, NDArray[Any]]
    ) -> Knowledge:
        plan = self.plan
        assert plan is not None
        shapes = {name: array.shape for name, array in weights.items()}
        update = {
            name: np.subtract(weights[name], array, dtype=np.float64)
            for name, array in self._before.items()
            if array.shape == shapes.get(name)
        }
        self._before = weights if plan.criterion.uses_update else {}
        of_these = fitting(self._known, shapes)
        known = Knowledge(weights, update, of_these, {}, model, plan.seed)
        if plan.criterion.accumulates is None:
            return known
        sums = {n: a for n, a in self._accumulated.items() if a.shape == shapes.get(n)}
        for name, part in plan.criterion.accumulates(known).items():
            sums[name] = sums[name] + part if name in sums else part
        self._accumulated = sums
        return replace(known, accumulated=sums)


def _shapes(arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in arrays.items()}

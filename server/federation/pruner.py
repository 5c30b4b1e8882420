"""What one stream prunes, version by version: where its schedule stands, and the masks it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from logging import INFO, WARNING
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.channels import ChannelPlan
from prunecast.compression.pruning.criteria import Knowledge
from prunecast.compression.pruning.masks import Masks
from prunecast.compression.pruning.plan import PlanError, PruningPlan, low_rank_factors
from prunecast.compression.pruning.statistics import (
    Statistics,
    StatisticsMean,
    statistic_shape,
)
from prunecast.server.federation.errors import PolicyError
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.progress import Losses, Progress

__all__ = ["MaskState", "Pruner"]

_WHY = (
    "none is a matrix or kernel of at least pruning-min-size elements that no pattern excludes, or "
    "all are adapters"
)
_OTHER_CRITERIA = 0.25  # part of the lattice's step where masks do not follow from sizes


@dataclass(frozen=True, eq=False)
class MaskState:
    """Masks that are held, and what is kept for later events and versions.

    Attributes:
        stage: of the schedule that they were chosen in, see `PruningPlan.stage`.
        masks: by tensor; empty while nothing is pruned, or where masks are not held.
        early: the master weights that events rewind to; empty for none.
        known: statistics that nodes contributed, those since the last version included.
        accumulated: what the criterion sums over versions, by tensor.
    """

    stage: float = 0.0
    masks: Masks = field(default_factory=dict)
    early: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    known: Statistics = field(default_factory=dict)
    accumulated: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class Pruner:
    """Chooses the masks of one stream's versions.

    Where the policy holds masks they change at pruning events alone: versions in which the schedule
    removes more. What an event removes stays removed, and what it keeps is published as a
    value other than zero. Else ("dpf") they follow the master from version to version, as in
    dynamic pruning with feedback (Lin et al. 2020).

    Args:
        policy: of the run.
        plan: what is pruned; None for a record that is no model.

    Attributes:
        plan: as given, its schedule fitted to the number of rounds.
        statistics: what nodes contributed since the last version.
        losses: what was measured of the last version.
        holds: whether masks are held.
    """

    def __init__(self, policy: Policy, plan: PruningPlan | None) -> None:
        self.policy, self.plan = policy, plan
        self.statistics, self.losses = StatisticsMean(), Losses()
        self.holds = policy.mask_rule != "dpf"
        self.progress = Progress(*policy.bounds(), policy.loss_budget)
        self._at = 0.0  # where the schedule stands; the clock, unless it follows learning
        self._before: Mapping[str, NDArray[Any]] = {}
        self._known: Statistics = {}
        self._accumulated: Mapping[str, NDArray[Any]] = {}
        self._versions = 0  # that masks were asked for
        self._state = MaskState()
        self._rewound: dict[str, NDArray[Any]] | None = None

    @property
    def state(self) -> MaskState:
        """What a resumed run needs beside `progress`."""
        known = self._with(self.statistics.so_far())
        return replace(self._state, known=known, accumulated=self._accumulated)

    def resume(self, progress: tuple[float, ...], state: MaskState) -> None:
        """Go on where another pruner was.

        Raises:
            ValueError: the progress is none.
        """
        if progress:
            self.progress.resume(progress)
        self._state, self._known, self._accumulated = state, state.known, state.accumulated

    def remove(self, plan: ChannelPlan, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Go on without the channels that a plan removes of the last version.

        Args:
            plan: of the channels.
            shapes: of the last version's tensors.
        """

        def part(tensor: str, array: NDArray[Any]) -> NDArray[Any]:
            axes = plan.kept.get(tensor)
            if axes is None or array.shape == shapes[tensor]:
                return plan.array(tensor, array)
            inputs = axes[1]  # a statistic of input channels alone
            return array if inputs is None else array[:, inputs]

        self.progress.remove(plan)
        self._before = plan.arrays(self._before)
        self._accumulated = plan.arrays(self._accumulated)
        masks, early = plan.arrays(self._state.masks), plan.arrays(self._state.early)
        self._state = replace(self._state, masks=masks, early=early)
        known = {**self._known, **self.statistics.take()}
        self._known = {
            name: {
                tensor: part(tensor, array)
                for tensor, array in arrays.items()
                if tensor in shapes and array.shape == statistic_shape(name, shapes[tensor])
            }
            for name, arrays in known.items()
        }

    def expect(self, rounds: int) -> None:
        """Fit the schedule to a number of rounds, those before a resume included."""
        if self.plan is None:
            return
        self.plan = replace(self.plan, schedule=self.policy.pruning(rounds).schedule)
        self.progress.begin, self.progress.end = self.policy.bounds(rounds)

    @property
    def fineness(self) -> tuple[float, bool]:
        """As `Lattices.refine` takes them: the part of the usual step, and whether it is early."""
        # a kept weight that rounds to zero is lost: right only where the smallest go first
        by_size = not self.policy.target or self.by_size
        part = 1.0 if by_size else _OTHER_CRITERIA
        return self.progress.fineness * part, self.progress.early and by_size and not self.holds

    @property
    def by_size(self) -> bool:
        """Whether the smallest weights of a tensor are those that go."""
        return self.policy.pruning_criterion == "magnitude" and not self.policy.pruning_pattern

    @property
    def wanted(self) -> tuple[str, ...]:
        """Statistics to ask of the nodes that train from the last version."""
        return self.plan.wanted(self._at, self._known) if self.plan is not None else ()

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
            first: whether it is the first version; says then what cannot be pruned.

        Raises:
            PolicyError: the model cannot be pruned as the policy says.
        """
        self._rewound = None
        if self.plan is None:
            return {}
        self._known = self._with(statistics)
        self._versions += 1
        weights = self.plan.prunable(lattice)
        self._at = clock
        learned = self.progress.clock(clock, self.losses.take())
        if not self.policy.pruning_end:
            self._at = learned
        if first and self.policy.target:
            self._say_unpruned(lattice)
        if self.policy.target and weights and self._versions <= 2:
            self._check(lattice, trained=self._versions == 2)
        known = self._knowledge(weights, lattice if model is None else model)
        asked = self._versions > 1 or self._known or self._state.masks
        if self.plan.criterion.once and not asked:
            return {}
        try:
            return self._held(known) if self.holds else self.plan.masks(self._at, known)
        except PlanError as error:
            raise PolicyError(f"the model cannot be pruned as the policy says: {error}") from error

    def _with(self, statistics: Statistics) -> Statistics:
        """What is known with what nodes contributed since; too late where they are asked once."""
        once = self.plan is not None and self.plan.criterion.once
        return self._known if once and self._known else {**self._known, **statistics}

    def _check(self, lattice: Mapping[str, NDArray[Any]], *, trained: bool) -> None:
        """Before the first round, and again for ties, once weights that were only copied differ."""
        assert self.plan is not None
        try:
            self.plan.check(lattice, trained=trained)
        except PlanError as error:
            raise PolicyError(f"the model cannot be pruned as the policy says: {error}") from error

    def rewound(self, master: Mapping[str, NDArray[Any]], clock: int) -> Mapping[str, NDArray[Any]]:
        """The master weights to publish: those given, or the early ones that an event rewinds to.

        Args:
            master: all of them, as they came from the strategy.
            clock: the round of the version.
        """
        if self.plan is None or not self.policy.pruning_rewind:
            return master
        if not self._state.early and clock >= self.policy.pruning_rewind and not self._state.masks:
            self._state = replace(self._state, early=dict(master))
        early, self._rewound = self._rewound, None
        if early is None or {n: a.shape for n, a in early.items()} != {
            n: a.shape for n, a in master.items()
        }:
            return master
        self.progress.jump(early)
        return early

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
            kept = plan.masks(self._at, known, kept if stage > self._state.stage else None)
            self._state = replace(self._state, stage=stage, masks=kept)
            self._rewound = dict(self._state.early) or None
        return kept

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
        fitting = {
            name: {
                tensor: array
                for tensor, array in arrays.items()
                if tensor in shapes and array.shape == statistic_shape(name, shapes[tensor])
            }
            for name, arrays in self._known.items()
        }
        known = Knowledge(weights, update, fitting, {}, model, plan.seed)
        if plan.criterion.accumulates is None:
            return known
        sums = {n: a for n, a in self._accumulated.items() if a.shape == shapes.get(n)}
        for name, part in plan.criterion.accumulates(known).items():
            sums[name] = sums[name] + part if name in sums else part
        self._accumulated = sums
        return replace(known, accumulated=sums)

    def _say_unpruned(self, lattice: Mapping[str, NDArray[Any]]) -> None:
        plan = self.plan
        assert plan is not None
        adapters = low_rank_factors({name: array.shape for name, array in lattice.items()})
        if adapters and not plan.adapters:
            log(
                INFO,
                "Not pruned: %d low-rank factors such as %r, whose products would lose whole rows; "
                "prunecast.pruning-adapters = true prunes them.",
                len(adapters),
                min(adapters),
            )
        if not plan.prunable(lattice):
            log(
                WARNING, "The model has no tensor that may be pruned, so nothing will be: %s.", _WHY
            )

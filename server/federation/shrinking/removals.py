"""Channels, heads and layers that go while a federation trains: who chooses, what goes along.

A *removal* is between two rounds: after the training of one has been aggregated and before anybody
is sent the result. Channels are chosen on the master; then master, published versions, what
criteria have kept, and the strategy's own state go on with the part that remains. After a round of
which no reply could be used nothing goes: it is *owed*, and goes after the next that trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from logging import INFO, WARNING

import numpy as np
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy

from prunecast.compression.flower import dense_arrays, set_apart
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.plan import ChannelSchedule, Shares
from prunecast.compression.pruning.structure.channels import ChannelChooser, ChannelPlan
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.exchange.grid import CompressedGrid
from prunecast.server.federation.shrinking.choosing import Arrays, check_trial, chosen
from prunecast.server.federation.shrinking.strategies import (
    narrow_strategy,
    say_what_is_not_reached,
)

__all__ = ["Removals", "Removed", "check_channels"]

_NEAR = 1e-6  # relative: what rounding makes of a share


@dataclass(frozen=True)
class Removed:
    """What a removal did.

    Attributes:
        share: of the channels that remain of all.
        weights: of the model before and after.
        plan_bytes: that every node is sent once beside the version.
        heads, layers: share of the heads and residual layers that remain of all.
    """

    share: float
    weights: list[int]
    plan_bytes: int
    heads: float = 1.0
    layers: float = 1.0


class Removals:
    """The removals of one run.

    Args:
        schedule: when channels go, and how many.
        choose: which; None where nobody says.
        passed: rounds before those of this run, where it goes on from a checkpoint.
        tries: of channels, heads and layers those of which automatic pruning finds how many can
            go, in place of the schedule.

    Raises:
        FederationError: channels are to go and nobody chooses which.
    """

    def __init__(
        self,
        schedule: ChannelSchedule,
        choose: ChannelChooser | None,
        passed: int = 0,
        *,
        tries: Sequence[str] = (),
    ) -> None:
        if (schedule.at or tries) and choose is None:
            raise FederationError(
                "the policy removes channels and nobody says which: give "
                "Run(channels=module_chooser(model, example)), or in the run config of the ready "
                "ServerApp example = 'myapp.task:example', () -> inputs of the model"
            )
        self._schedule, self._choose, self._passed = schedule, choose, passed
        self._tries = tries
        self._last: float = math.inf  # round of this run

    def check(
        self,
        grid: CompressedGrid,
        arrays: ArrayRecord,
        strategy: Strategy,
        rounds: int,
        key: str,
        *,
        begun: int = 0,
    ) -> None:
        """See before anything is trained that the channels can go, and say what they leave behind.

        Of the rounds, those up to `begun` have been trained.

        Raises:
            FederationError: they would go when no round is left that trains the rest.
            PlanError: they cannot go.
        """
        ahead = [at for at in self._schedule.at if at > self._passed + begun]
        self._last = last = self._passed + rounds
        if self._tries and self._choose is not None:
            _, end = grid.policy.bounds(last)
            if end >= last:
                raise FederationError(
                    f"channels may go as late as after round {end} of {last}, and no round would "
                    "train what is left: set prunecast.pruning-end to less, or train longer"
                )
            grid.try_channels(self._choose, key=key)
            if grid.channels(key=key) is None:
                check_trial(self._choose, dense_arrays(set_apart(arrays)[0]), self._tries)
                say_what_is_not_reached(strategy)
            return
        if self._owed(self._passed + begun, grid, key):
            ahead.insert(0, self._passed + begun)
        if not ahead:
            return
        _check_last(ahead[-1], last)
        for at in _ends(self._schedule, ahead):
            self._plan(grid, arrays, at, key)
        say_what_is_not_reached(strategy)

    def after(
        self, number: int, grid: CompressedGrid, strategy: Strategy, arrays: ArrayRecord, key: str
    ) -> tuple[ArrayRecord, Removed | None]:
        """Remove what is due after a round that trained, or has been since an earlier one.

        After the last round nothing goes, as none would train what is left.

        Args:
            number: of the round in this run, 1 for the first.
            grid: of the run.
            strategy: whose state goes on with what remains.
            arrays: what the round was aggregated to.
            key: of the model's record.

        Returns:
            What the strategy goes on from, and what was done; the same arrays and None for nothing.
        """
        number += self._passed
        if number >= self._last or not self._owed(number, grid, key):
            return arrays, None
        plan = self._plan(grid, arrays, number, key)
        wanted = self._wanted(number, grid, key)
        there = zip(wanted, self._shares(grid, key), strict=True)
        shares = Shares(*(now / before for now, before in there))
        if not np.allclose(plan.shares, shares, rtol=_NEAR, atol=0):  # what is owed is told from it
            plan = plan.of_shares(shares)
        before = {name: array.shape for name, array in dense_arrays(set_apart(arrays)[0]).items()}
        narrow = grid.remove_channels(arrays, plan, key=key)
        narrow_strategy(strategy, plan, before)
        channels = grid.channels(key=key)
        assert channels is not None
        weights = [
            sum(int(np.prod(array.shape)) for array in record.values())
            for record in (arrays, narrow)
        ]
        done = Removed(
            *(wanted.channels, weights, len(channels.coded), wanted.heads, wanted.layers)
        )
        log(
            INFO,
            "After round %d %s remain: %d of %d weights.",
            *(number, self._said(wanted), weights[1], weights[0]),
        )
        return narrow, done

    def say_owed(self, number: int, grid: CompressedGrid, key: str) -> None:
        """Warn after the last round of this run if channels remain that were to go."""
        number += self._passed
        if self._owed(number, grid, key):
            log(
                WARNING,
                "%s remain, not %s: in rounds after which some were to go, "
                "and all since, no reply could be used. Go on from the checkpoint for two rounds "
                "or more.",
                self._said(self._shares(grid, key)),
                self._said(self._wanted(number, grid, key), "{0:.0%}"),
            )

    def _said(self, shares: Shares, text: str = "{0:.0%} of the {1}") -> str:
        """Shares of what is to go, for people."""
        ends = self._schedule.share, self._schedule.heads, self._schedule.layers
        scheduled = [n for n, end in zip(Shares._fields, ends, strict=True) if end < 1]
        going = scheduled or [n for n in self._tries if getattr(shares, n) < 1] or self._tries
        return " and ".join(text.format(getattr(shares, name), name) for name in going)

    def _owed(self, number: int, grid: CompressedGrid, key: str) -> bool:
        """Whether more channels, heads or layers remain than are to after a round."""
        if not (self._schedule.at or self._tries):
            return False
        pairs = zip(self._wanted(number, grid, key), self._shares(grid, key), strict=True)
        return any(wanted < there * (1 - _NEAR) for wanted, there in pairs)

    def _wanted(self, number: int, grid: CompressedGrid, key: str) -> Shares:
        """What is to remain after a round; of what has fewer left already, these."""
        there = self._shares(grid, key)
        if self._tries:
            settled = grid.settled_channels(key=key)
            parts = Shares() if settled is None else settled.shares
            return Shares(*(now * part for now, part in zip(there, parts, strict=True)))
        return Shares(*map(min, self._schedule.shares(number), there))

    def _shares(self, grid: CompressedGrid, key: str) -> Shares:
        removed = grid.channels(key=key)
        return Shares() if removed is None else removed.shares

    def _plan(
        self, grid: CompressedGrid, arrays: ArrayRecord, number: int, key: str
    ) -> ChannelPlan:
        settled = grid.settled_channels(key=key) if self._tries else None
        if settled is not None:
            return settled
        assert self._choose is not None
        master, wanted = dense_arrays(set_apart(arrays)[0]), self._wanted(number, grid, key)
        return chosen(self._choose, master, wanted, grid.channels(key=key))


def check_channels(
    schedule: ChannelSchedule,
    choose: ChannelChooser,
    master: Arrays,
    rounds: int,
    *,
    tries: Sequence[str] = (),
) -> None:
    """Refuse channels that cannot go from a model that has all of them.

    Raises:
        FederationError: they would go when no round is left that trains the rest.
        PlanError: they cannot go.
    """
    if schedule.at:
        _check_last(schedule.at[-1], rounds)
        for at in _ends(schedule, schedule.at):
            chosen(choose, master, schedule.shares(at), None)
    if tries:
        check_trial(choose, master, tries)


def _ends(schedule: ChannelSchedule, at: Sequence[int]) -> Sequence[int]:
    """Rounds by which is seen that all can go; of heads and layers the last may leave none."""
    return at[:1] if len(at) == 1 or schedule.heads == schedule.layers == 1 else (at[0], at[-1])


def _check_last(at: int, last: int) -> None:
    if at >= last:
        raise FederationError(
            f"channels go after round {at} of {last}, and no round would train what is left: set "
            "prunecast.channels-at to earlier rounds, or train longer"
        )

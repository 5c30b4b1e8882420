"""How often nodes train, and how their updates are to be quantised for that."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import Message, MessageType
from numpy.typing import NDArray

from prunecast.compression.flower.internals import function_of
from prunecast.compression.versions import UpdateRule

__all__ = ["Changes", "Participation", "rule_for", "trains"]

_CHANGES = 4  # of the model, whose norms are averaged
_LEVELS = (4.0, 12.0)  # rounds from one update of a node to its next: seldom, rarely


def trains(message: Message) -> bool:
    """Whether a message asks for training."""
    return function_of(message.metadata.message_type) == MessageType.TRAIN


class Participation:
    """From which nodes were asked to train in which round: how long until a node's next update.

    A node that was never asked is expected after as many rounds as it takes to ask all; what is
    seen of a node counts as much as that for every time it was asked again.

    Attributes:
        pool: nodes that there are, as far as known.
        rounds: in which nodes were asked to train. Where messages state none, the next one begins
            when a node is asked again.
    """

    def __init__(self) -> None:
        self.pool = self.rounds = 0
        self._stated = self._before = 0
        self._asked: set[int] = set()  # in this round
        self._first: dict[int, int] = {}
        self._times: dict[int, int] = {}

    @property
    def rate(self) -> float:
        """Share of the nodes that are asked in a round; 1 while nobody was."""
        asked = max(len(self._asked), self._before)
        return min(1.0, asked / max(self.pool, len(self._first), 1)) if asked else 1.0

    def begin(self, nodes: Collection[int], pool: int = 0, stated: int = 0) -> None:
        """Note who is asked to train.

        Args:
            nodes: their ids.
            pool: how many nodes there are; 0 where nobody knows.
            stated: the round that their messages state; 0 for none.
        """
        again = not self._asked.isdisjoint(nodes)
        if not self.rounds or (stated != self._stated if stated else again):
            self.rounds, self._stated = self.rounds + 1, stated
            self._before, self._asked = len(self._asked), set()
        self._asked.update(nodes)
        self.pool = pool or self.pool
        for node in nodes:
            self._first.setdefault(node, self.rounds)
            self._times[node] = self._times.get(node, 0) + 1

    def gap(self, node: int) -> float:
        """Rounds from one update of a node to its next, 1 or more, as far as one can tell."""
        expected, times = 1 / self.rate, self._times.get(node, 0)
        if times < 2:
            return max(1.0, expected)
        return max(1.0, (expected + self.rounds - self._first[node]) / times)


def rule_for(rule: UpdateRule, gap: float) -> UpdateRule:
    """The rule of updates for a node whose next one follows after so many rounds.

    Coarse steps, a floor and a dead zone rely on the residual being added to the next update. What
    a node drops that seldom comes again is missing meanwhile, and of another model when it comes;
    of one that trains once it is lost. So who comes seldom sends more of its update at once.

    Args:
        rule: for nodes that train in every round, or almost.
        gap: rounds; the same rule for all within a factor of three or so, so that most messages
            have the same content.
    """
    if gap < _LEVELS[0] or not rule.error_feedback or not rule.step:
        return rule
    floor, zone, step = (0.5, 0.6, 2.6) if gap < _LEVELS[1] else (0.0, 0.5, 2.0)
    return replace(
        rule,
        step=min(rule.step, step),
        dead_zone=min(rule.dead_zone, zone),
        floor=min(rule.floor, floor),
    )


class Changes:
    """How far the master moves from version to version, over the tensors of its lattice."""

    def __init__(self) -> None:
        self._before: Mapping[str, NDArray[Any]] = {}
        self._norms: deque[float] = deque(maxlen=_CHANGES)

    @property
    def norm(self) -> float:
        """Mean norm of the last changes; 0 before the second version."""
        return sum(self._norms) / len(self._norms) if self._norms else 0.0

    def observe(self, master: Mapping[str, NDArray[Any]]) -> None:
        """Take in the next version's; of other shapes than the last one's nothing is measured."""
        before, self._before = self._before, dict(master)
        if before.keys() != master.keys() or not before:
            return
        if any(before[name].shape != array.shape for name, array in master.items()):
            return
        squares = (
            float(np.square(array - before[name], dtype=np.float64).sum())
            for name, array in master.items()
        )
        self._norms.append(sum(squares) ** 0.5)

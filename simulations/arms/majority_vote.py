"""signSGD with majority vote: a bit per weight in both directions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.simulations.arms import Arm
from prunecast.simulations.kinds import Range

if TYPE_CHECKING:
    from prunecast.server.federation import Policy

__all__ = ["MajorityVote"]


@dataclass(frozen=True)
class MajorityVote(Arm):
    """Clients send the sign of their change, the server the sign that most of them sent.

    Bernstein, Wang, Azizzadenesheli & Anandkumar 2018, "signSGD: Compressed Optimisation for
    Non-Convex Problems", algorithm 3, with the change by a round of local training in the place of
    one gradient. Every vote counts the same, and every weight moves by the step in every round.
    Running statistics, which have no sign to vote on, are averaged.

    Attributes:
        step: by which a weight moves in the first round (the paper's learning rate).
        decay: of the step from round to round, above 0 and at most 1.
    """

    step: Annotated[float, Range(0, above=True)] = 0.003
    decay: Annotated[float, Range(0, 1, above=True)] = 0.95

    def grid_policy(self) -> Policy:
        """A sign for each weight in both directions; the step travels once per tensor."""
        from prunecast.server.federation import Policy

        down = {"step": 0.0}  # the mean magnitude: all have the same
        return Policy(up="signsgd", down="signsgd", down_options=down)

    def strategy(self, average: Any) -> Any:
        """The vote in the place of the average of `average`, whose sampling stays."""
        mean = average.aggregate_train
        sent: dict[str, Any] = {}
        configure = average.configure_train

        def configure_train(server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            sent["arrays"] = arrays
            return configure(server_round, arrays, config, grid)

        def aggregate_train(server_round: int, replies: Iterable[Any]) -> Any:
            got = list(replies)
            votes = _votes(sent["arrays"], [reply for reply in got if not reply.has_error()])
            merged, metrics = mean(server_round, got)
            if merged is not None:
                step = np.float32(self.step * self.decay ** (server_round - 1))
                merged = _moved(sent["arrays"], merged, votes, step, server_round)
            return merged, metrics

        average.configure_train, average.aggregate_train = configure_train, aggregate_train
        return average

    def text(self) -> str:
        """The step."""
        return f"step = {self.step}, decay = {self.decay}"


def _votes(sent: Any, replies: Iterable[Any]) -> dict[str, NDArray[np.int32]]:
    """By weight, how many more replies have it above what was sent than below."""
    from prunecast.compression.flower import dense_arrays, float_names

    before, voting = dense_arrays(sent), float_names(sent)
    votes = {name: np.zeros(before[name].shape, np.int32) for name in voting}
    for reply in replies:
        [record] = reply.content.array_records.values()
        arrays = dense_arrays(record)
        for name in voting:
            votes[name] += np.sign(arrays[name] - before[name]).astype(np.int32)
    return votes


def _moved(
    sent: Any,
    mean: Any,
    votes: dict[str, NDArray[np.int32]],
    step: np.float32,
    server_round: int,
) -> Any:
    """What was sent, every weight moved by the step as most want it; what has no vote averaged."""
    from prunecast.compression.flower import array_record, dense_arrays

    before, after = dense_arrays(sent), dict(dense_arrays(mean))
    coins = np.random.default_rng([server_round, 0x51674])
    for name, vote in votes.items():
        ties = coins.integers(0, 2, vote.shape) * 2 - 1
        sign = np.where(vote == 0, ties, np.sign(vote)).astype(before[name].dtype)
        after[name] = before[name] + sign * step.astype(before[name].dtype)
    return array_record({name: np.asarray(array) for name, array in after.items()})

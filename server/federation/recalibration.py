"""A round of its own in which nodes estimate BatchNorm's running statistics of a published model.

What a node's training leaves behind are statistics of its own weights. The published model has the
average of all nodes' weights, and after a pruning event fewer of them. So the version is sent to
the nodes that have just trained, they pass their examples through it, and the mean of what
they find takes the place of the statistics: the same version otherwise, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from prunecast.compression.flower import dense_arrays, node_reason, set_apart
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.statistics import RECALIBRATE, RUNNING_STATISTICS
from prunecast.compression.versions import is_statistic
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.exchange.grid import CompressedGrid
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.strategies import private_strategy

__all__ = ["Recalibrated", "Recalibration"]

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Recalibrated:
    """What a recalibration did.

    Attributes:
        nodes: whose statistics were averaged.
        failures: how many others were asked.
        examples: that they looked at, together.
    """

    nodes: int
    failures: int
    examples: float


class Recalibration:
    """The recalibrations of one run.

    Args:
        policy: says after which rounds.
        strategy: of the run.

    Raises:
        FederationError: the strategy, or one that it wraps, protects what nodes send by
            differential privacy, which would not cover statistics.
    """

    def __init__(self, policy: Policy, strategy: object) -> None:
        self._when = policy.pruning_recalibrate
        if self._when != "never" and (name := private_strategy(strategy)):
            raise FederationError(
                "statistics that nodes estimate would be neither clipped nor noised, as what they "
                f"train is by {name}: set prunecast.pruning-recalibrate = 'never'"
            )
        self._said = False

    def after(
        self,
        number: int,
        grid: CompressedGrid,
        outermost: Grid,
        arrays: ArrayRecord,
        nodes: Sequence[int],
        *,
        removed: bool,
        key: str,
        timeout: float,
    ) -> tuple[ArrayRecord, Recalibrated | None]:
        """Estimate the statistics of what a round arrived at, where the policy says so.

        Args:
            number: of the round.
            grid: of the run.
            outermost: what messages are sent by.
            arrays: master weights that the strategy goes on from.
            nodes: that are asked: those that trained in the round.
            removed: whether channels have gone after it.
            key: of the model's record.
            timeout: seconds to wait for replies.

        Returns:
            The arrays with other statistics, and what was done; the same arrays and None for
            nothing: no event, no running statistics, or nobody answered.
        """
        if self._when == "never" or not nodes:
            return arrays, None
        known = dense_arrays(set_apart(arrays)[0])
        statistics = {name: array for name, array in known.items() if is_statistic(name)}
        if not statistics:
            return arrays, None
        event = grid.prunes_further(arrays, key=key) or removed
        if self._when == "events" and not event:
            return arrays, None
        messages = [
            Message(
                RecordDict({key: arrays, "config": ConfigRecord({"server-round": number})}),
                node,
                f"{MessageType.QUERY}.{RECALIBRATE}",
            )
            for node in nodes
        ]
        replies = list(outermost.send_and_receive(messages, timeout=timeout))
        found = list(self._usable(replies, statistics))
        examples = sum(weight for _, weight in found)
        if not found:
            return arrays, None
        means = {
            name: np.average([g[name] for g, _ in found], 0, [w for _, w in found]).astype(a.dtype)
            for name, a in statistics.items()
        }
        done = Recalibrated(len(found), len(nodes) - len(found), examples)
        return grid.restate(arrays, means, key=key), done

    def _usable(
        self, replies: Iterable[Message], statistics: Arrays
    ) -> Iterable[tuple[dict[str, NDArray[np.float64]], float]]:
        """Statistics of every reply that has all of them, and how many examples they are of."""
        for reply in replies:
            if reply.has_error():
                self._say(
                    f"node {reply.metadata.src_node_id}: {node_reason(str(reply.error.reason))}"
                )
                continue
            found, examples = _read(reply.content, statistics)
            if examples > 0:
                yield found, examples
            else:
                node = reply.metadata.src_node_id
                self._say(f"node {node} answered with other arrays, or without num-examples")

    def _say(self, why: str) -> None:
        if not self._said:
            self._said = True
            log(
                WARNING,
                "Not every node estimates running statistics anew (%s). The ready ClientApp does; "
                "an app of your own answers query %r, see docs/pruning.md, or set "
                "prunecast.pruning-recalibrate = 'never'.",
                *(why, RECALIBRATE),
            )


def _read(content: RecordDict, statistics: Arrays) -> tuple[dict[str, NDArray[np.float64]], float]:
    """What a reply holds, and its weight; 0 for one that cannot be used."""
    record = content.array_records.get(RUNNING_STATISTICS)
    weights = [r["num-examples"] for r in content.metric_records.values() if "num-examples" in r]
    if record is None or len(weights) != 1 or not isinstance(weights[0], int | float):
        return {}, 0.0
    known = dense_arrays(set_apart(record)[0])
    if any(n not in known or known[n].shape != a.shape for n, a in statistics.items()):
        return {}, 0.0
    found = {name: known[name].astype(np.float64) for name in statistics}
    sound = all(
        (np.abs(a) < np.finfo(np.float32).max).all()
        and (not n.endswith(("var", "variance")) or (a >= 0).all())
        for n, a in found.items()
    )
    weight = float(weights[0])
    return found, weight if sound and 0 < weight < float("inf") else 0.0

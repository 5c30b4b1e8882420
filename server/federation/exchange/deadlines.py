"""When a round ends, and how long it is waited for the nodes that it needs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from logging import WARNING
from typing import Any, Literal

from flwr.app import Message
from flwr.serverapp import Grid

from prunecast.common.references import typed
from prunecast.compression.flower.internals import log
from prunecast.server.federation.errors import FederationError, NodesMissing

__all__ = ["Attendance", "Closing", "Deadlines", "gather", "staleness_weight"]

_PAUSE = 60.0  # seconds without a question after which nobody is waiting for nodes
_KEYS = {
    "replies": "round-replies",
    "seconds": "round-deadline",
    "late": "late",
    "late_exponent": "late-exponent",
    "min_nodes": "min-nodes",
    "wait": "wait",
}


@dataclass(frozen=True)
class Deadlines:
    """When a round ends, what becomes of late replies, and what a start waits for.

    Attributes:
        replies: a round ends when so many replies that can be used are in; 0 for all. Of training
            and of evaluation alike.
        seconds: it ends at the latest after so many; 0 for no deadline but the timeout of the
            strategy. In the run config `round-deadline`.
        late: what becomes of an update that comes after its round: it is discarded, or applied in
            the next round with the weight of `staleness_weight`. What comes to more than 16 rounds
            is discarded.
        late_exponent: 0 or above.
        min_nodes: how many nodes must be connected before a run starts; 0 for as many as the
            strategy wants.
        wait: seconds to wait for nodes, at the start and in every round.

    Raises:
        FederationError: a value outside its range; names the key of the run config.
    """

    replies: int = 0
    seconds: float = 0.0
    late: Literal["discard", "apply"] = "discard"
    late_exponent: float = 0.5
    min_nodes: int = 0
    wait: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("replies", "seconds", "late_exponent", "min_nodes", "wait"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise FederationError(f"{_KEYS[name]} = {value!r}: give 0 or a number above")
        if self.late not in ("discard", "apply"):
            raise FederationError(f"late = {self.late!r}: choose 'discard' or 'apply'")

    @classmethod
    def from_run_config(cls, config: Mapping[str, Any]) -> Deadlines:
        """From the keys of Flower's run config that docs/run.md lists.

        Raises:
            FederationError: a value is of another type, or outside its range.
        """
        found: dict[str, Any] = {f.name: f.default for f in fields(cls)}
        for name, key in _KEYS.items():
            found[name] = typed(
                key, config.get(key, found[name]), type(found[name]), FederationError
            )
        return cls(**found)

    @property
    def applies(self) -> bool:
        """Whether late updates count."""
        return self.late == "apply"

    @property
    def ends_early(self) -> bool:
        """Whether a round may end before all have answered, and before the timeout."""
        return bool(self.replies or self.seconds)


def staleness_weight(rounds: int, exponent: float) -> float:
    """What an update counts that answers a model so many rounds old: ``1 / (1 + rounds)^a``.

    The polynomial of Xie, Koyejo and Gupta 2019, "Asynchronous Federated Optimization", section 5;
    with the exponent 0.5 that of FedBuff (Nguyen et al. 2022).

    >>> staleness_weight(3, 0.5)
    0.5
    """
    return float((1 + rounds) ** -exponent)


class Closing:
    """When one round ends.

    Args:
        deadlines: of the run.
        asked: how many nodes are asked.
        timeout: seconds to wait at most, whatever they say; None for no end.
    """

    def __init__(self, deadlines: Deadlines, asked: int, timeout: float | None) -> None:
        self._began, self._usable = time.monotonic(), 0
        self._wanted = min(deadlines.replies or asked, asked)
        self._limit = min(math.inf if timeout is None else timeout, deadlines.seconds or math.inf)

    def count(self, reply: Message) -> None:
        """A reply is in."""
        self._usable += not reply.has_error()

    @property
    def seconds(self) -> float:
        """How long the round has been going on."""
        return time.monotonic() - self._began

    @property
    def timed_out(self) -> bool:
        """Whether its time is over."""
        return self.seconds >= self._limit

    @property
    def over(self) -> bool:
        """Whether it ends now, whoever has not answered."""
        return self._usable >= self._wanted or self.timed_out


# -- nodes that are waited for --------------------------------------------------------------------


class Attendance:
    """Ends an endless wait: Flower's strategies ask for nodes once a second until enough are there.

    Args:
        deadlines: of the run.
    """

    def __init__(self, deadlines: Deadlines) -> None:
        self._limit = deadlines.wait
        self._since = self._last = -math.inf

    def sent(self) -> None:
        """Messages go out: nobody is waiting."""
        self._since = -math.inf

    def asked(self, connected: int) -> None:
        """Somebody asks which nodes there are.

        Raises:
            NodesMissing: it has been asked for longer than the limit, and nothing was sent.
        """
        now = time.monotonic()
        if now - self._last > _PAUSE or self._since == -math.inf:
            self._since = now
        self._last = now
        if now - self._since > self._limit:
            raise NodesMissing(
                f"waited {self._limit:.0f} s for nodes: {connected} connected, and the strategy "
                "wants more: start more SuperNodes, lower the strategy's min_available_nodes and "
                "min_train_nodes, or wait longer (wait in the run config)"
            )


def gather(grid: Grid, deadlines: Deadlines, *, poll_interval: float = 1.0) -> None:
    """Wait until as many nodes are connected as a start needs; says which number that is.

    Raises:
        NodesMissing: they are not within the limit.
    """
    needed, began, said = deadlines.min_nodes, time.monotonic(), -1
    while (connected := len(list(grid.get_node_ids()))) < needed:
        if time.monotonic() - began >= deadlines.wait:
            raise NodesMissing(
                f"waited {deadlines.wait:.0f} s for {needed} nodes (min-nodes), and {connected} "
                "connected: start more SuperNodes, or set min-nodes lower or wait higher"
            )
        if connected != said:
            said = connected
            log(
                WARNING,
                "Waiting for nodes: %d of %d connected; for %.0f s at most.",
                *(connected, needed, deadlines.wait),
            )
        time.sleep(poll_interval)

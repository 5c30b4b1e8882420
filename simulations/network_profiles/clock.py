"""A virtual clock: what a ledger's bytes take over a network. Everything it says is simulated.

A pure function of ledger and network; nothing is trained again. So a client that could not have
been reached, or was late, is counted, and the round is not kept waiting for it beyond the deadline;
what was reached is that of the run, in which it did answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from prunecast.simulations.network_profiles import NetworkSpec, Trace

__all__ = ["RoundTime", "Timeline", "classes_of", "simulated_time"]


class Message(Protocol):
    """What the clock reads of a ledger's entry."""

    round: int
    node: int
    payload_bytes: int
    direction: Any


@dataclass(frozen=True)
class RoundTime:
    """A round, in simulated time.

    Attributes:
        round: its number.
        ended: seconds from the beginning of the run to its end.
        seconds: how long it took: the slowest client's way down, training and way up.
        asked: clients that were asked.
        away: of these, how many could not be reached.
        late: of these, how many would have answered after the deadline.
        joules: of the radios of all clients, where the network states what they take.
    """

    round: int
    ended: float
    seconds: float
    asked: int
    away: int
    late: int
    joules: float


@dataclass(frozen=True)
class Timeline:
    """All rounds of a run in simulated time."""

    rounds: tuple[RoundTime, ...]

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.rounds[-1].ended if self.rounds else 0.0

    def seconds_at(self, number: int) -> float:
        """From the beginning to the end of a round."""
        return max((r.ended for r in self.rounds if r.round <= number), default=0.0)

    def to_mapping(self) -> dict[str, Any]:
        """Figures for a result; ``joules`` is absent where no energy is stated."""
        joules = sum(r.joules for r in self.rounds)
        return {
            "seconds": round(self.seconds, 3),
            "away": sum(r.away for r in self.rounds),
            "late": sum(r.late for r in self.rounds),
            **({"joules": round(joules, 3)} if joules else {}),
        }


def classes_of(shares: Mapping[str, float], count: int, *, seed: int) -> list[str]:
    """The class of every client: as many of each as its share says, drawn by the seed.

    >>> sorted(classes_of({"phone": 3, "gateway": 1}, 8, seed=1)).count("phone")
    6
    """
    bounds = np.cumsum(list(shares.values())) / sum(shares.values()) * count
    names = list(shares)
    ranks = np.random.default_rng([seed, 0x4E6574]).permutation(count)
    return [names[int(np.searchsorted(bounds, rank + 0.5))] for rank in ranks]


def simulated_time(
    entries: Iterable[Message],
    network: NetworkSpec,
    *,
    clients: Mapping[int, int],
    examples: Sequence[int],
    epochs: int = 1,
    seed: int = 0,
) -> Timeline:
    """Simulated time of a run.

    Args:
        entries: of its ledger.
        network: what lies between.
        clients: node id to number of the client.
        examples: how many each client trains on in an epoch.
        epochs: of a round.
        seed: of who is in which class, and who cannot be reached when.
    """
    links = network.links()
    shares = {name: share for name, (share, _) in links.items()}
    names = classes_of(shares, len(examples), seed=seed)
    sent: dict[int, dict[int, dict[str, list[int]]]] = {}
    for entry in entries:
        asked = sent.setdefault(entry.round, {})
        sizes = asked.setdefault(entry.node, {"down": [], "up": []})
        sizes[entry.direction].append(entry.payload_bytes)
    now, found = 0.0, []
    for number in sorted(sent):
        times, away, late, joules = [], 0, 0, 0.0
        for node, messages in sorted(sent[number].items(), key=lambda item: clients[item[0]]):
            client = clients[node]
            _, trace = links[names[client]]
            draw = np.random.default_rng([seed, number, client]).random()
            if draw >= trace.at(now).availability:
                away += 1
                continue
            ended, energy = _client(trace, now, messages, examples[client] * epochs)
            joules += energy
            times.append(ended - now)
        if network.deadline:
            late = sum(time > network.deadline for time in times)
            times = [min(time, network.deadline) for time in times]
            times += [network.deadline] * bool(away)
        seconds = max(times, default=0.0)
        now += seconds
        count = len(sent[number])
        found.append(RoundTime(number, now, seconds, count, away, late, joules))
    return Timeline(tuple(found))


def _client(
    trace: Trace, begun: float, messages: Mapping[str, Sequence[int]], examples: int
) -> tuple[float, float]:
    """When a client has answered, and what its radio took; each step on the link it begins with."""
    now, joules = begun, 0.0
    for size in messages["down"]:
        link = trace.at(now)
        joules += link.joules(size, "down")
        now += link.seconds(size, "down")
    if (speed := trace.at(now).examples_per_second) and messages["up"]:
        now += examples / speed
    for size in messages["up"]:
        link = trace.at(now)
        joules += link.joules(size, "up")
        now += link.seconds(size, "up")
    return now, joules

"""Byte budgets: how coarse a federation has to be so that a round, a node, a run stays within one.

A pure controller. It is told what a batch of messages is about to cost and what every message did
cost, and says: by how many doublings the lattice of the model is coarser than the policy has it, by
how many halvings it has fewer weights, where the policy allows that, and how many bytes the
payloads of each reply may have. A node finds the finest steps that fit
(`prunecast.client.training.sparing`), so the way up is within its budget by construction; what is
forecast is the way down, and what surrounds a payload.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunecast.common.text import bytes_text, count_text
from prunecast.server.federation.errors import BudgetError

__all__ = ["COARSEST", "TURNED", "Budget", "Coarseness", "Limits", "Plan", "Proposal"]

COARSEST = 1.6
"""Standard deviations: the coarsest lattice that a budget may ask for; beyond, all is zero."""

TURNED = ("lattice", "sparsity")
"""What a budget may turn, by the names that the knob has."""

_ENVELOPE = 450  # bytes around a payload, before any message told
_NO_CHANGE = 120  # bytes of a payload that says "no change"
_PAID_BACK = 0.5  # of a round's budget, at most, goes into what was overspent before
_DOWN = 0.5  # of what may be spent, that the way down may take before its lattice gets coarser
_COARSER = 1.6  # times fewer bytes down by a lattice of twice the step
_FINER = 2.2  # times more by one of half the step
_AT_ONCE = 2  # doublings from one version to the next: what is forecast of more is a guess
_THINNER = 1.5  # times fewer bytes down by half of the weights
_PAUSE = 4  # rounds between two refinements, each of which sends a bit for every weight
_WEIGHT = 0.5  # of what was seen last in a mean
_MARGIN = 24  # bytes by which envelopes vary


@dataclass(frozen=True)
class Limits:
    """Bytes of messages in both directions, as the ledger counts them; 0 for no limit.

    Attributes:
        round: of all messages of a round.
        node: of all messages of a node in the run.
        run: of all messages.
    """

    round: int = 0
    node: int = 0
    run: int = 0

    def __bool__(self) -> bool:
        return bool(self.round or self.node or self.run)


@dataclass(frozen=True)
class Proposal:
    """What the next version would be without a budget.

    Attributes:
        finer: doublings by which its lattice is finer than the one before: it follows learning.
        bits: that a doubling takes for each node at once, one for every weight that is kept.
        may_thin: whether the model has learned enough to lose weights.
    """

    finer: int = 0
    bits: int = 0
    may_thin: bool = False


_AS_BEFORE = Proposal()


@dataclass(frozen=True)
class Coarseness:
    """What the next version is to be.

    Attributes:
        doublings: by which its lattice's step is larger than learning and pruning have it.
        halvings: of the weights that are kept.
    """

    doublings: int = 0
    halvings: int = 0


@dataclass(frozen=True)
class Plan:
    """What a batch of messages may cost.

    Attributes:
        most: bytes that the payloads of each reply may have, in the order of the messages; 0 for
            any.
        forecast: bytes of the batch, both ways, if nodes use what they may or need.
    """

    most: tuple[int, ...]
    forecast: int


@dataclass
class _Mean:
    """A mean in which what was seen last weighs most.

    Of replies, which come in any order and from anybody, the median of those between two questions
    counts as often as there were replies: so it is the same whoever answers first, and no single
    node decides it.
    """

    value: float
    seen: bool = False
    told: list[float] = field(default_factory=list)

    def add(self, value: float, times: int = 1) -> None:
        kept = (1 - _WEIGHT) ** times if self.seen else 0.0
        self.value = kept * self.value + (1 - kept) * value
        self.seen = True

    def tell(self, value: float) -> None:
        """Add it together with others, before the value is asked for."""
        self.told.append(value)

    def fold(self) -> None:
        """Add what was told since."""
        if self.told:
            self.add(statistics.median(self.told), len(self.told))
            self.told = []


@dataclass
class _Round:
    """What one round has cost so far."""

    number: int
    nodes: int = 0
    spent: int = 0
    down: int = 0
    promised: int = 0  # of replies that have not come
    evaluation: int = 0
    forecast: int = 0
    allowed: int = 0
    most: tuple[int, ...] = ()
    coarser: list[int] = field(default_factory=list)


class Budget:
    """Keeps a run within its limits.

    A round may spend the smallest of: its own limit, less a part of what earlier rounds overspent;
    an equal part of what is left of the run's; for every node an equal part of what is left of its
    own. The model takes half of that at most, or gets coarser; nodes share the rest. A lattice that
    is to be finer, because learning slows down, stays as it is until that fits.

    Args:
        limits: any of them.
        down_step: of the policy, in standard deviations.
        turned: what may be turned, names of `TURNED`; the first one first.
        sparsest: share of zeros that thinning comes to at most, below 1.

    Attributes:
        level: doublings of the lattice's step, 0 or more.
        halvings: of the weights that are kept. They only rise: what went was not trained since.
    """

    def __init__(
        self,
        limits: Limits,
        down_step: float,
        turned: Sequence[str] = ("lattice",),
        sparsest: float = 0.0,
    ) -> None:
        self.limits, self.turned = limits, tuple(turned)
        self.most_level = max(0, math.floor(math.log2(COARSEST / down_step) + 1e-9))
        self.most_halvings = math.ceil(-math.log2(1 - sparsest) - 1e-9)
        self.level = self.halvings = 0
        self.rounds = 0
        self.spent = self.owed = 0
        self._nodes: dict[int, int] = {}
        self._round = _Round(0)
        self._begun = 0  # rounds
        self._around_down, self._around_up = _Mean(_ENVELOPE), _Mean(_ENVELOPE)
        self._down = _Mean(0.0)  # payload bytes down for each node in a round
        self._up = _Mean(0.0)  # payload bytes up of a reply in the policy's own steps
        self._evaluation = _Mean(0.0)  # bytes of messages that do not train, in a round
        self._since = _PAUSE  # versions since the lattice changed
        self._of_version = 0  # payload bytes down since the last version
        self._trained, self._rate = 0, 1.0  # nodes in the last round, and their share of all
        self._checked = False
        self._told: set[str] = set()  # limits of which it was said that they are exceeded
        self._complaints: list[str] = []

    # -- what is asked ----------------------------------------------------------------------------

    def begin(self, number: int) -> None:
        """Take note of a round, and settle what the one before overspent."""
        self._fold()
        if number == self._round.number and self._begun:
            return
        self._complain()
        self.owed, self._begun = self._owes(), self._begun + 1
        if self._round.nodes:
            self._trained = self._round.nodes
            self._evaluation.add(self._round.evaluation)
        self._round = _Round(number)

    def next_version(self, proposal: Proposal = _AS_BEFORE) -> Coarseness:
        """How coarse the next version is to be."""
        self._fold()
        nodes = self._round.nodes or self._trained
        if nodes and self._of_version:
            if self._since:  # from one lattice to another it is more than it will be
                self._down.add(self._of_version / nodes)
            self._of_version = 0
            self._since += 1
            self._choose(nodes, proposal)
        elif nodes and proposal.finer > 0:
            self._choose(nodes, proposal)
        return Coarseness(self.level, self.halvings)

    def plan(
        self,
        nodes: Sequence[int],
        payloads: Sequence[int],
        *,
        expected: float = 1.0,
        training: bool = True,
    ) -> Plan:
        """Say what the replies of a batch may take.

        Args:
            nodes: to whom its messages go.
            payloads: bytes of the payloads of each.
            expected: share of the nodes that train in a round.
            training: whether replies bring updates.

        Raises:
            BudgetError: the limits cannot be met at all.
        """
        self._fold()
        around = round(self._around_down.value)
        down = [size + around for size in payloads]
        back = round(self._around_up.value)
        if not training:
            forecast = sum(down) + back * len(nodes)
            self._round.forecast += forecast
            return Plan((0,) * len(nodes), forecast)
        # where messages go one by one, as many are to come as there were in the round before
        sharing = max(len(nodes), self._trained - self._round.nodes)
        self._round.nodes += len(nodes)
        self._rate = min(1.0, expected)
        if not self._checked:
            self._check(nodes, payloads)
        allowed = self._allowed()
        each = math.inf if allowed is None else allowed / sharing - sum(down) / len(nodes)
        most = []
        for node, size in zip(nodes, down, strict=True):
            own = each
            if self.limits.node:
                left = self.limits.node - self._nodes.get(node, 0)
                own = min(own, left / self._times(self._rounds_left()) - size)
            payload = own - back - _MARGIN
            most.append(0 if math.isinf(payload) else max(_NO_CHANGE, math.floor(payload)))
        self._round.promised += sum(m + back for m in most if m)
        usual = self._up.value if self._up.seen else math.inf
        up = sum(min(m or usual, usual) + back for m in most)
        forecast = sum(down) + (round(up) if math.isfinite(up) else 0)
        self._round.forecast += forecast
        self._round.allowed = 0 if allowed is None else allowed
        self._round.most = tuple(most)
        return Plan(tuple(most), forecast)

    # -- what is told -----------------------------------------------------------------------------

    def sent(self, node: int, size: int, payload: int, *, training: bool = True) -> None:
        """Count a message to a node: all of its bytes, and those of its payloads."""
        self._count(node, size, training=training)
        self._of_version += payload
        self._round.down += size
        self._around_down.add(size - payload)

    def received(self, node: int, size: int, *, training: bool = True) -> None:
        """Count all bytes of a reply, or of what came too late to be one."""
        self._count(node, size, training=training)

    def understood(self, size: int, payload: int, coarser: int = 0, most: int = 0) -> None:
        """Learn from a reply that brings an update, counted before.

        Args:
            size: bytes of the message.
            payload: bytes of its payloads.
            coarser: quarters of a doubling by which its steps are coarser than the policy's.
            most: bytes that its payloads might have; 0 for any.
        """
        kept = most + round(self._around_up.value) if most else 0
        self._round.promised = max(0, self._round.promised - kept)
        self._around_up.tell(size - payload)
        self._up.tell(payload * 2 ** (coarser / 4 * 0.8))
        self._round.coarser.append(coarser)

    def _fold(self) -> None:
        """Take in what replies have told since this was done last."""
        self._around_up.fold()
        self._up.fold()

    def _count(self, node: int, size: int, *, training: bool) -> None:
        self.spent += size
        self._nodes[node] = self._nodes.get(node, 0) + size
        self._round.spent += size
        if not training:
            self._round.evaluation += size

    # -- what is decided --------------------------------------------------------------------------

    def _rounds_left(self) -> int:
        return max(1, self.rounds - self._begun + 1)

    def _times(self, rounds: int) -> int:
        """How often a node trains in so many rounds."""
        return max(1, math.ceil(rounds * self._rate - 1e-9))

    def _owes(self) -> int:
        """What rounds so far have overspent of their limit and not saved since."""
        over = self._round.spent - self.limits.round if self._begun and self.limits.round else 0
        return max(0, self.owed + over)

    def _allowed(self) -> int | None:
        """Bytes that the training messages of this round may take, both ways; None for any."""
        found = []
        if self.limits.round:
            paid = min(self.owed, round(_PAID_BACK * self.limits.round))
            found.append(self.limits.round - paid - self._round.spent)
        if self.limits.run:
            left = self.limits.run - self.spent + self._round.spent
            found.append(left // self._rounds_left() - self._round.spent)
        reserved = self._round.promised + round(self._evaluation.value)
        return min(found) - reserved if found else None

    def _least(self) -> int:
        """Bytes of a message to a node and its reply that carry all but nothing."""
        return 2 * (_ENVELOPE + _NO_CHANGE)

    def _check(self, nodes: Sequence[int], payloads: Sequence[int]) -> None:
        """Refuse what not even empty messages would stay within.

        Raises:
            BudgetError: a limit is below that; says which, the least it could be, and why.
        """
        limits, count = self.limits, len(nodes)
        if (limits.run or limits.node) and not self.rounds:
            raise BudgetError(
                "a budget for a run or a node is spread over its rounds, and nobody said how many "
                "there are: call grid.expect_rounds(number) before the first message"
            )
        empty, first, times = self._least(), sum(payloads), self._times(self._rounds_left())
        a_round = empty * count
        if self.rounds:  # the first model may be saved up for
            a_round = max(a_round, math.ceil(first / self.rounds) + a_round)
        model = f", and the first model {bytes_text(max(payloads, default=0))}"
        why = f"{count_text(count, 'node')} take {bytes_text(empty)} each in a round for empty "
        for name, limit, least, cause in (
            ("round", limits.round, a_round, f"{why}messages{model} each"),
            (
                "run",
                limits.run,
                empty * count * self.rounds + first,
                f"{why}messages, in {count_text(self.rounds, 'round')}{model} each",
            ),
            (
                "node",
                limits.node,
                empty * times + max(payloads, default=0),
                f"a node takes {bytes_text(empty)} in each of {count_text(times, 'round')} for "
                f"empty messages{model}",
            ),
        ):
            if limit and limit < least:
                raise BudgetError(
                    f"prunecast.budget-{name} = {bytes_text(limit)} cannot be met: it takes "
                    f"{bytes_text(least)} at least, since {cause}. Raise it, ask fewer nodes, or "
                    "draw the first model from a seed"
                )
        self._checked = True

    def _choose(self, nodes: int, proposal: Proposal) -> None:
        """The next version, from what the last round cost."""
        shares = self._shares(nodes)
        self.most_level = max(0, self.most_level + proposal.finer)
        if not shares or not self._down.seen:
            return
        allowed = max(1, min(share for share, _ in shares) - round(self._evaluation.value))
        down = (self._down.value + self._around_down.value) * nodes
        up = (self._up.value + self._around_up.value) * nodes
        # as it is, with what is to be finer held back; what gets coarser by itself takes less
        level = now = min(self.level + max(0, proposal.finer), self.most_level)
        down /= _COARSER ** max(0, -proposal.finer)
        thinned, most = self.halvings, min(self.most_level, now + _AT_ONCE)

        def needed() -> bool:
            return down + up > allowed and down > _DOWN * allowed

        for knob in self.turned:
            if knob == "lattice":
                while needed() and level < most:
                    level, down = level + 1, down / _COARSER
            elif proposal.may_thin and thinned < self.most_halvings and needed():
                thinned, down = thinned + 1, down / _THINNER
        if (
            level == now
            and thinned == self.halvings
            and (proposal.finer > 0 or self._since >= _PAUSE)
        ):
            # that is a bit for every weight at once, and more from then on
            once = nodes * proposal.bits / 8
            for _ in range(max(1, proposal.finer)):
                finer = down * _FINER
                lasting = finer <= _DOWN * allowed or finer + up <= allowed
                if not level or not lasting or not self._bears(shares, nodes, finer, once):
                    break
                level, down = level - 1, finer
        if level != now or thinned != self.halvings:
            self._since = 0
            self._down.value *= _FINER ** max(0, now - level) / _COARSER ** max(0, level - now)
            self._down.value /= _THINNER ** (thinned - self.halvings)
        self.level, self.halvings = level, thinned

    def _bears(
        self, shares: Sequence[tuple[int, int]], nodes: int, down: float, once: float
    ) -> bool:
        """Whether a round that costs more than others stays within every limit.

        Its replies may be squeezed: what they drop comes later.
        """
        least = nodes * (self._around_up.value + _NO_CHANGE) + self._evaluation.value
        return all(down + once / rounds + least <= share for share, rounds in shares)

    def _shares(self, nodes: int) -> list[tuple[int, int]]:
        """What the next round may spend by each limit, and over how many rounds an exception is
        spread; empty where nothing is known to bind."""
        found = []
        if self.limits.round:
            paid = min(self._owes(), round(_PAID_BACK * self.limits.round))
            found.append((self.limits.round - paid, 1))
        left = max(1, self.rounds - self._begun)
        if self.limits.run:
            found.append(((self.limits.run - self.spent) // left, left))
        if self.limits.node and self._nodes:
            # what is beyond its limit is no further saved by what everybody else would lose
            within = [spent for spent in self._nodes.values() if spent < self.limits.node]
            most, times = max(within, default=self.limits.node), self._times(left)
            found.append((nodes * ((self.limits.node - most) // times), times))
        return found

    # -- what is said of it -----------------------------------------------------------------------

    def above(self) -> dict[str, int]:
        """Bytes by which limits are exceeded now, by name: of this round, of the worst node."""
        limits = self.limits
        spent = (self._round.spent, max(self._nodes.values(), default=0), self.spent)
        over = {
            name: used - limit
            for used, (name, limit) in zip(spent, vars(limits).items(), strict=True)
            if limit
        }
        return {name: size for name, size in over.items() if size > 0}

    def _complain(self) -> None:
        """Say of each limit once that it is exceeded."""
        now = self._round
        for name, over in self.above().items():
            if name in self._told:
                continue
            self._told.add(name)
            limit = getattr(self.limits, name)
            took = {"round": f"Round {now.number}", "node": "A node", "run": "The run"}[name]
            later = ", and the rounds after it save that" if name == "round" else ""
            self._complaints.append(
                f"{took} took {bytes_text(limit + over)}, which is above prunecast.budget-{name} = "
                f"{bytes_text(limit)}: messages to nodes took {bytes_text(now.down)} of "
                f"{bytes_text(now.spent)} in that round, and a version is what it is{later}. "
                "Others are told in the events (budget.above)."
            )

    def take_complaints(self) -> list[str]:
        """What is to be said of limits that were exceeded, since it was asked before."""
        self._complain()
        found, self._complaints = self._complaints, []
        return found

    def report(self, down_step: float) -> dict[str, Any]:
        """The field ``budget`` of an event, see docs/run.md."""
        now = self._round
        coarser = sorted(now.coarser)
        limits: Mapping[str, int] = {
            name: limit for name, limit in vars(self.limits).items() if limit
        }
        return {
            "limits": dict(limits),
            "spent": {
                "round": now.spent,
                "node": max(self._nodes.values(), default=0),
                "run": self.spent,
            },
            "forecast": now.forecast,
            "above": self.above(),
            "owed": self.owed,
            "thinned": 1 - 2.0**-self.halvings,
            "down_step": down_step * 2**self.level,
            "up_bytes": max(now.most, default=0),
            "up_coarser": 2 ** (coarser[len(coarser) // 2] / 4) if coarser else 1.0,
        }

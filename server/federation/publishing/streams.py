"""All streams and nodes of one run: what is published for it, and what nodes said."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from logging import WARNING

from prunecast.compression.flower import stream_id
from prunecast.compression.flower.internals import log
from prunecast.compression.versions import Capabilities, PublishedModel
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.budgets import Budget
from prunecast.server.federation.publishing.classes import Treatment
from prunecast.server.federation.publishing.in_flight import InFlight
from prunecast.server.federation.publishing.participation import Participation
from prunecast.server.federation.publishing.publisher import Publisher
from prunecast.server.federation.publishing.version import Version

__all__ = ["NodeState", "Streams"]

_LONGEST_JOB = 200  # characters, which travel with every message
_TAGS = 64  # of replies that a node that never answers is told of
_UNSAVED = 32  # replies of a node that wait for a checkpoint to have them


@dataclass
class NodeState:
    """What one node said of itself.

    Attributes:
        held: record key to short digest of the version the node last reported to hold.
        accepted: tags of its replies with an update that was accepted, as far as it may not know.
        given_up: likewise of those that were refused, or are not waited for any more.
        troubled: whether it said, the last time, that it cannot keep what it should.
        unread: types of messages that failed there, the last time, before the mod could read them.
        safe: of the accepted, those that a resumed run would accept, too.
        width: the class that it states; "" for none, None as long as it said nothing.
        ahead: by how many seconds its clock is ahead of ours at the least; None where nothing came
            that tells it.
        able: what it said of itself; None as long as it was not asked, or did not answer.
        treatment: of its capability class.
        foreign: why it understands nothing that is sent to it; "" where it does.
    """

    held: dict[str, bytes] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    troubled: bool = False
    unread: set[str] = field(default_factory=set)
    width: str | None = None
    ahead: float | None = None
    able: Capabilities | None = None
    treatment: Treatment = field(default_factory=Treatment)
    foreign: str = ""
    safe: set[str] = field(default_factory=set)

    def settled(self, tag: str, *, accepted: bool) -> None:
        """Tell the node with its next messages what became of a reply; given up is so for good."""
        if accepted and tag in self.given_up:
            return
        if not accepted and tag in self.accepted:
            self.accepted.remove(tag)
        tags = self.accepted if accepted else self.given_up
        if tag not in tags:
            tags.append(tag)
        del tags[:-_TAGS]

    def knows(self, tags: Collection[str]) -> None:
        """Tell it no more of these."""
        for known in (self.accepted, self.given_up):
            known[:] = [tag for tag in known if tag not in tags]


class Streams:
    """All streams and nodes of one run.

    Attributes:
        round: of messages that state none; 0 where nobody said.
        participation: of the nodes, in training.
        in_flight: what nodes will hold.
        budget: of bytes; None for none.
        job: that the streams are of; "" for Flower's run alone.
        attempt: how often the job was resumed.
        saves: whether nodes are told that a reply was accepted only after `saved`. Once told, they
            let go of what the reply took along; a run that is resumed from a checkpoint before it
            could not train that round again as it was.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.round = policy, 0
        self.participation = Participation()
        self.in_flight = InFlight()
        limits = policy.limits
        sparsest = policy.target if policy.thins else 0.0
        self.budget = (
            Budget(limits, policy.down_step, policy.budget_knobs, sparsest) if limits else None
        )
        self.job, self.attempt, self.saves = "", 0, False
        self._rounds = 0
        self._saved_before: dict[int, set[str]] = {}
        self._streams: dict[tuple[int, str], Publisher] = {}
        self._nodes: dict[int, NodeState] = {}

    def use_job(self, job: str, attempt: int = 0) -> None:
        """Be of a job; before anything is published.

        Raises:
            FederationError: something is, or it is no name.
        """
        _check_job(job)
        if job != self.job and any(stream.has_published for stream in self._streams.values()):
            raise FederationError(
                f"job {job!r} cannot begin with a grid that was used already: make a new one"
            )
        self.job, self.attempt = job, attempt
        for (run_id, key), stream in self._streams.items():
            stream.stream = stream_id(job or run_id, key)

    def saved(self) -> None:
        """A checkpoint has what was accepted so far."""
        self._saved_before = {number: node.safe for number, node in self._nodes.items()}
        for node in self._nodes.values():
            node.safe = set(node.accepted)

    def unsaved(self) -> None:
        """It has not: what the one before has is what a resumed run would accept."""
        for number, node in self._nodes.items():
            node.safe = self._saved_before.get(number, set())

    def ends_of(self, node: NodeState) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Tags of a node's replies that it is to be told were accepted, and given up."""
        # where no checkpoint can be written for long, better told than forgotten
        long_ago = set(node.accepted[:-_UNSAVED])
        safe = [t for t in node.accepted if not self.saves or t in node.safe or t in long_ago]
        return tuple(safe), tuple(node.given_up)

    def told(self, run_id: int) -> tuple[str, int]:
        """What messages of a run of Flower say of their job: its name, and the attempt."""
        known = self.job in ("", str(run_id)) and not self.attempt
        return ("", 0) if known else (self.job or str(run_id), self.attempt)

    def readers(self, connected: Collection[int]) -> list[int]:
        """Those of the nodes that understand this server, or need not.

        Raises:
            FederationError: there are nodes, and none that was ever heard of does.
        """
        found = []
        for node_id in connected:
            node = self._nodes.get(node_id)
            if node is None or not node.foreign or node.treatment.dense:
                found.append(node_id)
        # others may be away for a moment, and what one says of itself is no reason to end the run
        if connected and not found and all(node.foreign for node in self._nodes.values()):
            why = next(node.foreign for node in self._nodes.values() if node.foreign)
            raise FederationError(f"no node understands this server: {why}")
        return found

    def ends_with(self, run_id: int, stated: int) -> bool:
        """Whether a round is the last of a job that no other run can go on with.

        Args:
            run_id: Flower's run id.
            stated: the round that a message states; 0 for none.
        """
        return self.job in ("", str(run_id)) and 0 < self._rounds <= stated

    def stream(self, run_id: int, key: str) -> Publisher:
        """The publisher of a record key's versions, made if necessary."""
        if (run_id, key) not in self._streams:
            if self.policy.target and key not in self.policy.pruning_records:
                log(
                    WARNING,
                    "Array record %r is not pruned: pruning_records names %s. Add it there if it "
                    "holds the model.",
                    key,
                    ", ".join(map(repr, self.policy.pruning_records)) or "none",
                )
            plan = self.policy.pruning() if key in self.policy.pruning_records else None
            kind = Publisher
            if self.policy.down_scheme is not None:
                # derived from what is here
                from prunecast.server.federation.publishing.scheme_publisher import SchemePublisher

                kind = SchemePublisher
            made = kind(self.policy, stream_id(self.job or run_id, key), plan)
            made.expect(self._rounds)
            if self.budget is not None and plan is not None:
                made.coarseness = self.budget.next_version
            made.holders = partial(self._held_by_nodes, key)
            self._streams[run_id, key] = made
        return self._streams[run_id, key]

    def _held_by_nodes(self, key: str) -> list[bytes]:
        """Of every node the version that it last said it holds under a record key."""
        return [node.held[key] for node in self._nodes.values() if key in node.held]

    def narrowed_beside(self, run_id: int, key: str) -> str | None:
        """Another record key of a run whose model has fewer channels already; None for none."""
        others = (place for place in self._streams if place[0] == run_id and place[1] != key)
        return next((p[1] for p in others if self._streams[p].channels is not None), None)

    @property
    def ahead(self) -> dict[int, float]:
        """Of nodes of whose clock something is known, by how many seconds it is ahead."""
        return {i: node.ahead for i, node in self._nodes.items() if node.ahead is not None}

    def nodes_of(self, width: str) -> int:
        """How many nodes state a class; "" for none."""
        return sum(node.width == width for node in self._nodes.values())

    def able_nodes(self, capability: str) -> int:
        """How many nodes said what they can do and are of a class; "" for none."""
        known = (node for node in self._nodes.values() if node.able is not None)
        return sum(node.treatment.name == capability for node in known)

    def expect(self, rounds: int) -> None:
        """Fit the pruning of every stream to a number of rounds; warn if it cannot arrive."""
        self._rounds = rounds
        if self.budget is not None:
            self.budget.rounds = rounds
        self.policy.check_rounds(rounds)
        for stream in self._streams.values():
            stream.expect(rounds)

    def foresee(self, run_id: int, versions: Mapping[str, Version]) -> None:
        """Warn where nodes will come back more rarely than versions are kept.

        Args:
            run_id: Flower's.
            versions: record key to the version that a message to a node brings.
        """
        known = self.participation
        if self.policy.down_scheme is not None or not known.pool:
            return
        asked = max(1, round(known.rate * known.pool))
        for key, version in versions.items():
            self.stream(run_id, key).foresee(version, known.pool, asked, self._rounds)

    def held(self, digest: bytes) -> PublishedModel | None:
        """The version of a short digest in any stream, as long as payloads can build on it."""
        found = (stream.held(digest) for stream in self._streams.values())
        return next((model for model in found if model is not None), None)

    def node(self, node_id: int) -> NodeState:
        """What is known of a node; nothing at first."""
        return self._nodes.setdefault(node_id, NodeState())


def _check_job(job: str) -> None:
    if len(job) > _LONGEST_JOB or not job.isprintable() or job != job.strip():
        raise FederationError(
            f"job = {job[:80]!r} is no name: give up to {_LONGEST_JOB} printable characters"
        )

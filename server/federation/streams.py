"""What the server knows of every stream and every node."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from logging import WARNING

from flwr.app import ArrayRecord

from prunecast.compression.flower import dense_arrays, stream_id
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.plan import StatisticsMean
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publisher import Publisher, Version

__all__ = ["NodeState", "Stream", "Streams"]

_RECENT = 4  # contents whose version is remembered, so that train and evaluate share one


@dataclass
class NodeState:
    """What one node said of itself.

    Attributes:
        held: record key to short digest of the version the node last reported to hold.
        accepted: tag of its last reply with an update that was accepted.
        speaks: whether it ever answered through the mod.
    """

    held: dict[str, bytes] = field(default_factory=dict)
    accepted: str = ""
    speaks: bool = False


class Stream:
    """The versions of one record key."""

    def __init__(self, policy: Policy, run_id: int, key: str) -> None:
        self.id, plan = stream_id(run_id, key), policy.pruning
        self.publisher = Publisher(policy, self.id, plan if key in plan.records else None)
        self.statistics = StatisticsMean()
        self._recent: OrderedDict[str, Version] = OrderedDict()

    def version_of(self, record: ArrayRecord, content_id: str) -> Version:
        """The version of a content, published now unless it already was.

        Args:
            record: the dense arrays, as the strategy hands them over.
            content_id: digest of the record's content.

        Raises:
            NonFiniteModel: an array holds NaN or infinity.
        """
        version = self._recent.pop(content_id, None)
        if version is None:
            version = self.publisher.publish(dense_arrays(record), self.statistics.take())
        self._recent[content_id] = version
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return version


class Streams:
    """All streams and nodes of one run."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._streams: dict[tuple[int, str], Stream] = {}
        self._nodes: dict[int, NodeState] = {}

    def stream(self, run_id: int, key: str) -> Stream:
        """The stream of a record key, begun if necessary."""
        if (run_id, key) not in self._streams:
            if self.policy.sparsity and key not in self.policy.pruning_records:
                log(
                    WARNING,
                    "Array record %r is not pruned: pruning_records names %s. Add it there if it "
                    "holds the model.",
                    key,
                    ", ".join(map(repr, self.policy.pruning_records)) or "none",
                )
            self._streams[run_id, key] = Stream(self.policy, run_id, key)
        return self._streams[run_id, key]

    def node(self, node_id: int) -> NodeState:
        """What is known of a node; nothing at first."""
        return self._nodes.setdefault(node_id, NodeState())

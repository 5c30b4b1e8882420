"""The nodes of a simulation: what each one runs, and an order of them so that runs repeat."""

from __future__ import annotations

import time
from collections.abc import Iterable
from functools import partial

import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from torch import nn

from prunecast.client.training.client_app import Loader, LocalTraining, build_client_app
from prunecast.client.training.mod import compression_mod
from prunecast.client.training.trainer import TensorBatches
from prunecast.common.references import load_callable
from prunecast.compression.flower.internals import NodeInfo
from prunecast.server.federation.wrapper import GridWrapper
from prunecast.simulations.runner import EngineFailed
from prunecast.simulations.runner.prepared import PreparedRun, training_tensors

__all__ = ["OrderedGrid", "nodes_by_partition", "simulated_client"]

_NODE_RECORD = "node"  # in which a client answers a query with its ``partition-id``
_QUERY_SECONDS = 120.0


def simulated_client(prepared: PreparedRun) -> ClientApp:
    """The client of a prepared run; picklable, and small: data stay on disk."""
    scenario = prepared.scenario
    chosen = scenario.training
    settings = LocalTraining(
        local_epochs=chosen.epochs,
        learning_rate=chosen.learning_rate,
        learning_rate_decay=chosen.learning_rate_decay,
        momentum=chosen.momentum,
        weight_decay=chosen.weight_decay,
        device=chosen.device,
        mixed_precision=chosen.mixed_precision,
        seed=scenario.seed,
    )
    client = build_client_app(
        partial(_model, scenario.model.factory, scenario.engine.cpus),
        partial(_data, str(prepared.work), chosen.batch_size),
        settings,
        loss_fn=scenario.task.training_loss,
        mods=[compression_mod(prepared.store)],
    )
    client.query()(_identify)
    return client


def _model(reference: str, threads: int, context: Context) -> nn.Module:
    torch.set_num_threads(threads)  # each client has the CPUs the scenario gives it, no more
    module: nn.Module = load_callable(reference)()
    return module


def _data(work: str, batch_size: int, context: Context) -> tuple[Loader, Loader | None]:
    number = int(context.node_config["partition-id"])
    inputs, targets = training_tensors(work, number)
    return TensorBatches(inputs, targets, batch_size=batch_size, shuffle=True), None


def _identify(message: Message, context: Context) -> Message:
    number = int(context.node_config["partition-id"])
    record = ConfigRecord({"partition-id": number})
    return Message(RecordDict({_NODE_RECORD: record}), reply_to=message)


def nodes_by_partition(grid: Grid, count: int) -> list[int]:
    """Wait for `count` nodes and ask each for its partition; node ids in order of partition.

    Flower draws node ids at random; partitions are what stays the same from run to run.

    Raises:
        EngineFailed: the nodes do not come up, or do not answer.
    """
    deadline = time.monotonic() + _QUERY_SECONDS
    while len(nodes := list(grid.get_node_ids())) < count:
        if time.monotonic() > deadline:
            raise EngineFailed(f"only {len(nodes)} of {count} simulated nodes came up")
        time.sleep(0.1)
    queries = [Message(RecordDict(), node, MessageType.QUERY) for node in nodes]
    partitions: dict[int, int] = {}
    for reply in grid.send_and_receive(queries, timeout=_QUERY_SECONDS):
        if reply.has_error():
            raise EngineFailed(f"a simulated node failed to start: {reply.error.reason}")
        record = reply.content[_NODE_RECORD]
        assert isinstance(record, ConfigRecord)
        partitions[reply.metadata.src_node_id] = int(record["partition-id"])  # type: ignore[arg-type]
    if len(partitions) < count:
        raise EngineFailed(f"only {len(partitions)} of {count} simulated nodes answered")
    return sorted(partitions, key=partitions.__getitem__)


class OrderedGrid(GridWrapper):
    """Lists nodes by partition, and returns replies in the order of those nodes.

    Sums of floats depend on the order of their terms, and the sampling of nodes on the order of
    the nodes: without this no two runs are alike.

    Args:
        grid: the grid to wrap.
        nodes: node ids in the order to keep.
    """

    def __init__(self, grid: Grid, nodes: Iterable[int]) -> None:
        super().__init__(grid)
        self._rank = {node: rank for rank, node in enumerate(nodes)}

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes, in order."""
        return sorted(self._grid.get_node_ids(), key=self._place)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The connected nodes, in order."""
        return sorted(self._grid.get_nodes(), key=lambda node: self._place(node.node_id))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, in the order of their nodes."""
        return self._grid.push_messages(self._by_node(messages))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; the replies in the order of the nodes that were asked."""
        ordered = self._by_node(messages)
        replies = list(self._grid.send_and_receive(ordered, timeout=timeout))
        asked = {m.metadata.message_id: self._place(m.metadata.dst_node_id) for m in ordered}
        return sorted(replies, key=lambda r: asked.get(r.metadata.reply_to_message_id, len(asked)))

    def _by_node(self, messages: Iterable[Message]) -> list[Message]:
        return sorted(messages, key=lambda m: self._place(m.metadata.dst_node_id))

    def _place(self, node: int) -> int:
        return self._rank.get(node, len(self._rank))

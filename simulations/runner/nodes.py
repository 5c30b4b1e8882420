"""The simulated nodes: which client each one is, in which order, and how much they may keep.

Nothing here asks a node: with ten thousand of them Flower's engine would pass as many messages
before anything is trained.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from logging import WARNING
from pathlib import Path

import numpy as np
from flwr.app import Context, Message
from flwr.serverapp import Grid

from prunecast.client.training.housekeeping import forget, kept_bytes
from prunecast.common.files import write_atomically
from prunecast.compression.flower.internals import ClientAppCallable, Mod, log
from prunecast.server.federation.wrapper import GridWrapper
from prunecast.simulations.runner import EngineFailed
from prunecast.simulations.runner.prepared import PreparedRun

__all__ = ["OrderedGrid", "StoreBound", "client_number_mod", "number_nodes"]

_START_SECONDS = 120.0
_FILE = "nodes.bin"  # in the scratch folder: ids in their order, 8 bytes each


# -- who is who -----------------------------------------------------------------------------------


def number_nodes(grid: Grid, prepared: PreparedRun) -> list[int]:
    """Wait for the nodes of a run, and make the n-th smallest id client n.

    Flower draws node ids at random; the numbers of clients are what stays the same from run to run.
    They are left in the scratch folder, where `client_number_mod` finds them.

    Raises:
        EngineFailed: the nodes do not come up.
    """
    count = prepared.scenario.clients.count
    deadline = time.monotonic() + _START_SECONDS
    while len(nodes := sorted(grid.get_node_ids())) < count:
        if time.monotonic() > deadline:
            raise EngineFailed(f"only {len(nodes)} of {count} simulated nodes came up")
        time.sleep(0.1)
    write_atomically(prepared.work / _FILE, np.array(nodes, "<u8").tobytes())
    return nodes


def client_number_mod(prepared: PreparedRun) -> Mod:
    """A Flower mod that makes ``partition-id`` the number that `number_nodes` gave to the node.

    The node then states the width class that the scenario gives to the client of that number, and
    keeps its files under it, so that a run which is resumed finds them.
    """
    classes = prepared.scenario.clients.classes()

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        path = prepared.work / _FILE
        found = _numbers(path, path.stat().st_mtime_ns)
        context.node_config["partition-id"] = number = found[context.node_id]
        context.node_config["prunecast-node"] = number + 1
        if classes[number]:
            context.node_config["prunecast-width"] = classes[number]
        return call_next(message, context)

    return mod


@lru_cache(maxsize=2)
def _numbers(path: Path, written: int) -> Mapping[int, int]:
    nodes = np.frombuffer(path.read_bytes(), "<u8")
    return {int(node): number for number, node in enumerate(nodes)}


class OrderedGrid(GridWrapper):
    """Lists nodes by client, and returns replies in the order of those nodes.

    Sums of floats depend on the order of their terms, and the sampling of nodes on the order of
    the nodes: without this no two runs are alike.

    Args:
        grid: the grid to wrap.
        nodes: node ids in the order to keep; others are not listed.
        store: told who was asked, after every exchange.
    """

    def __init__(self, grid: Grid, nodes: Iterable[int], store: StoreBound) -> None:
        super().__init__(grid)
        self._rank = {node: rank for rank, node in enumerate(nodes)}
        self._store = store

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes, in order."""
        return sorted(filter(self._rank.__contains__, self._grid.get_node_ids()), key=self._place)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send messages; the replies in the order of the nodes that were asked."""
        ordered = sorted(messages, key=lambda m: self._place(m.metadata.dst_node_id))
        replies = list(self._grid.send_and_receive(ordered, timeout=timeout))
        asked = {m.metadata.message_id: self._place(m.metadata.dst_node_id) for m in ordered}
        self._store.after(m.metadata.dst_node_id for m in ordered)
        return sorted(replies, key=lambda r: asked.get(r.metadata.reply_to_message_id, len(asked)))

    def _place(self, node: int) -> int:
        return self._rank.get(node, len(self._rank))


# -- what they keep -------------------------------------------------------------------------------


@dataclass
class _Kept:
    """What a node has on disk: since which exchange, bytes, whether versions are among it."""

    asked: int
    size: int
    versions: bool = True


class StoreBound:
    """Keeps all simulated nodes together below a number of bytes on disk.

    It is held after every exchange; meanwhile, the nodes that are asked in one may exceed it by
    what they write. Nodes that were asked longest ago forget first: as a rule what no delta begins
    at any more, then all the rest. A node that forgot the version it held gets a keyframe, as one
    that lost its disk; what its updates dropped is lost.

    Args:
        root: of the nodes' store.
        job: that they keep it for.
        most: bytes.
        history: for how many exchanges the server knows a version it published.
        numbers: under which nodes keep their files; None for their ids.

    Attributes:
        peak: bytes, the most that was kept after an exchange.
        forgotten: how often a node lost what its updates had dropped.
    """

    def __init__(
        self,
        root: Path,
        job: int | str,
        *,
        most: int,
        history: int,
        numbers: Mapping[int, int] | None = None,
    ) -> None:
        self._root, self._job, self._numbers = root, job, numbers or {}
        self._most, self._history = most, history
        self._nodes: OrderedDict[int, _Kept] = OrderedDict()  # asked longest ago first
        self._exchange = self._total = 0
        self.peak = self.forgotten = 0

    def after(self, asked: Iterable[int]) -> None:
        """See what the nodes of an exchange keep now, and let others forget if it is too much."""
        self._exchange += 1
        for node in asked:
            before = self._nodes.pop(node, None)
            size = kept_bytes(self._root, self._job, self._numbers.get(node, node))
            self._total += size - (before.size if before else 0)
            if size:
                self._nodes[node] = _Kept(self._exchange, size)
        for node, kept in list(self._nodes.items()) if self._total > self._most else ():
            if self._total <= self._most or kept.asked >= self._exchange - self._history:
                break
            if kept.versions:
                self._forget(node, residuals=False)
        while self._total > self._most:
            node = next(iter(self._nodes))
            if not self.forgotten:
                log(
                    WARNING,
                    "Simulated nodes keep more than engine.store_bytes (%d): those that were asked "
                    "longest ago forget what they held, and what their updates dropped. Raise it "
                    "for figures without that.",
                    self._most,
                )
            self.forgotten += 1
            self._forget(node, residuals=True)
        self.peak = max(self.peak, self._total)

    def _forget(self, node: int, *, residuals: bool) -> None:
        kept = self._nodes[node]
        number = self._numbers.get(node, node)
        forget(self._root, self._job, number, residuals=residuals)
        left = kept_bytes(self._root, self._job, number)
        self._total += left - kept.size
        kept.size, kept.versions = left, False
        if not left:
            del self._nodes[node]

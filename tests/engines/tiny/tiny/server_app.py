"""What the server does.

Leaves `ledger.jsonl`, `losses.json`, `messages.json` and `final.npz` in `output`.
"""

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from prunecast.compression.flower import payload_of
from prunecast.compression.flower.envelope import unpack
from prunecast.compression.flower.internals import serialised_objects, uncached
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.server.federation import CompressedGrid, Policy
from prunecast.server.federation.wrapper import GridWrapper
from tiny.task import initial

app = ServerApp()


class Watched(GridWrapper):
    """Notes of every message, as it travels, what it consists of."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.messages: list[dict[str, object]] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))  # metadata is complete once they are pushed
        for message in messages:
            self._note("down", message)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        for message in found:
            self._note("up", message)
        return found

    def _note(self, direction: str, message: Message) -> None:
        arrays = unpack(message.content).array_records.values()
        payloads = [len(payload_of(a) or b"".join(x.data for x in a.values())) for a in arrays]
        self.messages.append(
            {
                "direction": direction,
                "type": message.metadata.message_type,
                "content": message.content.object_id,
                "payload": sum(payloads),
                "objects": list(map(len, serialised_objects(uncached(message)))),
            }
        )


def leading(rows: int, share: float) -> ChannelPlan:
    """The first rows, of weight and bias alike."""
    kept = np.arange(rows) < share * rows
    return ChannelPlan({"weight": (kept, None), "bias": (kept,)}, share=share)


def ask(grid: Grid) -> None:
    """Send every node a message of every type without arrays, and wait for the replies."""
    content = RecordDict({"config": ConfigRecord({"server-round": 1, "what": "size"})})
    kinds = ("train.note", "evaluate.note", "query")
    asked = [Message(content, node, kind) for node in grid.get_node_ids() for kind in kinds]
    waiting, deadline = set(grid.push_messages(asked)), time.monotonic() + 300
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(waiting):
            waiting.discard(reply.metadata.reply_to_message_id)
        time.sleep(0.2)


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    output = Path(config["output"])
    watched = Watched(grid)
    policy = Policy.from_run_config(config)
    grid = CompressedGrid(watched, policy, ledger=output / "ledger.jsonl")
    if policy.widths:
        grid.use_widths({name: leading(config["rows"], s) for name, s in policy.widths.items()})
    arrays = ArrayRecord({name: Array(array) for name, array in initial(config["rows"]).items()})
    least = {
        f"min_{what}_nodes": config["min-nodes"] for what in ("train", "evaluate", "available")
    }
    result = FedAvg(**least).start(
        grid=grid, initial_arrays=arrays, num_rounds=config["num-server-rounds"], timeout=600
    )
    if config["ask"]:
        for one in (watched, grid):  # first as plain Flower
            ask(one)
    grid.ledger.close()
    np.savez(output / "final.npz", **{n: a.numpy() for n, a in result.arrays.items()})
    losses = {r: m["loss"] for r, m in result.evaluate_metrics_clientapp.items()}
    (output / "losses.json").write_text(json.dumps(losses))
    (output / "messages.json").write_text(json.dumps(watched.messages))

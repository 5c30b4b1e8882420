"""An asynchronous loop: every node trains at its own pace, and nobody waits for the slowest.

As FedBuff (Nguyen et al. 2022): each node is sent the model of the moment as soon as it has
answered, and after every `buffer` updates the server goes on to a new model, each update counting
less the more models it is behind. The grid compresses as in rounds: a node gets the difference to
the model that it holds, and what its updates drop is kept for its next one, whatever overtakes it.
"""

import time

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from asynchronous.task import net
from prunecast.server import CompressedGrid, Policy, staleness_weight

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, then let the nodes evaluate what they got."""
    config = context.run_config
    grid = CompressedGrid(grid, Policy.from_run_config(config))
    models = config["models"]
    grid.expect_rounds(models)
    torch.manual_seed(0)
    arrays, number = ArrayRecord(net().state_dict()), 1
    under_way: dict[str, tuple[int, int, ArrayRecord]] = {}  # by message: node, number, model
    buffer: list[tuple[float, ArrayRecord, ArrayRecord]] = []
    grid.begin_round(number)
    while number <= models:
        busy = {node for node, _, _ in under_way.values()}
        # a node that is never heard of again is free when its message has expired
        content = RecordDict({"arrays": arrays})
        messages = [
            Message(content, node, "train", ttl=config["longest-training"])
            for node in grid.get_node_ids()
            if node not in busy
        ]
        for message_id, message in zip(grid.push_messages(messages), messages, strict=True):
            under_way[message_id] = message.metadata.dst_node_id, number, arrays
        time.sleep(config["poll-seconds"])
        for reply in grid.pull_messages(list(under_way)):
            node, begun, sent = under_way.pop(reply.metadata.reply_to_message_id)
            if reply.has_error():  # the reason is in the log and in the ledger
                continue
            weight = staleness_weight(number - begun, config["staleness-exponent"])
            buffer.append((weight, reply.content["arrays"], sent))
            print(f"model {number}: node {node} answers {number - begun} behind, {weight:.2f}")
        if len(buffer) >= config["buffer"]:
            arrays, buffer, number = merged(arrays, buffer), [], number + 1
            grid.begin_round(number)  # pruning goes by models, and not by messages
    evaluate(grid, arrays)


def merged(
    arrays: ArrayRecord, buffer: list[tuple[float, ArrayRecord, ArrayRecord]]
) -> ArrayRecord:
    """The model and the weighted mean of the updates."""
    found = {name: array.numpy().astype(np.float64) for name, array in arrays.items()}
    for weight, trained, sent in buffer:
        for name, total in found.items():
            total += weight / len(buffer) * (trained[name].numpy() - sent[name].numpy())
    return ArrayRecord({name: Array(found[name].astype(arrays[name].dtype)) for name in found})


def evaluate(grid: CompressedGrid, arrays: ArrayRecord) -> None:
    """Say how good the published model is on the nodes, and what all of it cost."""
    content = RecordDict({"arrays": arrays})
    messages = [Message(content, node, "evaluate") for node in grid.get_node_ids()]
    metrics = [
        reply.content["metrics"]
        for reply in grid.send_and_receive(messages, timeout=120)
        if not reply.has_error()
    ]
    examples = sum(m["num-examples"] for m in metrics)
    accuracy = sum(m["eval-accuracy"] * m["num-examples"] for m in metrics) / max(1, examples)
    model, sent = grid.published(arrays), grid.ledger.totals()
    print(f"accuracy {accuracy:.3f} with {model.sparsity():.0%} zeros")
    print(f"{sent.payload_bytes:,} bytes on the wire, {sent.dense_bytes:,} without Prunecast")

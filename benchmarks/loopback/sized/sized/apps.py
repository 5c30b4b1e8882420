"""Both sides: arrays of noise, which nothing makes smaller, and no training but for its seconds."""

import socket
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import compression_mod
from prunecast.server.federation import CompressedGrid, Policy

client = ClientApp(mods=[compression_mod()])
server = ServerApp()


@client.train()
def train(message: Message, context: Context) -> Message:
    """Answer with other noise, as late as a node that trains."""
    number = message.content["config"]["server-round"]
    rng = np.random.default_rng([context.node_id, number])
    arrays = {
        name: Array(rng.standard_normal(array.numpy().shape, np.float32))
        for name, array in message.content["arrays"].items()
    }
    time.sleep(context.run_config["seconds"])
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Train a round that is not counted, tell the relay, and train those that are."""
    config = context.run_config
    policy = Policy.from_run_config(config)
    compressed = CompressedGrid(grid, policy, ledger=Path(config["ledger"]))
    rng = np.random.default_rng(0)
    arrays = ArrayRecord({"weight": Array(rng.standard_normal(config["floats"], np.float32))})
    strategy = FedAvg(fraction_evaluate=0.0)
    for number in range(1, config["num-server-rounds"] + 2):
        messages = strategy.configure_train(number, arrays, ConfigRecord(), compressed)
        replies = compressed.send_and_receive(messages, timeout=600)
        arrays, _ = strategy.aggregate_train(number, replies)
        if number == 1:  # with it nodes have fetched the app
            _mark(config["relay"], "begin")
        # longer than an idle connection lives, as in a round that waits for slower nodes
        time.sleep(config["seconds"])
    _mark(config["relay"], "end")
    compressed.ledger.close()


def _mark(relay: str, name: str) -> None:
    """Have the relay note where the counted rounds begin and end."""
    host, _, port = relay.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"GET /{name}/ HTTP/1.1\r\n\r\n".encode())

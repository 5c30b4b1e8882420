"""What a node does."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from prunecast.client.training import compression_mod
from tiny.faults import fault_of, heal, of_another_kind, strike
from tiny.task import step, target

app = ClientApp(mods=[of_another_kind, compression_mod()])


def load(message: Message, context: Context):
    """The arrays of the message and the node's target."""
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    return arrays, target(int(context.node_config["partition-id"]), len(arrays["bias"]))


@app.train()
def train(message: Message, context: Context) -> Message:
    arrays, goal = load(message, context)
    trained = ArrayRecord({name: Array(step(arrays[name], goal[name])) for name in arrays})
    metrics = MetricRecord({"num-examples": 1})
    return Message(RecordDict({"arrays": trained, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    arrays, goal = load(message, context)
    if fault := fault_of(context):
        store = Path(context.node_config["prunecast-store"])
        if message.content["config"]["server-round"] == 1:
            strike(fault, store)
        else:
            heal(store)
    loss = float(np.mean(np.square(arrays["weight"] - goal["weight"])))
    metrics = MetricRecord({"loss": loss, "num-examples": 1})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


@app.train("note")
@app.evaluate("note")
@app.query()
def note(message: Message, context: Context) -> Message:
    """Messages and replies without arrays."""
    metrics = MetricRecord({"num-examples": 1, "size": 3.0})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)

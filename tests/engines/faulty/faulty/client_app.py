"""What a node does, and what happens to it."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from faulty.task import BARE, KILLED, NAN, SLOW, TROUBLED, fingerprint, wait_for
from prunecast.client.training import compression_mod

_mod = compression_mod()


def mod(message: Message, context: Context, call_next):
    """As an app that forgot the mod, on one node in one round."""
    bare = Path(context.run_config["output"]) / "bare"
    if context.node_config["partition-id"] == TROUBLED[BARE] and bare.exists():
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)
    return _mod(message, context, call_next)


app = ClientApp(mods=[mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    folder = Path(context.run_config["output"])
    partition, number = context.node_config["partition-id"], message.content["config"]["round"]
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    metrics = MetricRecord(
        {"num-examples": 1, "partition": partition, "received": fingerprint(arrays)}
    )
    rng = np.random.default_rng(100 * number + partition)
    trained = {
        name: array + 0.05 * rng.standard_normal(array.shape, dtype=np.float32)
        for name, array in arrays.items()
    }
    if TROUBLED.get(number) == partition:
        if number == SLOW:
            wait_for(folder / f"ended-{SLOW}")
        if number == KILLED:
            (folder / "training").touch()
            wait_for(folder / "never")
        if number == NAN:
            trained["weight"][0, 0] = np.nan
    record = ArrayRecord({name: Array(array) for name, array in trained.items()})
    return Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Tells that what was asked before has been answered."""
    metrics = MetricRecord({"partition": context.node_config["partition-id"]})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)

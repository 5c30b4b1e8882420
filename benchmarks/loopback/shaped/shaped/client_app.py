"""What a node does."""

from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from prunecast.client.training import compression_mod
from shaped.task import ZSTD, examples, packed, train, unpacked

app = ClientApp(mods=[compression_mod()])


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """An epoch on the node's own images."""
    node = int(context.node_config["partition-id"])
    x, y = examples(Path(context.run_config["folder"]) / f"node{node}.npz")
    record = message.content["arrays"]
    through_zstd = context.run_config["arm"] == ZSTD
    record = unpacked(record) if through_zstd else record
    number = message.content["config"]["server-round"]
    weights = {name: array.numpy() for name, array in record.items()}
    trained = train(weights, x, y, seed=1000 * number + node)
    arrays = ArrayRecord({name: Array(array) for name, array in trained.items()})
    content = {
        "arrays": packed(arrays) if through_zstd else arrays,
        "metrics": MetricRecord({"num-examples": len(x)}),
    }
    return Message(RecordDict(content), reply_to=message)

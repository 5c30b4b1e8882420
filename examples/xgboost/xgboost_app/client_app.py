"""What a node does."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from prunecast.client import compression_mod
from xgboost_app.task import boosted, load_data
from xgboost_app.task import test as test_fn

app = ClientApp(mods=[compression_mod()])


def load(message: Message, context: Context):
    """The trees that came with the message, and this node's data."""
    trees = message.content["arrays"]["0"].numpy().tobytes()
    node = context.node_config
    return trees, *load_data(int(node["partition-id"]), int(node["num-partitions"]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Grow trees on the local data, and send these alone: the strategy puts all together."""
    trees, data, _ = load(message, context)
    grown = boosted(trees, data, context.run_config["trees-a-round"])
    content = RecordDict(
        {
            "arrays": ArrayRecord([np.frombuffer(grown, np.uint8)]),
            "metrics": MetricRecord({"num-examples": data.num_row()}),
        }
    )
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test on what was held back."""
    trees, _, data = load(message, context)
    metrics = {"eval_auc": test_fn(trees, data), "num-examples": data.num_row()}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

"""What a node does."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from prunecast.client import compression_mod
from quickstart.task import Net, load_data
from quickstart.task import test as test_fn
from quickstart.task import train as train_fn

app = ClientApp(mods=[compression_mod()])


def load(message: Message, context: Context):
    """The model that came with the message, and this node's data."""
    torch.set_num_threads(1)
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    node = context.node_config
    data = load_data(
        int(node["partition-id"]), int(node["num-partitions"]), context.run_config["batch-size"]
    )
    return model, *data


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the local digits."""
    model, data, _ = load(message, context)
    config = context.run_config
    loss = train_fn(model, data, config["local-epochs"], config["learning-rate"])
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(data.dataset)}),
        }
    )
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test on the digits that were held back."""
    model, _, data = load(message, context)
    loss, accuracy = test_fn(model, data)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data.dataset)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

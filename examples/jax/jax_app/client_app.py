"""What a node does."""

import jax
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from jax_app.task import flattened, load_data, unflattened
from jax_app.task import test as test_fn
from jax_app.task import train as train_fn
from prunecast.client import compression_mod, current_masks

app = ClientApp(mods=[compression_mod()])


def load(message: Message, context: Context):
    """The model that came with the message, and this node's data."""
    arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
    node = context.node_config
    data = load_data(int(node["partition-id"]), int(node["num-partitions"]))
    return unflattened(arrays), *data


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the local digits."""
    params, images, labels, *_ = load(message, context)
    # optional: without it, weights that were pruned are trained, and dropped when they are sent
    kept = current_masks()
    ones = jax.tree.map(lambda leaf: leaf * 0 + 1, params)
    masks = unflattened({name: kept.get(name, one) for name, one in flattened(ones).items()})
    config = context.run_config
    params, loss = train_fn(
        *(params, masks, images, labels),
        epochs=config["local-epochs"],
        batch_size=config["batch-size"],
        rate=config["learning-rate"],
        seed=message.content["config"]["server-round"],
    )
    arrays = {name: Array(array) for name, array in flattened(params).items()}
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(labels)})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test on the digits that were held back."""
    params, _, _, images, labels = load(message, context)
    loss, accuracy = test_fn(params, images, labels)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(labels)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

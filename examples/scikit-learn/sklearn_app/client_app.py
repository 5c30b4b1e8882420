"""What a node does."""

from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.metrics import log_loss

from prunecast.client import compression_mod
from sklearn_app.task import CLASSES, load_data, new_model, set_weights, weights_of

app = ClientApp(mods=[compression_mod()])


def load(message: Message, context: Context):
    """The model that came with the message, and this node's data."""
    model = new_model()
    arrays = message.content["arrays"].items()
    set_weights(model, {name: array.numpy() for name, array in arrays})
    node = context.node_config
    return model, *load_data(int(node["partition-id"]), int(node["num-partitions"]))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on the local digits."""
    model, images, labels, *_ = load(message, context)
    for _ in range(context.run_config["local-epochs"]):
        model.partial_fit(images, labels)
    arrays = {name: Array(array) for name, array in weights_of(model).items()}
    metrics = MetricRecord({"train_loss": float(model.loss_), "num-examples": len(labels)})
    content = RecordDict({"arrays": ArrayRecord(arrays), "metrics": metrics})
    return Message(content=content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test on the digits that were held back."""
    model, _, _, images, labels = load(message, context)
    loss = log_loss(labels, model.predict_proba(images), labels=CLASSES)
    accuracy = float(model.score(images, labels))
    metrics = {"eval_loss": float(loss), "eval_acc": accuracy, "num-examples": len(labels)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

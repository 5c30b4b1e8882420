"""Training that is a function of node, round and model alone, and stops at signs."""

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from prunecast.client import compression_mod

app = ClientApp(mods=[compression_mod()])


def stop_at_sign(folder: Path, number: int, node: int) -> None:
    """Say that the round was reached, and wait as long as there is a sign; minutes at most."""
    sign = folder / f"stop-{number}-{node}"
    if not sign.exists():
        return
    (folder / f"reached-{number}-{node}").touch()
    deadline = time.monotonic() + 300
    while sign.exists() and time.monotonic() < deadline:
        time.sleep(0.1)


@app.train()
def train(message: Message, context: Context) -> Message:
    number = message.content["config"]["server-round"]
    node = context.node_config["partition-id"]
    stop_at_sign(Path(context.run_config["signs"]), number, node)
    rng = np.random.default_rng([number, node])
    trained = {}
    for name, array in message.content["arrays"].items():
        values = array.numpy()
        apart = np.float32(node + 1) * np.cos(np.arange(values.size, dtype="f4"))
        noise = rng.normal(size=values.shape).astype("f4")
        trained[name] = values + np.float32(0.2) * (apart.reshape(values.shape) - values + noise)
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(values) for name, values in trained.items()}),
            "metrics": MetricRecord({"num-examples": node + 1}),
        }
    )
    return Message(content, reply_to=message)

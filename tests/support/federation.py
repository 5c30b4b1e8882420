"""A small federation on the in-process grid: real Flower, real messages, no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from prunecast.client.training import compression_mod
from prunecast.compression.flower import CONTROL_RECORD, ERROR_REASON
from prunecast.compression.flower.envelope import unpack

RUN_ID = 11


def initial_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "conv.weight": rng.normal(size=(16, 1, 5, 5)).astype(np.float32) * 0.2,
        "fc.weight": rng.normal(size=(64, 40)).astype(np.float32) * 0.1,
        "fc.bias": np.zeros(64, np.float32),
        "bn.running_mean": np.zeros(16, np.float32),
        "bn.running_var": np.ones(16, np.float32),
    }


def to_record(arrays: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def to_arrays(record: ArrayRecord) -> dict[str, np.ndarray]:
    return {name: array.numpy() for name, array in record.items()}


def local_step(arrays: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Stands for training: a seeded pull towards a target, different on every node."""
    rng = np.random.default_rng(seed)
    return {
        name: np.asarray(
            array + 0.1 * (rng.normal(size=array.shape) * 0.1 - 0.2 * array), array.dtype
        )
        if array.dtype.kind == "f"
        else array
        for name, array in arrays.items()
    }


def seed_of(message: Message, context: Context) -> int:
    config = message.content.get("config", ConfigRecord())
    return int(context.node_id) * 1000 + int(config.get("server-round", 0))


def reason_of(reply: Message) -> str:
    """Why a node failed, as a strategy sees it or as the node sent it; "" where it did not."""
    if reply.has_error():
        return reply.error.reason
    control = unpack(reply.content).config_records.get(CONTROL_RECORD, ConfigRecord())
    return str(control.get(ERROR_REASON, ""))


def make_app(
    store: Path | None,
    seen: list[tuple[int, str, dict[str, np.ndarray]]] | None = None,
    most: int | None = None,
):
    """Train, evaluate and query functions; with `store=None` without the mod."""
    app = ClientApp(mods=[] if store is None else [compression_mod(store, max_model_bytes=most)])

    def note(message: Message, context: Context) -> dict[str, np.ndarray]:
        arrays = to_arrays(message.content["arrays"])
        if seen is not None:
            seen.append((context.node_id, message.metadata.message_type, arrays))
        return arrays

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = local_step(note(message, context), seed_of(message, context))
        metrics = MetricRecord({"num-examples": context.node_id * 10, "loss": 0.5})
        content = RecordDict({"arrays": to_record(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        total = sum(float(np.abs(a).sum()) for a in note(message, context).values())
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1, "norm": total})})
        return Message(content, reply_to=message)

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict({"answer": ConfigRecord({"n": 42})}), reply_to=message)

    return app

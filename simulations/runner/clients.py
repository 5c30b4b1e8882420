"""The ClientApp of a simulation."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from prunecast.client.training.client_app import Loader, LocalTraining, build_client_app
from prunecast.client.training.mod import compression_mod
from prunecast.client.training.scheme_mod import scheme_mod
from prunecast.client.training.trainer import TensorBatches
from prunecast.compression.flower.references import load_callable
from prunecast.simulations.runner.job import Job, training_tensors
from prunecast.simulations.runner.ordered import NODE_RECORD

__all__ = ["simulated_client"]


def simulated_client(job: Job) -> ClientApp:
    """The client of a prepared run; picklable, and small: data stay on disk."""
    scenario = job.scenario
    chosen = scenario.training
    settings = LocalTraining(
        local_epochs=chosen.epochs,
        learning_rate=chosen.learning_rate,
        learning_rate_decay=chosen.learning_rate_decay,
        momentum=chosen.momentum,
        weight_decay=chosen.weight_decay,
        device=chosen.device,
        mixed_precision=chosen.mixed_precision,
        seed=scenario.seed,
    )
    client = build_client_app(
        partial(_model, scenario.model.factory, scenario.engine.cpus),
        partial(_data, str(job.work), chosen.batch_size),
        settings,
        mods=[compression_mod(job.store), scheme_mod(job.store)],
    )
    client.query()(_identify)
    return client


def _model(reference: str, threads: int, context: Context) -> nn.Module:
    torch.set_num_threads(threads)  # each client has the CPUs the scenario gives it, no more
    module: nn.Module = load_callable(reference)()
    return module


def _data(work: str, batch_size: int, context: Context) -> tuple[Loader, Loader | None]:
    number = int(context.node_config["partition-id"])
    inputs, targets = training_tensors(str(Path(work)), number)
    return TensorBatches(inputs, targets, batch_size=batch_size, shuffle=True), None


def _identify(message: Message, context: Context) -> Message:
    number = int(context.node_config["partition-id"])
    record = ConfigRecord({"partition-id": number})
    return Message(RecordDict({NODE_RECORD: record}), reply_to=message)

"""The ready ClientApp: bring a model and data, name them in Flower's run config.

In ``pyproject.toml`` of a Flower app::

    [tool.flwr.app.components]
    clientapp = "prunecast.client.training.client_app:app"

    [tool.flwr.app.config]
    model = "myapp.task:net"           # () -> torch.nn.Module
    data = "myapp.task:load"           # (Context) -> (training loader, validation loader or None)
    local-epochs = 1
    learning-rate = 0.05

Every key and default is a field of `LocalTraining`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from logging import WARNING
from typing import Any, TypeAlias

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import nn

from prunecast.client.training.mod import compression_mod
from prunecast.client.training.trainer import (
    TrainerError,
    Training,
    best_device,
    evaluate,
    train,
)
from prunecast.common.references import configured_callable, typed
from prunecast.compression.flower import stated_round
from prunecast.compression.flower.internals import Mod, log
from prunecast.compression.pruning.masks import (
    contribute_statistics,
    current_masks,
    current_teacher,
    wanted_statistics,
)
from prunecast.compression.pruning.statistics import RECALIBRATE, RUNNING_STATISTICS
from prunecast.compression.pruning.structure.channels import current_channels
from prunecast.compression.pruning.structure.narrowing import fit_module
from prunecast.compression.pruning.training.measuring import Batch, Loss
from prunecast.compression.pruning.training.recalibrating import recalibrate
from prunecast.compression.versions import is_statistic

__all__ = [
    "DISTILLED",
    "LocalTraining",
    "app",
    "build_client_app",
    "running_statistics_reply",
    "training_seed",
]

DISTILLED = "distilled"
"""Metric of a node that is to distil: 1.0 where it had a teacher, 0.0 where it had none (yet)."""

Loader: TypeAlias = Iterable[Batch]
ModelFactory: TypeAlias = Callable[[Context], nn.Module]
DataFactory: TypeAlias = Callable[[Context], tuple[Loader, Loader | None]]


@dataclass(frozen=True)
class LocalTraining:
    """What a client does in a round; each field is a key of the run config, dashes for underscores.

    Attributes:
        local_epochs: passes over the client's examples.
        learning_rate: of SGD, in the first round.
        learning_rate_decay: factor from round to round.
        momentum: of SGD.
        weight_decay: of SGD.
        device: "auto" (CUDA where present), or a torch device.
        mixed_precision: "auto" (on CUDA), "on" or "off".
        seed: local training is a function of it, the round and the partition.
        distillation: part of the loss, 0 to 1, that the last dense version is the teacher of once
            the model is pruned; nodes that never held one train without. The metric `DISTILLED`
            of every reply says which did.
        distillation_temperature: see `prunecast.client.training.trainer.train`.
    """

    local_epochs: int = 1
    learning_rate: float = 0.05
    learning_rate_decay: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 0.0
    device: str = "auto"
    mixed_precision: str = "auto"
    seed: int = 0
    distillation: float = 0.0
    distillation_temperature: float = 4.0

    def __post_init__(self) -> None:
        if not 0 <= self.distillation <= 1:
            raise TrainerError(f"distillation must be from 0 to 1, not {self.distillation}")
        if not self.distillation_temperature > 0:
            raise TrainerError(
                f"distillation-temperature must be above 0, not {self.distillation_temperature}"
            )
        if self.mixed_precision not in ("auto", "on", "off"):
            raise TrainerError(
                f"mixed-precision must be 'auto', 'on' or 'off', not {self.mixed_precision!r}"
            )

    @classmethod
    def from_run_config(cls, run_config: Mapping[str, Any]) -> LocalTraining:
        """Read the fields from Flower's run config; other keys are ignored.

        Raises:
            TrainerError: a value of the wrong type.
        """
        given: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            key = field.name.replace("_", "-")
            if key in run_config:
                given[field.name] = typed(key, run_config[key], type(field.default), TrainerError)
        return cls(**given)

    @property
    def torch_device(self) -> str | None:
        """The device as `train` and `evaluate` take it; None for "auto"."""
        return None if self.device == "auto" else self.device

    def train(
        self,
        module: nn.Module,
        loader: Loader,
        server_round: int,
        context: Context,
        *,
        loss_fn: Loss,
        masks: Mapping[str, NDArray[np.bool_]] | None = None,
        statistics: Collection[str] = (),
        teacher: nn.Module | None = None,
    ) -> Training:
        """Train a module in place as the node of `context` does in a round.

        Arguments and errors as of `prunecast.client.training.trainer.train`.
        """
        return train(
            module,
            loader,
            epochs=self.local_epochs,
            lr=self.learning_rate * self.learning_rate_decay ** max(server_round - 1, 0),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            masks=masks,
            device=self.torch_device,
            mixed_precision={"auto": None, "on": True, "off": False}[self.mixed_precision],
            seed=training_seed(self.seed, server_round, context),
            statistics=statistics,
            loss_fn=loss_fn,
            teacher=teacher,
            distillation=self.distillation,
            temperature=self.distillation_temperature,
        )


def training_seed(seed: int, server_round: int, context: Context) -> int:
    """Seed of one client's local training in one round.

    The partition names the client where there is one, since node ids differ from run to run.
    """
    client = int(context.node_config.get("partition-id", context.node_id))
    words = [seed, server_round, client & 0xFFFFFFFF, client >> 32]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def build_client_app(
    model: ModelFactory,
    data: DataFactory,
    settings: LocalTraining | None = None,
    *,
    loss_fn: Loss = nn.functional.cross_entropy,
    mods: Sequence[Mod] | None = None,
) -> ClientApp:
    """A ClientApp that trains and evaluates `model` on `data`.

    Args:
        model: called with the context for every message; the received arrays are loaded into it.
        data: loaders of the node whose context it is given; cache what is costly.
        settings: of local training; None reads the run config.
        loss_fn: of (outputs, targets), the mean over the batch.
        mods: Flower mods; default ``[compression_mod()]``, which keeps the teacher that `settings`
            distil from.
    """
    distils = None if settings is None else settings.distillation > 0
    client = ClientApp(mods=[compression_mod(teacher=distils)] if mods is None else list(mods))

    def _settings(context: Context) -> LocalTraining:
        return settings or LocalTraining.from_run_config(context.run_config)

    @client.train()  # type: ignore[untyped-decorator, unused-ignore]
    def _train(message: Message, context: Context) -> Message:
        chosen = _settings(context)
        key, module = _load(model, message, context)
        loader, _ = data(context)
        teacher = _teacher(model, context) if chosen.distillation else None
        outcome = chosen.train(
            module,
            loader,
            stated_round(message.content),
            context,
            loss_fn=loss_fn,
            masks=current_masks(),
            statistics=wanted_statistics(),
            teacher=teacher,
        )
        for name, measured in outcome.statistics.items():
            contribute_statistics(name, measured)
        metrics = MetricRecord({"num-examples": outcome.examples, "train-loss": outcome.loss})
        if chosen.distillation:  # in every round: strategies average the same names from all nodes
            metrics[DISTILLED] = float(teacher is not None)
        arrays = ArrayRecord({k: v.cpu() for k, v in module.state_dict().items()})
        return Message(RecordDict({key: arrays, "metrics": metrics}), reply_to=message)

    @client.evaluate()  # type: ignore[untyped-decorator, unused-ignore]
    def _evaluate(message: Message, context: Context) -> Message:
        chosen = _settings(context)
        _, module = _load(model, message, context)
        training, validation = data(context)
        outcome = evaluate(
            module,
            training if validation is None else validation,
            device=chosen.torch_device,
            loss_fn=loss_fn,
        )
        metrics = MetricRecord({"num-examples": outcome.examples, "eval-loss": outcome.loss})
        if outcome.accuracy is not None:
            metrics["eval-accuracy"] = outcome.accuracy
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    @client.query(RECALIBRATE)  # type: ignore[untyped-decorator, unused-ignore]
    def _recalibrate(message: Message, context: Context) -> Message:
        chosen = _settings(context)
        _, module = _load(model, message, context)
        module.to(best_device() if chosen.torch_device is None else chosen.torch_device)
        loader, _ = data(context)
        with torch.random.fork_rng():
            torch.manual_seed(training_seed(chosen.seed, stated_round(message.content), context))
            examples = recalibrate(module, loader)
        return running_statistics_reply(message, module.state_dict(), examples)

    return client


def running_statistics_reply(
    message: Message, state: Mapping[str, torch.Tensor], examples: int
) -> Message:
    """The answer to a server that asks for the running statistics of what it sent.

    Args:
        message: whose action is `RECALIBRATE`.
        state: ``state_dict()`` of the module after `recalibrate`; what else it holds is left out.
        examples: that were looked at.
    """
    found = {name: tensor.cpu() for name, tensor in state.items() if is_statistic(name)}
    metrics = MetricRecord({"num-examples": examples})
    content = RecordDict({RUNNING_STATISTICS: ArrayRecord(found), "metrics": metrics})
    return Message(content, reply_to=message)


def _load(model: ModelFactory, message: Message, context: Context) -> tuple[str, nn.Module]:
    records = message.content.array_records
    if len(records) != 1:
        raise TrainerError(f"expected one array record, the message has {sorted(records)}")
    key, arrays = next(iter(records.items()))
    module = model(context)
    if (plan := current_channels()) is not None:
        module = fit_module(module, plan)
    module.load_state_dict(arrays.to_torch_state_dict())
    return key, module


def _teacher(model: ModelFactory, context: Context) -> nn.Module | None:
    """The last dense version as a module; None before anything is pruned, and where it is not."""
    arrays = current_teacher()
    if arrays is None:
        if current_masks() or current_channels() is not None:
            _say_untaught(context.run_id, context.node_id)
        return None
    module = model(context)
    module.load_state_dict({name: torch.from_numpy(np.array(a)) for name, a in arrays.items()})
    return module


@cache
def _say_untaught(run_id: int, node_id: int) -> None:
    """Once: strategies learn it from every reply."""
    log(
        WARNING,
        "Node %d of run %d trains without distillation: it holds no dense version of the model. It "
        "came when that was pruned already, or lost its store.",
        *(node_id, run_id),
    )


def _model_from_run_config(context: Context) -> nn.Module:
    module = configured_callable(context.run_config, "model", TrainerError)()
    if not isinstance(module, nn.Module):
        raise TrainerError(f"model in the run config made a {type(module).__name__}, no nn.Module")
    return module


def _data_from_run_config(context: Context) -> tuple[Loader, Loader | None]:
    loaders = configured_callable(context.run_config, "data", TrainerError)(context)
    if not (isinstance(loaders, tuple) and len(loaders) == 2):
        raise TrainerError(
            "data in the run config must return (training loader, validation loader or None)"
        )
    return loaders


app = build_client_app(_model_from_run_config, _data_from_run_config)
"""The ready ClientApp, configured by Flower's run config alone."""

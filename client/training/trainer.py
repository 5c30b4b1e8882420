"""Local training and evaluation with torch: masks held, GPU and mixed precision where present."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.training.holding import hold_masks
from prunecast.compression.pruning.training.measuring import (
    Batch,
    Loss,
    StatisticsMeter,
    moved,
    outputs_of,
)

__all__ = [
    "Evaluation",
    "TensorBatches",
    "TrainerError",
    "Training",
    "best_device",
    "evaluate",
    "train",
]


class TrainerError(RuntimeError):
    """Local training or evaluation cannot be done as asked."""


@dataclass(frozen=True)
class Training:
    """What local training did.

    Attributes:
        loss: mean training loss per example over the last epoch.
        examples: examples seen in one epoch.
        steps: optimiser steps taken.
        precision: "float32", "bfloat16" or "float16", the dtype that matrix products ran in.
        statistics: what was asked for, by name of the statistic and of the parameter, float32, as
            `StatisticsMeter` measures it.
    """

    loss: float
    examples: int
    steps: int
    precision: str
    statistics: Mapping[str, Mapping[str, NDArray[np.float32]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy over a data set.

    Attributes:
        loss: mean loss per example.
        accuracy: fraction of examples whose largest output is the label; None where targets are
            no labels.
        examples: number of examples.
    """

    loss: float
    accuracy: float | None
    examples: int


class TensorBatches:
    """Mini-batches of tensors: a loader without worker processes, for data held in memory.

    Args:
        inputs: one tensor, or one for each input of the model (batches then hold tuples); the
            first dimension is the example.
        targets: as many as inputs.
        batch_size: examples in a batch; the last one may be smaller.
        shuffle: reshuffle in every pass, with torch's generator, which `train` seeds.
    """

    def __init__(
        self,
        inputs: Tensor | Sequence[Tensor],
        targets: Tensor,
        *,
        batch_size: int,
        shuffle: bool = False,
    ) -> None:
        for tensor in [inputs] if isinstance(inputs, Tensor) else inputs:
            if len(tensor) != len(targets):
                raise TrainerError(f"{len(tensor)} inputs but {len(targets)} targets")
        if batch_size < 1:
            raise TrainerError(f"batch_size must be at least 1, not {batch_size}")
        self._inputs, self._targets = inputs, targets
        self._size, self._shuffle = batch_size, shuffle

    def __len__(self) -> int:
        return math.ceil(len(self._targets) / self._size)

    def __iter__(self) -> Iterator[Batch]:
        count = len(self._targets)
        order = torch.randperm(count) if self._shuffle else torch.arange(count)
        for first in range(0, count, self._size):
            chosen = order[first : first + self._size]
            if isinstance(self._inputs, Tensor):
                yield self._inputs[chosen], self._targets[chosen]
            else:
                yield tuple(tensor[chosen] for tensor in self._inputs), self._targets[chosen]


def best_device() -> torch.device:
    """CUDA where present, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    epochs: int,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    masks: Mapping[str, NDArray[np.bool_]] | None = None,
    device: torch.device | str | None = None,
    mixed_precision: bool | None = None,
    seed: int,
    loss_fn: Loss = nn.functional.cross_entropy,
    statistics: Collection[str] = (),
    teacher: nn.Module | None = None,
    distillation: float = 0.5,
    temperature: float = 4.0,
) -> Training:
    """Train `model` in place with SGD.

    Weights off a mask are zero before, during and after (`hold_masks`): neither momentum nor weight
    decay ever moves them.

    Args:
        model: its floating parameters stay float32; moved to `device` and left there.
        loader: yields (inputs, targets); passed over once per epoch.
        epochs: passes over the loader, at least 1.
        lr: learning rate.
        momentum: of SGD.
        weight_decay: of SGD.
        masks: parameter name to boolean array, True where a weight is kept, such as
            `current_masks()`; names of tensors that are no parameters (buffers) are ignored.
        device: default `best_device()`.
        mixed_precision: None uses it on CUDA only. bfloat16 where the device computes it, else
            float16 with a gradient scaler.
        seed: of torch's generators during the call (dropout, a shuffling loader). The global
            state is put back afterwards.
        loss_fn: of (outputs, targets), the mean over the batch.
        statistics: names of what to measure on the side, which some pruning criteria need.
        teacher: a model of the same classes whose soft outputs are learnt beside the targets
            (Hinton et al. 2015, section 2), such as the one before pruning; moved to `device`. None
            for none.
        distillation: part of the loss that the teacher has, 0 to 1.
        temperature: that outputs are divided by before they are compared with the teacher's.

    Raises:
        TrainerError: a mask does not fit, the loader is empty, the loss is not finite, or a teacher
            is given where outputs are no classes.
    """
    if epochs < 1:
        raise TrainerError(f"epochs must be at least 1, not {epochs}")
    target = torch.device(device) if device is not None else best_device()
    precision = _precision(target, mixed_precision)
    model.to(target).train()
    optimiser = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay
    )
    try:
        held = hold_masks(optimiser, masks or {}, model, dense_gradients=bool(statistics))
    except PlanError as error:
        raise TrainerError(str(error)) from error
    if teacher is not None:
        teacher.to(target).eval()
    scaler = torch.amp.GradScaler(target.type, enabled=precision is torch.float16)
    steps, total, examples = 0, torch.zeros((), device=target), 0
    devices = [target] if target.type == "cuda" else []
    with (
        StatisticsMeter(model, statistics) as meter,
        torch.random.fork_rng(devices=devices),
        held,
    ):
        torch.manual_seed(seed)
        for _ in range(epochs):
            total.zero_()
            examples = 0
            for inputs, targets in loader:
                targets = moved(targets, target)
                optimiser.zero_grad(set_to_none=True)
                with torch.autocast(target.type, precision, enabled=precision is not None):
                    outputs = outputs_of(model, inputs, target)
                    whole = loss = loss_fn(outputs, targets)
                    if teacher is not None:
                        with torch.no_grad():
                            known = outputs_of(teacher, inputs, target)
                        soft = _divergence(outputs, known, temperature)
                        whole = (1 - distillation) * loss + distillation * soft
                scaler.scale(whole).backward()  # type: ignore[no-untyped-call]
                scaler.unscale_(optimiser)
                meter.step()
                scaler.step(optimiser)
                scaler.update()
                total += loss.detach().float() * len(targets)
                examples += len(targets)
                steps += 1
    if not examples:
        raise TrainerError("the loader is empty: this client has no training data")
    mean = float(total) / examples
    if not math.isfinite(mean):
        raise TrainerError(
            f"the training loss is {mean}: lower the learning rate ({lr}) or clip gradients"
        )
    return Training(
        mean,
        examples,
        steps,
        str(precision or torch.float32).removeprefix("torch."),
        meter.found(),
    )


def _divergence(outputs: Tensor, known: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence from a teacher's classes, times the temperature squared.

    The factor keeps gradients as large as those of the targets (Hinton et al. 2015, section 2).
    """
    is_tensor = isinstance(outputs, Tensor) and isinstance(known, Tensor)
    if not is_tensor or outputs.ndim < 2 or outputs.shape[1] < 2 or outputs.shape != known.shape:
        told_apart = [
            f"shape {list(o.shape)}" if isinstance(o, Tensor) else f"type {type(o).__name__}"
            for o in (outputs, known)
        ]
        raise TrainerError(
            f"outputs of {told_apart[0]} are no classes to distil from a teacher's of "
            f"{told_apart[1]}: set distillation = 0"
        )
    learnt = nn.functional.log_softmax(outputs.float() / temperature, dim=1)
    told = nn.functional.log_softmax(known.float() / temperature, dim=1)
    divergence = nn.functional.kl_div(learnt, told, reduction="none", log_target=True).sum(1)
    return divergence.mean() * temperature**2


def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    *,
    device: torch.device | str | None = None,
    loss_fn: Loss = nn.functional.cross_entropy,
) -> Evaluation:
    """Mean loss, and accuracy of a classifier, in float32 and evaluation mode.

    Args:
        model: moved to `device` and left there; its training mode is put back.
        loader: yields (inputs, targets).
        device: default `best_device()`.
        loss_fn: of (outputs, targets), the mean over the batch.

    Raises:
        TrainerError: the loader is empty.
    """
    target = torch.device(device) if device is not None else best_device()
    training = model.training
    model.to(target).eval()
    total, correct, examples, labelled = 0.0, 0, 0, True
    try:
        with torch.inference_mode():
            for inputs, targets in loader:
                targets = moved(targets, target)
                outputs = outputs_of(model, inputs, target)
                total += float(loss_fn(outputs, targets)) * len(targets)
                if targets.ndim != 1 or targets.is_floating_point():
                    labelled = False
                else:
                    correct += int((outputs.argmax(1) == targets).sum())
                examples += len(targets)
    finally:
        model.train(training)
    if not examples:
        raise TrainerError("the loader is empty: there is nothing to evaluate on")
    return Evaluation(total / examples, correct / examples if labelled else None, examples)


def _precision(device: torch.device, wanted: bool | None) -> torch.dtype | None:
    if not (device.type == "cuda" if wanted is None else wanted):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return torch.float16
    return torch.bfloat16

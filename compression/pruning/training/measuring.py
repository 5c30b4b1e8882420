"""What training measures for pruning on the side: statistics that criteria ask for; needs torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunecast.compression.pruning.statistics import (
    ACTIVATION,
    GRADIENT,
    GROWTH,
    SENSITIVITY,
    VOTES,
)

__all__ = ["Batch", "Inputs", "Loss", "StatisticsMeter", "moved", "outputs_of"]

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
"""What a model is called with: one tensor, several in order, or several by name."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Of outputs and targets: the mean over a batch."""
Batch = tuple[Inputs, Tensor]
"""Inputs and targets."""

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class StatisticsMeter:
    """Measures statistics while a model trains; changes nothing of what it learns.

    `GRADIENT` is the root mean square over all steps, pruned weights included; of `GROWTH` and
    `VOTES` it is the mean, of which the mod sends what they say. `SENSITIVITY` is of
    the first step alone (that float16 does not overflow in), whose weights are those that the node
    was sent: one mini-batch, as in Lee et al. 2019, on every node. `ACTIVATION` comes from hooks on
    linear and convolutional layers; a layer that computes without calling its module, as the output
    of torch's `nn.MultiheadAttention`, has none.

    Args:
        model: on its device already.
        wanted: names of statistics, such as `wanted_statistics()`; others than these are ignored.

    Frozen parameters have no gradient and no sensitivity. Close it, or use it as a context.
    """

    def __init__(self, model: nn.Module, wanted: Collection[str]) -> None:
        self._steps = 0
        self._squares: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._sensitivities: dict[str, Tensor] = {}
        self._sizes: dict[str, Tensor] = {}  # sums over positions of a channel's size
        self._positions: dict[str, int] = {}
        self._hooks: list[Any] = []
        self._wanted = wanted
        self._trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if GRADIENT in wanted:
            self._squares = {n: torch.zeros_like(p.detach()) for n, p in self._trained.items()}
        if GROWTH in wanted or VOTES in wanted:
            self._sums = {n: torch.zeros_like(p.detach()) for n, p in self._trained.items()}
        if ACTIVATION in wanted:
            for prefix, module in model.named_modules():
                name = f"{prefix}.weight" if prefix else "weight"
                if isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and name in self._trained:
                    self._hooks.append(module.register_forward_pre_hook(self._observer(name)))

    def __enter__(self) -> StatisticsMeter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off the model."""
        while self._hooks:
            self._hooks.pop().remove()

    def step(self) -> None:
        """Look at the gradients of a step, unscaled and before any of them is set to zero."""
        self._steps += 1
        sent = SENSITIVITY in self._wanted and not self._sensitivities
        if not (sent or self._squares or self._sums):
            return
        products: dict[str, Tensor] = {}
        for name, parameter in self._trained.items():
            if parameter.grad is None:
                continue
            gradient = parameter.grad.to_dense()  # of an embedding it may hold a few rows
            if name in self._squares:  # float16 overflows
                self._squares[name] += gradient.square().nan_to_num_(0.0, posinf=0.0)
            if name in self._sums:
                self._sums[name] += gradient.nan_to_num(0.0, posinf=0.0, neginf=0.0)
            if sent:
                products[name] = parameter.detach() * gradient
        if all(bool(product.isfinite().all()) for product in products.values()):
            self._sensitivities.update(products)  # else the scaler leaves the weights as they are

    def found(self) -> dict[str, dict[str, NDArray[np.float32]]]:
        """The wanted statistics by name and tensor, float32, as `statistic_shape` says."""
        means = {n: s / max(1, self._steps) for n, s in self._sums.items()}
        measured = {
            GROWTH: means,
            VOTES: means,
            GRADIENT: {n: (s / max(1, self._steps)).sqrt() for n, s in self._squares.items()},
            SENSITIVITY: self._sensitivities,
            ACTIVATION: {n: s / self._positions[n] for n, s in self._sizes.items()},
        }
        return {name: _arrays(measured[name]) for name in measured if name in self._wanted}

    def _observer(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def observe(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if not inputs or not isinstance(inputs[0], Tensor):
                return
            size = inputs[0].detach().abs()
            spatial = 0 if isinstance(module, nn.Linear) else len(module.kernel_size)  # type: ignore[arg-type]
            size = size.movedim(size.ndim - 1 - spatial, -1)
            channels = size.reshape(-1, size.shape[-1]).sum(0, dtype=torch.float32)
            if groups := getattr(module, "groups", 0):
                channels = channels.reshape(groups, -1).mean(0)
            sums = channels.reshape(1, -1, *[1] * spatial)
            self._sizes[name] = self._sizes[name] + sums if name in self._sizes else sums
            positions = size.numel() // size.shape[-1]
            self._positions[name] = self._positions.get(name, 0) + positions

        return observe


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def outputs_of(model: nn.Module, inputs: Inputs, device: torch.device) -> Tensor:
    """What a model makes of a batch, its inputs moved to the device."""
    outputs: Tensor
    if isinstance(inputs, Tensor):
        outputs = model(moved(inputs, device))
    elif isinstance(inputs, Mapping):
        outputs = model(**{name: moved(tensor, device) for name, tensor in inputs.items()})
    else:
        outputs = model(*(moved(tensor, device) for tensor in inputs))
    return outputs

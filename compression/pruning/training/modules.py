"""Prune a torch module by a plan, at once or while it trains; no federation is needed.

What a server does from version to version happens here from optimiser step to optimiser step: the
plan's schedule says how much, its criterion what, its allocation and pattern where, and the masks
are held by the optimiser (`prunecast.compression.pruning.training.holding`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from prunecast.compression.pruning.counting import count_operations, parameter_count
from prunecast.compression.pruning.criteria import Knowledge
from prunecast.compression.pruning.masks import Masks
from prunecast.compression.pruning.plan import PlanError, PruningPlan
from prunecast.compression.pruning.schedules import AT_LAST
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.narrowing import choose_channels, narrow_module
from prunecast.compression.pruning.training.holding import HeldMasks, hold_masks
from prunecast.compression.pruning.training.measuring import (
    Batch,
    Loss,
    StatisticsMeter,
    outputs_of,
)

__all__ = ["ModuleReport", "PrunedModule", "prune_module"]

Arrays = dict[str, NDArray[Any]]
_NO_ROW = "{what} makes NaN of a row of {name!r} without weights: lower the sparsity, or exclude it"


@dataclass(frozen=True)
class ModuleReport:
    """What pruning took from a module so far.

    Attributes:
        sparsity: by tensor that is pruned, the share of its weights that is masked.
        weights: how many weights may be pruned, tied ones once.
        removed: how many of them are masked.
        parameters: of the module as it came, and as it is now: channels that went are not there.
        macs: multiply-accumulates of one example, likewise; zeros are multiplied like others.
        effective_macs: without those of masked weights.
    """

    sparsity: Mapping[str, float]
    weights: int
    removed: int
    parameters: tuple[int, int]
    macs: tuple[int, int]
    effective_macs: int


def prune_module(
    module: nn.Module,
    plan: PruningPlan | ChannelPlan,
    example: tuple[torch.Tensor, ...],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    every: int = 1,
    loader: Iterable[Batch] | None = None,
    loss_fn: Loss = nn.functional.cross_entropy,
    batches: int = 8,
) -> PrunedModule:
    """Prune a module: at once, or with an optimiser along the plan's schedule.

    With `optimizer` the module is pruned as its steps go by and needs no other call: the schedule's
    versions count from 1, each of `every` steps. Pruned weights are held at zero through all of
    them. Without one, everything goes now that the schedule has gone in the end.

    Channels go first and at once, the weights of what remains after them.

    Args:
        module: pruned in place as far as single weights go; without its channels it is another one,
            see `PrunedModule.module`.
        plan: what goes, how much and when; or the channels that go.
        example: positional inputs that the module accepts.
        optimizer: of the module's parameters; None prunes at once.
        every: optimiser steps of a version.
        loader: yields (inputs, targets), for criteria that look at gradients or activations.
        loss_fn: of (outputs, targets), the mean over a batch; likewise.
        batches: how many of the loader's are looked at, at each pruning event.

    Returns:
        The module, its masks and a report.

    Raises:
        PlanError: nothing is prunable, a layer would vanish, tied weights would be pruned apart, a
            pattern or channels do not fit, or the criterion needs a loader.

    Examples:
        >>> from prunecast.compression.pruning.schedules import CubicSchedule
        >>> net = nn.Linear(64, 32)
        >>> plan = PruningPlan(schedule=CubicSchedule(0.75, begin=1, end=4))
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> pruned = prune_module(net, plan, (torch.ones(1, 64),), optimizer=sgd)
        >>> for _ in range(3):
        ...     net(torch.ones(1, 64)).sum().backward()
        ...     sgd.step()
        >>> int((net.weight == 0).sum()), pruned.report().removed
        (1536, 1536)
    """
    for name, parameter in module.named_parameters():
        if parameter.is_meta or nn.parameter.is_lazy(parameter):
            raise PlanError(f"{name!r} has no values yet: load or initialise the module first")
    if every < 1 or batches < 1:
        raise PlanError(f"a version has at least one step and a batch, not {every} and {batches}")
    channels = _channels(module, plan, example)
    if channels is not None and optimizer is not None:
        raise PlanError(
            "an optimiser holds the parameters of the wide module: remove channels first, without "
            "it, and make it of what prune_module returns"
        )
    narrow = module
    if channels is not None:
        modes = {n: p.training for n, p in module.named_modules(remove_duplicate=False)}
        narrow = narrow_module(module, example, channels)
        for name, part in narrow.named_modules():
            part.training = modes[name]
    weights = plan if isinstance(plan, PruningPlan) else PruningPlan()
    measure = _Measure(loader, loss_fn, batches)
    return PrunedModule(module, narrow, weights, channels, example, optimizer, every, measure)


class PrunedModule:
    """A module that is pruned, or being pruned; made by `prune_module`.

    Attributes:
        module: to train and use from now on: the one that was given, unless channels went.
        masks: parameter name to boolean array, True where a weight is kept; empty while nothing is
            pruned.
        channels: that went; None for none.
    """

    def __init__(
        self,
        wide: nn.Module,
        module: nn.Module,
        plan: PruningPlan,
        channels: ChannelPlan | None,
        example: tuple[torch.Tensor, ...],
        optimizer: torch.optim.Optimizer | None,
        every: int,
        measure: _Measure,
    ) -> None:
        self.module, self.channels = module, channels
        wide, module = (getattr(m, "_orig_mod", m) for m in (wide, module))  # of torch.compile
        self._eager: nn.Module = module
        self.masks: dict[str, NDArray[np.bool_]] = {}
        self._plan, self._example, self._measure, self._every = plan, example, measure, every
        self._wide = (parameter_count(wide), count_operations(wide, example).macs)
        self._steps, self._stage = 0, 0.0
        self._held: HeldMasks | None = None
        self._hook: Any = None
        self._statistics: Mapping[str, Mapping[str, NDArray[Any]]] = {}
        self._accumulated: Arrays = {}
        self._before: Arrays = {}
        if not plan.schedule(AT_LAST):
            return
        self._ties = _ties(module)
        plan.check(_arrays(module), ties=self._ties)
        self._count = len(self._weights())
        self._last = plan.stage(AT_LAST, self._count)
        if plan.criterion.once:
            self._statistics, _ = measure(module, plan.criterion.statistics)
        if optimizer is None:
            self._prune(AT_LAST, self._weights(), at_all=True)
            with torch.no_grad():
                parameters = dict(module.named_parameters(remove_duplicate=False))
                for name, mask in self.masks.items():
                    parameter = parameters[name]
                    parameter.masked_fill_(~torch.from_numpy(mask).to(parameter.device), 0)
            return
        self._held = hold_masks(optimizer, {}, module)
        self._event(1)
        self._hook = optimizer.register_step_post_hook(lambda *_: self._stepped())

    def report(self) -> ModuleReport:
        """What was taken so far."""
        parameters = dict(self._eager.named_parameters())  # tied ones once
        operations = count_operations(self._eager, self._example)
        prunable = self._weights()
        return ModuleReport(
            {name: float(1 - mask.mean()) for name, mask in self.masks.items()},
            sum(parameters[name].numel() for name in prunable if name in parameters),
            sum(int((~mask).sum()) for name, mask in self.masks.items() if name in parameters),
            (self._wide[0], parameter_count(self._eager)),
            (self._wide[1], operations.macs),
            operations.effective({name: int(mask.sum()) for name, mask in self.masks.items()}),
        )

    def release(self) -> None:
        """Leave the optimiser alone: nothing is pruned or held any longer."""
        if self._hook is not None:
            self._hook.remove()
        if self._held is not None:
            self._held.release()

    def _stepped(self) -> None:
        self._steps += 1
        if self._steps % self._every == 0:
            self._event(1 + self._steps // self._every)

    def _event(self, version: float) -> None:
        """Prune where the schedule removes more at this version than it has.

        Optimiser steps come here, so weights are fetched only where something is made of them.
        """
        criterion = self._plan.criterion
        stage = self._plan.stage(version, self._count)
        more = stage > self._stage
        gathers = criterion.uses_update or criterion.accumulates is not None
        if not more and (not gathers or self._stage >= self._last):
            return
        weights = self._weights()
        self._prune(version, weights, at_all=more)
        if more and self._held is not None:
            self._stage = stage
            self._held.update(self.masks)
        if criterion.uses_update:  # what was pruned just now is zero in the module
            self._before = {
                n: np.where(self.masks[n], w, 0) if n in self.masks else w.copy()
                for n, w in weights.items()
            }

    def _prune(self, version: float, weights: Arrays, *, at_all: bool) -> None:
        criterion = self._plan.criterion
        for name, values in weights.items() if at_all else ():
            if not np.isfinite(values).all():
                raise PlanError(
                    f"{name!r} holds NaN or an infinity: begin from weights that are sound, or "
                    "exclude it"
                )
        update = {n: weights[n] - self._before[n] for n in weights if n in self._before}
        statistics = self._statistics
        needs_gradient = criterion.uses_update and not update and version >= AT_LAST
        if at_all and (needs_gradient or (criterion.statistics and not criterion.once)):
            statistics, gradients = self._measure(self._eager, criterion.statistics)
            if needs_gradient:  # a step of plain gradient descent is the update that there is
                update = {n: -gradients[n] for n in weights if n in gradients}
        model: Arrays = {}
        if at_all and criterion.uses_model:
            model = {n: _array(t) for n, t in self._eager.state_dict().items()}
        known = Knowledge(
            weights, update, statistics, self._accumulated, model, self._plan.seed, self._ties
        )
        if criterion.accumulates is not None:
            for name, more in criterion.accumulates(known).items():
                self._accumulated[name] = self._accumulated.get(name, 0) + more
        if at_all:
            masks = self._plan.masks(version, known, self.masks)
            _refuse_lost(self._eager, masks)
            self.masks = masks

    def _weights(self) -> Arrays:
        return self._plan.prunable(_arrays(self._eager))


def _channels(
    module: nn.Module, plan: PruningPlan | ChannelPlan, example: tuple[torch.Tensor, ...]
) -> ChannelPlan | None:
    if isinstance(plan, ChannelPlan):
        state = {n: tuple(t.shape) for n, t in module.state_dict().items()}
        name = plan.misfit(state)
        if name is not None:
            raise PlanError(
                f"the plan of channels is of another architecture: {type(module).__name__} has "
                + (
                    f"{name!r} of shape {list(state[name])}"
                    if name in state
                    else f"no tensor {name!r}"
                )
            )
        return plan
    channels, heads, layers = plan.channels.shares(max(plan.channels.at, default=0))
    if channels == heads == layers == 1:
        return None
    return choose_channels(module, example, channels, heads=heads, layers=layers)


def _refuse_lost(module: nn.Module, masks: Masks) -> None:
    """Refuse masks whose zeros a parametrisation makes other values of, or NaN of whole rows."""
    lengths = {n for n, _ in module.named_parameters() if n.endswith("_g")}
    for name, mask in masks.items():  # of nn.utils.weight_norm, which is a hook
        rows = mask.reshape(len(mask), -1).any(1)
        if name.endswith("_v") and f"{name[:-1]}g" in lengths and not rows.all():
            raise PlanError(_NO_ROW.format(what="weight_norm", name=name))
    for prefix, part in module.named_modules():
        held = {n for n, _ in part.named_parameters(prefix, recurse=False)} & masks.keys()
        if not held or not isinstance(part, ParametrizationList):
            continue
        trial = copy.deepcopy(part).eval()
        with torch.no_grad():
            for name, parameter in trial.named_parameters(prefix, recurse=False):
                if name in held:
                    dropped = torch.from_numpy(~masks[name]).to(parameter.device)
                    parameter.masked_fill_(dropped, 0)
                    made = trial()
                    what = type(part[0]).__name__.lstrip("_")
                    if not made.isfinite().all():
                        raise PlanError(_NO_ROW.format(what=what, name=name))
                    if made.shape == dropped.shape and made[dropped].any():
                        raise PlanError(
                            f"{what} makes other values of zeros in {name!r}: exclude it"
                        )


def _ties(module: nn.Module) -> dict[str, str]:
    """Names of parameters that are one before them, and the name of that."""
    first: dict[int, str] = {}
    named = module.named_parameters(remove_duplicate=False)
    pairs = ((name, first.setdefault(id(parameter), name)) for name, parameter in named)
    return {name: other for name, other in pairs if name != other}


def _arrays(module: nn.Module) -> Arrays:
    """Floating parameters, tied ones under each name; arrays share memory where they can."""
    return {
        name: _array(parameter)
        for name, parameter in module.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    }


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    found = tensor.detach().cpu()
    return found.float().numpy() if found.dtype == torch.bfloat16 else found.numpy()


@dataclass(frozen=True)
class _Measure:
    """Gradients and activations of a module over some batches, without touching it."""

    loader: Iterable[Batch] | None
    loss_fn: Loss
    batches: int

    def __call__(
        self, module: nn.Module, wanted: tuple[str, ...]
    ) -> tuple[dict[str, dict[str, NDArray[np.float32]]], Arrays]:
        """Statistics by name and tensor, and the mean gradient by tensor.

        Raises:
            PlanError: there is no loader, or nothing in it.
        """
        if self.loader is None:
            raise PlanError(
                "the criterion looks at gradients or activations: give prune_module a loader (and "
                "its loss_fn)"
            )
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise PlanError(
                "the criterion looks at gradients or activations of what is trained, and every "
                "parameter is frozen: choose magnitude, or let some be trained"
            )
        work = copy.deepcopy(module).train()
        device = next(work.parameters()).device
        count = 0
        devices = [device] if device.type == "cuda" else []
        with StatisticsMeter(work, wanted) as meter, torch.random.fork_rng(devices=devices):
            sums: dict[str, torch.Tensor] = {}
            for inputs, targets in islice(self.loader, self.batches):
                work.zero_grad()
                with torch.enable_grad():
                    loss = self.loss_fn(outputs_of(work, inputs, device), targets.to(device))
                    loss.backward()  # type: ignore[no-untyped-call]
                meter.step()
                count += 1
                for name, parameter in work.named_parameters():
                    if parameter.grad is not None:
                        sums[name] = sums.get(name, 0) + parameter.grad.to_dense()
        if not count:
            raise PlanError(
                "the loader is empty, so the criterion has nothing to look at: give one that can "
                "be gone through again, as a DataLoader or a list, and no generator"
            )
        gradients = {name: (total / count).float().cpu().numpy() for name, total in sums.items()}
        for name, gradient in gradients.items():
            if not np.isfinite(gradient).all():
                raise PlanError(
                    f"the gradient of {name!r} is NaN or infinite: look at the loader's batches "
                    "and the loss_fn"
                )
        return meter.found(), gradients

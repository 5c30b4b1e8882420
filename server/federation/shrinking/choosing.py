"""Who chooses the channels, heads and layers that go, and modules narrowed to what is left."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import WARNING
from threading import Timer
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.plan import PlanError, Shares
from prunecast.compression.pruning.structure.channels import ChannelChooser, ChannelPlan

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["FittedModule", "check_trial", "chosen", "module_chooser", "saying_how_long"]

_FIRST = 0.5  # of channels, heads or layers, by which is seen whether any can be tried
_PATIENCE = 30.0  # s until it is said that a choice takes long

Arrays = Mapping[str, NDArray[Any]]


def module_chooser(
    factory: Callable[[], nn.Module], example: Callable[[], Tensor | tuple[Tensor, ...]]
) -> ChannelChooser:
    """Chooses by the norm of groups in the module's dependency graph; see `choose_channels`.

    Args:
        factory: makes the module with all of its channels, on any device.
        example: makes positional inputs that it accepts, or the only one.
    """
    return _ModuleChooser(factory, example)


@dataclass(frozen=True)
class _ModuleChooser:
    factory: Callable[[], nn.Module]
    example: Callable[[], Tensor | tuple[Tensor, ...]]

    def __call__(
        self,
        master: Arrays,
        share: float,
        removed: ChannelPlan | None,
        *,
        heads: float = 1.0,
        layers: float = 1.0,
    ) -> ChannelPlan:
        from prunecast.compression.pruning.structure.narrowing import choose_channels

        module, inputs = self._module(master, removed)
        return choose_channels(module, inputs, share, removed, heads=heads, layers=layers)

    def check_trial(self, master: Arrays, plan: ChannelPlan) -> None:
        """Refuse to try what a removal would not come to; see `check_zeroed`.

        Of layers all are checked, as any of them may be tried.
        """
        from prunecast.compression.pruning.structure.narrowing import check_zeroed
        from prunecast.compression.pruning.structure.residual import residual_layers

        module, inputs = self._module(master, None)
        if plan.layers_share < 1:
            plan = ChannelPlan({}, gone=tuple(residual_layers(module, inputs)))
        check_zeroed(module, inputs, plan)

    def _module(
        self, master: Arrays, removed: ChannelPlan | None
    ) -> tuple[nn.Module, tuple[Tensor, ...]]:
        import torch

        from prunecast.compression.pruning.structure.narrowing import fit_module, made_with_inputs

        module, inputs = made_with_inputs(self.factory, self.example)
        if removed is not None:
            module = fit_module(module, removed)
        state = {name: torch.from_numpy(np.array(array)) for name, array in master.items()}
        try:
            module.load_state_dict(state, strict=False)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise PlanError(f"the model does not fit {type(module).__name__}: {reason}") from error
        return module, inputs


class FittedModule:
    """A module that is kept for models of the same channels, and made anew for those of others.

    Args:
        factory: makes it with all of its channels.
        module: one that was made already.
        most: modules that are kept, each of other channels; the latest ones.
    """

    def __init__(self, factory: Callable[[], nn.Module], module: nn.Module, most: int = 1) -> None:
        self._factory, self._most = factory, most
        self._made: dict[int, tuple[ChannelPlan | None, nn.Module]] = {id(None): (None, module)}

    def of(self, removed: ChannelPlan | None) -> nn.Module:
        """The module for models without the channels that a plan removes."""
        if id(removed) not in self._made:
            from prunecast.compression.pruning.structure.narrowing import fit_module

            module = self._factory()
            self._made[id(removed)] = removed, fit_module(module, removed) if removed else module
            while len(self._made) > self._most:
                del self._made[next(iter(self._made))]
        return self._made[id(removed)][1]


def chosen(
    choose: ChannelChooser, master: Arrays, shares: Shares, removed: ChannelPlan | None
) -> ChannelPlan:
    """A choice of channels; one that knows of these alone is not told of the rest."""
    others = {"heads": shares.heads, "layers": shares.layers}
    if shares.heads == shares.layers == 1:
        others = {}
    try:
        inspect.signature(choose).bind(master, shares.channels, removed, **others)
    except TypeError as error:
        raise PlanError(
            "heads or layers go, and who chooses knows of channels alone: take module_chooser"
        ) from error
    with saying_how_long():
        return choose(master, shares.channels, removed, **others)


@contextmanager
def saying_how_long() -> Iterator[None]:
    """Warn once if a choice of channels takes long, as it is silent and nothing can go on."""
    timer = Timer(
        _PATIENCE,
        log,
        (
            WARNING,
            "Channels are still being chosen after %g s: how they hang together takes "
            "torch-pruning minutes, or for ever, in models that reshape or split much. Without "
            "them (prunecast.channels = 1) heads and layers can go.",
            _PATIENCE,
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_trial(choose: ChannelChooser, master: Arrays, tries: Sequence[str]) -> None:
    """Refuse a model of which some of what is to be tried cannot be.

    Args:
        choose: who chooses.
        master: the weights.
        tries: of channels, heads and layers those that are to be tried.

    Raises:
        PlanError: they cannot go, or zeros in their place would not come to what is left.
    """
    for kind in tries:
        plan = chosen(choose, master, Shares()._replace(**{kind: _FIRST}), None)
        if isinstance(choose, _ModuleChooser):
            choose.check_trial(master, plan)

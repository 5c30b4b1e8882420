"""Masks held through any torch optimiser: what is pruned is zero after every step; needs torch.

Zeroing weights before training is not enough: the gradient, momentum gathered earlier, and
optimisers whose steps mix weights (Muon) move them again. So gradients are zeroed where they are
accumulated, which also keeps them out of norms that are clipped and of curvature that LBFGS learns
inside its closure, and weights once more after each step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from prunecast.compression.pruning.masks import current_masks
from prunecast.compression.pruning.plan import PlanError

__all__ = ["HeldMasks", "hold_masks"]

AnyMask = NDArray[np.bool_] | Tensor
_COMPILED = "_orig_mod."  # what torch.compile puts before the names of what it wraps


def hold_masks(
    optimizer: torch.optim.Optimizer,
    masks: Mapping[str, AnyMask] | None = None,
    module: nn.Module | None = None,
    *,
    dense_gradients: bool = False,
) -> HeldMasks:
    """Keep pruned weights at exactly zero through every step of an optimiser; no code of the loop.

    Weights off their mask become +0 now and after every step. Their gradients are zeroed as they
    are accumulated and before each step, so momentum and second moments of them stay zero too,
    neither with weight decay nor under a gradient scaler that skips steps.

    Args:
        optimizer: any of torch's; its hooks are used, its settings and groups stay.
        masks: name to boolean array in the parameter's shape, True where a weight is kept; on any
            device. None takes `current_masks()`, those of the message that a ClientApp handles.
            Names of buffers are ignored.
        module: whose `named_parameters` the names are; compiled or not. None where the optimiser
            was given `module.named_parameters()` itself.
        dense_gradients: leave gradients whole until the step begins, for who measures what pruned
            weights would gain. Not with a closure, whose gradients only the other way reaches.

    Returns:
        A handle: `update` changes the masks, `release` or the end of a ``with`` block ends it.

    Raises:
        PlanError: a mask fits no parameter, or two names of one parameter have different masks.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(layer.named_parameters(), lr=0.1, momentum=0.9)
        >>> held = hold_masks(sgd, {"weight": np.array([[True, False]])})
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> sgd.step()
        >>> layer.weight[0, 1].item()
        0.0
    """
    return HeldMasks(
        optimizer, current_masks() if masks is None else masks, module, dense_gradients
    )


class HeldMasks:
    """Masks that an optimiser's steps respect; made by `hold_masks`."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        masks: Mapping[str, AnyMask],
        module: nn.Module | None,
        dense_gradients: bool,
    ) -> None:
        self._optimizer, self._module, self._dense = optimizer, module, dense_gradients
        self._held: list[tuple[nn.Parameter, Tensor]] = []
        self._watched: list[RemovableHandle] = []
        self._replace(masks)
        self._steps = [
            optimizer.register_step_pre_hook(lambda *_: self._gradients()),
            optimizer.register_step_post_hook(lambda *_: self._weights()),
            optimizer.register_load_state_dict_post_hook(lambda *_: self._loaded()),
        ]

    def update(self, masks: Mapping[str, AnyMask]) -> None:
        """Hold other masks from now on, as at a pruning event.

        What is newly pruned becomes zero, and so does what the optimiser has gathered of it; a
        weight that comes back starts from zero with nothing gathered.

        Raises:
            PlanError: see `hold_masks`; the former masks are held further.
        """
        self._replace(masks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Hold nothing any longer; weights stay as they are."""
        for handle in (*self._steps, *self._watched):
            handle.remove()
        self._held, self._watched, self._steps = [], [], []

    def _replace(self, masks: Mapping[str, AnyMask]) -> None:
        held = list(self._matched(masks).values())
        for handle in self._watched:
            handle.remove()
        self._held = held
        self._watched = []
        for index, (parameter, _) in enumerate(held if not self._dense else ()):
            frozen = not parameter.requires_grad  # which may end before these masks do
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_()
                self._watched.append(
                    parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                        self._gradient_of(index)
                    )
                )
                parameter.requires_grad_(not frozen)
        self._forget()
        self._gradients()
        self._weights()

    def _matched(self, masks: Mapping[str, AnyMask]) -> dict[int, tuple[nn.Parameter, Tensor]]:
        """Each masked parameter once, with True where its weights are pruned."""
        parameters, others = self._names()
        held: dict[int, tuple[nn.Parameter, Tensor]] = {}
        names: dict[int, str] = {}
        for name, mask in masks.items():
            name = name.replace(_COMPILED, "")
            parameter = parameters.get(name)
            if parameter is None:
                if name not in others:
                    raise PlanError(self._unknown(name))
                continue
            if tuple(mask.shape) != tuple(parameter.shape):
                raise PlanError(
                    f"the mask of {name!r} is {list(mask.shape)}, "
                    f"the parameter {list(parameter.shape)}"
                )
            kept = torch.from_numpy(mask.copy()) if isinstance(mask, np.ndarray) else mask
            dropped = ~kept.to(parameter.device, torch.bool)
            earlier = held.setdefault(id(parameter), (parameter, dropped))[1]
            if earlier is not dropped and not torch.equal(earlier, dropped):
                raise PlanError(
                    f"{names[id(parameter)]!r} and {name!r} are one parameter with two masks: "
                    "tied weights are pruned together"
                )
            names[id(parameter)] = name
        return held

    def _names(self) -> tuple[dict[str, nn.Parameter], set[str]]:
        """Parameters by name, and names of tensors that are none."""
        if self._module is not None:
            named = self._module.named_parameters(remove_duplicate=False)
            return {name.replace(_COMPILED, ""): parameter for name, parameter in named}, {
                name.replace(_COMPILED, "") for name in self._module.state_dict()
            }
        return {
            name.replace(_COMPILED, ""): parameter
            for group in self._optimizer.param_groups
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=False)
        }, set()

    def _unknown(self, name: str) -> str:
        if self._module is not None:
            return (
                f"there is a mask for {name!r}, which the model does not have: masks name the "
                "tensors of state_dict()"
            )
        return (
            f"there is a mask for {name!r}, which the optimiser does not know by name: give the "
            "module too, hold_masks(optimizer, masks, module)"
        )

    def _loaded(self) -> None:
        """The weights are loaded beside the optimiser, mostly before it."""
        self._forget()
        self._weights()

    def _forget(self) -> None:
        """What the optimiser has gathered of pruned weights, such as momentum, becomes zero."""
        if isinstance(self._optimizer, torch.optim.LBFGS):
            self._optimizer.state.clear()  # one flat history of all weights
            return
        for parameter, dropped in self._held:
            for value in self._optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(dropped.to(value.device), 0)

    def _dropped(self, index: int) -> Tensor:
        """Where weights are pruned, on the device where the parameter is by now."""
        parameter, dropped = self._held[index]
        if dropped.device != parameter.device:
            dropped = dropped.to(parameter.device)
            self._held[index] = (parameter, dropped)
        return dropped

    def _gradient_of(self, index: int) -> Any:
        def mask(parameter: Tensor) -> None:
            gradient = parameter.grad
            if gradient is None:
                return
            if gradient.layout == torch.sparse_coo:
                rows = gradient.coalesce()
                pruned = self._dropped(index)[tuple(rows.indices())]
                values = rows.values().masked_fill(pruned, 0)
                parameter.grad = torch.sparse_coo_tensor(
                    rows.indices(), values, rows.shape, is_coalesced=True, check_invariants=False
                )
            else:
                gradient.masked_fill_(self._dropped(index), 0)

        return mask

    @torch.no_grad()
    def _gradients(self) -> None:
        for index, (parameter, _) in enumerate(self._held):
            self._gradient_of(index)(parameter)

    @torch.no_grad()
    def _weights(self) -> None:
        for index, (parameter, _) in enumerate(self._held):
            parameter.masked_fill_(self._dropped(index), 0)

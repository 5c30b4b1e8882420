"""Which heads of attention remain, and whether layers of one's own go on with them; needs torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunecast.common.text import first_line
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.attention import Attention, attentions, set_heads
from prunecast.compression.pruning.structure.axes import Axes
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.dependencies import check_weights

__all__ = ["choose_heads"]

_ALIKE = 1e-3  # of the largest output; what takes other heads, or scales otherwise, is far off


def choose_heads(
    module: nn.Module,
    example: tuple[Tensor, ...],
    share: float,
    removed: ChannelPlan | None = None,
) -> ChannelPlan:
    """Choose which heads of every attention layer remain: those of the largest norm.

    Args:
        module: with the weights that the choice is made on; left as it was.
        example: positional inputs that it accepts.
        share: of all the heads of each layer that remain, rounded to the nearest number.
        removed: what is gone from the module already.

    Raises:
        PlanError: no layer has heads, one would keep none, or one cannot go on with fewer.
    """
    found = attentions(module)
    if not found:
        raise PlanError(
            f"{type(module).__name__} has no attention whose heads go: set prunecast.heads = 1"
        )
    heads: dict[str, NDArray[np.bool_]] = {}
    masks: dict[int, tuple[int, NDArray[np.bool_]]] = {}
    for one in found:
        check_weights(one.layer, one.name)
        before = None if removed is None else removed.heads.get(one.name)
        whole = one.heads if before is None else before.size
        wanted = math.floor(share * whole + 0.5)
        if wanted < 1:
            raise PlanError(
                f"a share of {share:.3g} leaves none of the {whole} heads of {one.name!r}: set "
                "prunecast.heads to more"
            )
        if wanted < one.heads:
            mask = np.zeros(one.heads, np.bool_)
            mask[np.argsort(-one.norms(), kind="stable")[:wanted]] = True
            heads[one.name] = mask
            for name, tensor in one.tensors().items():
                axis = next(part[1] for part in one.parts if part[0] == name)
                new = axis, one.axis_mask(mask, name)
                old = masks.setdefault(id(tensor), new)
                if old[0] != axis or not np.array_equal(old[1], new[1]):
                    raise PlanError(f"{one.name!r} shares {name!r} with a layer of other heads")
    kept = _kept(module, masks)
    left = share if removed is None else share / removed.heads_share
    plan = ChannelPlan(kept, heads=heads, heads_share=left)
    own = [one for one in found if one.name in heads and not one.is_torchs]
    if own:
        _check(module, example, own, plan)
    return plan


def _kept(module: nn.Module, masks: Mapping[int, tuple[int, NDArray[np.bool_]]]) -> dict[str, Axes]:
    """Masks by the names of tensors, those that are tied under each of theirs."""
    kept: dict[str, Axes] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in masks:
            axis, mask = masks[id(tensor)]
            kept[name] = tuple(mask if i == axis else None for i in range(tensor.dim()))
    return kept


def _check(
    module: nn.Module, example: tuple[Tensor, ...], own: list[Attention], plan: ChannelPlan
) -> None:
    """See that layers of one's own compute with fewer heads what the heads that remain did.

    Each is run by itself, on drawn inputs and with drawn weights: the example may be the same
    everywhere, and weights so small that it does not show which head is which.
    """
    calls: dict[nn.Module, tuple[Any, Any]] = {}

    def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
        calls.setdefault(layer, (args, kwargs))

    work = copy.deepcopy(module).eval()
    for one in own:
        work.get_submodule(one.name).register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        work(*example)
        for one in own:
            layer = work.get_submodule(one.name)
            why = "it is not called on the example"
            if layer in calls:
                why = _unlike(one, plan.heads[one.name], *calls[layer])
            if why:
                raise PlanError(
                    f"attention {one.name!r} ({type(one.layer).__name__}) does not go on with "
                    f"fewer heads: {why}; its forward is to read how many there are from its "
                    "attribute, and their width from its layers, q.out_features // num_heads"
                )


def _unlike(one: Attention, kept: NDArray[np.bool_], args: Any, kwargs: Any) -> str:
    """How a layer with fewer heads differs from one in which the others put out nothing."""
    drawn: dict[int, Any] = {}
    generator = torch.Generator().manual_seed(0)

    def draw(given: Any) -> Any:
        if not (isinstance(given, Tensor) and given.is_floating_point()):
            return given
        if id(given) not in drawn:  # what is one tensor stays one
            drawn[id(given)] = torch.randn(given.shape, generator=generator, dtype=given.dtype)
        return drawn[id(given)]

    wide = copy.deepcopy(one.layer).eval().cpu()
    state = wide.state_dict(keep_vars=True)
    for name, _, _ in one.parts:
        tensor = state[name]
        scale = tensor.shape[1] ** -0.5 if tensor.dim() == 2 else 1.0
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    narrow = copy.deepcopy(wide)
    left = narrow.state_dict(keep_vars=True)
    for name, axis, _ in one.parts:
        places = torch.from_numpy(np.flatnonzero(one.axis_mask(kept, name)))
        left[name].data = left[name].index_select(axis, places)
    last = one.parts[-1][0]
    state[last][:, torch.from_numpy(~one.axis_mask(kept, last))] = 0
    set_heads(one.name, narrow, kept)
    for part in narrow.modules():
        if isinstance(part, nn.Linear):
            part.out_features, part.in_features = part.weight.shape
    args, kwargs = [draw(x) for x in args], {n: draw(x) for n, x in kwargs.items()}
    try:
        wanted, found = (_first(part(*args, **kwargs)) for part in (wide, narrow))
    except Exception as error:  # of the user's code
        return first_line(error)
    near = wanted.shape == found.shape
    if near and float((wanted - found).abs().max()) <= _ALIKE * float(wanted.abs().max()):
        return ""
    return "what it puts out is not what the heads that remain did"


def _first(outputs: Any) -> Tensor:
    """Of what a layer puts out, the first tensor; weights of attention are by head."""
    return torch.as_tensor(outputs[0] if isinstance(outputs, tuple | list) else outputs)

"""Choose channels of a torch module and remove them; needs torch, and torch-pruning to choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from prunecast.compression.pruning.plan import PlanError, Shares
from prunecast.compression.pruning.structure.attention import set_heads
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.comparing import (
    check_outputs,
    check_values,
    outputs_of,
    zero_what_goes,
)
from prunecast.compression.pruning.structure.dependencies import (
    choose_by_norm,
    copied,
    failing,
    naming_what_is_not_followed,
)
from prunecast.compression.pruning.structure.heads import choose_heads
from prunecast.compression.pruning.structure.narrow_attention import (
    NarrowAttention,
    become,
    resize_attention,
)
from prunecast.compression.pruning.structure.residual import (
    PassThrough,
    choose_layers,
    pass_through,
)

__all__ = ["check_zeroed", "choose_channels", "fit_module", "made_with_inputs", "narrow_module"]

_NEAR = 1e-6  # relative: what rounding makes of a share
_ALIKE = 1e-3  # of the largest output: what sums in another order differ by, and more


def choose_channels(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    share: float,
    removed: ChannelPlan | None = None,
    *,
    leading: bool = False,
    heads: float = 1.0,
    layers: float = 1.0,
) -> ChannelPlan:
    """Choose which channels remain, by the norm of their groups in the module's weights.

    Layers whose outputs are the module's outputs keep all of them, and recurrent ones theirs. The
    heads of `torch.nn.MultiheadAttention` stay as many, and become narrower by the same; unless
    whole heads go, which leave the others as wide as they are.

    Args:
        module: with the weights that the choice is made on; left as it was.
        example: positional inputs that it accepts.
        share: of the channels of every group that remain, 0 < share < 1; or 1 where heads or layers
            go.
        removed: which of these are gone from the module already.
        leading: the first channels of every group remain (of every part of it, as of a head or of
            what GroupNorm normalises together), whatever their weights: then what remains of a
            smaller share is contained in what remains of a larger one, as in HeteroFL (Diao et al.
            2021) and the ordered dropout of FjORD (Horvath et al. 2021).
        heads: share of the heads of every attention layer that remain; see `choose_heads`.
        layers: share of the residual layers that remain; see `choose_layers`.

    Raises:
        PlanError: the module's channels cannot be removed, or none would be.
    """
    wanted, before = Shares(share, heads, layers), Shares() if removed is None else removed.shares
    for what, part in zip(Shares._fields, wanted, strict=True):
        if not 0 < part <= 1 or min(wanted) == 1:
            raise PlanError(f"the share of {what} that remain lies between 0 and 1, not {part}")
    if heads == layers == 1:
        return _by_norm(module, example, share, removed, leading)
    work, plan = copied(module), ChannelPlan({})

    def go_on(part: ChannelPlan) -> None:
        nonlocal work, plan
        work, plan = fit_module(work, part), plan.then(part)

    if layers < before.layers * (1 - _NEAR):
        go_on(choose_layers(work, example, layers, removed))
    if heads < 1:
        for layer in work.modules():
            if isinstance(layer, nn.MultiheadAttention):
                become(layer, NarrowAttention)
        if heads < before.heads * (1 - _NEAR):
            go_on(choose_heads(work, example, heads, removed))
    if share < before.channels * (1 - _NEAR):
        gone = plan if removed is None else removed.then(plan)
        go_on(_by_norm(work, example, share, gone, leading, whole_heads=heads < 1))
    check_outputs(copied(module), work, example)
    return plan


def _by_norm(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    share: float,
    removed: ChannelPlan | None,
    leading: bool,
    whole_heads: bool = False,
) -> ChannelPlan:
    """A choice of channels that has been tried: fitted as nodes fit it, the module goes on."""
    with naming_what_is_not_followed(module):
        plan = choose_by_norm(copied(module), example, share, removed, leading, whole_heads)
        wide, narrow = copied(module), fit_module(copied(module), plan)
        check_outputs(wide, narrow, example)
        check_values(copied(module), example, plan, fit_module)
    try:
        check_outputs(wide.train(), wide, example)
    except PlanError:  # as BatchNorm does of one example
        return plan
    check_outputs(wide, narrow.train(), example)
    return plan


def narrow_module(
    module: nn.Module, example: tuple[torch.Tensor, ...], plan: ChannelPlan
) -> nn.Module:
    """A copy of a module, in evaluation mode, with the channels of a plan removed.

    Parameters keep their names; they hold the part of the module's weights that remains.

    Raises:
        PlanError: the plan does not fit, or the narrow module gives outputs of another shape.
    """
    work = fit_module(copied(module), plan)
    check_outputs(copied(module), work, example)
    return work


def made_with_inputs(
    factory: Callable[[], nn.Module],
    example: Callable[[], torch.Tensor | tuple[torch.Tensor, ...]],
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """A module on the CPU with positional inputs that it accepts; the random state stays as it is.

    Args:
        factory: makes the module with all of its channels, on any device.
        example: makes positional inputs, or the only one.
    """
    with torch.random.fork_rng(devices=[]):
        module, inputs = factory().cpu(), example()
    return module, inputs if isinstance(inputs, tuple) else (inputs,)


def check_zeroed(module: nn.Module, example: tuple[torch.Tensor, ...], plan: ChannelPlan) -> None:
    """Refuse a plan of which what is zero does not leave the same outputs as what is gone.

    So it is where a layer computes over all channels, how many there are included: GroupNorm,
    LayerNorm, the scale of attention; and where a residual layer has a norm behind what it adds.

    Args:
        module: with any weights; left as it was.
        example: positional inputs that it accepts.
        plan: of its channels, heads or layers.

    Raises:
        PlanError: the outputs differ, or the module does not run with what remains.
    """
    zeroed, narrow = copied(module), fit_module(copied(module), plan)
    with torch.no_grad(), failing(module):
        zero_what_goes(zeroed, plan)
        pairs = list(zip(outputs_of(zeroed(*example)), outputs_of(narrow(*example)), strict=True))
    for one, other in pairs:
        if float((one - other).abs().max()) > _ALIKE * float(other.abs().max()):
            what, why = "channels", "computes over all of them (GroupNorm, LayerNorm, attention)"
            if plan.gone:
                what, why = "layers", "has a norm behind what it adds"
            elif plan.heads:
                what, why = "heads", "computes over all of them"
            raise PlanError(
                f"{what} of {type(module).__name__} that are zero do not leave what removed ones "
                f"do, so they cannot be tried: a layer {why}; say how many go, prunecast.{what} "
                "and channels-at"
            )


def fit_module(module: nn.Module, plan: ChannelPlan) -> nn.Module:
    """Remove the channels of a plan from a module, in place; needs no example and no torch-pruning.

    What a node does with the module that its code makes: tensors keep their names and the part of
    their values that remains, and layers are told their new sizes.

    Returns:
        The module.

    Raises:
        PlanError: the plan is of another module.
    """
    state = module.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    plan.check(shapes, type(module).__name__)
    for name in plan.gone:
        pass_through(_part(module, name))
    for name, mask in plan.heads.items():
        inside = f"{name}." if name else ""
        if not mask.all() and not any(tensor.startswith(inside) for tensor in plan.kept):
            raise PlanError(f"the plan takes heads of layer {name!r} and nothing of its tensors")
        set_heads(name, _part(module, name), mask)
    parts: dict[str, torch.Tensor] = {}
    for name in plan.kept:
        index = plan.array(name, np.arange(state[name].numel()).reshape(shapes[name]))
        parts[name] = state[name].detach().reshape(-1)[torch.from_numpy(np.array(index))]
    for name, part in parts.items():  # tied tensors once more, with the same part
        state[name].data, state[name].grad = part, None
    for name, layer in module.named_modules():
        own = [f"{name}.{n}" if name else n for n, _ in _tensors_of(layer)]
        if any(n in plan.kept for n in own):
            _resize(name, layer)
    for layer in module.modules():
        if isinstance(layer, nn.Transformer) and isinstance(layer.decoder.norm, nn.LayerNorm):
            # which it compares with what comes in
            layer.d_model = layer.decoder.norm.normalized_shape[-1]
        if isinstance(layer, nn.TransformerEncoder):
            # nested tensors are for the fast path of its layers alone
            narrow = any(isinstance(p, NarrowAttention | PassThrough) for p in layer.modules())
            layer.use_nested_tensor = layer.use_nested_tensor and not narrow
    return module


def _part(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError as error:
        raise PlanError(
            f"{type(module).__name__} lacks layer {name!r}: the plan is of another module"
        ) from error


def _tensors_of(layer: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]


def _resize(name: str, layer: nn.Module) -> None:
    """Tell a layer the sizes that its tensors have now.

    A layer of another type need not know them; if it does, its forward says so.
    """
    at: Any = layer
    tensors = dict(_tensors_of(layer))
    size = tuple(next(iter(tensors.values())).shape)
    match layer:
        case nn.Linear():
            at.out_features, at.in_features = size
        case nn.modules.conv._ConvNd():
            _resize_convolution(name, at)
        case nn.modules.batchnorm._NormBase():
            at.num_features = size[0]
        case nn.GroupNorm():
            at.num_channels = size[0]
            if size[0] % at.num_groups:
                raise PlanError(f"layer {name!r}: {size[0]} channels are no {at.num_groups} groups")
        case nn.LayerNorm() | nn.RMSNorm():
            at.normalized_shape = size
        case nn.PReLU():
            at.num_parameters = size[0]
        case nn.Embedding():
            at.num_embeddings, at.embedding_dim = size
        case nn.MultiheadAttention():
            resize_attention(name, layer)
        case nn.RNNBase():
            at.input_size = tensors["weight_ih_l0"].shape[1]
            layer.flatten_parameters()


def _resize_convolution(name: str, layer: Any) -> None:
    first, second = layer.weight.shape[:2]
    inner, outer = ("out_channels", "in_channels") if layer.transposed else (
        "in_channels", "out_channels")  # fmt: skip
    if 1 < layer.groups == layer.in_channels == layer.out_channels:
        layer.groups = first  # each channel by itself
    if first % layer.groups:
        raise PlanError(f"layer {name!r}: {first} channels are no {layer.groups} groups")
    setattr(layer, outer, first)
    setattr(layer, inner, second * layer.groups)

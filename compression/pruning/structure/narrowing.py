"""Choose channels of a torch module and remove them; needs torch, and torch-pruning to choose."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunecast.common.text import first_line
from prunecast.compression.pruning.plan import PlanError, Shares
from prunecast.compression.pruning.structure.attention import Attention, attentions, set_heads
from prunecast.compression.pruning.structure.axes import Axes
from prunecast.compression.pruning.structure.channel_texts import Steps
from prunecast.compression.pruning.structure.channels import ChannelPlan
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
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)


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
    if not 0 < min(wanted) < 1 or max(wanted) > 1:
        raise PlanError(f"the share of channels that remain lies between 0 and 1, not {share}")
    if heads == layers == 1:
        return _choose_by_norm(_copy(module), example, share, removed, leading)
    work, plan = _copy(module), ChannelPlan({})

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
        go_on(_choose_by_norm(_copy(work), example, share, gone, leading, whole_heads=heads < 1))
    _compare_outputs(module, example, work)
    return plan


def _choose_by_norm(
    work: nn.Module,
    example: tuple[torch.Tensor, ...],
    share: float,
    removed: ChannelPlan | None,
    leading: bool,
    whole_heads: bool = False,
) -> ChannelPlan:
    """Channels alone; `work` is narrowed on the way. With `whole_heads` attention keeps its own."""
    tp = _library()
    module = _copy(work)
    ignored = [part for one in _own(work) for part in one.projections()] if whole_heads else []
    with _failing(module), _traceable(work, whole_heads), torch.enable_grad():
        graph = _graph(work, example)
        heads = {
            layer: layer.num_heads
            for layer in work.modules()
            if isinstance(layer, nn.MultiheadAttention) and not isinstance(layer, NarrowAttention)
        }  # each gives the same of its dimensions, and stays a head
        pruner = tp.pruner.BasePruner(
            work,
            example,
            importance=_first if leading else tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - share,
            ignored_layers=[*_last_layers(graph), *_recurrent(work), *ignored],
            customized_pruners=_customized(),
            in_channel_groups=dict(heads),
            out_channel_groups=dict(heads),
        )
        if removed is not None:
            _count_from_before(pruner, removed)
        pruner.step()
        history = pruner.pruning_history()
    steps = tuple((str(name), bool(out), tuple(sorted(map(int, i)))) for name, out, i in history)
    if not steps:
        raise PlanError(f"{type(module).__name__} has no channels that could be removed")
    left = share / removed.share if removed is not None else share
    return ChannelPlan(_kept(module, example, steps, whole_heads), steps, left)


def _own(module: nn.Module) -> list[Attention]:
    return [one for one in attentions(module) if not one.is_torchs]


def narrow_module(
    module: nn.Module, example: tuple[torch.Tensor, ...], plan: ChannelPlan
) -> nn.Module:
    """A copy of a module, in evaluation mode, with the channels of a plan removed.

    Parameters keep their names; they hold the part of the module's weights that remains.

    Raises:
        PlanError: the plan does not fit, or the narrow module gives outputs of another shape.
    """
    work, replays = _copy(module), bool(plan.steps) and plan.shares == (plan.share, 1, 1)
    if replays:
        with _failing(module):
            _remove(work, example, plan.steps)
    else:
        fit_module(work, plan)
    _compare_outputs(module, example, work)
    return work


def _compare_outputs(
    module: nn.Module, example: tuple[torch.Tensor, ...], narrow: nn.Module
) -> None:
    with torch.no_grad():
        wanted, found = _copy(module)(*example), None
        try:
            found = narrow(*example)
        except RuntimeError as error:
            raise PlanError(
                f"{type(module).__name__} does not run with fewer channels: {first_line(error)}; "
                "it probably names a number of channels in forward(): use flatten or x.shape"
            ) from error
    if _shapes(wanted) != _shapes(found):
        raise PlanError(f"without these channels the outputs are {_shapes(found)}")


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
    """Refuse a plan whose channels do not leave the same outputs where they are zero as when gone.

    So it is where a layer computes over all channels, how many there are included: GroupNorm,
    LayerNorm, the scale of attention.

    Args:
        module: with any weights; left as it was.
        example: positional inputs that it accepts.
        plan: of its channels.

    Raises:
        PlanError: the outputs differ, or the module does not run with fewer channels.
    """
    zeroed, narrow = _copy(module), fit_module(_copy(module), plan)
    with torch.no_grad(), _failing(module):
        for name, tensor in zeroed.state_dict().items():
            tensor.copy_(torch.from_numpy(plan.zeroed_array(name, tensor.numpy())))
        pairs = list(zip(_outputs(zeroed(*example)), _outputs(narrow(*example)), strict=True))
    for one, other in pairs:
        if float((one - other).abs().max()) > _ALIKE * float(other.abs().max()):
            raise PlanError(
                f"channels of {type(module).__name__} that are zero do not leave what removed ones "
                "do, so they cannot be tried: a layer computes over all of them (GroupNorm, "
                "LayerNorm, attention); say how many go, prunecast.channels and channels-at"
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
        set_heads(name, _part(module, name), mask)
    parts: dict[str, torch.Tensor] = {}
    for name in plan.kept:
        index = plan.array(name, np.arange(state[name].numel()).reshape(shapes[name]))
        parts[name] = state[name].detach().reshape(-1)[torch.from_numpy(np.array(index))]
    for name, part in parts.items():  # tied tensors once more, with the same part
        state[name].data = part
    for name, layer in module.named_modules():
        own = [f"{name}.{n}" if name else n for n, _ in _tensors_of(layer)]
        if any(n in plan.kept for n in own):
            _resize(name, layer)
    for layer in module.modules():  # nested tensors are for the fast path of its layers alone
        if isinstance(layer, nn.TransformerEncoder):
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
        case nn.LayerNorm():
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
    if layer.groups > 1 and layer.groups == layer.in_channels and second == 1:
        layer.groups = first * layer.groups // getattr(layer, outer)  # each channel by itself
    if first % layer.groups:
        raise PlanError(f"layer {name!r}: {first} channels are no {layer.groups} groups")
    setattr(layer, outer, first)
    setattr(layer, inner, second * layer.groups)


def _graph(module: nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
    return (
        _library()
        .DependencyGraph()
        .build_dependency(module, example_inputs=example, customized_pruners=_customized())
    )


@contextmanager
def _traceable(module: nn.Module, own: bool = False) -> Iterator[None]:
    """Let attention whose heads keep their width only say which channels go along with which.

    torch-pruning would follow the heads inside it to channels that they have nothing to do with.

    Args:
        module: whose layers are changed for the time being.
        own: whether attention of one's own keeps the width of its heads, too.
    """

    def couple(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> Any:
        return query + sum(x.mean(tuple(range(x.dim() - 1))) for x in (key, value)), None

    layers: list[Any] = [part for part in module.modules() if isinstance(part, NarrowAttention)]
    if any(layer.in_proj_weight is None for layer in layers):
        raise PlanError("attention that has keys of another width than queries keeps its channels")
    hooks = []
    for one in _own(module) if own else []:
        made: list[torch.Tensor] = []
        for part in one.projections():
            hooks.append(part.register_forward_hook(lambda _, x, y, made=made: made.append(y)))

        def cut(_: nn.Module, given: Any, made: list[torch.Tensor] = made) -> Any:
            return given[0].detach() + 0 * sum(y.mean() for y in made), *given[1:]

        hooks.append(one.last.register_forward_pre_hook(cut))
    for layer in layers:
        layer.forward = couple
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
        for hook in hooks:
            hook.remove()


def _customized() -> dict[type[nn.Module], Any]:
    """What torch-pruning does with attention whose heads keep their width: what leads in and out.

    Made for every graph: it tells what is pruned by the pruner that does it.
    """
    base: Any = _library().function.BasePruningFunc

    class Pruner(base):  # type: ignore[misc]
        def prune_out_channels(self, layer: Any, idxs: list[int]) -> Any:
            left = [i for i in range(layer.embed_dim) if i not in set(idxs)]
            cut, last = self._prune_parameter_and_grad, layer.out_proj
            layer.in_proj_weight = cut(layer.in_proj_weight, left, 1)
            last.weight = cut(last.weight, left, 0)
            last.bias = None if last.bias is None else cut(last.bias, left, 0)
            layer.embed_dim = layer.kdim = layer.vdim = last.out_features = len(left)
            return layer

        prune_in_channels = prune_out_channels

        def get_out_channels(self, layer: Any) -> int:
            return int(layer.embed_dim)

        get_in_channels = get_out_channels

    return {NarrowAttention: Pruner()}


def _library() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise PlanError("torch-pruning is missing: pip install 'prunecast[server]'") from error
    return torch_pruning


def _copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).eval()


def _outputs(outputs: Any) -> list[torch.Tensor]:
    return list(outputs) if isinstance(outputs, tuple | list) else [outputs]


def _shapes(outputs: Any) -> list[list[int]]:
    return [list(tensor.shape) for tensor in _outputs(outputs)]


@contextmanager
def _failing(module: nn.Module) -> Iterator[None]:
    """torch-pruning's and torch's errors as ours, and no warnings on the way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the library asserts, and raises plain errors
        if isinstance(error, PlanError):
            raise
        raise PlanError(
            f"channels of {type(module).__name__} cannot be removed: {first_line(error)}"
        ) from error


def _first(group: Any, **_: Any) -> torch.Tensor:
    """The earlier a channel, the more it is worth."""
    return torch.arange(len(group[0].idxs), 0, -1, dtype=torch.float32)


def _count_from_before(pruner: Any, removed: ChannelPlan) -> None:
    """Let a pruner take its share of what groups had before channels were removed."""
    for group in pruner.DG.get_all_groups(
        ignored_layers=pruner.ignored_layers, root_module_types=pruner.root_module_types
    ):
        root = group[0][0].source.module
        name = pruner.DG._module2name[root]
        axes = removed.kept.get(f"{name}.weight" if name else "weight")
        mask = None if axes is None else axes[1 if getattr(root, "transposed", False) else 0]
        if mask is not None:  # as torch-pruning 1.6 counts when it prunes step by step
            parts = pruner._get_channel_groups(group)
            pruner._scope_initial_channels[name] = mask.size // parts


def _recurrent(module: nn.Module) -> list[nn.Module]:
    # torch-pruning 1.6 mistakes the gates of one that is narrowed
    return [layer for layer in module.modules() if isinstance(layer, nn.RNNBase)]


def _last_layers(graph: Any) -> list[nn.Module]:
    """Layers from which the outputs come through nothing that has channels of its own."""
    waiting = [node for node in graph.module2node.values() if not node.outputs]
    seen: set[int] = set()
    last: list[nn.Module] = []
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node.module, _LAYERS):
            last.append(node.module)
        else:
            waiting += node.inputs
    return last


def _remove(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    steps: Steps,
    values: dict[str, torch.Tensor] | None = None,
    whole_heads: bool = False,
) -> None:
    """Remove channels in place; `values` replace the tensors once the groups are known."""
    with _traceable(module, whole_heads), torch.enable_grad():
        graph = _graph(module, example)
    state = module.state_dict(keep_vars=True)
    for name, tensor in (values or {}).items():
        state[name].data = tensor
    graph.load_pruning_history([[name, out, list(gone)] for name, out, gone in steps])


def _kept(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    steps: Steps,
    whole_heads: bool,
) -> dict[str, Axes]:
    """What remains of each tensor, found by removing channels from tensors of positions."""
    work = _copy(module)
    state = work.state_dict()
    places = {
        name: torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.dim()
    }
    with _failing(module):
        _remove(work, example, steps, places, whole_heads)
    kept: dict[str, Axes] = {}
    for name, tensor in work.state_dict().items():
        shape = tuple(state[name].shape)
        if name in places and tuple(tensor.shape) != shape:
            kept[name] = _axes(name, tensor.detach().numpy(), shape)
    return kept


def _axes(name: str, places: NDArray[np.float64], shape: tuple[int, ...]) -> Axes:
    # flat: of an array of several axes, some of them 1, NumPy 2.4 repeats what is behind 8192
    indices = np.unravel_index(places.astype(np.int64).ravel(), shape)
    masks = []
    for size, index in zip(shape, indices, strict=True):
        mask = np.zeros(size, np.bool_)
        mask[index] = True
        masks.append(mask)
    grid = np.arange(np.prod(shape)).reshape(shape)[np.ix_(*map(np.flatnonzero, masks))]
    if grid.shape != places.shape or not np.array_equal(grid, places.astype(np.int64)):
        raise PlanError(f"what remains of tensor {name!r} is not a part along its axes")
    return tuple(None if mask.all() else mask for mask in masks)

"""Groups of channels that go together, by torch-pruning's dependency graph; needs both.

torch-pruning finds what is coupled with a channel, through additions, norms and flattenings, and
which groups weigh least (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning").
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_map_only

from prunecast.common.text import first_line
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.attention import Attention, attentions
from prunecast.compression.pruning.structure.axes import Axes
from prunecast.compression.pruning.structure.channel_texts import Steps
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.comparing import LAYERS, outputs_of
from prunecast.compression.pruning.structure.narrow_attention import NarrowAttention

__all__ = [
    "check_weights",
    "choose_by_norm",
    "copied",
    "failing",
    "naming_what_is_not_followed",
]


def choose_by_norm(
    work: nn.Module,
    example: tuple[torch.Tensor, ...],
    share: float,
    removed: ChannelPlan | None,
    leading: bool,
    whole_heads: bool = False,
) -> ChannelPlan:
    """Choose channels alone, by the norm of their groups.

    Args:
        work: with the weights that the choice is made on; narrowed on the way.
        example: positional inputs that it accepts.
        share: of the channels of every group that remain, of what it had before `removed`.
        removed: which of these are gone from it already.
        leading: the first channels of every group remain, whatever their weights.
        whole_heads: attention keeps its own channels.

    Raises:
        PlanError: no channels can be removed.
    """
    tp = _library()
    check_weights(work)
    module = copied(work)
    ignored = [part for one in _own(work) for part in one.projections()] if whole_heads else []
    with failing(module), _traceable(work, whole_heads), torch.enable_grad():
        graph = _graph(work, example)
        heads: dict[nn.Module, int] = {
            layer: layer.num_heads
            for layer in work.modules()
            if isinstance(layer, nn.MultiheadAttention) and not isinstance(layer, NarrowAttention)
        }  # each gives the same of its dimensions, and stays a head
        heads |= {part: one.heads for one in _told(work) for part in one.projections()}
        pruner = tp.pruner.BasePruner(
            work,
            example,
            importance=_first if leading else tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=1 - share,
            ignored_layers=[*_last_layers(graph), *_recurrent(work), *ignored],
            customized_pruners=_customized(),
            output_transform=outputs_of,
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


def copied(module: nn.Module) -> nn.Module:
    """A copy of a module, in evaluation mode.

    Raises:
        PlanError: it cannot be copied.
    """
    try:
        return copy.deepcopy(module).eval()
    except Exception as error:
        check_weights(module)
        raise PlanError(f"{type(module).__name__} cannot be copied: {first_line(error)}") from error


def check_weights(module: nn.Module, prefix: str = "") -> None:
    """Refuse layers whose weights are no tensors of their own.

    Args:
        module: whose layers these are.
        prefix: its name, where it is a part of another.
    """
    for name, layer in module.named_modules(prefix=prefix):
        if isinstance(layer, LAYERS) and "weight" not in {**layer._parameters, **layer._buffers}:
            raise PlanError(
                f"layer {name!r} makes its weight of other tensors (parametrization, weight_norm, "
                "spectral_norm or torch's own pruning): take that off first"
            )


@contextmanager
def naming_what_is_not_followed(module: nn.Module) -> Iterator[None]:
    """Add to errors the first layer in which torch-pruning 1.6 loses its way."""
    try:
        yield
    except PlanError as error:
        for name, layer in module.named_modules():
            if remedy := _in_place_of(layer):
                raise PlanError(
                    f"{error}; channels before layer {name!r} ({type(layer).__name__}) cannot be "
                    f"followed: set prunecast.channels = 1, or take {remedy}"
                ) from error
        raise


def _in_place_of(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.RNNCellBase | nn.GRU) or getattr(layer, "proj_size", 0) > 0:
        return "nn.LSTM without proj_size"
    if isinstance(layer, LAYERS) and "weight" in layer._non_persistent_buffers_set:
        return "one whose weight is in the state"
    torchs = isinstance(layer, nn.MultiheadAttention)
    if torchs and (layer.in_proj_weight is None or layer.add_zero_attn):
        return "nn.MultiheadAttention without kdim, vdim and add_zero_attn"
    return None


@contextmanager
def failing(module: nn.Module) -> Iterator[None]:
    """torch-pruning's and torch's errors as ours, and no warnings on the way."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # the library asserts, and raises plain errors
        if isinstance(error, PlanError):
            raise
        raise PlanError(
            f"channels of {type(module).__name__} cannot be removed{_place(error, module)}: "
            f"{first_line(error)}"
        ) from error


def _place(error: Exception, module: nn.Module) -> str:
    """The last layer of a module that torch-pruning had in hand, as its errors name none."""
    at, trace, layers = "", error.__traceback__, dict(module.named_modules())
    while trace is not None:
        held = trace.tb_frame.f_locals
        for node in held.get("root_node"), getattr(held.get("dep"), "target", None):
            name = str(getattr(node, "name", "")).partition(" (")[0]
            at = f" at layer {name!r}" if name and name in layers else at
        trace = trace.tb_next
    return at


def _kept(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    steps: Steps,
    whole_heads: bool,
) -> dict[str, Axes]:
    """What remains of each tensor, found by removing channels from tensors of positions."""
    work = copied(module)
    state = work.state_dict()
    places = {
        name: torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
        for name, tensor in state.items()
        if tensor.is_floating_point() and tensor.dim()
    }
    with failing(module):
        with _traceable(work, whole_heads), torch.enable_grad():
            graph = _graph(work, example)
        held = work.state_dict(keep_vars=True)
        for name, tensor in places.items():  # now that the groups are known
            held[name].data = tensor
        graph.load_pruning_history([[name, out, list(gone)] for name, out, gone in steps])
    kept: dict[str, Axes] = {}
    for name, tensor in work.state_dict().items():
        shape = tuple(state[name].shape)
        if name in places and tuple(tensor.shape) != shape:
            kept[name] = _axes(name, tensor.detach().numpy(), shape)
    tied: dict[int, str] = {}
    for name, one in module.state_dict(keep_vars=True).items():
        first = tied.setdefault(id(one), name)
        pairs = zip(kept.get(first, ()), kept.get(name, ()), strict=False)
        if (first in kept) != (name in kept) or not all(map(_same, pairs)):
            raise PlanError(f"{first!r} and {name!r} are one tensor, and would lose other channels")
    return kept


def _same(pair: tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]) -> bool:
    one, other = pair
    return one is other or (one is not None and other is not None and np.array_equal(one, other))


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


def _graph(module: nn.Module, example: tuple[torch.Tensor, ...]) -> Any:
    for parameter in module.parameters():  # it follows gradients, so frozen parts, too
        parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
    return (
        _library()
        .DependencyGraph()
        .build_dependency(
            module,
            example_inputs=example,
            output_transform=outputs_of,
            customized_pruners=_customized(),
        )
    )


@contextmanager
def _traceable(module: nn.Module, own: bool = False) -> Iterator[None]:
    """Let attention whose heads keep their width only say which channels go along with which.

    torch-pruning would follow the heads inside it to channels that they have nothing to do with.
    What it cannot follow at all, and may try to for ever, ends its way.

    Args:
        module: whose layers are changed for the time being.
        own: whether attention of one's own keeps the width of its heads, too.
    """

    def couple(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **_: Any) -> Any:
        return query + sum(x.mean(tuple(range(x.dim() - 1))) for x in (key, value)), None

    layers: list[Any] = [part for part in module.modules() if isinstance(part, NarrowAttention)]
    if any(layer.in_proj_weight is None for layer in layers):
        raise PlanError("attention that has keys of another width than queries keeps its channels")
    hooks = [
        layer.register_forward_hook(lambda _, x, y: tree_map_only(torch.Tensor, torch.detach, y))
        for layer in module.modules()
        if _in_place_of(layer) and not isinstance(layer, NarrowAttention)
    ]
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


def _own(module: nn.Module) -> list[Attention]:
    return [one for one in attentions(module) if not one.is_torchs]


def _told(module: nn.Module) -> list[Attention]:
    """Attention of one's own whose heads can be told; it is tried whether others go on."""
    try:
        return [one for one in _own(module) if len(one.projections()) > 1]
    except PlanError:
        return []


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
        outer = getattr(root, "transposed", False) and root.groups == 1
        mask = None if axes is None else axes[1 if outer else 0]
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
        if isinstance(node.module, LAYERS):
            last.append(node.module)
        else:
            waiting += node.inputs
    return last

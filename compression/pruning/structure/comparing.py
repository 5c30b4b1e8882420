"""Whether a narrow module computes what the wide one does of what remains; needs torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunecast.common.text import first_line
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.pruning.structure.narrow_attention import NarrowAttention, become

__all__ = ["LAYERS", "check_outputs", "check_values", "outputs_of", "zero_what_goes"]

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
"""Whose outputs are channels, by the first axis of a weight (the second, if transposed)."""

_ALIKE = 1e-3  # of the largest value: what sums in another order differ by, and more
_TINY = 1e-12
_MEANS = frozenset(("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min"))
_POOLS = {f"adaptive_{kind}_pool{n}d": n for kind in ("avg", "max") for n in (1, 2, 3)}
_SCALES = frozenset(
    ("add", "sub", "mul", "div", "pow", "rsub", "rmul", "rdiv", "rpow", "true_divide", "tensor")
)
Fit = Callable[[nn.Module, ChannelPlan], nn.Module]


def outputs_of(outputs: Any) -> list[Tensor]:
    """The tensors of what a module puts out, however they lie inside one another."""
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    if isinstance(outputs, tuple | list):
        return [tensor for part in outputs for tensor in outputs_of(part)]
    return [outputs] if isinstance(outputs, Tensor) else []


def zero_what_goes(module: nn.Module, plan: ChannelPlan) -> None:
    """Let what a plan removes be zero, in place; running statistics are as they were."""
    for name, tensor in module.state_dict().items():
        kept = plan.zeroed_array(name, np.ones(tuple(tensor.shape), np.bool_))
        tensor.masked_fill_(~torch.from_numpy(np.array(kept)).to(tensor.device), 0)


def check_outputs(wide: nn.Module, narrow: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Refuse a narrow module that does not run, or whose outputs have other shapes.

    Both are copies, in one mode.

    Raises:
        PlanError: with the name of the layer that fails.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            wanted, _ = _run(wide, example)
        except _Failed as error:
            raise PlanError(f"{type(wide).__name__} does not take the example: {error}") from error
        torch.manual_seed(0)  # as what is drawn may decide shapes
        try:
            found, _ = _run(narrow, example)
        except _Failed as error:
            raise PlanError(
                f"{type(wide).__name__} does not run with fewer channels: {error}; it probably "
                "names a number of channels in forward() or in a tensor that is no layer's: use "
                "flatten or x.shape"
            ) from error
    one, other = ([list(x.shape) for x in outputs] for outputs in (wanted, found))
    if one != other:
        raise PlanError(f"without these channels the outputs are {other}, not {one}")


def check_values(wide: nn.Module, example: tuple[Tensor, ...], plan: ChannelPlan, fit: Fit) -> None:
    """Refuse a plan under which channels would meet weights that are of others.

    Weights are drawn, since those there are may be zero or alike. What counts channels (norms,
    softmax, the scale of attention, other numbers that are computed with) does not in the
    comparison, as it does go along with them. Where means over channels are taken otherwise, or
    outputs are drawn, nothing is compared.

    Args:
        wide: a copy, in evaluation mode.
        example: positional inputs that it accepts.
        plan: of its channels.
        fit: `prunecast.compression.pruning.structure.narrowing.fit_module`.

    Raises:
        PlanError: with the name of the first layer that puts out something else.
    """
    _draw(wide)
    narrow = fit(copy.deepcopy(wide), plan)
    zero_what_goes(wide, plan)
    for part in (*wide.modules(), *narrow.modules()):
        if isinstance(part, nn.MultiheadAttention):
            become(part, NarrowAttention)
    runs: list[Any] = []
    modes: list[_Uncounted] = []
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for seed, module in enumerate((wide, wide, narrow)):
            torch.manual_seed(seed)
            modes.append(_Uncounted(modes[-1].numbers if modes else ()))
            try:
                runs.append(_run(module, example, modes[-1]))
            except _Failed:  # by what it takes for a norm of torch's
                return
    (wanted, inside), (again, _), (found, left) = runs
    if not all(map(_alike, wanted, again)) or modes[1].counted != modes[2].counted:
        return
    if all(map(_alike, found, wanted)):
        return
    layers, at = dict(narrow.named_modules()), type(narrow).__name__
    for name, output in left.items():
        layer = layers[name]
        if isinstance(layer, LAYERS) and name in inside:
            axes = plan.kept.get(f"{name}.weight" if name else "weight", (None, None))
            mask, whole = axes[1 if getattr(layer, "transposed", False) else 0], inside[name]
            if mask is not None:
                axis = 1 - layer.weight.dim()
                left_over = torch.from_numpy(np.flatnonzero(mask)).to(whole.device)
                whole = whole.index_select(axis, left_over)
            if not _alike(output, whole):
                at = f"layer {name!r} of {at}"
                break
    raise PlanError(
        f"{at} would not put out what it does of the channels that remain: they come to it in an "
        "order that fewer do not keep (flattened, shuffled or picked by number), or are counted "
        "otherwise than by a norm or a mean; set prunecast.channels = 1"
    )


class _Failed(Exception):
    """A module does not run; where, and why."""


class _Uncounted(TorchFunctionMode):
    """Lets norms, softmax and attention compute without counting zeros; notes means.

    Args:
        numbers: of the run that is compared with, which scale what they did there: they may be
            made of how many channels there are.
    """

    def __init__(self, numbers: Sequence[float]) -> None:
        super().__init__()
        self.means: list[tuple[int, ...]] = []
        self.numbers: list[float] = []
        self._given = numbers

    @property
    def counted(self) -> tuple[list[tuple[int, ...]], int]:
        """Sizes that means were taken over, and how many numbers there were."""
        return self.means, len(self.numbers)

    def _number(self, value: Any) -> Any:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return value
        self.numbers.append(value)
        at = len(self.numbers)
        return self._given[at - 1] if at <= len(self._given) else value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, by = getattr(func, "__name__", ""), kwargs or {}

        def given(at: int, key: str, default: Any = None) -> Any:
            return by.get(key, args[at] if at < len(args) else default)

        match name:
            case "softmax" | "log_softmax" | "softmin":
                dim = given(1, "dim", -1)
                return _parts(given(0, "input"), -1 if dim is None else dim)
            case "layer_norm" | "rms_norm":
                axes = tuple(range(-len(given(1, "normalized_shape")), 0))
                weight, bias = given(2, "weight"), None
                if name == "layer_norm":
                    bias = given(3, "bias")
                return _affine(given(0, "input"), axes, weight, bias)
            case "group_norm":
                x, groups = given(0, "input"), given(1, "num_groups")
                weight, bias = (
                    None if v is None else v.reshape(-1, *(1,) * (x.dim() - 2))
                    for v in (given(2, "weight"), given(3, "bias"))
                )
                kept = x if weight is None else x * (weight != 0)
                made = _parts(kept.reshape(len(x), groups, -1), -1).reshape(x.shape)
                made = made if weight is None else made * weight
                return made if bias is None else made + bias
            case "scaled_dot_product_attention" if not by.get("enable_gqa"):
                q, k, v = (given(i, key) for i, key in enumerate(("query", "key", "value")))
                return _parts(q @ k.transpose(-1, -2), -1) @ v
        if name in _MEANS and not isinstance(given(1, "dim"), Tensor):
            x, dim = given(0, "input"), given(1, "dim")
            dims = range(x.dim()) if dim is None else [dim] if isinstance(dim, int) else dim
            self.means.append(tuple(x.shape[d] for d in dims))
        elif name in _POOLS:
            self.means.append(tuple(given(0, "input").shape[-_POOLS[name] :]))
        elif name.strip("_") in _SCALES and _scales(args):
            args = tuple(map(self._number, args))
        return func(*args, **by)


def _scales(args: Any) -> bool:
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    return all(tensor.is_floating_point() for tensor in tensors)


def _affine(x: Tensor, axes: tuple[int, ...], weight: Any, bias: Any) -> Tensor:
    made = _parts(x if weight is None else x * (weight != 0), axes)
    made = made if weight is None else made * weight
    return made if bias is None else made + bias


def _parts(x: Tensor, axes: Any) -> Tensor:
    """Each value by the sum of their sizes, which zeros and a scale leave as it is."""
    x = torch.where(x.isfinite(), x, 0)
    return x / (x.abs().sum(axes, keepdim=True) + _TINY)


def _draw(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dim():
            drawn, tensor = torch.randn(parameter.shape, generator=generator), parameter.data
            if tensor.dim() > 1:
                drawn *= (tensor.shape[0] / max(1, tensor.numel())) ** 0.5
            elif name.endswith("weight"):
                drawn = 0.5 + torch.rand(parameter.shape, generator=generator)
            tensor.copy_(drawn)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):  # a server's noise or moments may have made it negative
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def _run(
    module: nn.Module, example: tuple[Tensor, ...], mode: Any = None
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of a module, and of each of its layers the last."""
    inside: dict[str, Tensor] = {}
    entered: list[str] = []
    hooks = []
    for name, layer in module.named_modules():

        def enter(_: Any, __: Any, name: str = name) -> None:
            entered.append(name)

        def leave(_: Any, __: Any, output: Any, name: str = name) -> None:
            entered.pop()
            if isinstance(output, Tensor):
                inside[name] = output.clone()

        hooks += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with mode or nullcontext():
            return [x.clone() for x in outputs_of(module(*example))], inside
    except Exception as error:  # of the user's code
        at = f"layer {entered[-1]!r}: " if any(entered[-1:]) else ""
        raise _Failed(f"{at}{first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()


def _alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not other.is_floating_point() or not other.numel():
        return one.shape == other.shape
    bound = max(_ALIKE, 8 * torch.finfo(other.dtype).eps)
    return not float((one - other).abs().max()) > bound * float(other.abs().max())

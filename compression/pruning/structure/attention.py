"""Layers that attend by heads, as they are found in a module; needs torch.

A head is the part of queries, keys and values that attends by itself, and what the output
projection makes of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.narrow_attention import NarrowAttention

__all__ = ["Attention", "attentions", "set_heads"]

_NUMBERS = ("num_heads", "n_heads", "n_head", "heads", "num_attention_heads")
_INNER = ("all_head_size", "inner_dim")  # how some call the width of all heads together
_BEFORE = r"(?:to|w|fc|lin|linear)?_?"
_AFTER = r"_?(?:proj|projection|lin|linear|layer|fc)?"
_ROLES = {
    role: re.compile(f"{_BEFORE}(?:{names}){_AFTER}")
    for role, names in (
        ("query", "q|query|queries"),
        ("key", "k|key|keys"),
        ("value", "v|value|values"),
    )
}


@dataclass(frozen=True)
class Attention:
    """A layer of a module that attends by heads.

    Attributes:
        name: of the layer in the module.
        layer: the layer.
        heads: how many it has.
        parts: of its tensors, those that have heads along an axis: name in the layer, axis, and how
            many times all heads lie along it, one after the other.
    """

    name: str
    layer: nn.Module
    heads: int
    parts: tuple[tuple[str, int, int], ...]

    @property
    def is_torchs(self) -> bool:
        """Whether it is `torch.nn.MultiheadAttention`."""
        return isinstance(self.layer, nn.MultiheadAttention)

    @property
    def last(self) -> nn.Module:
        """The layer that takes all heads in, where it is not torch's."""
        return self.layer.get_submodule(self.parts[-1][0].removesuffix(".weight"))

    def projections(self) -> list[nn.Module]:
        """The layers that put queries, keys and values out, where it is not torch's."""
        names = [name for name, axis, _ in self.parts if axis == 0 and name.endswith(".weight")]
        return [self.layer.get_submodule(name.removesuffix(".weight")) for name in names]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of `parts`, by name in the layer."""
        state = self.layer.state_dict(keep_vars=True)
        return {name: state[name] for name, _, _ in self.parts}

    def axis_mask(self, kept: NDArray[np.bool_], tensor: str) -> NDArray[np.bool_]:
        """Which places remain along a tensor's axis that has the heads."""
        _, axis, times = next(part for part in self.parts if part[0] == tensor)
        size = self.tensors()[tensor].shape[axis]
        return np.tile(np.repeat(kept, size // (times * self.heads)), times)

    def norms(self) -> NDArray[np.float64]:
        """L2 norm of each head over all matrices that have a part of it."""
        tensors, squares = self.tensors(), torch.zeros(self.heads, dtype=torch.float64)
        for name, axis, times in self.parts:
            if tensors[name].dim() == 2:
                parts = tensors[name].detach().double().movedim(axis, 0).flatten(1)
                squares += parts.square().sum(1).reshape(times, self.heads, -1).sum((0, 2)).cpu()
        return np.asarray(squares.sqrt().numpy())


def attentions(module: nn.Module) -> list[Attention]:
    """The layers of a module that attend by heads, in its order.

    They are torch's, and those that hold a number of heads and linear layers for queries, keys and
    values (or one for all three) and the output.

    Raises:
        PlanError: what holds a number of heads and linear layers is of another kind.
    """
    found, names = [], {layer: name for name, layer in module.named_modules()}
    for layer, name in names.items():
        if isinstance(layer, nn.MultiheadAttention):
            found.append(_of_torch(name, layer))
        elif (attribute := _number_of(layer)) is not None and any(_linears(layer)):
            inside = [part for part in layer.modules() if part is not layer]
            if any(isinstance(p, nn.MultiheadAttention) or _number_of(p) for p in inside):
                continue  # it tells these how many they have
            found.append(_of_ones_own(name, layer, getattr(layer, attribute)))
    return found


def _of_torch(name: str, layer: nn.MultiheadAttention) -> Attention:
    if type(layer).forward not in (nn.MultiheadAttention.forward, NarrowAttention.forward):
        raise _not_told(name, layer, "it has a forward of its own")
    parts = [("in_proj_weight", 0, 3)] if layer.in_proj_weight is not None else [
        (f"{part}_proj_weight", 0, 1) for part in "qkv"
    ]  # fmt: skip
    if layer.in_proj_bias is not None:
        parts.append(("in_proj_bias", 0, 3))
    if layer.bias_k is not None:
        parts += [("bias_k", 2, 1), ("bias_v", 2, 1)]
    return Attention(name, layer, layer.num_heads, (*parts, ("out_proj.weight", 1, 1)))


def _of_ones_own(name: str, layer: nn.Module, heads: int) -> Attention:
    linears = dict(_linears(layer))
    three = {
        role: linear
        for role, pattern in _ROLES.items()
        for linear in linears
        if pattern.fullmatch(linear.lower())
    }
    if len(three) == len(_ROLES):
        inner = {linears[part].out_features for part in three.values()}
        leading, times = list(three.values()), 1
        if len(inner) > 1:
            raise _not_told(name, layer, "its keys or values have other heads than its queries")
    else:
        leading = [
            n for n, part in linears.items() if "q" in n.lower() and part.out_features % 3 == 0
        ]
        inner, times = {linears[part].out_features // 3 for part in leading}, 3
    if len(leading) != 3 // times or min(inner) % heads:
        raise _not_told(name, layer, "its queries, keys and values are no linear layers q, k and v")
    width = min(inner)
    last = [n for n, part in linears.items() if n not in leading and part.in_features == width]
    if len(last) != 1:
        raise _not_told(name, layer, f"{len(last) or 'none'} of its linear layers takes all heads")
    parts = [(f"{part}.weight", 0, times) for part in leading]
    parts += [(f"{n}.bias", 0, times) for n in leading if linears[n].bias is not None]
    return Attention(name, layer, heads, (*parts, (f"{last[0]}.weight", 1, 1)))


def _not_told(name: str, layer: nn.Module, why: str) -> PlanError:
    return PlanError(
        f"the heads of {name!r} ({type(layer).__name__}) cannot be told: {why}; set "
        "prunecast.heads = 1, or name its linear layers q, k, v (or qkv) and one for the output"
    )


def _number_of(layer: nn.Module) -> str | None:
    """The attribute of a layer that says how many heads it has."""
    for name in _NUMBERS:
        number = getattr(layer, name, None)
        if isinstance(number, int) and not isinstance(number, bool) and number > 0:
            return name
    return None


def _linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers of a layer, alone or with others in a sequence, by name."""
    for name, part in layer.named_children():
        if isinstance(part, nn.Linear):
            yield name, part
        elif isinstance(part, nn.Sequential):
            yield from ((f"{name}.{n}", p) for n, p in part.named_children()
                        if isinstance(p, nn.Linear))  # fmt: skip


def set_heads(name: str, layer: nn.Module, kept: NDArray[np.bool_]) -> None:
    """Tell a layer how many heads it has left; its tensors are those of the heads that remain.

    Args:
        name: of the layer, for the error.
        layer: changed in place.
        kept: of the heads that it had.

    Raises:
        PlanError: it had another number of them.
    """
    at: Any = layer
    attribute, left = _number_of(layer), int(np.count_nonzero(kept))
    had = None if attribute is None else getattr(layer, attribute)
    if attribute is None or had != kept.size:
        raise PlanError(
            f"layer {name!r} has {had or 'no'} heads, the plan was made for {kept.size}"
        )
    setattr(at, attribute, left)
    if isinstance(layer, nn.MultiheadAttention):
        return
    for inner in _INNER:
        if getattr(layer, inner, None) is not None:
            setattr(at, inner, getattr(layer, inner) * left // had)

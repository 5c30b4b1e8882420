"""Whole heads of attention: which go, and modules that go on with fewer; needs torch.

A head is the part of queries, keys and values that attends by itself, and what the output
projection makes of it. `torch.nn.MultiheadAttention` computes with as many dimensions as come in,
so that it cannot have fewer heads of the same width: `NarrowAttention` takes its place.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from prunecast.common.text import first_line
from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import Axes, ChannelPlan

__all__ = [
    "Attention",
    "NarrowAttention",
    "attentions",
    "become",
    "choose_heads",
    "resize_attention",
    "set_heads",
]

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
_ALIKE = 1e-3  # of the largest output; what takes other heads, or scales otherwise, is far off


class NarrowAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose heads together are narrower than what comes in.

    It is made of one in place, by `set_heads`. Parameters have the same names; of `embed_dim` rows
    there are ``num_heads * head_dim`` in the projections that lead in, and as many columns in
    ``out_proj.weight``. Arguments, masks and results are those of torch's.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint of what attn_mask is: give that, too")
        batched = query.dim() == 3
        q, k, v = self._projected(query, key, value)
        if not batched:
            q, k, v = (x.unsqueeze(0) for x in (q, k, v))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        count, beside = q.shape[0], 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(count, -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(count, -1, -1)], 1)
            beside += 1
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
            beside += 1
        q, k, v = (
            x.reshape(count, x.shape[1], self.num_heads, -1).transpose(1, 2) for x in (q, k, v)
        )
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None
        if attn_mask is not None and not causal:
            mask = _additive(attn_mask, q.dtype, beside)
            if mask.dim() == 3:
                mask = mask.reshape(count, self.num_heads, *mask.shape[1:])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, q.dtype, beside)[:, None, None]
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
            weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = functional.dropout(weights, dropout)
            made = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            made = functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        made = functional.linear(
            made.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias
        )
        if not batched:
            return made.squeeze(0), None if weights is None else weights.squeeze(0)
        return made if self.batch_first else made.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads side by side, in the layout that came in."""
        if self.in_proj_weight is not None and query is key is value:
            packed = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
            return packed.chunk(3, -1)
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        three = zip((query, key, value), weights, biases, strict=True)
        return tuple(functional.linear(x, weight, bias) for x, weight, bias in three)


def _additive(mask: Tensor, dtype: torch.dtype, beside: int) -> Tensor:
    """A mask as what is added to scores; keys that are added to those that came are seen."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
    return functional.pad(mask.to(dtype), (0, beside)) if beside else mask.to(dtype)


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


def resize_attention(name: str, layer: nn.MultiheadAttention) -> None:
    """Tell torch's attention the sizes that its tensors have now, and let it compute with them.

    Raises:
        PlanError: no number of channels is the same for every head.
    """
    at: Any = layer
    width, inner = layer.out_proj.weight.shape
    if inner % layer.num_heads:
        raise PlanError(f"layer {name!r}: a width of {inner} is no {layer.num_heads} heads")
    at.embed_dim, at.head_dim = width, inner // layer.num_heads
    at.kdim = at.vdim = width
    packed = layer.in_proj_weight is not None
    if not packed:
        at.kdim, at.vdim = layer.k_proj_weight.shape[1], layer.v_proj_weight.shape[1]
    become(layer, NarrowAttention if width != inner else nn.MultiheadAttention)


def become(layer: nn.MultiheadAttention, kind: type[nn.MultiheadAttention]) -> None:
    """Let torch's attention compute as a kind of it does, in place; one of another forward stays.

    In place, since others may hold it. `TransformerEncoderLayer` takes its fast path, which
    computes with as many dimensions as come in, only where the three projections are of one size.
    """
    at: Any = layer
    if type(layer) in (nn.MultiheadAttention, NarrowAttention):
        at.__class__ = kind
        at._qkv_same_embed_dim = kind is nn.MultiheadAttention and layer.in_proj_weight is not None

"""Which channels remain: structured pruning as a plan that narrows any later weights.

Removing a channel of one layer removes slices of every layer that is coupled with it, through
additions, norms and flattenings. torch-pruning computes these groups (Fang et al. 2023, "DepGraph:
Towards Any Structural Pruning"); the channels with the least norm over their whole group go.

The choice is made once, on some version of the weights. What comes out is a `ChannelPlan`: for
each tensor the positions along each axis that remain. Later versions are narrowed by the same
plan, in numpy and without torch, so that the narrow models of two rounds differ by as little as
the wide ones. A narrowed tensor keeps its lattice: its integers are a part of the wide ones.

Whole heads of attention are channels that go together, and the plan says which remain, since a
module must be told how many there are. Whole layers leave with all of their tensors.

Plans compose: of a federation that removes channels more than once, one plan says what remains of
the module that everybody's code makes, and what of it is new to somebody who knows an earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import write_atomically
from prunecast.compression.pruning.plan import PlanError, Shares
from prunecast.compression.pruning.structure.axes import (
    Axes,
    beyond,
    composed,
    is_of,
    of_another_shape,
    places_of,
)
from prunecast.compression.pruning.structure.channel_texts import (
    PlanParts,
    Steps,
    deflated,
    inflated,
    layers_of,
    parts_of,
    text_of,
)
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
    is_statistic,
)

__all__ = [
    "ChannelChooser",
    "ChannelPlan",
    "channels_beside",
    "current_channels",
    "holding_channels",
]


@dataclass(frozen=True, eq=False)
class ChannelPlan:
    """What remains of each tensor.

    Attributes:
        kept: for each tensor a mask per axis, True where it remains; None where all of it does.
            Tensors that stay whole are not listed.
        steps: how to narrow a torch module: layer, whether its outputs (or else its inputs) are
            meant, and the channels that go, in the order of their removal.
        share: of the channels that were to remain.
        heads: for each attention layer that lost whole heads, by its name in the module, a mask of
            them, True where one remains.
        gone: names of the layers that left altogether; none of their tensors is in `kept`.
        heads_share, layers_share: of the heads and residual layers that were to remain.
    """

    kept: Mapping[str, Axes]
    steps: Steps = ()
    share: float = 1.0
    heads: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    heads_share: float = 1.0
    layers_share: float = 1.0

    @property
    def shares(self) -> Shares:
        """What was to remain of each kind."""
        return Shares(self.share, self.heads_share, self.layers_share)

    def of_shares(self, shares: Shares) -> ChannelPlan:
        """The same plan under other shares, as where it stands for a level that leaves no less."""
        part, heads, layers = shares
        return replace(self, share=part, heads_share=heads, layers_share=layers)

    def loses(self, tensor: str) -> bool:
        """Whether a tensor goes altogether, as its layer does."""
        return bool(self.gone) and not self._gone.isdisjoint(layers_of(tensor))

    @cached_property
    def _gone(self) -> frozenset[str]:
        return frozenset(self.gone)

    def narrow(self, model: PublishedModel) -> PublishedModel:
        """The part of a model that remains; lattice, steps and pruned flags stay.

        Raises:
            PlanError: a tensor has another shape than the plan's.

        >>> plan = ChannelPlan({"w": (np.array([True, False, True]), None)})
        >>> wide = PublishedModel({"w": LatticeTensor(np.array([[1], [2], [3]]), 0.5)})
        >>> plan.narrow(wide)["w"].q.tolist()
        [[1], [3]]
        """
        self.check({name: tensor.shape for name, tensor in model.tensors.items()})
        tensors = {
            name: self._narrow(name, tensor)
            for name, tensor in model.tensors.items()
            if not self.loses(name)
        }
        return PublishedModel(tensors, model.counter)

    def zeroed(self, model: PublishedModel) -> PublishedModel:
        """A model of which what goes is zero and nothing is gone: how a plan is tried.

        Its layers then put out what those of the narrow model do, unless one counts how many
        channels there are, or has a norm behind what it adds
        (`prunecast.compression.pruning.structure.narrowing.check_zeroed`).

        Raises:
            PlanError: a tensor has another shape than the plan's.

        >>> plan = ChannelPlan({"w": (np.array([True, False, True]),)})
        >>> wide = PublishedModel({"w": LatticeTensor(np.array([1, 2, 3]), 0.5)})
        >>> plan.zeroed(wide).tensors["w"].q.tolist()
        [1, 0, 3]
        """
        self.check({name: tensor.shape for name, tensor in model.tensors.items()})
        tensors: dict[str, Tensor] = {}
        for name, tensor in model.tensors.items():
            if isinstance(tensor, LatticeTensor):
                q = self.zeroed_array(name, tensor.q)
                tensors[name] = LatticeTensor(q, tensor.step, tensor.pruned, tensor.dtype)
            else:
                tensors[name] = RawTensor(self.zeroed_array(name, tensor.values))
        return PublishedModel(tensors, model.counter)

    def zeroed_array(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """One tensor of which what goes is zero; running statistics are as they were.

        Raises:
            PlanError: it has another shape than the plan's.
        """
        if is_statistic(name):
            return array
        if self.loses(name):
            return np.zeros_like(array)
        if name not in self.kept:
            return array
        left, places = np.zeros_like(array), self.places(name, array.shape)
        left[places] = array[places]
        return left

    def arrays(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part of a record's arrays that remains; those that it does not name are as they were.

        A record need not have all tensors of the plan, as what a strategy accumulates may not.

        Raises:
            PlanError: an array has another shape than the plan's.
        """
        return {n: self.array(n, array) for n, array in arrays.items() if not self.loses(n)}

    def array(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """The part of one tensor that remains, of a layer that does (see `loses`).

        Raises:
            PlanError: it has another shape than the plan's.
        """
        axes = self.kept.get(name)
        return array if axes is None else array[places_of(name, array.shape, axes)]

    def places(self, name: str, shape: tuple[int, ...]) -> Any:
        """Where what remains lies in a tensor, as an index of it.

        Raises:
            PlanError: it has another shape than the plan's.
        """
        axes = self.kept.get(name)
        return ... if axes is None else places_of(name, shape, axes)

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether tensors of these shapes, all of a model's, are what the plan narrows."""
        return self.misfit(shapes) is None

    def misfit(self, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """The first tensor that is missing, or else of another shape; None where the plan fits."""
        for name in self.kept:
            if name not in shapes:
                return name
        if self.gone:
            layers = {layer for name in shapes for layer in layers_of(name)}
            if missing := [layer for layer in self.gone if layer not in layers]:
                return f"{missing[0]}.*"
        return next((n for n, axes in self.kept.items() if not is_of(axes, shapes[n])), None)

    def check(self, shapes: Mapping[str, tuple[int, ...]], owner: str = "the model") -> None:
        """Refuse tensors, all of a model's, that are not what the plan narrows.

        Args:
            shapes: of the tensors, by name.
            owner: what the error calls whoever has them.

        Raises:
            PlanError: a tensor is missing, or of another shape.
        """
        name = self.misfit(shapes)
        if name is None:
            return
        if name not in shapes:
            raise PlanError(f"{owner} lacks tensor {name!r}: the plan is of another module")
        raise of_another_shape(name, shapes[name])

    def shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """What remains of tensors of these shapes, which the plan `fits`."""
        sizes = {
            name: tuple(n if m is None else int(np.count_nonzero(m)) for n, m in pairs)
            for name, axes in self.kept.items()
            if name in shapes and (pairs := list(zip(shapes[name], axes, strict=True)))
        }
        return {n: sizes.get(n, shape) for n, shape in shapes.items() if not self.loses(n)}

    def then(self, later: ChannelPlan) -> ChannelPlan:
        """This plan and one that was made of what it leaves, as one plan.

        Raises:
            PlanError: `later` was made of something else.

        >>> first = ChannelPlan({"w": (np.array([True, False, True]),)}, share=0.5)
        >>> both = first.then(ChannelPlan({"w": (np.array([False, True]),)}, share=0.5))
        >>> both.kept["w"][0].tolist(), both.share
        ([False, False, True], 0.25)
        """
        for name in (*later.kept, *(f"{layer}." for layer in (*later.heads, *later.gone))):
            if self.loses(name):
                raise PlanError(f"the later plan names {name!r}, of a layer that is gone")
        kept = {name: axes for name, axes in self.kept.items() if not later.loses(name)}
        for name, axes in later.kept.items():
            kept[name] = tuple(composed(name, *pair) for pair in self._beside(name, axes))
        heads = {n: mask for n, mask in self.heads.items() if not later.loses(f"{n}.")}
        for name, mask in later.heads.items():
            both = composed(name, self.heads.get(name), mask)
            assert both is not None
            heads[name] = both
        gone = tuple(n for n in self.gone if not later.loses(f"{n}.")) + later.gone
        of = Shares(*(a * b for a, b in zip(self.shares, later.shares, strict=True)))
        steps = (*self.steps, *later.steps)
        return ChannelPlan(kept, steps, of.channels, heads, gone, of.heads, of.layers)

    def since(self, earlier: ChannelPlan | None) -> ChannelPlan:
        """What this plan removes beyond an earlier one, of what that leaves; it has no `steps`.

        Raises:
            PlanError: this plan keeps what `earlier` removed.

        >>> first = ChannelPlan({"w": (np.array([True, False, True]),)})
        >>> ChannelPlan({"w": (np.array([False, False, True]),)}).since(first).kept["w"][0].tolist()
        [False, True]
        """
        if earlier is None:
            return self
        for name in earlier.kept:
            if name not in self.kept and not self.loses(name):
                raise PlanError(f"the plan keeps channels of tensor {name!r} that are gone")
        for layer in earlier.gone:
            if not self.loses(f"{layer}."):
                raise PlanError(f"the plan keeps layer {layer!r} that is gone")
        kept: dict[str, Axes] = {}
        for name, axes in self.kept.items():
            left = tuple(beyond(name, *pair) for pair in earlier._beside(name, axes))
            if any(mask is not None for mask in left):
                kept[name] = left
        heads = {
            name: mask
            for name, now in self.heads.items()
            if (mask := beyond(name, earlier.heads.get(name), now)) is not None
        }
        gone = tuple(layer for layer in self.gone if not earlier.loses(f"{layer}."))
        of = Shares(*(a / b for a, b in zip(self.shares, earlier.shares, strict=True)))
        return ChannelPlan(kept, (), of.channels, heads, gone, of.heads, of.layers)

    def _beside(
        self, name: str, axes: Axes
    ) -> Iterator[tuple[NDArray[np.bool_] | None, NDArray[np.bool_] | None]]:
        """This plan's mask and another's, axis by axis."""
        own = self.kept.get(name, (None,) * len(axes))
        if len(own) != len(axes):
            raise PlanError(f"of tensor {name!r} both plans have another number of axes")
        return zip(own, axes, strict=True)

    def _narrow(self, name: str, tensor: Tensor) -> Tensor:
        axes = self.kept.get(name)
        if axes is None:
            return tensor
        places = places_of(name, tensor.shape, axes)
        if isinstance(tensor, LatticeTensor):
            return LatticeTensor(tensor.q[places], tensor.step, tensor.pruned, tensor.dtype)
        return RawTensor(tensor.values[places])

    def save(self, path: Path) -> None:
        """Write the text to a file, whole or not at all.

        Raises:
            StorageError: the file system refuses; an old file is untouched.
        """
        write_atomically(path, self.to_text().encode())

    @classmethod
    def load(cls, path: Path) -> ChannelPlan:
        """Read what `save` wrote.

        Raises:
            OSError: it cannot be read.
            PlanError: no such plan.
        """
        try:
            return cls.from_text(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PlanError(f"the plan of channels is damaged: {error}") from error

    @cached_property
    def coded(self) -> bytes:
        """As it travels: the text without `steps`, which only a dependency graph needs; deflated.

        Nodes give their modules the shapes that the masks say.
        """
        return deflated(replace(self, steps=()).to_text())

    @classmethod
    def from_bytes(cls, data: bytes, most: int | None = None) -> ChannelPlan:
        """Read what `coded` is; at most 16 MiB of text.

        Args:
            data: of whoever sent it.
            most: bytes of the largest model that the plan may be of: its masks have no more places
                together, and its text is not longer but for some names. None for any model.

        Raises:
            PlanError: no such plan, one of a larger model, or one with `steps`.
        """
        plan = cls.from_text(inflated(data, most), most)
        if plan.steps:
            raise PlanError("the plan of channels is damaged: it travels without steps")
        return plan

    def to_text(self) -> str:
        """JSON; masks in hexadecimal, each written once."""
        return text_of(PlanParts(self.kept, self.steps, self.shares, self.heads, self.gone))

    @classmethod
    def from_text(cls, text: str, most: int | None = None) -> ChannelPlan:
        """Read what `to_text` wrote.

        Args:
            text: of a file, or of whoever sent it.
            most: places that its masks may have together; None for any number.

        Raises:
            PlanError: no such plan, or one under which a layer would vanish.
        """
        kept, steps, of, heads, gone = parts_of(text, most)
        return cls(kept, steps, of.channels, heads, gone, of.heads, of.layers)


ChannelChooser = Callable[..., ChannelPlan]
"""From the master weights, the share of all channels that is to remain, and what remains already of
the module that everybody's code makes (None for all) to a plan of the master's channels. Where
whole heads or layers go, it is given the shares of these by keyword, `heads` and `layers`.

Raises PlanError where these cannot be removed."""


def channels_beside(model: Path) -> Path:
    """Where the plan of a file's model lies that has fewer channels than its module: beside it."""
    return model.with_suffix(".channels")


_current: ContextVar[ChannelPlan | None] = ContextVar("prunecast_channels", default=None)


def current_channels() -> ChannelPlan | None:
    """Which channels remain in the model of the message being handled.

    Returns:
        The plan that the module which this side's code makes is to be narrowed by, before the
        received arrays are loaded (`fit_module` of `narrowing`); None where all channels remain.
    """
    return _current.get()


@contextmanager
def holding_channels(plan: ChannelPlan | None) -> Iterator[None]:
    """Make `plan` the current one for the duration of a ClientApp's function."""
    token = _current.set(plan)
    try:
        yield
    finally:
        _current.reset(token)

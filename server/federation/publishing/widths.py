"""Width classes: nodes of a class train a slice of the model, the same part of every version.

Heterogeneous federated learning by nested sub-models (HeteroFL, Diao et al. 2021; FjORD, Horvath
et al. 2021). A slice is a `ChannelPlan`: what it leaves of a published version is a version of its
own, bit for bit a part of the whole one, and travels as such. Only the running statistics of
normalisation are a class's own: fewer channels before a layer make other statistics behind it,
which HeteroFL's static batch normalisation and slimmable networks (Yu et al. 2019) keep apart, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from prunecast.compression.pruning.plan import PlanError
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import PublishedModel, RawTensor, is_statistic
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.publishing.history import History
from prunecast.server.federation.strategies import private_strategy

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["SliceChooser", "Slices", "check_strategy", "leading_slices"]

SliceChooser = Callable[[float], ChannelPlan]
"""From the share of the channels that a class trains to which these are, of the whole module.

Raises PlanError where the module cannot be sliced."""

Arrays = Mapping[str, NDArray[Any]]


def leading_slices(
    factory: Callable[[], nn.Module], example: Callable[[], Tensor | tuple[Tensor, ...]]
) -> SliceChooser:
    """Slices of the leading channels of every layer, as `choose_channels` finds them.

    Args:
        factory: makes the module with all of its channels, on any device.
        example: makes positional inputs that it accepts, or the only one.
    """

    def choose(share: float) -> ChannelPlan:
        from prunecast.compression.pruning.structure.narrowing import (
            choose_channels,
            made_with_inputs,
        )
        from prunecast.server.federation.shrinking.choosing import saying_how_long

        with saying_how_long():
            return choose_channels(*made_with_inputs(factory, example), share, leading=True)

    return choose


def check_strategy(strategy: object) -> None:
    """Refuse a strategy that bounds what a single node can change.

    Where few nodes hold a weight, each of them moves it by more than the noise is made for.

    Raises:
        FederationError: it, or one that it wraps, is one of Flower's for differential privacy.
    """
    if name := private_strategy(strategy):
        raise FederationError(
            f"{name} makes its noise for averages over all nodes, and under "
            "prunecast.widths some weights are averaged over few: leave one of the two out"
        )


class Slices:
    """What the classes of one stream train, and what of it nodes may hold.

    Args:
        plans: what each class has left of the model.
        history: what keeps the versions of each that payloads may build on, made anew.

    Attributes:
        statistics: running statistics of each class, as its nodes left them: tensor to array.

    Raises:
        PlanError: of two slices none contains the other.
    """

    def __init__(self, plans: Mapping[str, ChannelPlan], history: Callable[[], History]) -> None:
        ordered = sorted(plans, key=lambda name: plans[name].share, reverse=True)
        for wider, narrower in pairwise(ordered):
            try:
                plans[narrower].since(plans[wider])
            except PlanError as error:
                raise PlanError(
                    f"the slice of class {narrower!r} is not contained in that of {wider!r}: "
                    f"{error}"
                ) from error
        self.plans = dict(plans)
        self.statistics: dict[str, dict[str, NDArray[Any]]] = {}
        self._history = {name: history() for name in plans}

    def history(self, width: str) -> History:
        """Versions of a class that payloads may build on, by short digest."""
        return self._history[width]

    def held(self, digest: bytes) -> PublishedModel | None:
        """The version of a short digest of any class."""
        found = (known.get(digest) for known in self._history.values())
        return next((model for model in found if model is not None), None)

    def latest(self, width: str) -> PublishedModel | None:
        """The last version of a class; None before the first."""
        return self._history[width].latest

    def model(
        self, width: str, whole: PublishedModel, rounded: Callable[[str, NDArray[Any]], RawTensor]
    ) -> PublishedModel:
        """The part of a version that a class trains, with its own running statistics.

        Args:
            width: the class.
            whole: the version.
            rounded: from the name and values of a running statistic to what is published of it.

        Raises:
            PlanError: the version is of another model than the slices.
        """
        tensors = dict(self.plans[width].narrow(whole).tensors)
        for name, array in self.statistics.get(width, {}).items():
            tensors[name] = rounded(name, array)
        model = PublishedModel(tensors, whole.counter)
        return self._history[width].keep(model)

    def master(self, width: str, whole: Arrays) -> dict[str, NDArray[Any]]:
        """The master weights that a class's version stands for."""
        return {**self.plans[width].arrays(whole), **self.statistics.get(width, {})}

    def resume(self, statistics: Mapping[str, Arrays], whole: Arrays) -> None:
        """Go on with the running statistics of a checkpoint.

        Args:
            statistics: of each class; of classes that there are no more they are left.
            whole: master weights of the checkpoint.

        Raises:
            ValueError: a class is of another width.
        """
        for width in statistics.keys() & self.plans.keys():
            for name, array in statistics[width].items():
                if name not in whole or not is_statistic(name):
                    raise ValueError(f"class {width!r}: {name!r} is no statistic of the model")
                if array.shape != self.plans[width].array(name, whole[name]).shape:
                    raise ValueError(f"class {width!r} had another width")
            self.statistics[width] = dict(statistics[width])

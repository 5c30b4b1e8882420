"""Aggregation by overlap: of replies to slices of a model, each weight counts where it was trained.

HeteroFL (Diao et al. 2021) averages each weight over the nodes whose slice has it. Here a strategy
goes on seeing whole models: what a node lacks is filled in with the average of those that have it,
weighted by their examples, and with the master weight where nobody does. An average over all nodes
by the same weights is then the average over the holders, whatever the strategy does with it
afterwards; and one that takes medians or distances is given no values far from all that came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from prunecast.compression.flower import NUMPY
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import is_statistic
from prunecast.server.federation.exchange.replies.lazy import LazyArray
from prunecast.server.federation.reporting.ledger import Entry

if TYPE_CHECKING:
    from prunecast.server.federation.publishing.version import Version

__all__ = ["Overlap"]

_Place = tuple[str, str]  # key of a record, name of a tensor


@dataclass(frozen=True)
class _Member:
    width: str
    plan: ChannelPlan | None
    weight: float
    arrays: Mapping[_Place, Array]

    def part(self, place: _Place, shape: tuple[int, ...]) -> tuple[Any, NDArray[np.float64]] | None:
        """Where it has what of a tensor; None for nothing that belongs there."""
        array, name = self.arrays.get(place), place[1]
        if array is None or (self.plan is not None and is_statistic(name)):
            return None  # statistics are what its own layers see
        at = ... if self.plan is None else self.plan.places(name, shape)
        values = _values(array, shape if at is ... else tuple(axis.size for axis in at))
        return None if values is None else (at, values)


class Overlap:
    """The replies to messages that were sent together, and what they have in common.

    An average is formed when the first array is read that lacks some of it, of the replies that
    were there by then, and kept with them: one dense model more, where any are of slices.
    """

    def __init__(self) -> None:
        self._members: dict[str, _Member] = {}
        self._means: dict[_Place, NDArray[Any]] = {}

    def join(self, message_id: str, content: RecordDict, version: Version, weight: float) -> None:
        """Count a reply.

        Args:
            message_id: of the message that it answers.
            content: its records as they came, decoded.
            version: that it answers.
            weight: number of examples; a reply of none, or of no number of them, counts nowhere.
        """
        records = content.array_records.items()
        arrays = {(key, name): array for key, record in records for name, array in record.items()}
        if 0 < weight < math.inf:
            self._members[message_id] = _Member(version.width, version.plan, weight, arrays)

    def leave(self, message_id: str) -> None:
        """Count the reply to a message no more: it was refused after all."""
        self._members.pop(message_id, None)

    def whole(self, content: RecordDict, version: Version, entry: Entry) -> RecordDict:
        """A reply as a strategy is given it: of the shapes of the whole model.

        Arrays that are not of the slice are left as they are.

        Args:
            content: its records as they came, decoded.
            version: the slice's, that it answers.
            entry: its line in the ledger.
        """
        made = RecordDict(dict(content))
        for key, record in content.array_records.items():
            made[key] = filled = ArrayRecord()
            for name, array in record.items():  # set one by one: the constructor reads them all
                filled[name] = self._filled((key, name), array, version, entry)
        return made

    def _filled(self, place: _Place, array: Array, version: Version, entry: Entry) -> Array:
        name, plan = place[1], version.plan
        known = version.whole.get(name)
        if plan is None or known is None or not _is_numbers(array):
            return array
        own = is_statistic(name)
        if not own and name not in plan.kept:
            return array
        part = version.master[name].shape
        if tuple(array.shape) != part:
            return array
        dtype = np.dtype(array.dtype)
        at = None if own else plan.places(name, known.shape)
        form = partial(self._form, place, array, at, known, dtype)
        return LazyArray(form, dtype, known.shape, entry)

    def _form(
        self,
        place: _Place,
        array: Array,
        at: Any,
        known: NDArray[Any],
        dtype: np.dtype[Any],
    ) -> NDArray[Any]:
        part = array.numpy()  # also where it is not used: it may be damaged
        filled = _as(self._mean(place, known), dtype)
        if at is not None:
            filled[at] = part
        return filled

    def _mean(self, place: _Place, known: NDArray[Any]) -> NDArray[Any]:
        """What holders arrived at on average, in float64; a master weight where there are none."""
        if place not in self._means:
            total, weights = np.zeros(known.shape), np.zeros(known.shape)
            for member in self._members.values():
                part = member.part(place, known.shape)
                if part is not None:
                    total[part[0]] += member.weight * part[1]
                    weights[part[0]] += member.weight
            mean = known.astype(np.float64)
            np.divide(total, weights, out=mean, where=weights > 0)
            self._means[place] = mean
        return self._means[place]

    def statistics(self, version: Version) -> dict[str, NDArray[Any]]:
        """Running statistics of a class, on average over its nodes so far.

        Args:
            version: of its slice, that they answered.
        """
        sums: dict[str, NDArray[Any]] = {}
        weights: dict[str, float] = {}
        for member in self._members.values():
            if member.width != version.width:
                continue
            for (_, name), array in member.arrays.items():
                like = version.master.get(name)
                if like is None or not is_statistic(name):
                    continue
                if (values := _values(array, like.shape)) is not None:
                    sums[name] = sums.get(name, 0.0) + member.weight * values
                    weights[name] = weights.get(name, 0.0) + member.weight
        with np.errstate(over="ignore"):
            means = {
                name: (total / weights[name]).astype(version.master[name].dtype)
                for name, total in sums.items()
            }
        return {name: mean for name, mean in means.items() if np.isfinite(mean).all()}


def _values(array: Array, shape: tuple[int, ...]) -> NDArray[np.float64] | None:
    """What is averaged of an array; None where it is not finite, or of another shape."""
    if not _is_numbers(array) or tuple(array.shape) != shape:
        return None
    values = array.numpy().astype(np.float64)
    return values if np.isfinite(values).all() else None


def _is_numbers(array: Array) -> bool:
    """Whether it can be averaged; the rest is refused where Flower averages."""
    if array.stype != NUMPY:
        return False
    try:
        return np.dtype(array.dtype).kind in "biuf"
    except TypeError:
        return False


def _as(mean: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A copy in the dtype of the replies; averages of integers are integers."""
    if dtype.kind == "f":
        return mean.astype(dtype)
    if dtype.kind == "b":
        return mean >= 0.5
    info = np.iinfo(dtype)
    whole: NDArray[Any] = np.rint(mean).clip(info.min, math.nextafter(float(info.max), 0.0))
    return whole.astype(dtype)

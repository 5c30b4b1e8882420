"""The plan: what is pruned, by which criterion, when, and how much of each tensor.

Criteria score weights by what the server knows. They, schedules and allocations are functions, each
kind with a registry by name (`CRITERIA`, `SCHEDULES`, `ALLOCATIONS`), so that run configs and
scenario files can name them; a new one is a function and an entry.

What nodes contribute to a criterion are statistics: named arrays, one value per weight, in one
small payload. A statistic only ranks weights, so its values travel with one bit of mantissa: within
20 %, and five to six bits each after the codec.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Limits
from prunecast.compression.pruning.masks import ALLOCATIONS, Allocation, Scores
from prunecast.compression.pruning.schedules import NEVER, Schedule
from prunecast.compression.versions import BadPayload, encode_plain, open_plain, rounded_floats

__all__ = [
    "CRITERIA",
    "GRADIENT",
    "Criterion",
    "Knowledge",
    "PlanError",
    "PruningPlan",
    "Statistics",
    "StatisticsMean",
    "Structure",
    "low_rank_factors",
    "pack_statistics",
]

Statistics = Mapping[str, Mapping[str, NDArray[Any]]]
"""Name of a statistic to tensor to values."""
_LARGEST = 1e30  # a mean of such is finite
_BITS = 1  # of mantissa
_OF = "\0"


def pack_statistics(statistics: Statistics) -> bytes:
    """Statistics as a plain payload; what is beyond ±1e30 becomes that."""
    return encode_plain(
        {
            name + _OF + tensor: rounded_floats(
                np.clip(array, -_LARGEST, _LARGEST).astype(np.float32), _BITS
            )
            for name, tensors in statistics.items()
            for tensor, array in tensors.items()
        }
    )


class StatisticsMean:
    """The mean over nodes of what they contribute from one version to the next."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, str], tuple[NDArray[np.float32], float]] = {}

    def add(
        self,
        payload: bytes,
        wanted: tuple[str, ...],
        shapes: Mapping[str, tuple[int, ...]],
        weight: float = 1.0,
    ) -> None:
        """Count what one node contributed.

        Args:
            payload: of `pack_statistics`; what it may allocate is bounded by the next two.
            wanted: names of the statistics that it was asked for.
            shapes: of the tensors of the model that it has.
            weight: how often it counts; once unless that is finite and above 0.

        Raises:
            BadPayload: damaged, not finite, or not what was asked for; nothing was counted.
        """
        size = 4 * len(wanted) * sum(math.prod(shape) for shape in shapes.values())
        opened = open_plain(payload, limits=Limits(decoded_bytes=size, free_bytes=size))
        found: dict[tuple[str, str], NDArray[np.float32]] = {}
        for key, spec in opened.specs.items():
            name, _, tensor = key.partition(_OF)
            asked = name in wanted and spec.shape == shapes.get(tensor)
            if not asked or spec.dtype != np.float32:
                raise BadPayload(f"nobody asked for the statistic {name[:80]!r} of {tensor[:80]!r}")
            try:
                found[name, tensor] = opened[key]
            except CodecError as error:
                raise BadPayload(f"a statistic cannot be decoded: {error}") from error
            if not (np.abs(found[name, tensor]) <= 2 * _LARGEST).all():
                raise BadPayload(f"statistic {name!r} of {tensor!r} holds NaN or infinity")
        weight = weight if math.isfinite(weight) and weight > 0 else 1.0
        for place, values in found.items():
            mean, before = self._means.get(place, (values, 0.0))
            if mean.shape != values.shape:  # the model changed under way
                mean, before = values, 0.0
            share = np.float32(weight / (before + weight))
            self._means[place] = (mean + (values - mean) * share, before + weight)

    def take(self) -> dict[str, dict[str, NDArray[np.float32]]]:
        """The mean so far, by statistic and tensor; begins anew."""
        taken: dict[str, dict[str, NDArray[np.float32]]] = {}
        for (name, tensor), (mean, _) in self._means.items():
            taken.setdefault(name, {})[tensor] = mean
        self._means.clear()
        return taken


GRADIENT = "gradient"
"""The statistic *root mean square over steps of the loss's gradient*, one value per weight."""
_UNMOVED = 1e-3  # part of the root mean square update that weights no client moved are given


@dataclass(frozen=True)
class Knowledge:
    """What the server knows when a version is about to be published.

    Attributes:
        weights: the prunable tensors of the master, finite.
        update: the last aggregated update of them, *this master - the one published before*, for a
            criterion that uses it; lacks tensors that have no predecessor.
        statistics: the nodes' means of what the criterion asks for, where any node has sent it.
    """

    weights: Mapping[str, NDArray[np.floating]]
    update: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)
    statistics: Statistics = field(default_factory=dict)


@dataclass(frozen=True)
class Criterion:
    """Scores weights; those that score lowest are removed first.

    Attributes:
        scores: for every tensor of `Knowledge.weights` scores of 0 or above, same shape, no NaN. A
            function of what is known alone, which gives some ranking while that lacks the update
            or statistics, as at the first version.
        uses_update: whether it needs the update; the server then keeps one master more.
        statistics: what nodes are asked to contribute, by name.
    """

    scores: Callable[[Knowledge], Scores]
    uses_update: bool = False
    statistics: tuple[str, ...] = ()


def _magnitude(known: Knowledge) -> Scores:
    """The weight's absolute value (Han et al. 2015, section 3)."""
    return {name: np.abs(weight) for name, weight in known.weights.items()}


def _taylor(known: Knowledge) -> Scores:
    """First-order estimate of the loss that removing a weight costs: ``|w * gradient|``.

    Molchanov et al. 2019 ("Importance Estimation for Neural Network Pruning", equation 8, without
    the square, which ranks the same). The gradient is the last aggregated update, as server
    optimisers take it (Reddi et al. 2021). Weights it left alone rank among themselves by size.
    """
    return _weighted(known, known.update, least=_UNMOVED)


def _fisher(known: Knowledge) -> Scores:
    """Second-order estimate of that cost, curvature taken from the nodes' gradients.

    ``w**2 * mean(gradient**2) / 2`` (Theis et al. 2018, "Faster gaze prediction with dense networks
    and Fisher pruning", equation 9), as its square root, which ranks the same.
    """
    return _weighted(known, known.statistics.get(GRADIENT, {}))


def _weighted(
    known: Knowledge, factors: Mapping[str, NDArray[np.floating]], least: float = 0.0
) -> Scores:
    """Magnitudes times factors; a tensor without any gets the root mean square of the others'."""
    scores = _magnitude(known)
    squares = sum(float(np.square(f, dtype=np.float64).sum()) for f in factors.values())
    typical = np.float64((squares / max(1, sum(f.size for f in factors.values()))) ** 0.5)
    if not typical:
        return scores
    return {
        name: magnitude * np.maximum(np.abs(factors.get(name, typical)), least * typical)
        for name, magnitude in scores.items()
    }


CRITERIA: dict[str, Criterion] = {
    "magnitude": Criterion(_magnitude),
    "taylor": Criterion(_taylor, uses_update=True),
    "fisher": Criterion(_fisher, statistics=(GRADIENT,)),
}
"""By the name that a policy's `pruning_criterion` has."""


Structure = Literal["weights", "channels"]
"""What is removed as one: single weights, or whole channels with all that is coupled to them."""


class PlanError(ValueError):
    """A plan asks for what cannot be done, or does not fit a model."""


_ADAPTER = re.compile(
    r"(^|[._])(lora|loha|hada|lokr|ia3|oft|boft|vera|dora|adalora|adapters?|prompt_encoder"
    r"|prompt_embeddings?|prefix_encoder)([._0-9]|$)",
    re.IGNORECASE,
)
_FACTORS = ({"a", "b"}, {"down", "up"}, {"left", "right"}, {"u", "v"})
_LOW_RANK = 4  # times smaller than the matrix's sides is the rank of its factors


def low_rank_factors(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Names of adapters' weights, such as LoRA's (Hu et al. 2022, section 4.1).

    They are told by what libraries of adapters call them, or by being two factors of a matrix:
    names that differ in one part, as ``q.A`` and ``q.B`` or ``down`` and ``up``, and shapes
    (rank, n) and (m, rank) with a rank of at most a quarter of n and m.

    Args:
        shapes: name to shape of all tensors of a model.

    Examples:
        >>> sorted(low_rank_factors({"q.A": (4, 64), "q.B": (32, 4), "q.weight": (32, 64)}))
        ['q.A', 'q.B']
    """
    found = {name for name in shapes if _ADAPTER.search(name)}
    factors: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for name, shape in shapes.items():
        parts = re.split(r"[._]", name)
        for at, part in enumerate(parts):
            if len(shape) == 2 and any(part.lower() in pair for pair in _FACTORS):
                factors.setdefault((*parts[:at], "*", *parts[at + 1 :]), []).append((part, name))
    for group in factors.values():
        for one, first in group:
            for other, second in group:
                (rank, n), (m, inner) = shapes[first], shapes[second]
                is_product = {one.lower(), other.lower()} in _FACTORS and rank == inner
                if is_product and rank * _LOW_RANK <= min(n, m):
                    found |= {first, second}
    return found


@dataclass(frozen=True)
class PruningPlan:
    """What a publisher prunes; by default nothing.

    Attributes:
        schedule: when, and how much at the end.
        criterion: what is removed first.
        allocation: how the sparsity is spread over tensors.
        min_size: tensors with fewer elements are never pruned.
        exclude: name patterns (shell style) that are never pruned.
        adapters: whether low-rank factors may be pruned; they are small already, and what is
            removed from one factor is lost in a whole row or column of their product.
        records: keys of the array records that are pruned.
        structure: "weights". Channels are chosen when a release is made (`choose_channels`).

    Raises:
        PlanError: rounds cannot prune that structure.
    """

    schedule: Schedule = NEVER
    criterion: Criterion = CRITERIA["magnitude"]
    allocation: Allocation = ALLOCATIONS["layer"]
    min_size: int = 1024
    exclude: tuple[str, ...] = ()
    adapters: bool = False
    records: tuple[str, ...] = ("arrays",)
    structure: Structure = "weights"

    def __post_init__(self) -> None:
        if self.structure != "weights":
            raise PlanError(
                f"{self.structure!r} cannot be pruned in rounds: choose 'weights', and narrow "
                "channels in the release (prunecast release create --variant structured)"
            )

    def prunable(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The tensors that may be pruned: matrices and kernels of some size, and no adapters."""
        left = set() if self.adapters else low_rank_factors({n: a.shape for n, a in arrays.items()})
        return {
            name: array
            for name, array in arrays.items()
            if array.ndim >= 2
            and array.size >= self.min_size
            and name not in left
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.exclude)
        }

    def masks(self, version: float, known: Knowledge) -> dict[str, NDArray[np.bool_]]:
        """Masks of a version's prunable tensors; none while the schedule prunes nothing."""
        sparsity = self.schedule(version)
        if sparsity <= 0 or not known.weights:
            return {}
        return self.allocation(self.criterion.scores(known), sparsity)

    def wanted(self, version: float, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the statistics to ask of the nodes that train from a version.

        They cost bytes: only while the version to come prunes more than this one, or prunes by
        what is not `known` yet.
        """
        now, then = self.schedule(version), self.schedule(version + 1)
        return tuple(
            s for s in self.criterion.statistics if then > now or (then and s not in known)
        )

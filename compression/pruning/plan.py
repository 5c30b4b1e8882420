"""The plan: what is pruned, by which criterion, when, and how much of each tensor.

Criteria, schedules and allocations are functions, each kind with a registry by name (`CRITERIA`,
`SCHEDULES`, `ALLOCATIONS`), so that run configs and scenario files can name them; a new one is a
function and an entry.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.allocation import ALLOCATIONS, Allocation
from prunecast.compression.pruning.criteria import CRITERIA, Criterion, Knowledge
from prunecast.compression.pruning.masks import Masks
from prunecast.compression.pruning.schedules import NEVER, LayerSchedule, Schedule

__all__ = [
    "ChannelSchedule",
    "PlanError",
    "PruningPlan",
    "Structure",
    "low_rank_factors",
]

Structure = Literal["weights", "channels"]
"""What is removed as one: single weights, or whole channels with all that is coupled to them."""


class PlanError(ValueError):
    """A plan asks for what cannot be done, or does not fit a model."""


@dataclass(frozen=True)
class ChannelSchedule:
    """When channels go, and how many.

    Attributes:
        share: of the channels of every group that remain at the end, 0 < share <= 1.
        at: rounds after whose training some go, ascending; each time by the same factor.

    Raises:
        PlanError: a share or a round that cannot be.

    Examples:
        >>> schedule = ChannelSchedule(0.25, (4, 8))
        >>> [schedule.after(number) for number in (3, 4, 7, 8, 20)]
        [1.0, 0.5, 0.5, 0.25, 0.25]
    """

    share: float = 1.0
    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise PlanError(f"the share of channels that remain lies in (0, 1], not {self.share}")
        if list(self.at) != sorted(set(self.at)) or any(number < 1 for number in self.at):
            raise PlanError(f"channels go after ascending rounds of 1 or more, not {self.at}")
        if (self.share < 1) != bool(self.at):
            raise PlanError("channels that go need both a share below 1 and rounds")

    def after(self, number: int) -> float:
        """Share that remains once a round has been trained, counted from 1."""
        passed = sum(number >= at for at in self.at)
        return float(self.share ** (passed / len(self.at))) if self.at else 1.0


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
        channels: when whole channels go, and how many; see `choose_channels`.
    """

    schedule: Schedule = NEVER
    criterion: Criterion = CRITERIA["magnitude"]
    allocation: Allocation = ALLOCATIONS["layer"]
    min_size: int = 1024
    exclude: tuple[str, ...] = ()
    adapters: bool = False
    records: tuple[str, ...] = ("arrays",)
    channels: ChannelSchedule = ChannelSchedule()

    def structures(self, rounds: int) -> tuple[Structure, ...]:
        """What such a plan removes as one within so many rounds: channels, weights, both or none.

        >>> PruningPlan(channels=ChannelSchedule(0.5, (4,))).structures(10)
        ('channels',)
        """
        found: list[Structure] = ["channels"] if self.channels.after(rounds) < 1 else []
        return (*found, "weights") if self.schedule(rounds + 1) else tuple(found)

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

    def masks(
        self, version: float, known: Knowledge, kept: Masks | None = None
    ) -> dict[str, NDArray[np.bool_]]:
        """Masks of a version's prunable tensors; none while the schedule prunes nothing.

        Args:
            version: by the schedule's clock.
            known: of the weights.
            kept: masks outside of which nothing comes back; None or lacking a tensor where any
                weight may.
        """
        layered = self.schedule if isinstance(self.schedule, LayerSchedule) else None
        sparsity = layered.final if layered is not None else self.schedule(version)
        if self.stage(version, len(known.weights)) <= 0 or not known.weights:
            return {}
        kept = kept or {}
        scores = self.criterion.scores(known)
        masks = self.allocation({n: _among(s, kept.get(n)) for n, s in scores.items()}, sparsity)
        if layered is not None:
            due = list(known.weights)[: layered.due(version, len(known.weights))]
            masks = {name: kept.get(name, masks[name]) for name in due}
        return masks

    def stage(self, version: float, tensors: int) -> float:
        """A number that rises wherever the schedule removes more: what its pruning events are.

        Args:
            version: by the schedule's clock.
            tensors: how many may be pruned.
        """
        if isinstance(self.schedule, LayerSchedule):
            return self.schedule.due(version, tensors) if self.schedule.final else 0
        return self.schedule(version)

    def wanted(self, version: float, known: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of the statistics to ask of the nodes that train from a version.

        They cost bytes: only while the version to come prunes more than this one, or prunes by
        what is not `known` yet.
        """
        now, then = self.schedule(version), self.schedule(version + 1)
        return tuple(
            s for s in self.criterion.statistics if then > now or (then and s not in known)
        )


def _among(scores: NDArray[np.floating], kept: NDArray[np.bool_] | None) -> NDArray[np.floating]:
    """Scores of which those that are not kept are the lowest: 0, below all others."""
    if kept is None or kept.shape != scores.shape:
        return scores
    return np.where(kept, np.maximum(scores, np.finfo(scores.dtype).tiny), scores.dtype.type(0))

"""The plan: what is pruned, by which criterion, when, and how much of each tensor.

Criteria, schedules and allocations are functions, each kind with a registry by name (`CRITERIA`,
`SCHEDULES`, `ALLOCATIONS`), so that run configs and scenario files can name them; a new one is a
function and an entry. Patterns have a notation (`parse_pattern`).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.allocation import ALLOCATIONS, Allocation, of_the_rest
from prunecast.compression.pruning.criteria import CRITERIA, Criterion, Knowledge
from prunecast.compression.pruning.masks import Masks
from prunecast.compression.pruning.patterns import Pattern
from prunecast.compression.pruning.schedules import AT_LAST, NEVER, LayerSchedule, Schedule

__all__ = [
    "ChannelSchedule",
    "PlanError",
    "PruningPlan",
    "Shares",
    "is_named",
    "is_weight",
    "low_rank_factors",
    "tied_weights",
]


class PlanError(ValueError):
    """A plan asks for what cannot be done, or does not fit a model."""


class Shares(NamedTuple):
    """What remains, or is to, of the channels, heads and residual layers that a module has."""

    channels: float = 1.0
    heads: float = 1.0
    layers: float = 1.0

    def text(self) -> str:
        """Those of which some go, for people.

        >>> Shares(channels=0.5, layers=0.75).text()
        '50% of the channels and 75% of the layers'
        """
        parts = zip(self._fields, self, strict=True)
        return " and ".join(f"{part:.0%} of the {name}" for name, part in parts if part < 1)


@dataclass(frozen=True)
class ChannelSchedule:
    """When channels, heads and residual layers go, and how many.

    Attributes:
        share: of the channels of every group that remain at the end, 0 < share <= 1.
        at: rounds after whose training some go, ascending; each time by the same factor.
        heads: share of the heads of every attention layer that remain at the end.
        layers: share of the residual layers that remain at the end.

    Raises:
        PlanError: a share or a round that cannot be.

    Examples:
        >>> schedule = ChannelSchedule(0.25, (4, 8))
        >>> [schedule.after(number) for number in (3, 4, 7, 8, 20)]
        [1.0, 0.5, 0.5, 0.25, 0.25]
    """

    share: float = 1.0
    at: tuple[int, ...] = ()
    heads: float = 1.0
    layers: float = 1.0

    def __post_init__(self) -> None:
        for what, share in zip(("channels", "heads", "layers"), self._shares, strict=True):
            if not 0 < share <= 1:
                raise PlanError(f"the share of {what} that remain lies in (0, 1], not {share}")
        if list(self.at) != sorted(set(self.at)) or any(number < 1 for number in self.at):
            raise PlanError(f"channels go after ascending rounds of 1 or more, not {self.at}")
        if (min(self._shares) < 1) != bool(self.at):
            raise PlanError("channels that go need both a share below 1 and rounds")

    @property
    def _shares(self) -> Shares:
        return Shares(self.share, self.heads, self.layers)

    def after(self, number: int) -> float:
        """Share of the channels that remains once a round has been trained, counted from 1."""
        return self.shares(number).channels

    def shares(self, number: int) -> Shares:
        """What remains of channels, heads and layers once a round has been trained."""
        passed = sum(number >= at for at in self.at) / max(1, len(self.at))
        return Shares(*(float(share**passed) for share in self._shares))


# Biases, scales, and what weight_norm and quantisation multiply weights with.
_NO_WEIGHT = re.compile(
    r"(^|[^a-z])(bias|scales?|scales?_inv|absmax|zeros?|zero_?points?|weight\w*_g)$"
    r"|\bparametrizations\.[^.]+\.original0$",
    re.IGNORECASE,
)
_ADAPTER = re.compile(
    r"(^|[._])(lora|loha|hada|lokr|ia3|oft|boft|vera|dora|adalora|adapters?|prompt_encoder"
    r"|prompt_embeddings?|prefix_encoder)([._0-9]|$)",
    re.IGNORECASE,
)
_FACTORS = ({"a", "b"}, {"down", "up"}, {"left", "right"}, {"u", "v"})
_NEAR = 1e-6
_LOW_RANK = 4  # times smaller than the matrix's sides is the rank of its factors


def is_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix or a kernel, by its shape and, where that misleads, its name.

    One value a channel is a vector whatever axes of length 1 it has besides, as a scale of a
    residual branch or the token of a class; with two axes it may be a layer of one output. Biases
    are none of any shape, nor are a causal mask that is called so and scales of normalised or
    quantised weights, each of which stands for many.

    Examples:
        >>> is_weight("head.weight", (1, 512)), is_weight("block.layer_scale", (512, 1, 1))
        (True, False)
        >>> is_weight("h.0.attn.bias", (1, 1, 64, 64)), is_weight("q_proj.scales", (32, 512))
        (False, False)
    """
    vector = len(shape) != 2 and sum(n != 1 for n in shape) <= 1
    return len(shape) > 1 and not vector and not _NO_WEIGHT.search(name)


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns (shell style) is a tensor's name, or matches it.

    >>> is_named("blocks[0].weight", ["blocks[0].*"]), is_named("['kernel']", ["['kernel']"])
    (False, True)
    """
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


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


def tied_weights(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """Names of tensors that hold what one before them holds, and the name of that.

    A module's ``state_dict()`` lists weights that two layers share under both names, so a server
    sees two equal arrays at every version. Equal for the time being are also layers that were
    copied and not trained yet; all zeros are nobody's copy.

    Args:
        arrays: of any shapes; those of less than two axes are left out.

    Examples:
        >>> table = np.arange(6.0).reshape(2, 3)
        >>> tied_weights({"tokens": table, "enter": table + 1, "head": table.copy()})
        {'head': 'tokens'}
    """
    found: dict[str, str] = {}
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, array in arrays.items():
        if array.ndim < 2 or not array.any():
            continue
        # one row tells nearly all apart before anything is compared whole
        others = alike.setdefault((array.shape, array.dtype, array[0].tobytes()), [])
        first = next((n for n in others if np.array_equal(arrays[n], array)), None)
        if first is None:
            others.append(name)
        else:
            found[name] = first
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
        pattern: which weights go together; None for each by itself.
        seed: of criteria that draw.

    Raises:
        PlanError: N of every M weights with an allocation that gives tensors different sparsities.
    """

    schedule: Schedule = NEVER
    criterion: Criterion = CRITERIA["magnitude"]
    allocation: Allocation = ALLOCATIONS["layer"]
    min_size: int = 1024
    exclude: tuple[str, ...] = ()
    adapters: bool = False
    records: tuple[str, ...] = ("arrays",)
    channels: ChannelSchedule = ChannelSchedule()
    pattern: Pattern | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        fixed = self.pattern is not None and self.pattern.sparsity is not None
        if fixed and self.allocation is not ALLOCATIONS["layer"]:
            raise PlanError(
                "N of every M weights is the same sparsity for every tensor: choose the scope "
                "'layer'"
            )

    def prunable(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The tensors that may be pruned: matrices and kernels of some size, and no adapters."""
        left = set() if self.adapters else low_rank_factors({n: a.shape for n, a in arrays.items()})
        return {
            name: array
            for name, array in arrays.items()
            if is_weight(name, array.shape)
            and array.size >= self.min_size
            and name not in left
            and not is_named(name, self.exclude)
        }

    def check(
        self,
        arrays: Mapping[str, NDArray[Any]],
        *,
        trained: bool = True,
        ties: Mapping[str, str] | None = None,
    ) -> None:
        """Refuse a model that cannot be pruned as the plan says.

        Args:
            arrays: all of the model.
            trained: whether equal weights are tied, not only not trained yet.
            ties: as `Knowledge` has them.

        Raises:
            PlanError: nothing is prunable, the pattern does not divide a tensor or comes to another
                sparsity, a layer would vanish, or tied weights would be pruned apart; says what to
                do.
        """
        weights = self.prunable(arrays)
        if not weights:
            raise PlanError(
                "the model has no tensor that may be pruned: none is a matrix or kernel of at "
                f"least {self.min_size} elements that no pattern excludes, or all are adapters"
            )
        ties = tied_weights(arrays) if ties is None else ties
        apart = [pair for pair in ties.items() if (pair[0] in weights) != (pair[1] in weights)]
        if apart and trained:
            raise PlanError(
                "tied weights would be pruned apart: {!r} and {!r} are the same, and only one of "
                "them is excluded; exclude both or neither".format(*apart[0])
            )
        final = self.schedule(AT_LAST)
        single = {name: array for name, array in weights.items() if name not in ties}
        unit = 1
        if self.pattern is not None:
            misfits = {n: w for n, a in weights.items() if (w := self.pattern.misfit(a.shape))}
            if misfits:
                name, why = next(iter(misfits.items()))
                more = f" (and {len(misfits) - 1} more: {_few(misfits)})" * (len(misfits) > 1)
                raise PlanError(
                    f"the pattern does not divide {name!r} of shape "
                    f"{list(weights[name].shape)}{more}: {why}; exclude what it does not divide"
                )
            comes_to = self.pattern.sparsity
            if comes_to is not None and final and abs(final - comes_to) > _NEAR:
                raise PlanError(
                    f"the pattern comes to a sparsity of {comes_to:g}, not {final:g}: give that"
                )
            unit = self.pattern.unit
        units = sum(array.size // unit for array in single.values())
        left = units - int(final * units)
        if left < len(single) and self.allocation is not ALLOCATIONS["layer"]:
            smallest = min(single, key=lambda name: single[name].size)
            raise PlanError(
                f"sparsity {final:g} leaves {left} of {units} for {len(single)} tensors, so layers "
                f"such as {smallest!r} would vanish: lower it, or exclude them"
            )

    def masks(
        self, version: float, known: Knowledge, kept: Masks | None = None
    ) -> dict[str, NDArray[np.bool_]]:
        """Masks of a version's prunable tensors; none while the schedule prunes nothing.

        Tied weights get the mask of the first of them, and count once.

        Args:
            version: by the schedule's clock.
            known: of the weights.
            kept: masks outside of which nothing comes back; None or lacking a tensor where any
                weight may.

        Raises:
            PlanError: a layer would vanish.
        """
        layered = self.schedule if isinstance(self.schedule, LayerSchedule) else None
        sparsity = layered.final if layered is not None else self.schedule(version)
        if self.stage(version, len(known.weights)) <= 0 or not known.weights:
            return {}
        kept = kept or {}
        ties = tied_weights(known.weights) if known.ties is None else known.ties
        scores = self.criterion.scores(known)
        scores = {n: _among(score, kept.get(n)) for n, score in scores.items() if n not in ties}
        if layered is not None and self.allocation is not ALLOCATIONS["layer"]:
            unit = 1 if self.pattern is None else self.pattern.unit
            scores, sparsity = of_the_rest(scores, kept, sparsity, unit)
        try:
            if self.pattern is None:
                masks = self.allocation(scores, sparsity)
            else:
                masks = self.pattern.masks(scores, sparsity, self.allocation)
        except ValueError as error:
            raise PlanError(str(error)) from error
        if layered is not None:
            due = list(known.weights)[: layered.due(version, len(known.weights))]
            masks = {name: mask for name, mask in {**masks, **kept}.items() if name in due}
        return {
            name: masks[first] for name in known.weights if (first := ties.get(name, name)) in masks
        }

    def stage(self, version: float, tensors: int) -> float:
        """A number that rises wherever the schedule removes more: what its pruning events are.

        Args:
            version: by the schedule's clock.
            tensors: how many may be pruned.
        """
        if isinstance(self.schedule, LayerSchedule):
            return self.schedule.due(version, tensors) if self.schedule.final else 0
        return self.schedule(version)

    def wanted(self, version: float, known: Mapping[str, Any], ahead: float = 1) -> tuple[str, ...]:
        """Names of the statistics to ask of the nodes that train from a version.

        They cost bytes: only while the version to come, at most so far `ahead`, may prune more, or
        prunes by what is not `known` yet. One that asks once does so as long as it knows nothing.
        """
        if self.criterion.once:
            asked = self.criterion.statistics if self.schedule(AT_LAST) > 0 else ()
            return tuple(name for name in asked if name not in known)
        now, then = self.schedule(version), self.schedule(version + ahead)
        return tuple(
            s for s in self.criterion.statistics if then > now or (then and s not in known)
        )


def _among(scores: NDArray[np.floating], kept: NDArray[np.bool_] | None) -> NDArray[np.floating]:
    """Scores of which those that are not kept are the lowest: 0, below all others."""
    if kept is None or kept.shape != scores.shape:
        return scores
    scores = scores.astype(np.result_type(scores, np.float32))  # float16 has weights below that
    least = np.finfo(np.float32).tiny  # allocations square it in float64
    return np.where(kept, np.maximum(scores, least), scores.dtype.type(0))


def _few(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[1:4]) + (", ..." if len(listed) > 4 else "")

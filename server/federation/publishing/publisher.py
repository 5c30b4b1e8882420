"""From master weights to the published versions of one stream."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from prunecast.compression.codec import QuantiseError
from prunecast.compression.flower import dense_arrays
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.operations import MaskCost
from prunecast.compression.pruning.plan import PruningPlan, low_rank_factors
from prunecast.compression.pruning.statistics import Statistics
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import (
    MAX_MODEL_BYTES,
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Seed,
    Tensor,
    draw_like,
    rounded_floats,
)
from prunecast.server.federation.errors import FederationError, NonFiniteModel
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.budgets import Coarseness, Proposal
from prunecast.server.federation.publishing.channel_stream import ChannelStream
from prunecast.server.federation.publishing.lattices import Lattices
from prunecast.server.federation.publishing.masks.mask_state import MaskState
from prunecast.server.federation.publishing.participation import Changes
from prunecast.server.federation.publishing.version import Version

__all__ = ["Publisher"]

_RECENT = 4  # contents whose version is remembered, so that train and evaluate share one
_NO_ROUND = (
    "No message states its round, so pruning takes every batch of messages with new weights for "
    "one: put server-round into a config record, as Flower's strategies do, or call "
    "grid.begin_round(number)."
)
_NONE_HELD = MaskState()
_UNBOUND = Coarseness()


class Publisher(ChannelStream):
    """Publishes the versions of one stream (one record of one run).

    ``q = round(master / step) * mask``: the master keeps what rounding dropped, so a later version
    repairs it; `Lattices` says how.

    Args:
        policy: steps, what travels exactly, how many versions are kept.
        stream: identifier of the stream, part of every payload.
        plan: what is pruned of a model; None for a record that is none, such as control variates,
            whose lattices are all fine.

    A tensor that cannot lie on its lattice travels exactly from then on: one that holds infinity to
    begin with, such as a causal mask or the range of an observer, or one whose values are too large
    for its spread. Integers that an average made floats of are integers again.

    Attributes:
        pruner: chooses the masks; told what nodes contribute and measure.
        mask_cost: what that took so far.
        changes: of the master; where nodes may be lazy.
        clock: the pruning schedule's round of the last version, counted from 1.
        channels: which channels remain of the module that everybody's code makes; None for all.
        choose: which channels, heads and layers go, where automatic pruning tries how many; None
            for nobody.
        tried: plans that it tries, by the shares of what is there that they leave.
        history: versions that payloads may build on.
        holders: says which version every node holds.
        coarseness: says how coarse the next version is to be; by default as it is proposed.
        slices: what nodes of other width classes than the whole model's train; None for no classes.
    """

    def __init__(self, policy: Policy, stream: bytes, plan: PruningPlan | None = None) -> None:
        super().__init__(policy, stream, plan)
        self.mask_cost = MaskCost()
        self.changes = Changes()
        self._recent: OrderedDict[str, Version] = OrderedDict()
        self._lattices = Lattices(policy)
        self.coarseness: Callable[[Proposal], Coarseness] = lambda proposal: _UNBOUND
        self._fineness = 1.0  # part of its usual step that learning and pruning give the lattice
        self._counter = self.clock = 0
        self._before_resume = 0  # rounds of the run that is resumed, where this one's begin anew
        self._trained = 0  # the last round that a message stated to train
        self._occasion: object = None
        self._exact: set[str] = set()
        self._finite: set[str] = set()
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._seeded: tuple[bytes, Seed] | None = None

    def refine(self) -> None:
        """Make the lattices as fine as pruning and the budget have them."""
        part, early = self.pruner.fineness
        finer = round(math.log2(self._fineness / part)) + self._lattices.settles(early)
        self._fineness = part
        proposal = Proposal(finer, self._refinement_bits(), self.pruner.may_thin)
        chosen = self.coarseness(proposal)
        self._lattices.refine(part * 2.0**chosen.doublings, early)
        self.pruner.thin(chosen.halvings)

    def _refinement_bits(self) -> int:
        """Weights of the last version that half of its step says something new of."""
        if self._latest is None:
            return 0
        return sum(
            int(np.count_nonzero(tensor.q)) if tensor.pruned else tensor.q.size
            for tensor in self._latest.tensors.values()
            if isinstance(tensor, LatticeTensor)
        )

    @property
    def position(
        self,
    ) -> tuple[int, dict[str, float], int, tuple[float, ...], MaskState, tuple[float, ...]]:
        """Number of the last version, step of every lattice tensor, clock, progress, masks, search.

        The last three as `Pruner.resume` takes them.
        """
        steps, pruner = dict(self._lattices.steps), self.pruner
        pruned = pruner.progress.position, pruner.state, pruner.searched
        return self._counter, steps, self.clock, *pruned

    def resume(
        self,
        counter: int,
        steps: Mapping[str, float],
        clock: int,
        progress: Sequence[float] = (),
        masks: MaskState = _NONE_HELD,
        searched: Sequence[float] = (),
        channels: ChannelPlan | None = None,
        tried: Sequence[ChannelPlan] = (),
    ) -> None:
        """Go on where another publisher's `position` was, with the same master and channels."""
        self.channels, self.tried = channels, {plan.shares: plan for plan in tried}
        self._counter, self._lattices.steps = counter, dict(steps)
        self.clock = self._before_resume = max(0, clock - 1)  # until that master is published
        self.pruner.resume(progress, masks, searched)
        if progress:
            self._lattices.fineness, self._lattices.early = self.pruner.fineness
            self._fineness = self._lattices.fineness

    def remove(self, plan: ChannelPlan) -> None:
        """See `ChannelStream.remove`."""
        super().remove(plan)
        self._recent.clear()

    def expect(self, rounds: int) -> None:
        """Fit the schedule of pruning to a number of rounds, those before a resume included."""
        self.pruner.expect(rounds)

    def draw(
        self, like: Mapping[str, NDArray[Any]], seed: int, most: int = MAX_MODEL_BYTES
    ) -> dict[str, NDArray[Any]]:
        """Draw a from-scratch model whose keyframe is its seed.

        Args:
            like: a freshly initialised model; layout, means and spreads are taken from it.
            seed: 0 to 2**64 - 1.
            most: largest model, in bytes, that nodes let a seed stand for; a larger one travels
                whole.

        Returns:
            The master weights to begin with, which lie on the lattice exactly.

        Raises:
            FederationError: the stream has begun already.
        """
        if self._counter:
            raise FederationError("a model can only be drawn before the first version is published")
        # nothing drawn has learned anything yet
        self.pruner.progress.early = self.pruner.plan is not None
        self.refine()
        model, source = draw_like(self._on_lattice(like, {}), seed)
        for name, tensor in model.tensors.items():
            if isinstance(tensor, LatticeTensor):
                self._lattices.steps[name] = tensor.step
        if sum(spec.nbytes for spec in model.specs.values()) <= most:
            # receivers refuse to be told by a few bytes to allocate more than that
            self._seeded = (model.digest, source)
        return model.arrays()

    def version_of(
        self,
        record: ArrayRecord,
        content_id: str,
        *,
        stated: int = 0,
        training: bool = True,
        occasion: object = None,
    ) -> Version:
        """The version of a content, published now unless it already was.

        Args:
            record: the dense arrays, as the strategy hands them over.
            content_id: digest of the record's content.
            stated: the round that the message states which it is for; 0 for none.
            training: whether that message asks for training; else the content is what the stated
                round arrived at, which the next one trains.
            occasion: contents without a stated round that have it in common are of one round.

        Raises:
            NonFiniteModel: a trained tensor became NaN or infinite.
        """
        if stated and training:
            self._trained = max(self._trained, stated)
        version = self._recent.pop(content_id, None)
        if version is None:
            clock = self.clock
            if stated or self._trained:
                now = stated if stated and training else max(stated, self._trained) + 1
                clock = max(clock, now + self._before_resume)
            elif occasion is None or occasion is not self._occasion:
                clock += 1
                if self.policy.target and self.pruner.plan is not None and clock == 2:
                    log(WARNING, _NO_ROUND)
            self._occasion = occasion
            statistics = self.pruner.statistics.take()
            version = self._publish(self.narrowed(dense_arrays(record)), statistics, clock)
            version.whole = version.master
        self._recent[content_id] = version
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return version

    def slice_of(self, version: Version, width: str) -> Version:
        """The part of a version that a class of nodes trains; all of it for "".

        Raises:
            PlanError: the version is of another model than the slices.
        """
        if not width or self.slices is None:
            return version
        if width not in version.slices:
            last = self.slices.latest(width)
            model = self.slices.model(
                width, version.model, lambda name, array: self._off_lattice(name, array, last)
            )
            version.slices[width] = Version(
                *(model, self.slices.master(width, version.master)),
                width=width,
                plan=self.slices.plans[width],
                whole=version.whole,
            )
        return version.slices[width]

    def publish(
        self, master: Mapping[str, NDArray[Any]], statistics: Statistics | None = None
    ) -> Version:
        """Make the next version, of the next round.

        Args:
            master: name to array, any shapes.
            statistics: what nodes contributed since the last version, by statistic and tensor; what
                is not given stays as it was.

        Raises:
            NonFiniteModel: a trained tensor became NaN or infinite.
        """
        return self._publish(master, statistics, self.clock + 1)

    def _publish(
        self, master: Mapping[str, NDArray[Any]], statistics: Statistics | None, clock: int
    ) -> Version:
        tried = self.policy.tried_structures
        if tried and self.pruner.plan is not None and self.choose is None:
            raise FederationError(
                f"the policy tries how many {' and '.join(tried)} can go, and nobody says which: "
                "prunecast.server.Run(channels=...) does, or grid.try_channels(choose)"
            )
        self._check_finite(master)
        self.clock = clock
        master = self._restored(self.as_published(master))
        lattice = {name: array for name, array in master.items() if not self._is_exact(name, array)}
        self._counter += 1
        if self.policy.lazy:
            self.changes.observe(lattice)
        if self.pruner.plan is not None:
            self.pruner.observe(lattice, clock, waits=self.settled is not None)
            self.refine()
        first = self._counter == 1
        with self.mask_cost.measuring() if self.policy.target else nullcontext():
            masks = self.pruner.masks(lattice, clock, statistics or {}, model=master, first=first)
        master = self.pruner.adjusted(master, clock)
        model = self._keep(self._without_tried(self._on_lattice(master, masks), master))
        seed = None
        if self._seeded is not None and self._seeded[0] == model.digest:
            seed = self._seeded[1]
        return Version(model, master, seed)

    def restate(
        self, content_id: str, statistics: Mapping[str, NDArray[Any]], as_content_id: str
    ) -> None:
        """Publish the latest version again with other running statistics: weights stay.

        Args:
            content_id: of what the latest version was published from.
            statistics: name to array, of tensors that have no lattice.
            as_content_id: of the same content with these.
        """
        before, statistics = self._recent[content_id], self._restored(statistics)
        self._counter += 1
        tensors = {
            name: self._off_lattice(name, statistics[name], before.model)
            if name in statistics
            else tensor
            for name, tensor in before.model.tensors.items()
        }
        model = self._keep(PublishedModel(tensors, self._counter))
        self._recent[as_content_id] = Version(model, {**before.master, **statistics})

    def as_published(self, master: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Master weights in which what was published as integers first is integers again.

        Strategies average a counter of int64 in floats, and a client's answer has its own dtype.
        """
        arrays = dict(master)
        for name, array in arrays.items():
            dtype = self._dtypes.get(name, array.dtype)
            if dtype.kind not in "biu" or array.dtype.kind != "f" or not np.isfinite(array).all():
                continue
            nearest = np.asarray(np.rint(array))  # of a single number it makes no array
            if dtype.kind != "b":
                bounds = np.iinfo(dtype)
                if array.size and not (bounds.min <= nearest.min() and nearest.max() <= bounds.max):
                    continue
            arrays[name] = nearest.astype(dtype)
        return arrays

    def master_of(self, content_id: str) -> Mapping[str, NDArray[Any]] | None:
        """The master weights that a content was published from, if it was lately.

        They are not the content itself where a pruning event rewound them.
        """
        version = self._recent.get(content_id)
        return None if version is None else version.master

    def _check_finite(self, master: Mapping[str, NDArray[Any]]) -> None:
        finite = set()
        for name, array in master.items():
            if not self.policy.is_trained(name, array.dtype, array.size):
                continue
            if np.isfinite(array).all():
                finite.add(name)
                continue
            known = name in self._finite or name in self._exact
            if name in self._finite or np.isnan(array).any():
                what = (
                    "the training diverged"
                    if known
                    else "does it belong there? Name it in lossless"
                )
                raise NonFiniteModel(
                    f"tensor {name!r} of the global model holds NaN or infinity: {what}; nothing "
                    "was sent"
                )
            if not known:
                self._travels_exactly(name, "it holds infinity from the start")
        self._finite = finite
        self._dtypes = {n: self._dtypes.get(n, array.dtype) for n, array in master.items()}

    def _travels_exactly(self, name: str, why: str) -> None:
        if self.policy.down_step > 0:
            log(INFO, "Tensor %r travels exactly, not on the lattice: %s.", name, why)
        self._exact.add(name)

    def _is_exact(self, name: str, array: NDArray[Any]) -> bool:
        dtype = self._dtypes.get(name, array.dtype)  # what was no float is no weight
        return name in self._exact or self.policy.is_lossless(name, dtype, array.size)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Statistics to ask of the nodes that train from the last version."""
        return self.pruner.wanted

    def _on_lattice(
        self, master: Mapping[str, NDArray[Any]], masks: Mapping[str, NDArray[np.bool_]]
    ) -> PublishedModel:
        tensors: dict[str, Tensor] = {}
        holds = self.pruner.holds
        aligned = self.policy.pruning_align and self.pruner.by_size and not holds
        factors = low_rank_factors({name: array.shape for name, array in master.items()})
        self._lattices.look(master)
        for name, array in master.items():
            if not self._is_exact(name, array):
                last = self._latest.tensors.get(name) if self._latest is not None else None
                try:
                    tensors[name] = self._lattices.tensor(
                        *(name, array, masks.get(name), last),
                        fine=self.pruner.plan is None or array.ndim < 2 or name in factors,
                        aligned=aligned,
                        held=holds,
                    )
                    continue
                except QuantiseError as error:
                    self._travels_exactly(name, str(error))
            tensors[name] = self._off_lattice(name, array, self._latest)
        return PublishedModel(tensors, self._counter)

    def _off_lattice(
        self, name: str, array: NDArray[Any], latest: PublishedModel | None
    ) -> RawTensor:
        bits = self.policy.mantissa_bits(name, array.dtype, array.size)
        if not bits:
            return RawTensor(array)
        held = latest.tensors.get(name) if latest is not None else None
        last = None
        if isinstance(held, RawTensor) and (held.shape, held.dtype) == (array.shape, array.dtype):
            last = held.values
        hysteresis = self.policy.hysteresis
        return RawTensor(rounded_floats(array, bits, last=last, hysteresis=hysteresis))

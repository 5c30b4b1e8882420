"""From master weights to published versions, to what nodes hold, and to the payload each needs."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from logging import INFO, WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from prunecast.compression.codec import QuantiseError
from prunecast.compression.flower import dense_arrays, payload_record, stream_id
from prunecast.compression.flower.internals import Measured, log
from prunecast.compression.pruning.operations import MaskCost
from prunecast.compression.pruning.plan import PlanError, PruningPlan, low_rank_factors
from prunecast.compression.pruning.statistics import Statistics
from prunecast.compression.pruning.structure.channels import ChannelChooser, ChannelPlan
from prunecast.compression.versions import (
    MAX_MODEL_BYTES,
    Capabilities,
    InvalidModel,
    Kind,
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Seed,
    Tensor,
    UpdateReader,
    draw_like,
    encode_delta,
    encode_keyframe,
    rounded_floats,
    short,
)
from prunecast.server.federation.errors import FederationError, NonFiniteModel
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.budgets import Budget
from prunecast.server.federation.publishing.classes import Treatment
from prunecast.server.federation.publishing.history import History, Holders
from prunecast.server.federation.publishing.lattices import Lattices
from prunecast.server.federation.publishing.participation import Changes, Participation
from prunecast.server.federation.publishing.pruner import MaskState, Pruner
from prunecast.server.federation.publishing.widths import Slices

__all__ = ["EncodedPayload", "NodeState", "Publisher", "Streams", "Version"]

_RECENT = 4  # contents whose version is remembered, so that train and evaluate share one
_NO_ROUND = (
    "No message states its round, so pruning takes every batch of messages with new weights for "
    "one: put server-round into a config record, as Flower's strategies do, or call "
    "grid.begin_round(number)."
)
_LONGEST_JOB = 200  # characters, which travel with every message
_TAGS = 64  # of replies that a node that never answers is told of
_NONE_HELD = MaskState()
_ALL = ChannelPlan({})
_NEAR = 1e-6  # relative: what rounding makes of a share
_CLEARLY = 0.7  # of a keyframe: a smaller delta need not be compared with one
_WORTH_IT = 0.95  # of a delta: as large as that, a keyframe saves nothing that is worth a surprise


@dataclass(frozen=True)
class EncodedPayload:
    """One payload, in one record for every node that needs it, so that Flower uploads it once."""

    kind: Kind
    record: ArrayRecord

    @property
    def data(self) -> bytes:
        """The payload itself."""
        return next(iter(self.record.values())).data

    @cached_property
    def measured(self) -> Measured:
        """The record, measured once for all nodes."""
        return Measured(self.record)


@dataclass
class Version:
    """A published model, the master weights it was published from, the seed it was drawn from.

    Attributes:
        width: the class of nodes that it is the slice of; "" for all of the model.
        plan: which channels this leaves; None for all.
        whole: master weights of all of the model.
        slices: of this version, by class.
        densely: the model as plain Flower sends it, once a node needs it so.
    """

    model: PublishedModel
    master: Mapping[str, NDArray[Any]]
    seed: Seed | None = None
    payloads: dict[bytes | None, EncodedPayload] = field(default_factory=dict)
    width: str = ""
    plan: ChannelPlan | None = None
    whole: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    slices: dict[str, Version] = field(default_factory=dict)
    densely: ArrayRecord | None = None
    _reader: weakref.ref[UpdateReader] | None = field(default=None, init=False, repr=False)

    def reader(self, stream: bytes) -> UpdateReader:
        """Reads updates that were trained from it: the same object as long as one of them lives."""
        reader = self._reader() if self._reader is not None else None
        if reader is None:
            reader = UpdateReader(self.model, stream=stream)
            self._reader = weakref.ref(reader)
        return reader


class Publisher:
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
        choose: which channels go, where automatic pruning tries how many; None for nobody.
        tried: plans of the channels that it tries, by the share of those there that they leave.
        history: versions that payloads may build on.
        holders: says which version every node holds.
        coarseness: says by how many doublings the next version's lattice is coarser.
        slices: what nodes of other width classes than the whole model's train; None for no classes.
    """

    def __init__(self, policy: Policy, stream: bytes, plan: PruningPlan | None = None) -> None:
        self.policy, self.stream = policy, stream
        self.pruner = Pruner(policy, plan)
        self.mask_cost = MaskCost()
        self.changes = Changes()
        self._recent: OrderedDict[str, Version] = OrderedDict()
        self._lattices = Lattices(policy)
        self._latest: PublishedModel | None = None
        self.holders: Holders = tuple
        self.coarseness: Callable[[], int] = int
        self.history = self.new_history()
        self._counter = self.clock = 0
        self._keyframe_bytes = 0  # of the last one that was made
        self._before_resume = 0  # rounds of the run that is resumed, where this one's begin anew
        self._trained = 0  # the last round that a message stated to train
        self._occasion: object = None
        self._exact: set[str] = set()
        self._finite: set[str] = set()
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._seeded: tuple[bytes, Seed] | None = None
        self.channels: ChannelPlan | None = None
        self.choose: ChannelChooser | None = None
        self.tried: dict[float, ChannelPlan] = {}
        # what the last version has zeros of, and its master
        self._trial: tuple[ChannelPlan, Mapping[str, NDArray[Any]]] | None = None
        self.slices: Slices | None = None
        self._removals: list[ChannelPlan] = []
        self._unaware: set[bytes] = set()  # of the history, what nodes hold with more channels

    def refine(self) -> None:
        """Make the lattices as fine as pruning and the budget have them."""
        part, early = self.pruner.fineness
        self._lattices.refine(part * 0.5 ** -self.coarseness(), early)

    def new_history(self) -> History:
        """An empty one, as the policy has it."""
        policy = self.policy
        holders = lambda: self.holders()  # noqa: E731  which are told later
        return History(policy.history, policy.history_bytes, self.stream, holders)

    @property
    def has_published(self) -> bool:
        """Whether there is a version."""
        return self._latest is not None

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
        self.channels, self.tried = channels, {plan.share: plan for plan in tried}
        self._counter, self._lattices.steps = counter, dict(steps)
        self.clock = self._before_resume = max(0, clock - 1)  # until that master is published
        self.pruner.resume(progress, masks, searched)
        if progress:
            self._lattices.fineness, self._lattices.early = self.pruner.fineness

    def remove(self, plan: ChannelPlan) -> None:
        """Go on without the channels that a plan removes of the latest version.

        Whatever is kept of earlier versions goes on with the part that remains, so that payloads
        build on what nodes hold: they narrow it by the same plan. Masters that are handed over
        with all of the channels are narrowed, too.

        Raises:
            PlanError: the plan is of another model; nothing was changed.
        """
        shapes = (
            {} if self._latest is None else {n: t.shape for n, t in self._latest.tensors.items()}
        )
        channels = plan if self.channels is None else self.channels.then(plan)
        latest = None if self._latest is None else plan.narrow(self._latest)
        history = self.history.narrowed(plan)
        self.pruner.remove(plan, shapes)  # the last that may raise
        self.channels, self._latest, self.history = channels, latest, history
        self._removals.append(plan)
        self.tried.clear()
        self._trial = None
        self._unaware |= set(self.history)
        self._recent.clear()

    @property
    def settled(self) -> ChannelPlan | None:
        """The channels that automatic pruning has found to be dispensable, and that are there."""
        search = self.pruner.search
        if search is None or not search.is_settled("channels"):
            return None
        found = self.tried.get(self._part())
        return found if found is not None and found.kept else None

    def _part(self) -> float:
        """Of the channels that are there, those that the search leaves."""
        there = 1.0 if self.channels is None else self.channels.share
        part = self.pruner.channels / there
        return part if part < 1 - _NEAR else 1.0

    def _without_tried(
        self, model: PublishedModel, master: Mapping[str, NDArray[Any]]
    ) -> PublishedModel:
        """A model in which the channels that are tried are zero; the master keeps them."""
        part, self._trial = self._part(), None
        # what is gone back to is what held
        self.tried = {share: plan for share, plan in self.tried.items() if share >= part}
        if part == 1:
            return model
        if part not in self.tried:
            assert self.choose is not None
            try:
                plan = self.choose(master, self.pruner.channels, self.channels)
            except PlanError as error:  # a layer has too few of them: as many go as before
                log(INFO, "No further channels are tried: %s.", error)
                plan = self.tried[min(self.tried)] if self.tried else _ALL
            self.tried[part] = replace(plan, share=part)
        self._trial = self.tried[part], master
        return self.tried[part].zeroed(model)

    def _restored(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Arrays in which channels on trial are as they were: of them nodes saw zeros."""
        restored = dict(arrays)
        plan, before = self._trial or (_ALL, {})
        for name in plan.kept.keys() & arrays.keys() & before.keys():
            last, array = before[name], arrays[name]
            if last.shape == array.shape:
                places = plan.places(name, array.shape)
                restored[name] = last.astype(array.dtype)
                restored[name][places] = array[places]
        return restored

    def narrowed(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Arrays of the model without the channels that have gone since they were of it."""
        for plan in self._removals:
            if plan.fits({name: array.shape for name, array in arrays.items()}):
                arrays = plan.arrays(arrays)
        return arrays

    def unknown_channels(self, version: Version, held: bytes | None) -> bytes | None:
        """The plan of channels as it travels, for a node that does not know it; else None.

        Args:
            version: that the node is sent.
            held: short digest of the version the node says it holds; None for none.
        """
        if self.slices is not None:
            if held in self._bases(version) or (held is None and version.plan is None):
                return None
            # of a node whose class was another, all channels may be what is new to it
            return (version.plan or _ALL).coded
        if self.channels is None or (held in self.history and held not in self._unaware):
            return None
        return self.channels.coded

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

    def _bases(self, version: Version) -> History:
        """What payloads to a version can build on, by short digest."""
        if version.width and self.slices is not None:
            return self.slices.history(version.width)
        return self.history

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
        if self.policy.tries_channels and self.pruner.plan is not None and self.choose is None:
            raise FederationError(
                "the policy tries how many channels can go, and nobody says which: "
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
            self.pruner.observe(lattice, clock)
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

    def _keep(self, model: PublishedModel) -> PublishedModel:
        """Make a model the latest one, that later payloads can build on."""
        self._latest = model
        self.history.keep(model)
        self._unaware.intersection_update(self.history)
        return model

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
            nearest = np.rint(array)
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
        self._lattices.weights = sum(array.size for array in master.values())
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

    def payload(self, version: Version, held: bytes | None) -> EncodedPayload:
        """What a node that does not hold `version` must receive.

        Args:
            version: the version to deliver.
            held: short digest of the version the node says it holds; None for none.

        Returns:
            A delta from whichever version is held, or a keyframe where that is not possible.
            Encoded once and shared.
        """
        bases = self._bases(version)
        key = held if held in bases else None
        if key not in version.payloads:
            version.payloads[key] = self._smallest(version, bases.get(key))
        return version.payloads[key]

    def held(self, digest: bytes) -> PublishedModel | None:
        """The version of a short digest, as long as payloads can build on it."""
        found = self.history.get(digest)
        return self.slices.held(digest) if found is None and self.slices is not None else found

    def earlier(self, version: Version) -> list[bytes]:
        """Short digests of the versions that payloads to one can build on, newest first."""
        now = short(version.model.digest)
        return [digest for digest in reversed(list(self.history)) if digest != now]

    def _smallest(self, version: Version, base: PublishedModel | None) -> EncodedPayload:
        """A delta, or a keyframe where that is fewer bytes: what is far behind says little."""
        payload = self._encode(version, base)
        if payload.kind is Kind.KEYFRAME or len(payload.data) < _CLEARLY * self._keyframe_bytes:
            self._keyframe_bytes = max(self._keyframe_bytes, len(payload.data))
            return payload
        if None not in version.payloads:
            version.payloads[None] = self._encode(version, None)
        whole = version.payloads[None]
        self._keyframe_bytes = len(whole.data)
        return whole if len(whole.data) < _WORTH_IT * len(payload.data) else payload

    def _encode(self, version: Version, base: PublishedModel | None) -> EncodedPayload:
        if base is not None:
            with suppress(InvalidModel):  # the record's tensors changed: a delta is impossible
                delta = encode_delta(base, version.model, stream=self.stream)
                return EncodedPayload(Kind.DELTA, payload_record(delta))
        data = encode_keyframe(version.model, stream=self.stream, seed=version.seed)
        return EncodedPayload(Kind.KEYFRAME, payload_record(data))


# -- every stream and every node ------------------------------------------------------------------


@dataclass
class NodeState:
    """What one node said of itself.

    Attributes:
        held: record key to short digest of the version the node last reported to hold.
        accepted: tags of its replies with an update that was accepted, as far as it may not know.
        given_up: likewise of those that were refused, or are not waited for any more.
        troubled: whether it said, the last time, that it cannot keep what it should.
        unread: types of messages that failed there, the last time, before the mod could read them.
        safe: of the accepted, those that a resumed run would accept, too.
        width: the class that it states; "" for none, None as long as it said nothing.
        ahead: by how many seconds its clock is ahead of ours at the least; None where nothing came
            that tells it.
        able: what it said of itself; None as long as it was not asked, or did not answer.
        treatment: of its capability class.
        foreign: why it understands nothing that is sent to it; "" where it does.
    """

    held: dict[str, bytes] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    troubled: bool = False
    unread: set[str] = field(default_factory=set)
    width: str | None = None
    ahead: float | None = None
    able: Capabilities | None = None
    treatment: Treatment = field(default_factory=Treatment)
    foreign: str = ""
    safe: set[str] = field(default_factory=set)

    def settled(self, tag: str, *, accepted: bool) -> None:
        """Tell the node with its next messages what became of a reply; given up is so for good."""
        if accepted and tag in self.given_up:
            return
        if not accepted and tag in self.accepted:
            self.accepted.remove(tag)
        tags = self.accepted if accepted else self.given_up
        if tag not in tags:
            tags.append(tag)
        del tags[:-_TAGS]

    def knows(self, tags: Collection[str]) -> None:
        """Tell it no more of these."""
        for known in (self.accepted, self.given_up):
            known[:] = [tag for tag in known if tag not in tags]


class Streams:
    """All streams and nodes of one run.

    Attributes:
        round: of messages that state none; 0 where nobody said.
        participation: of the nodes, in training.
        budget: of bytes; None for none.
        job: that the streams are of; "" for Flower's run alone.
        attempt: how often the job was resumed.
        saves: whether nodes are told that a reply was accepted only after `saved`. Once told, they
            let go of what the reply took along; a run that is resumed from a checkpoint before it
            could not train that round again as it was.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.round = policy, 0
        self.participation = Participation()
        limits = policy.limits
        self.budget = Budget(limits, policy.down_step) if limits else None
        self.job, self.attempt, self.saves = "", 0, False
        self._rounds = 0
        self._streams: dict[tuple[int, str], Publisher] = {}
        self._nodes: dict[int, NodeState] = {}

    def use_job(self, job: str, attempt: int = 0) -> None:
        """Be of a job; before anything is published.

        Raises:
            FederationError: something is, or it is no name.
        """
        _check_job(job)
        if job != self.job and any(stream.has_published for stream in self._streams.values()):
            raise FederationError(
                f"job {job!r} cannot begin with a grid that was used already: make a new one"
            )
        self.job, self.attempt = job, attempt
        for (run_id, key), stream in self._streams.items():
            stream.stream = stream_id(job or run_id, key)

    def saved(self) -> None:
        """A checkpoint has what was accepted so far."""
        for node in self._nodes.values():
            node.safe = set(node.accepted)

    def ends_of(self, node: NodeState) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Tags of a node's replies that it is to be told were accepted, and given up."""
        safe = [tag for tag in node.accepted if not self.saves or tag in node.safe]
        return tuple(safe), tuple(node.given_up)

    def told(self, run_id: int) -> tuple[str, int]:
        """What messages of a run of Flower say of their job: its name, and the attempt."""
        known = self.job in ("", str(run_id)) and not self.attempt
        return ("", 0) if known else (self.job or str(run_id), self.attempt)

    def readers(self, connected: Collection[int]) -> list[int]:
        """Those of the nodes that understand this server, or need not.

        Raises:
            FederationError: there are nodes, and none of them does.
        """
        found = []
        for node_id in connected:
            node = self._nodes.get(node_id)
            if node is None or not node.foreign or node.treatment.dense:
                found.append(node_id)
        if connected and not found:
            why = next(node.foreign for node in self._nodes.values() if node.foreign)
            raise FederationError(f"no node understands this server: {why}")
        return found

    def ends_with(self, run_id: int, stated: int) -> bool:
        """Whether a round is the last of a job that no other run can go on with.

        Args:
            run_id: Flower's run id.
            stated: the round that a message states; 0 for none.
        """
        return self.job in ("", str(run_id)) and 0 < self._rounds <= stated

    def stream(self, run_id: int, key: str) -> Publisher:
        """The publisher of a record key's versions, made if necessary."""
        if (run_id, key) not in self._streams:
            if self.policy.target and key not in self.policy.pruning_records:
                log(
                    WARNING,
                    "Array record %r is not pruned: pruning_records names %s. Add it there if it "
                    "holds the model.",
                    key,
                    ", ".join(map(repr, self.policy.pruning_records)) or "none",
                )
            plan = self.policy.pruning() if key in self.policy.pruning_records else None
            kind = Publisher
            if self.policy.down_scheme is not None:
                # derived from what is here
                from prunecast.server.federation.publishing.scheme_publisher import SchemePublisher

                kind = SchemePublisher
            made = kind(self.policy, stream_id(self.job or run_id, key), plan)
            made.expect(self._rounds)
            if self.budget is not None and plan is not None:
                made.coarseness = self.budget.next_level
            made.holders = partial(self._held_by_nodes, key)
            self._streams[run_id, key] = made
        return self._streams[run_id, key]

    def _held_by_nodes(self, key: str) -> list[bytes]:
        """Of every node the version that it last said it holds under a record key."""
        return [node.held[key] for node in self._nodes.values() if key in node.held]

    def narrowed_beside(self, run_id: int, key: str) -> str | None:
        """Another record key of a run whose model has fewer channels already; None for none."""
        others = (place for place in self._streams if place[0] == run_id and place[1] != key)
        return next((p[1] for p in others if self._streams[p].channels is not None), None)

    @property
    def ahead(self) -> dict[int, float]:
        """Of nodes of whose clock something is known, by how many seconds it is ahead."""
        return {i: node.ahead for i, node in self._nodes.items() if node.ahead is not None}

    def nodes_of(self, width: str) -> int:
        """How many nodes state a class; "" for none."""
        return sum(node.width == width for node in self._nodes.values())

    def expect(self, rounds: int) -> None:
        """Fit the pruning of every stream to a number of rounds; warn if it cannot arrive."""
        self._rounds = rounds
        if self.budget is not None:
            self.budget.rounds = rounds
        self.policy.check_rounds(rounds)
        for stream in self._streams.values():
            stream.expect(rounds)

    def held(self, digest: bytes) -> PublishedModel | None:
        """The version of a short digest in any stream, as long as payloads can build on it."""
        found = (stream.held(digest) for stream in self._streams.values())
        return next((model for model in found if model is not None), None)

    def node(self, node_id: int) -> NodeState:
        """What is known of a node; nothing at first."""
        return self._nodes.setdefault(node_id, NodeState())


def _check_job(job: str) -> None:
    if len(job) > _LONGEST_JOB or not job.isprintable() or job != job.strip():
        raise FederationError(
            f"job = {job[:80]!r} is no name: give up to {_LONGEST_JOB} printable characters"
        )

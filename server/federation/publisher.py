"""From master weights to published versions, to what nodes hold, and to the payload each needs."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from logging import WARNING
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from prunecast.compression.codec import Limits, quantise, spread
from prunecast.compression.flower import dense_arrays, payload_record, stream_id
from prunecast.compression.flower.internals import Measured, log
from prunecast.compression.pruning.plan import Knowledge, PruningPlan, Statistics, StatisticsMean
from prunecast.compression.versions import (
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
    short,
)
from prunecast.server.federation.errors import FederationError, NonFiniteModel
from prunecast.server.federation.policy import Policy

__all__ = ["EncodedPayload", "NodeState", "Publisher", "Streams", "Version"]

_SMALLEST_SPREAD = 1e-3  # a tensor that starts constant still gets a usable step
_RECENT = 4  # contents whose version is remembered, so that train and evaluate share one
_TAGS = 64  # of replies that a node that never answers is told of
_VECTOR_STEP = 0.25  # biases and norms are few and sensitive: a finer lattice for them


@dataclass(frozen=True)
class EncodedPayload:
    """One payload, in one record for every node that needs it, so that Flower uploads it once."""

    kind: Kind
    record: ArrayRecord

    @cached_property
    def measured(self) -> Measured:
        """The record, measured once for all nodes."""
        return Measured(self.record)


@dataclass
class Version:
    """A published model, the master weights it was published from, the seed it was drawn from."""

    model: PublishedModel
    master: Mapping[str, NDArray[Any]]
    seed: Seed | None = None
    payloads: dict[bytes | None, EncodedPayload] = field(default_factory=dict)
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

    ``q = round(master / step) * mask``: the master keeps what rounding dropped, so the next
    version repairs it. Steps follow each tensor's spread in powers of two, which keeps old and
    new lattices nested.

    Args:
        policy: steps, what travels exactly, how many versions are kept.
        stream: identifier of the stream, part of every payload.
        plan: what is pruned; None prunes nothing.

    Attributes:
        statistics: what nodes contributed since the last version.
    """

    def __init__(self, policy: Policy, stream: bytes, plan: PruningPlan | None = None) -> None:
        self.policy, self.stream, self._plan = policy, stream, plan
        self.statistics = StatisticsMean()
        self._recent: OrderedDict[str, Version] = OrderedDict()
        self._before: dict[str, NDArray[Any]] = {}
        self._statistics: Statistics = {}
        self._steps: dict[str, float] = {}
        self._history: OrderedDict[bytes, PublishedModel] = OrderedDict()
        self._counter = 0
        self._seeded: tuple[bytes, Seed] | None = None

    @property
    def position(self) -> tuple[int, dict[str, float]]:
        """Number of the last version and the current step of every lattice tensor."""
        return self._counter, dict(self._steps)

    def resume(self, counter: int, steps: Mapping[str, float]) -> None:
        """Go on where another publisher's `position` was."""
        self._counter, self._steps = counter, dict(steps)

    def draw(self, like: Mapping[str, NDArray[Any]], seed: int) -> dict[str, NDArray[Any]]:
        """Draw a from-scratch model whose keyframe is its seed.

        Args:
            like: a freshly initialised model; layout, means and spreads are taken from it.
            seed: 0 to 2**64 - 1.

        Returns:
            The master weights to begin with, which lie on the lattice exactly.

        Raises:
            FederationError: the stream has begun already.
        """
        if self._counter:
            raise FederationError("a model can only be drawn before the first version is published")
        template = self._on_lattice(like, {})
        model, source = draw_like(template, seed)
        if sum(spec.nbytes for spec in model.specs.values()) <= Limits().free_bytes:
            # receivers refuse to be told by a few bytes to allocate more than that
            self._seeded = (model.digest, source)
        return model.arrays()

    def version_of(self, record: ArrayRecord, content_id: str) -> Version:
        """The version of a content, published now unless it already was.

        Args:
            record: the dense arrays, as the strategy hands them over.
            content_id: digest of the record's content.

        Raises:
            NonFiniteModel: an array holds NaN or infinity.
        """
        version = self._recent.pop(content_id, None)
        if version is None:
            version = self.publish(dense_arrays(record), self.statistics.take())
        self._recent[content_id] = version
        while len(self._recent) > _RECENT:
            self._recent.popitem(last=False)
        return version

    def publish(
        self, master: Mapping[str, NDArray[Any]], statistics: Statistics | None = None
    ) -> Version:
        """Make the next version.

        Args:
            master: name to array, any shapes; float arrays must be finite unless lossless.
            statistics: what nodes contributed since the last version, by statistic and tensor; what
                is not given stays as it was.

        Raises:
            NonFiniteModel: a tensor to be put on the lattice holds NaN or infinity.
        """
        lattice = {
            name: array
            for name, array in master.items()
            if not self.policy.is_lossless(name, array.dtype, array.size)
        }
        for name, array in lattice.items():
            if not np.isfinite(array).all():
                raise NonFiniteModel(
                    f"tensor {name!r} of the global model holds NaN or infinity: the training "
                    "diverged; nothing was sent"
                )
        self._counter += 1
        self._statistics = {**self._statistics, **(statistics or {})}
        model = self._on_lattice(master, self._masks(lattice))
        known = self._history.pop(short(model.digest), None)
        self._history[short(model.digest)] = known or model
        while len(self._history) > self.policy.history:
            self._history.popitem(last=False)
        seed = None
        if self._seeded is not None and self._seeded[0] == model.digest:
            seed = self._seeded[1]
        return Version(model, master, seed)

    @property
    def wanted(self) -> tuple[str, ...]:
        """Statistics to ask of the nodes that train from the last version."""
        return self._plan.wanted(self._counter, self._statistics) if self._plan else ()

    def _masks(self, lattice: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.bool_]]:
        if self._plan is None:
            return {}
        weights = self._plan.prunable(lattice)
        shapes = {name: array.shape for name, array in weights.items()}
        update = {
            name: np.subtract(weights[name], array, dtype=np.float64)
            for name, array in self._before.items()
            if array.shape == shapes.get(name)
        }
        self._before = weights if self._plan.criterion.uses_update else {}
        known = {
            name: {t: array for t, array in arrays.items() if array.shape == shapes.get(t)}
            for name, arrays in self._statistics.items()
        }
        return self._plan.masks(self._counter, Knowledge(weights, update, known))

    def _on_lattice(
        self, master: Mapping[str, NDArray[Any]], masks: Mapping[str, NDArray[np.bool_]]
    ) -> PublishedModel:
        tensors: dict[str, Tensor] = {}
        for name, array in master.items():
            if self.policy.is_lossless(name, array.dtype, array.size):
                tensors[name] = RawTensor(array)
                continue
            step = self._step(name, array)
            q = quantise(array, step, name=name)
            if name in masks:
                q *= masks[name]
            tensors[name] = LatticeTensor(q, step, name in masks, array.dtype)
        return PublishedModel(tensors, self._counter)

    def _step(self, name: str, array: NDArray[Any]) -> float:
        unit = max(spread(array, "std"), _SMALLEST_SPREAD)
        ideal = self.policy.down_step * unit * (1.0 if array.ndim > 1 else _VECTOR_STEP)
        step = self._steps.get(name)
        if step is None:
            step = float(np.float32(ideal))
        while ideal >= 2 * step:
            step *= 2
        while ideal <= step / 4:
            step /= 2
        self._steps[name] = step
        return step

    def payload(self, version: Version, held: bytes | None) -> EncodedPayload:
        """What a node that does not hold `version` must receive.

        Args:
            version: the version to deliver.
            held: short digest of the version the node says it holds; None for none.

        Returns:
            A delta from whichever version is held, or a keyframe where that is not possible.
            Encoded once and shared.
        """
        base = self._history.get(held) if held is not None else None
        key = held if base is not None else None
        if key not in version.payloads:
            version.payloads[key] = self._encode(version, base)
        return version.payloads[key]

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
        speaks: whether it ever answered through the mod.
        troubled: whether it said, the last time, that it cannot keep what it should.
    """

    held: dict[str, bytes] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    speaks: bool = False
    troubled: bool = False

    def settled(self, tag: str, *, accepted: bool) -> None:
        """Tell the node with its next messages what became of a reply."""
        tags = self.accepted if accepted else self.given_up
        tags.append(tag)
        del tags[:-_TAGS]

    def knows(self, tags: Collection[str]) -> None:
        """Tell it no more of these."""
        for known in (self.accepted, self.given_up):
            known[:] = [tag for tag in known if tag not in tags]


class Streams:
    """All streams and nodes of one run."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._streams: dict[tuple[int, str], Publisher] = {}
        self._nodes: dict[int, NodeState] = {}

    def stream(self, run_id: int, key: str) -> Publisher:
        """The publisher of a record key's versions, made if necessary."""
        if (run_id, key) not in self._streams:
            if self.policy.sparsity and key not in self.policy.pruning_records:
                log(
                    WARNING,
                    "Array record %r is not pruned: pruning_records names %s. Add it there if it "
                    "holds the model.",
                    key,
                    ", ".join(map(repr, self.policy.pruning_records)) or "none",
                )
            plan = self.policy.pruning if key in self.policy.pruning_records else None
            self._streams[run_id, key] = Publisher(self.policy, stream_id(run_id, key), plan)
        return self._streams[run_id, key]

    def node(self, node_id: int) -> NodeState:
        """What is known of a node; nothing at first."""
        return self._nodes.setdefault(node_id, NodeState())

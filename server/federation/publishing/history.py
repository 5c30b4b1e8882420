"""Versions that payloads may build on: the latest as they are, older ones as few bytes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from logging import WARNING

from prunecast.common.text import bytes_text, count_text
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import (
    PublishedModel,
    decode_model,
    encode_keyframe,
    model_limits,
    short,
)

__all__ = ["Coded", "History", "Holders"]

Holders = Callable[[], Iterable[bytes]]
"""Short digests of the versions that nodes last said they hold, one for each node."""


@dataclass(frozen=True)
class Coded:
    """An older version: a keyframe, and the bytes of the model that it makes."""

    data: bytes
    nbytes: int


class History:
    """The versions of one stream that a delta may begin at.

    A delta leads from any of them to the newest directly, so what a node must be sent depends on
    whether the version it holds is still here and not on how many it missed. The latest are kept as
    they are. An older one is kept as a keyframe as long as a node says that it holds it, some 2 to
    4 bits for each weight that is not zero, and is decoded where a node that comes back needs it.

    Args:
        recent: versions that are kept as they are.
        most: bytes of all older ones together; beyond it the oldest go, and nodes that hold them
            get keyframes.
        stream: identifier of the stream.
        holders: says what nodes hold; None for nobody, so that nothing older is kept.
    """

    def __init__(
        self, recent: int, most: int, stream: bytes, holders: Holders | None = None
    ) -> None:
        self._recent, self._most, self._stream = recent, most, stream
        self.holders: Holders = holders or tuple
        self._whole: OrderedDict[bytes, PublishedModel] = OrderedDict()
        self._coded: OrderedDict[bytes, Coded] = OrderedDict()
        self._said = False

    def __contains__(self, digest: object) -> bool:
        return digest in self._whole or digest in self._coded

    def __iter__(self) -> Iterator[bytes]:
        """Short digests, oldest first."""
        yield from self._coded
        yield from self._whole

    @property
    def coded_bytes(self) -> int:
        """Bytes that the older versions take."""
        return sum(len(coded.data) for coded in self._coded.values())

    @property
    def latest(self) -> PublishedModel | None:
        """The newest version; None before the first."""
        return next(reversed(self._whole.values()), None)

    def get(self, digest: bytes | None) -> PublishedModel | None:
        """The version of a short digest; None for one that is not kept."""
        if digest is None:
            return None
        if digest in self._coded:
            coded = self._coded[digest]
            limits = model_limits(coded.nbytes, len(coded.data))
            return decode_model(coded.data, stream=self._stream, limits=limits)
        return self._whole.get(digest)

    def keep(self, model: PublishedModel) -> PublishedModel:
        """Make a version the newest one; the same object where its content was published before."""
        digest = short(model.digest)
        known = self._whole.pop(digest, None) or model
        self._coded.pop(digest, None)
        self._whole[digest] = known
        held = set(self.holders()) if len(self._whole) > self._recent or self._coded else set()
        while len(self._whole) > self._recent:
            old, version = self._whole.popitem(last=False)
            if old in held and self._most:
                self._coded[old] = self._compact(version)
        for old in self._coded.keys() - held:  # everybody has gone on from it
            del self._coded[old]
        while self.coded_bytes > self._most:
            self._lose(self._coded.popitem(last=False)[0])
        return known

    def foresee(self, nodes: int, asked: int, each: float, rounds: int = 0) -> None:
        """Warn where nodes will come back more rarely than versions are kept; once.

        Args:
            nodes: how many there are.
            asked: how many of them in a round.
            each: bytes of a version as a keyframe.
            rounds: of the run; 0 where nobody knows.
        """
        gap = math.ceil(nodes / asked)
        older = min(gap, rounds or gap) - self._recent  # a version a round, each held by some node
        if self._said or older * each <= self._most:
            return
        self._said = True
        log(
            WARNING,
            "Of %s %d are asked in a round, so that one comes back after some %d rounds, and nodes "
            "will hold about as many versions: %d of them are kept as they are, and older ones, "
            "about %s each, within prunecast.history-bytes = %s. A node that comes back later will "
            "be sent a keyframe. Raise prunecast.history-bytes to about %s, if this machine has as "
            "much memory.",
            count_text(nodes, "node"),
            *(asked, gap, self._recent),
            *(bytes_text(each), bytes_text(self._most), bytes_text(older * each)),
        )

    def _compact(self, version: PublishedModel) -> Coded:
        nbytes = sum(spec.nbytes for spec in version.specs.values())
        return Coded(encode_keyframe(version, stream=self._stream), nbytes)

    def _lose(self, digest: bytes) -> None:
        if self._said:
            return
        self._said = True
        nodes = list(self.holders())
        versions = max(1, len(set(nodes)))
        each = self.coded_bytes / max(1, len(self._coded))
        log(
            WARNING,
            "Nodes come back more rarely than versions are kept: the oldest of %s that nodes hold "
            "is dropped, and %s of it will be sent a keyframe. Raise prunecast.history-bytes from "
            "%s to about %s, if this machine has as much memory.",
            count_text(versions, "version"),
            count_text(nodes.count(digest), "node"),
            bytes_text(self._most),
            bytes_text(max(2 * self._most, each * versions)),
        )

    def narrowed(self, plan: ChannelPlan) -> History:
        """What a plan of channels leaves of every version, by the digest of the whole one.

        Raises:
            PlanError: the plan is of another model.
        """
        left = History(self._recent, self._most, self._stream, self.holders)
        for digest in self._coded:
            version = self.get(digest)
            assert version is not None
            left._coded[digest] = self._compact(plan.narrow(version))
        for digest, version in self._whole.items():
            left._whole[digest] = plan.narrow(version)
        left._said = self._said
        return left

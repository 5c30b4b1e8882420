"""Versions of one stream that nodes may hold, and the payload that each node needs."""

from __future__ import annotations

from contextlib import suppress

from prunecast.compression.flower import payload_record
from prunecast.compression.versions import (
    InvalidModel,
    Kind,
    PublishedModel,
    encode_delta,
    encode_keyframe,
    short,
)
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.history import History, Holders
from prunecast.server.federation.publishing.version import EncodedPayload, Version
from prunecast.server.federation.publishing.widths import Slices

__all__ = ["VersionStream"]

_BITS = 3  # about, of a weight in the keyframe of a trained model
_CLEARLY = 0.7  # of a keyframe: a smaller delta need not be compared with one
_WORTH_IT = 0.95  # of a delta: as large as that, a keyframe saves nothing that is worth a surprise


class VersionStream:
    """What nodes may hold of one stream, and how they get from there to a version.

    `Publisher` tells its arguments and attributes.
    """

    def __init__(self, policy: Policy, stream: bytes) -> None:
        self.policy, self.stream = policy, stream
        self._latest: PublishedModel | None = None
        self.holders: Holders = tuple
        self.history = self.new_history()
        self.slices: Slices | None = None
        self._keyframe_bytes = 0  # of the last one that was made

    def new_history(self) -> History:
        """An empty one, as the policy has it."""
        policy = self.policy
        holders = lambda: self.holders()  # noqa: E731  which are told later
        return History(policy.history, policy.history_bytes, self.stream, holders)

    @property
    def has_published(self) -> bool:
        """Whether there is a version."""
        return self._latest is not None

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

    def foresee(self, version: Version, nodes: int, asked: int, rounds: int) -> None:
        """Warn where nodes will come back more rarely than versions such as this one are kept.

        Args:
            version: that is being sent.
            nodes: how many there are.
            asked: how many of them in a round.
            rounds: of the run; 0 where nobody knows.
        """
        weights = sum(spec.size for spec in version.model.specs.values())
        drawn = version.seed is not None  # its own keyframe is the seed
        each = weights * _BITS / 8 if drawn else len(self.payload(version, None).data)
        self.history.foresee(nodes, asked, each, rounds)

    def held(self, digest: bytes) -> PublishedModel | None:
        """The version of a short digest, as long as payloads can build on it."""
        found = self.history.get(digest)
        return self.slices.held(digest) if found is None and self.slices is not None else found

    def earlier(self, version: Version) -> list[bytes]:
        """Short digests of the versions that payloads to one can build on, newest first."""
        now = short(version.model.digest)
        return [digest for digest in reversed(list(self.history)) if digest != now]

    def _keep(self, model: PublishedModel) -> PublishedModel:
        """Make a model the latest one, that later payloads can build on."""
        self._latest = model
        self.history.keep(model)
        return model

    def _bases(self, version: Version) -> History:
        """What payloads to a version can build on, by short digest."""
        if version.width and self.slices is not None:
            return self.slices.history(version.width)
        return self.history

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

"""The way down by a scheme of the literature: what nodes hold follows the master from afar.

As the server of Sattler et al. 2019 (STC, algorithm 2) and of doubly compressed SGD (Tang et al.
2019, "DoubleSqueeze", algorithm 1): the server codes the change of its model as the nodes code
theirs, keeps what coding dropped, and codes it with the next change. Here the master is what the
strategy made, so what was dropped is *master - held* and no state of its own.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.flower import payload_record
from prunecast.compression.flower.chains import changed, encode_chain
from prunecast.compression.pruning.plan import PruningPlan
from prunecast.compression.pruning.statistics import Statistics
from prunecast.compression.schemes.layout import State, layout_of
from prunecast.compression.versions import Kind, PublishedModel, RawTensor, short
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.publisher import Publisher
from prunecast.server.federation.publishing.version import EncodedPayload, Version

__all__ = ["Link", "SchemePublisher"]


@dataclass(frozen=True)
class Link:
    """A coded change, from the version of one message to that of the next, by short digests."""

    base: bytes
    made: bytes
    payload: bytes


class SchemePublisher(Publisher):
    """Publishes what nodes hold after every message: the model before, and a coded change.

    The first version is whole, or drawn from a seed; a node that missed messages gets the payloads
    of all of these, or the model where that is fewer bytes. Tensors that are no trained floats
    (counters, running statistics) travel exactly.
    """

    def __init__(self, policy: Policy, stream: bytes, plan: PruningPlan | None = None) -> None:
        super().__init__(policy, stream, plan)
        self._state: State | None = None
        self._links: deque[Link] = deque()

    def _publish(
        self, master: Mapping[str, NDArray[Any]], statistics: Statistics | None, clock: int
    ) -> Version:
        held = self._latest
        seeded = self._seeded[0] if held is None and self._seeded is not None else None
        if seeded and self._on_lattice(master, {}).digest == seeded:
            return super()._publish(master, statistics, clock)
        self._check_finite(master)
        self.clock = clock
        self._counter += 1
        master = self.as_published(master)
        arrays, payload = master, b""
        if held is not None and _specs(held.arrays()) == _specs(master):
            arrays, payload = self._by_change(held, master)
        model = PublishedModel({n: RawTensor(a) for n, a in arrays.items()}, self._counter)
        if held is not None and payload:
            nbytes = sum(array.nbytes for array in arrays.values())
            self._remember(Link(short(held.digest), short(model.digest), payload), nbytes)
        else:
            self._links.clear()
        self._latest = model
        return Version(model, master)

    def _by_change(
        self, held: PublishedModel, master: Mapping[str, NDArray[Any]]
    ) -> tuple[dict[str, NDArray[Any]], bytes]:
        """What nodes hold afterwards, and the payload; nothing where no array can be coded."""
        chosen, before = self.policy.down_scheme, held.arrays()
        assert chosen is not None
        with np.errstate(over="ignore", invalid="ignore"):
            change = {
                name: array - before[name]
                for name, array in master.items()
                if not self._is_exact(name, array)
            }
        change = {n: array for n, array in change.items() if np.isfinite(array).all()}
        layout = layout_of(change)
        if self._state is None or list(self._state.layout.items()) != list(layout.items()):
            self._state = chosen.init(layout)
            self._links.clear()
        if not change:
            return dict(master), b""
        label = b"prunecast scheme down\0" + self.stream + self._counter.to_bytes(4, "little")
        key = int.from_bytes(hashlib.sha256(label).digest()[:8], "little")
        payload, self._state = chosen.encode(change, self._state, key=key)
        after = changed({name: before[name] for name in change}, chosen.decode(payload))
        return {name: after.get(name, array) for name, array in master.items()}, payload

    def payload(self, version: Version, held: bytes | None) -> EncodedPayload:
        """What a node must receive: the changes since the version it holds, or the whole model.

        Args:
            version: the version to deliver.
            held: short digest of the version the node says it holds; None for none.
        """
        links = self._between(held, short(version.model.digest))
        key = held if links else None
        if key not in version.payloads:
            version.payloads[key] = self._encoded(version, links)
        return version.payloads[key]

    def held(self, digest: bytes) -> PublishedModel | None:
        """The latest version, if it is the one; chains need no others."""
        latest = self._latest
        return latest if latest is not None and short(latest.digest) == digest else None

    def earlier(self, version: Version) -> list[bytes]:
        """Short digests of the versions that the kept changes begin with, newest first."""
        return [link.base for link in reversed(self._links)]

    def _encoded(self, version: Version, links: Sequence[Link]) -> EncodedPayload:
        if not links or self._state is None:
            return self._encode(version, None)
        data = encode_chain(
            links[0].base,
            version.model,
            [link.payload for link in links],
            frozenset(self._state.layout),
            stream=self.stream,
        )
        if 2 * len(data) > sum(spec.nbytes for spec in version.model.specs.values()):
            whole = self._encode(version, None)  # floats hardly get smaller than that
            if len(whole.data) < len(data):
                return whole
        return EncodedPayload(Kind.SCHEME, payload_record(data))

    def _remember(self, link: Link, most: int) -> None:
        """Keep a link, and those before it as long as all together are smaller than the model."""
        self._links.append(link)
        while sum(len(known.payload) for known in self._links) > most and len(self._links) > 1:
            self._links.popleft()

    def _between(self, base: bytes | None, made: bytes) -> list[Link]:
        """The links from one version to another, oldest first; none where some are forgotten."""
        found: list[Link] = []
        for link in reversed(self._links):
            if found or link.made == made:
                found.append(link)
                if link.base == base:
                    return found[::-1]
        return []


def _specs(arrays: Mapping[str, NDArray[Any]]) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
    return [(name, array.dtype, array.shape) for name, array in arrays.items()]

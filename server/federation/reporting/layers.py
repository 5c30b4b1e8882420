"""What single tensors cost and hold: in one message of each kind of a round, and in the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, RecordDict
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Limits
from prunecast.compression.flower import STATISTICS_RECORD, is_codable_array, open_coded
from prunecast.compression.flower.chains import payloads_in
from prunecast.compression.flower.envelope import unpack
from prunecast.compression.schemes.registry import SCHEMES
from prunecast.compression.schemes.registry import inspect as inspect_scheme
from prunecast.compression.versions import (
    Kind,
    LatticeTensor,
    PublishedModel,
    VersionsError,
    inspect,
    measure_payload,
)
from prunecast.server.federation.reporting.ledger import Entry

__all__ = ["LayerSamples", "changed_masks", "layers_in", "samples_round"]

_MOST = 100  # tensors that an event names, the largest; the others are summed up
_ROUNDS = 20  # of a run that are sampled, or a few more

Held = Callable[[bytes], PublishedModel | None]
"""From a version's short digest to the version, where it is still known."""


def samples_round(number: int, rounds: int) -> bool:
    """Whether the messages of a round are looked into: some twenty rounds, first and last too.

    >>> [n for n in range(1, 101) if samples_round(n, 100)][:5]
    [1, 5, 10, 15, 20]
    """
    return number in (1, rounds) or number % max(1, math.ceil(rounds / _ROUNDS)) == 0


class LayerSamples:
    """Bytes of every tensor, in the first message of each direction and kind of a round.

    Decoding one message of each kind bounds what it costs, however many nodes there are.

    Attributes:
        wanted: whether messages are looked into now.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._found: dict[tuple[str, str], dict[str, Any]] = {}

    def note(self, entry: Entry, content: RecordDict, held: Held) -> None:
        """Look into a message as it travels, if it is the first of its kind.

        Args:
            entry: of the message, complete but for times.
            content: of the message; not changed.
            held: finds the versions that payloads build on.
        """
        key = entry.direction, entry.kind
        if not self.wanted or key in self._found or entry.kind == "error":
            return
        try:
            tensors, shared = _tensor_bytes(content, held)
        except (VersionsError, CodecError):  # the ledger has its bytes all the same
            return
        named, others = _largest(tensors, lambda size: size, sum)
        self._found[key] = {
            "direction": entry.direction,
            "kind": entry.kind,
            "bytes": entry.payload_bytes,
            "tensors": named,
            **({"others": others} if others else {}),
            "estimated": shared,
        }

    def take(self) -> list[dict[str, Any]]:
        """What was found since it was asked for before."""
        found, self._found = list(self._found.values()), {}
        return found


def _tensor_bytes(content: RecordDict, held: Held) -> tuple[dict[str, int], bool]:
    """Bytes by tensor, and whether any is a share of bytes that several have in common."""
    costs: dict[str, int] = {}
    shared = False
    for key, record in unpack(content).array_records.items():
        if key == STATISTICS_RECORD:
            continue
        coded = open_coded(record)
        beside: Mapping[str, Any] = record
        if coded is not None:
            payload, beside = coded
            found, estimated = _payload_bytes(payload, held)
            shared = shared or estimated
            for name, size in found.items():
                costs[name] = costs.get(name, 0) + size
        for name, array in beside.items():
            costs[name] = costs.get(name, 0) + len(array.data)
    return costs, shared


def _payload_bytes(payload: bytes, held: Held) -> tuple[dict[str, int], bool]:
    try:
        info = inspect(payload)
    except VersionsError:
        return _scheme_bytes(payload), True
    if info.kind is not Kind.SCHEME:
        costs = measure_payload(payload, held=held(info.base)).tensors
        return {n: c.nbytes for n, c in costs.items()}, any(c.shared for c in costs.values())
    total: dict[str, int] = {}
    for part in payloads_in(payload):
        for name, size in _scheme_bytes(part).items():
            total[name] = total.get(name, 0) + size
    return total, True


def _scheme_bytes(payload: bytes) -> dict[str, int]:
    """Bytes of a scheme's payload, by the entropy of what it holds of each tensor."""
    envelope = inspect_scheme(payload)
    values = SCHEMES[envelope.scheme].parse(envelope, Limits()).values
    bits = {name: _entropy(array) for name, array in values.items()}
    whole = sum(bits.values()) or 1.0
    return {name: round(len(payload) * part / whole) for name, part in bits.items()}


def _entropy(values: NDArray[Any]) -> float:
    """Bits of integers by how often each occurs; of floats by where they are not zero."""
    if not values.size:
        return 0.0
    if values.dtype.kind == "f":
        kept = int(np.count_nonzero(values))
        counts = np.array([kept, values.size - kept])
        stored = 8 * values.dtype.itemsize * kept
    else:
        counts, stored = np.unique(values, return_counts=True)[1], 0
    shares = counts[counts > 0] / values.size
    return float(stored - values.size * np.sum(shares * np.log2(shares)))


def layers_in(arrays: ArrayRecord, model: PublishedModel | None) -> dict[str, Any]:
    """How many entries each tensor of a model has, and how many of these are zero.

    Args:
        arrays: the model, where nothing is published.
        model: the published one.

    Returns:
        ``tensors``: name to [entries, zeros]; ``others``: the same of those that are too many to
        be named, together.
    """
    if model is not None:
        parts = {
            n: t.q if isinstance(t, LatticeTensor) else t.dense() for n, t in model.tensors.items()
        }
    else:
        parts = {n: a.numpy() for n, a in arrays.items() if is_codable_array(a)}
    sizes = {name: [int(a.size), int(a.size - np.count_nonzero(a))] for name, a in parts.items()}
    named, others = _largest(
        sizes,
        lambda pair: pair[0],
        lambda pairs: [sum(column) for column in zip(*pairs, strict=True)],
    )
    return {"tensors": named, **({"others": others} if others else {})}


def changed_masks(before: PublishedModel | None, model: PublishedModel | None) -> dict[str, int]:
    """How masks changed from one version to the next: weights kept, come back, and gone.

    Empty where nothing is pruned.
    """
    found = {"kept": 0, "of": 0, "grown": 0, "removed": 0}
    for name, tensor in (model.tensors if model is not None else {}).items():
        if not (isinstance(tensor, LatticeTensor) and tensor.pruned):
            continue
        mask = tensor.q != 0
        found["of"] += int(mask.size)
        found["kept"] += int(np.count_nonzero(mask))
        earlier = before.tensors.get(name) if before is not None else None
        if isinstance(earlier, LatticeTensor) and earlier.q.shape == mask.shape:
            was = earlier.q != 0
            found["grown"] += int(np.count_nonzero(mask & ~was))
            found["removed"] += int(np.count_nonzero(was & ~mask))
    return found if found["of"] else {}


def _largest(
    found: Mapping[str, Any], size: Callable[[Any], float], together: Callable[[Any], Any]
) -> tuple[dict[str, Any], Any]:
    """The largest of many in their order, and the others together."""
    if len(found) <= _MOST:
        return dict(found), None
    named = set(sorted(found, key=lambda name: -size(found[name]))[:_MOST])
    rest = [value for name, value in found.items() if name not in named]
    return {name: value for name, value in found.items() if name in named}, together(rest)

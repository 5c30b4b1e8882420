"""signSGD with majority vote (Bernstein et al. 2018, "signSGD: Compressed Optimisation for
Non-Convex Problems", algorithm 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Limits

from . import BadConfig, LayoutMismatch, WrongScheme
from .container import CODINGS, Reader, coded, decoded, seal, unseal
from .interface import Draws, Quantised, Scheme
from .layout import Arrays, Layout, State, concatenated, scaled, split, total_size

__all__ = ["SignSgd", "majority_vote"]

_TIES = ("random", "positive")


@dataclass(frozen=True)
class SignSgd(Scheme):
    """One bit per entry: its sign.

    Attributes:
        step: magnitude of every received entry; the paper's server applies its learning rate to
            signs, so 1. With 0 it is the mean magnitude of each tensor, which travels as one
            float32 (Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", algorithm 1).
        ties: sign of an entry that is zero, for which one bit has no room: "random", a fair
            coin drawn from the key, or "positive".
        error_feedback: keep what the signs left out (the same, algorithm 1).

    >>> sign = SignSgd(step=0.5)
    >>> payload, _ = sign.encode({"w": np.float32([3, -4])}, sign.init({"w": (2,)}), key=1)
    >>> sign.decode(payload)["w"].tolist()
    [0.5, -0.5]
    """

    name: ClassVar[str] = "signsgd"
    number: ClassVar[int] = 4

    step: float = 1.0
    ties: str = "random"
    error_feedback: bool = False

    def _check(self) -> None:
        if not 0 <= self.step <= float(np.finfo(np.float32).max):
            raise self._bad("step", "0 or a magnitude")
        if self.ties not in _TIES:
            raise self._bad("ties", " or ".join(map(repr, _TIES)))

    def _buffers(self) -> tuple[str, ...]:
        return ("residual",) if self.error_feedback else ()

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        values: dict[str, NDArray[np.bool_]] = {}
        scales = []
        for name, tensor in tensors.items():
            positive = tensor > 0
            zero = tensor == 0
            coins = draws.coins(name, tensor.size).reshape(tensor.shape)
            values[name] = np.where(zero, coins if self.ties == "random" else True, positive)
            mean = np.abs(tensor).mean(dtype=np.float64) if tensor.size else 0.0
            scales.append(np.float32(self.step or mean))
        return Quantised(values, np.array(scales, np.float32))

    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        return _written(quantised, layout, self.coding)

    @classmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        scales = reader.scales(len(layout))
        if coding == "prunecast":
            return Quantised(decoded(reader.rest(), layout, "bool", limits), scales)
        bits = reader.bits(total_size(layout))
        return Quantised(split(bits, list(layout), layout), scales)

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        return {
            name: scaled(np.where(positive, np.int8(1), np.int8(-1)), scale)
            for (name, positive), scale in zip(
                quantised.values.items(), quantised.scales, strict=True
            )
        }


def _written(quantised: Quantised, layout: Layout, coding: str) -> bytes:
    scales = quantised.scales.astype("<f4").tobytes()
    if coding == "prunecast":
        return scales + coded(quantised.values)
    flat = concatenated(quantised.values, list(layout), np.bool_) if layout else np.zeros(0, bool)
    return scales + np.packbits(flat).tobytes()


def majority_vote(
    payloads: Sequence[bytes],
    *,
    key: int,
    ties: str = "random",
    coding: str = "paper",
    limits: Limits | None = None,
) -> bytes:
    """The server's answer: one signSGD payload with the sign that most senders sent.

    Args:
        payloads: of `SignSgd`, of the same names and shapes; any coding.
        key: 0 to 2**64 - 1, decides the ties.
        ties: sign of an entry with as many voters for either sign, which an even number of them
            makes common: "random", a fair coin drawn from the key, or "positive".
        coding: of the answer.
        limits: what is accepted of each payload.

    Returns:
        A payload for `SignSgd.decode`; the magnitude of each tensor is the mean of the senders'.

    Raises:
        BadConfig: no payload, or an option is out of range.
        LayoutMismatch: the payloads are not of the same tensors.
        CodecError: a subclass for each way in which a payload may be wrong.

    >>> sign = SignSgd()
    >>> votes = []
    >>> for w in ([1, 1], [1, -1], [-1, -1]):
    ...     votes.append(sign.encode({"w": np.float32(w)}, sign.init({"w": (2,)}), key=0)[0])
    >>> sign.decode(majority_vote(votes, key=0))["w"].tolist()
    [1.0, -1.0]
    """
    if not payloads:
        raise BadConfig("a majority needs votes: give at least one payload")
    if ties not in _TIES or coding not in CODINGS:
        raise BadConfig(f"ties are {_TIES} and coding {CODINGS}, not {ties!r} and {coding!r}")
    draws, limits = Draws(key, b"vote"), limits or Limits()
    layout: dict[str, tuple[int, ...]] = {}
    votes: dict[str, NDArray[np.int32]] = {}
    scales = np.zeros(0, np.float64)
    for number, payload in enumerate(payloads):
        envelope = unseal(bytes(payload), limits)
        if envelope.scheme != SignSgd.number:
            raise WrongScheme(f"payload {number} is no vote: its scheme is {envelope.scheme}")
        if not number:
            layout = envelope.layout
            votes = {name: np.zeros(shape, np.int32) for name, shape in layout.items()}
            scales = np.zeros(len(layout))
        elif list(envelope.layout.items()) != list(layout.items()):
            raise LayoutMismatch(f"payload {number} votes on other tensors than the first")
        vote = SignSgd.parse(envelope, limits)
        scales += vote.scales
        for name, positive in vote.values.items():
            votes[name] += np.where(positive, np.int32(1), np.int32(-1))
    values = {}
    for name, sum_ in votes.items():
        coins = draws.coins(name, sum_.size).reshape(sum_.shape)
        values[name] = np.where(sum_ == 0, coins if ties == "random" else True, sum_ > 0)
    result = Quantised(values, (scales / len(payloads)).astype(np.float32))
    return seal(SignSgd.number, coding, layout, _written(result, layout, coding))

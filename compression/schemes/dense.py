"""Every entry in fewer bits: its sign, IEEE half precision, integers with one scale per channel.

Signs as in Bernstein et al. 2018 ("signSGD: Compressed Optimisation for Non-Convex Problems",
algorithm 3). Integers of 8 and 4 bits as in post-training quantisation (Jacob et al. 2018,
"Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference";
Krishnamoorthi 2018, section 2.2, per-channel symmetric).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Limits, MalformedPayload

from . import BadConfig, LayoutMismatch, OutOfRange, WrongScheme
from .container import Reader, coded, decoded, seal, unseal
from .interface import Draws, Quantised, Scheme
from .layout import Arrays, Layout, State, concatenated, scaled, split, step_of, total_size

__all__ = ["Fp16", "Int4", "Int8", "SignSgd", "majority_vote"]


class _Dense(Scheme):
    """The body is the scales, and then a number for every entry."""

    dtype: ClassVar[str]
    """Of these numbers."""

    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        scales = quantised.scales.astype("<f4").tobytes()
        if self.coding == "prunecast":
            return scales + coded(quantised.values)
        return scales + self._packed(concatenated(quantised.values, list(layout), self.dtype))

    @classmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        scales = reader.scales(sum(map(cls._scales, layout.values())))
        if coding == "prunecast":
            values = decoded(reader.rest(), layout, cls.dtype, limits)
        else:
            flat = cls._unpacked(reader, total_size(layout))
            values = split(flat, list(layout), layout)
        for name, value in values.items():
            cls._verify(name[:80], value)
        return Quantised(values, scales)

    @classmethod
    def _scales(cls, shape: tuple[int, ...]) -> int:
        """Number of scales of a tensor."""
        return 0

    @classmethod
    def _verify(cls, name: str, values: NDArray[Any]) -> None:
        """MalformedPayload when no sender can have sent such numbers."""

    @classmethod
    def _packed(cls, flat: NDArray[Any]) -> bytes:
        """The numbers in the paper's coding."""
        return flat.astype(np.dtype(cls.dtype).newbyteorder("<"), copy=False).tobytes()

    @classmethod
    def _unpacked(cls, reader: Reader, count: int) -> NDArray[Any]:
        """Inverse of `_packed`."""
        return reader.array(np.dtype(cls.dtype).newbyteorder("<").str, count)


_TOP = np.finfo(np.float16).max


@dataclass(frozen=True)
class Fp16(_Dense):
    """Every entry as IEEE half precision, rounded to nearest even as numpy does.

    Attributes:
        overflow: what happens to magnitudes that round beyond 65,504: "error", or "saturate",
            they become ±65,504.
        error_feedback: add what rounding changed to the next message.

    >>> fp16 = Fp16()
    >>> payload, _ = fp16.encode({"w": np.float32([0.1, 2])}, fp16.init({"w": (2,)}), key=0)
    >>> fp16.decode(payload)["w"].tolist()
    [0.0999755859375, 2.0]
    """

    name: ClassVar[str] = "fp16"
    dtype = "float16"
    choices: ClassVar = {"overflow": ("error", "saturate")}

    overflow: str = "error"
    error_feedback: bool = False

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        values: dict[str, NDArray[np.float16]] = {}
        for name, tensor in tensors.items():
            with np.errstate(over="ignore", under="ignore"):
                half = tensor.astype(np.float16)
            if not np.isfinite(half).all():
                if self.overflow == "error":
                    raise OutOfRange(
                        f"tensor {name!r} reaches {float(np.abs(tensor).max()):g}, beyond half "
                        f"precision ({_TOP:g}); scale it, or choose overflow='saturate'"
                    )
                half = np.clip(half, -_TOP, _TOP)
            values[name] = half
        return Quantised(values, np.zeros(0, np.float32))

    @classmethod
    def _verify(cls, name: str, values: NDArray[Any]) -> None:
        if not np.isfinite(values).all():
            raise MalformedPayload(f"tensor {name!r} holds NaN or an infinity")

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        return {name: value.astype(np.float32) for name, value in quantised.values.items()}


@dataclass(frozen=True)
class _Integers(_Dense):
    top: ClassVar[int]
    """Largest magnitude of an integer."""
    dtype = "int8"
    choices: ClassVar = {"rounding": ("nearest", "stochastic")}

    rounding: str = "nearest"
    error_feedback: bool = False

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        values: dict[str, NDArray[np.int8]] = {}
        scales: list[NDArray[np.float32]] = []
        for name, tensor in tensors.items():
            rows = tensor.reshape(self._scales(tensor.shape), -1) if tensor.size else tensor
            if not tensor.size:
                values[name] = np.zeros(tensor.shape, np.int8)
                continue
            scale = step_of(np.abs(rows).max(axis=1), self.top)
            scales.append(scale)
            divisor = np.where(scale > 0, scale, 1).astype(np.float64)
            ratio = rows / divisor[:, None]
            if self.rounding == "nearest":
                whole = np.rint(ratio, out=ratio)
            else:
                chance = draws.uniform(name, tensor.size).reshape(rows.shape)
                whole = np.floor(ratio + chance, out=ratio)
            values[name] = whole.astype(np.int8).reshape(tensor.shape)
        return Quantised(values, np.concatenate([np.zeros(0, np.float32), *scales]))

    @classmethod
    def _scales(cls, shape: tuple[int, ...]) -> int:
        """The first dimension of a matrix or kernel, else one; none of nothing."""
        if not math.prod(shape):
            return 0
        return shape[0] if len(shape) > 1 else 1

    @classmethod
    def _verify(cls, name: str, values: NDArray[Any]) -> None:
        if values.size and not -cls.top <= values.min() <= values.max() <= cls.top:
            raise MalformedPayload(f"an integer of {name!r} is above {cls.top}")

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        arrays: Arrays = {}
        at = 0
        for name, value in quantised.values.items():
            count = cls._scales(value.shape)
            mine = quantised.scales[at : at + count]
            at += count
            rows = value.reshape(count, -1) if count else value
            arrays[name] = (
                scaled(rows, mine[:, None]).reshape(value.shape)
                if count
                else scaled(value, np.float32(1))
            )
        return arrays


@dataclass(frozen=True)
class Int8(_Integers):
    """Every output channel is a scale times integers from -127 to 127.

    ``scale = max |w| / 127`` over a channel, which is an index of the first dimension where
    there are two or more and else the whole tensor; ``q = rint(w / scale)``, so that
    ``|w - q scale| <= scale / 2``.

    Attributes:
        rounding: "nearest" (halves to even), or "stochastic": up with the probability of the
            fractional part, right on average and off by at most ``scale``.
        error_feedback: add what rounding changed to the next message.

    >>> int8 = Int8()
    >>> payload, _ = int8.encode({"w": np.float32([127, -0.6])}, int8.init({"w": (2,)}), key=0)
    >>> int8.decode(payload)["w"].tolist()
    [127.0, -1.0]
    """

    name: ClassVar[str] = "int8"
    top: ClassVar[int] = 127


@dataclass(frozen=True)
class Int4(_Integers):
    """Every output channel is a scale times integers from -7 to 7, two in a byte.

    As :class:`Int8` with ``scale = max |w| / 7``; the first of two is the low half of the byte.

    >>> int4 = Int4()
    >>> payload, _ = int4.encode({"w": np.float32([7, -3.4])}, int4.init({"w": (2,)}), key=0)
    >>> int4.decode(payload)["w"].tolist()
    [7.0, -3.0]
    """

    name: ClassVar[str] = "int4"
    top: ClassVar[int] = 7

    @classmethod
    def _packed(cls, flat: NDArray[Any]) -> bytes:
        nibbles = np.concatenate([flat, np.zeros(len(flat) % 2, np.int8)]).view(np.uint8) & 15
        return (nibbles[::2] | nibbles[1::2] << 4).tobytes()

    @classmethod
    def _unpacked(cls, reader: Reader, count: int) -> NDArray[Any]:
        octets = reader.array("u1", count + 1 >> 1)
        if count % 2 and octets[-1] >> 4:
            raise MalformedPayload("the half byte after the last integer is not zero")
        flat = np.empty(2 * len(octets), np.uint8)
        flat[::2] = octets << 4
        flat[1::2] = octets & 0xF0
        return (flat.view(np.int8) >> 4)[:count]


@dataclass(frozen=True)
class SignSgd(_Dense):
    """One bit per entry: its sign.

    Attributes:
        step: magnitude of every received entry; the paper's server applies its learning rate to
            signs, so 1. With 0 it is the mean magnitude of each tensor, which travels as one
            float32 (Karimireddy et al. 2019, "Error Feedback Fixes SignSGD", algorithm 1).
        ties: sign of an entry that is zero, for which one bit has no room: "random", a fair
            coin drawn from the key, or "positive".
        error_feedback: keep what the signs left out (the same, algorithm 1).
        rounding: "sign", or "stochastic": ``+step`` with the chance ``(1 + x / step) / 2``, cut to
            0 and 1, so that what is received is right on average for ``|x| <= step`` (Li et al.
            2024, "FedBAT: Communication-Efficient Federated Learning via Learnable Binarization",
            section 4, whose step begins as the mean magnitude, and is then trained).

    >>> sign = SignSgd(step=0.5)
    >>> payload, _ = sign.encode({"w": np.float32([3, -4])}, sign.init({"w": (2,)}), key=1)
    >>> sign.decode(payload)["w"].tolist()
    [0.5, -0.5]
    """

    name: ClassVar[str] = "signsgd"
    dtype = "bool"
    choices: ClassVar = {"ties": ("random", "positive"), "rounding": ("sign", "stochastic")}

    step: float = 1.0
    ties: str = "random"
    error_feedback: bool = False
    rounding: str = "sign"

    def _check(self) -> None:
        if not 0 <= self.step <= float(np.finfo(np.float32).max):
            raise self._bad("step", "0 or a magnitude")

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        values: dict[str, NDArray[np.bool_]] = {}
        scales = []
        for name, tensor in tensors.items():
            mean = np.abs(tensor).mean(dtype=np.float64) if tensor.size else 0.0
            scales.append(np.float32(self.step or mean))
            if self.rounding == "stochastic":
                chance = draws.uniform(name, tensor.size).reshape(tensor.shape)
                values[name] = chance < 0.5 + 0.5 * tensor / (float(scales[-1]) or 1.0)
                continue
            positive = tensor > 0
            zero = tensor == 0
            coins = draws.coins(name, tensor.size).reshape(tensor.shape)
            values[name] = np.where(zero, coins if self.ties == "random" else True, positive)
        return Quantised(values, np.array(scales, np.float32))

    @classmethod
    def _scales(cls, shape: tuple[int, ...]) -> int:
        return 1

    @classmethod
    def _packed(cls, flat: NDArray[Any]) -> bytes:
        return np.packbits(flat).tobytes()

    @classmethod
    def _unpacked(cls, reader: Reader, count: int) -> NDArray[Any]:
        return reader.bits(count)

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        return {
            name: scaled(np.where(positive, np.int8(1), np.int8(-1)), scale)
            for (name, positive), scale in zip(
                quantised.values.items(), quantised.scales, strict=True
            )
        }


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
    answer = SignSgd(ties=ties, coding=coding)
    draws, limits = Draws(key, b"vote"), limits or Limits()
    layout: dict[str, tuple[int, ...]] = {}
    votes: dict[str, NDArray[np.int32]] = {}
    scales = np.zeros(0, np.float64)
    for number, payload in enumerate(payloads):
        envelope = unseal(bytes(payload), limits)
        if envelope.scheme != SignSgd.name:
            raise WrongScheme(f"payload {number} is no vote: its scheme is {envelope.scheme!r}")
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
    return seal(answer.name, coding, layout, answer._write(result, layout))

"""Every entry in fewer bits: IEEE half precision, and integers with one scale per channel.

Integers of 8 and 4 bits as in post-training quantisation (Jacob et al. 2018, "Quantization and
Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference"; Krishnamoorthi 2018,
section 2.2, per-channel symmetric).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Limits, MalformedPayload

from . import OutOfRange
from .container import Reader, coded, decoded
from .interface import Draws, Quantised, Scheme
from .layout import Arrays, Layout, State, concatenated, scaled, split, step_of, total_size

__all__ = ["Fp16", "Int4", "Int8"]

_OVERFLOW = ("error", "saturate")
_TOP = np.finfo(np.float16).max


@dataclass(frozen=True)
class Fp16(Scheme):
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
    number: ClassVar[int] = 7

    overflow: str = "error"
    error_feedback: bool = False

    def _check(self) -> None:
        if self.overflow not in _OVERFLOW:
            raise self._bad("overflow", " or ".join(map(repr, _OVERFLOW)))

    def _buffers(self) -> tuple[str, ...]:
        return ("residual",) if self.error_feedback else ()

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

    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        if self.coding == "prunecast":
            return coded(quantised.values)
        return concatenated(quantised.values, list(layout), np.float16).astype("<f2").tobytes()

    @classmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        if coding == "prunecast":
            values = decoded(reader.rest(), layout, "float16", limits)
        else:
            flat = reader.array("<f2", total_size(layout))
            values = split(flat, list(layout), layout)
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise MalformedPayload(f"tensor {name[:80]!r} holds NaN or an infinity")
        return Quantised(values, np.zeros(0, np.float32))

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        return {name: value.astype(np.float32) for name, value in quantised.values.items()}


_ROUNDING = ("nearest", "stochastic")


@dataclass(frozen=True)
class _Integers(Scheme):
    top: ClassVar[int]
    """Largest magnitude of an integer."""

    rounding: str = "nearest"
    error_feedback: bool = False

    def _check(self) -> None:
        if self.rounding not in _ROUNDING:
            raise self._bad("rounding", " or ".join(map(repr, _ROUNDING)))

    def _buffers(self) -> tuple[str, ...]:
        return ("residual",) if self.error_feedback else ()

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        values: dict[str, NDArray[np.int8]] = {}
        scales: list[NDArray[np.float32]] = []
        for name, tensor in tensors.items():
            rows = tensor.reshape(_channels(tensor.shape), -1) if tensor.size else tensor
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

    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        scales = quantised.scales.astype("<f4").tobytes()
        if self.coding == "prunecast":
            return scales + coded(quantised.values)
        return scales + self._packed(concatenated(quantised.values, list(layout), np.int8))

    @classmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        scales = reader.scales(sum(map(_channels, layout.values())))
        if coding == "prunecast":
            values = decoded(reader.rest(), layout, "int8", limits)
        else:
            flat = cls._unpacked(reader, total_size(layout))
            values = split(flat, list(layout), layout)
        for name, value in values.items():
            if value.size and not -cls.top <= value.min() <= value.max() <= cls.top:
                raise MalformedPayload(f"an integer of {name[:80]!r} is above {cls.top}")
        return Quantised(values, scales)

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        arrays: Arrays = {}
        at = 0
        for name, value in quantised.values.items():
            count = _channels(value.shape)
            mine = quantised.scales[at : at + count]
            at += count
            rows = value.reshape(count, -1) if count else value
            arrays[name] = (
                scaled(rows, mine[:, None]).reshape(value.shape)
                if count
                else scaled(value, np.float32(1))
            )
        return arrays

    @classmethod
    def _packed(cls, flat: NDArray[np.int8]) -> bytes:
        return flat.tobytes()

    @classmethod
    def _unpacked(cls, reader: Reader, count: int) -> NDArray[np.int8]:
        return np.asarray(reader.array("<i1", count), np.int8)


def _channels(shape: tuple[int, ...]) -> int:
    """Number of scales: the first dimension of a matrix or kernel, else one; none of nothing."""
    if not math.prod(shape):
        return 0
    return shape[0] if len(shape) > 1 else 1


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
    number: ClassVar[int] = 5
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
    number: ClassVar[int] = 6
    top: ClassVar[int] = 7

    @classmethod
    def _packed(cls, flat: NDArray[np.int8]) -> bytes:
        nibbles = np.concatenate([flat, np.zeros(len(flat) % 2, np.int8)]).view(np.uint8) & 15
        return (nibbles[::2] | nibbles[1::2] << 4).tobytes()

    @classmethod
    def _unpacked(cls, reader: Reader, count: int) -> NDArray[np.int8]:
        octets = reader.array("u1", count + 1 >> 1)
        if count % 2 and octets[-1] >> 4:
            raise MalformedPayload("the half byte after the last integer is not zero")
        flat = np.empty(2 * len(octets), np.uint8)
        flat[::2] = octets << 4
        flat[1::2] = octets & 0xF0
        return (flat.view(np.int8) >> 4)[:count]

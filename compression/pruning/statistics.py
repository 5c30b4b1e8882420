"""What nodes contribute to a criterion: named arrays, one value per weight, in one small record.

A statistic only ranks weights, so a value travels as its sign and its magnitude's logarithm in
quarters of an octave below the tensor's largest: one byte, 31 octaves deep, within 9 %, and about
six bits after the codec. On the server the nodes' values become one weighted mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Limits
from prunecast.compression.versions import BadPayload, encode_plain, open_plain

__all__ = [
    "Statistics",
    "StatisticsError",
    "StatisticsMean",
    "collecting",
    "contribute_statistics",
    "pack_statistics",
    "unpack_statistics",
    "wanted_statistics",
]

Statistics = Mapping[str, Mapping[str, NDArray[np.floating]]]
Shapes = Mapping[str, tuple[int, ...]]

_OCTAVE, _TOP = 4, 127  # codes an octave; the code of a tensor's largest magnitude
_LEVELS = np.concatenate([[0.0], np.exp2((np.arange(1, _TOP + 1) - _TOP) / _OCTAVE)])
_LARGEST = 2.0**100  # a magnitude beyond says nothing, and sums of them would overflow
_SCALES, _OF = "", "\0"


class StatisticsError(ValueError):
    """A ClientApp contributes what does not fit the model."""


class _Collected:
    def __init__(self, wanted: tuple[str, ...], shapes: Shapes) -> None:
        self.wanted, self.shapes = wanted, shapes
        self.found: dict[str, dict[str, NDArray[np.floating]]] = {}


_collected: ContextVar[_Collected | None] = ContextVar("prunecast_statistics", default=None)


def wanted_statistics() -> tuple[str, ...]:
    """Names of the statistics that the server asks for with the message being handled."""
    collected = _collected.get()
    return collected.wanted if collected else ()


def contribute_statistics(name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Send a statistic with the reply to the message being handled; ignored unless it is wanted.

    Args:
        name: of the statistic, see `wanted_statistics`.
        arrays: tensor name to one finite value per weight, in the tensor's shape. Tensors that are
            left out are known by the other nodes' values, or not at all.

    Raises:
        StatisticsError: a tensor is not the model's, or a value is not finite.
    """
    collected = _collected.get()
    if collected is None or name not in collected.wanted:
        return
    for tensor, array in arrays.items():
        shape = collected.shapes.get(tensor)
        if shape is None or np.shape(array) != shape:
            raise StatisticsError(
                f"statistic {name!r} of tensor {tensor!r} is {list(np.shape(array))}: the model "
                + ("has no such tensor" if shape is None else f"holds {list(shape)}")
            )
        if not (np.abs(array) <= _LARGEST).all():
            raise StatisticsError(
                f"statistic {name!r} of tensor {tensor!r} holds NaN, infinity or more than 2**100"
            )
    collected.found[name] = {tensor: np.asarray(array) for tensor, array in arrays.items()}


@contextmanager
def collecting(
    wanted: tuple[str, ...], shapes: Shapes
) -> Iterator[dict[str, dict[str, NDArray[np.floating]]]]:
    """Take what is contributed for the duration of a ClientApp's function.

    Args:
        wanted: names of the statistics that the server asked for.
        shapes: of the tensors of the model that is trained.

    Yields:
        What has been contributed, by statistic and tensor.
    """
    collected = _Collected(wanted, shapes)
    token = _collected.set(collected)
    try:
        yield collected.found
    finally:
        _collected.reset(token)


def pack_statistics(statistics: Statistics, *, stream: bytes = b"") -> bytes:
    """Statistics of finite values as a plain payload, to within 9 % of each value."""
    arrays: dict[str, NDArray[Any]] = {}
    scales = []
    for name, tensors in statistics.items():
        for tensor, array in tensors.items():
            values = array.astype(np.float32)
            magnitude = np.abs(values)
            scale = float(magnitude.max(initial=0.0))
            depth = np.full(values.shape, float(_TOP))
            np.log2(magnitude, out=depth, where=magnitude > 0)
            np.subtract(math.log2(scale) if scale else 0.0, depth, out=depth, where=magnitude > 0)
            code = np.maximum(_TOP - np.rint(_OCTAVE * depth), 0)
            arrays[name + _OF + tensor] = np.copysign(code, values).astype(np.int8)
            scales.append(scale)
    arrays[_SCALES] = np.array(scales, np.float32)
    return encode_plain(arrays, stream=stream)


def unpack_statistics(
    payload: bytes, wanted: tuple[str, ...], shapes: Shapes, *, stream: bytes = b""
) -> dict[str, dict[str, NDArray[np.float32]]]:
    """Inverse of `pack_statistics`, for what was asked of a node.

    Args:
        payload: the bytes; what they may allocate is bounded by `wanted` and `shapes`.
        wanted: names of the statistics.
        shapes: of the tensors that it may have.
        stream: identifier the payload must have been made for.

    Raises:
        BadPayload: damaged, or it holds what was not asked for.
        WrongStream: made for another stream.
    """
    elements = len(wanted) * sum(math.prod(shape) + 1 for shape in shapes.values())
    limits = Limits(elements=elements, decoded_bytes=4 * elements, free_bytes=4 * elements)
    opened = open_plain(payload, stream=stream, limits=limits)
    specs = dict(opened.specs)
    scales_spec = specs.pop(_SCALES, None)
    if scales_spec is None or (scales_spec.dtype, scales_spec.shape) != (
        np.dtype(np.float32),
        (len(specs),),
    ):
        raise BadPayload("the record of statistics lacks their scales")
    found: dict[str, dict[str, NDArray[np.float32]]] = {}
    try:
        scales = opened[_SCALES]
        if not ((scales >= 0) & (scales <= _LARGEST)).all():
            raise BadPayload("a statistic's scale is no finite number of 0 or above")
        for (key, spec), scale in zip(specs.items(), scales, strict=True):
            name, _, tensor = key.partition(_OF)
            expected = shapes.get(tensor) if name in wanted else None
            if expected is None or (spec.dtype, spec.shape) != (np.dtype(np.int8), expected):
                raise BadPayload(f"nobody asked for the statistic {name[:80]!r} of {tensor[:80]!r}")
            codes = opened[key].astype(np.int16)
            values = (_LEVELS[np.minimum(np.abs(codes), _TOP)] * scale).astype(np.float32)
            found.setdefault(name, {})[tensor] = np.copysign(values, codes)
    except CodecError as error:
        raise BadPayload(f"a statistic cannot be decoded: {error}") from error
    return found


class StatisticsMean:
    """The weighted mean of what nodes contribute from one version to the next."""

    def __init__(self) -> None:
        self._mean: dict[str, dict[str, NDArray[np.float32]]] = {}
        self._weight: dict[tuple[str, str], float] = {}

    def add(self, statistics: Statistics, weight: float = 1.0) -> None:
        """Count one node's values `weight` times; a weight that is not above 0 and finite, once."""
        if not (math.isfinite(weight) and weight > 0):
            weight = 1.0
        for name, tensors in statistics.items():
            mean = self._mean.setdefault(name, {})
            for tensor, array in tensors.items():
                total = self._weight.get((name, tensor), 0.0) + weight
                self._weight[name, tensor] = total
                before = mean.setdefault(tensor, np.zeros(array.shape, np.float32))
                if before.shape != array.shape:  # the model changed under way
                    self._weight[name, tensor] = weight
                    mean[tensor] = array.astype(np.float32)
                else:
                    before += (array - before) * np.float32(weight / total)

    def take(self) -> dict[str, dict[str, NDArray[np.float32]]]:
        """The mean so far; begins anew."""
        taken, self._mean = self._mean, {}
        self._weight.clear()
        return taken

"""What nodes contribute to a criterion: named arrays, in one small payload.

A statistic has one value per weight, or per input channel. It only ranks weights, so its values
travel with one bit of mantissa: within 20 %, and five to six bits each after the codec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Limits
from prunecast.compression.versions import BadPayload, encode_plain, open_plain, rounded_floats

__all__ = [
    "ACTIVATION",
    "GRADIENT",
    "SENSITIVITY",
    "Statistics",
    "StatisticsMean",
    "pack_statistics",
    "statistic_shape",
]

GRADIENT = "gradient"
"""The statistic *root mean square over steps of the loss's gradient*, one value per weight."""
SENSITIVITY = "sensitivity"
"""*Weight times gradient* of the mean loss, at the weights a node was sent; with its sign."""
ACTIVATION = "activation"
"""*Mean absolute input* of a linear or convolutional layer, one value per input channel."""

Statistics = Mapping[str, Mapping[str, NDArray[Any]]]
"""Name of a statistic to tensor to values."""
_LARGEST = 1e30  # a mean of such is finite
_BITS = 1  # of mantissa
_OF = "\0"


def statistic_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that a statistic of a tensor has: the tensor's, or of its input channels alone.

    Examples:
        >>> statistic_shape("gradient", (64, 32, 3, 3)), statistic_shape("activation", (64, 32, 3))
        ((64, 32, 3, 3), (1, 32, 1))
    """
    if name != ACTIVATION:
        return shape
    return tuple(n if axis == 1 else 1 for axis, n in enumerate(shape))


def pack_statistics(statistics: Statistics) -> bytes:
    """Statistics as a plain payload; what is beyond ±1e30 becomes that."""
    return encode_plain(
        {
            name + _OF + tensor: rounded_floats(
                np.clip(array, -_LARGEST, _LARGEST).astype(np.float32), _BITS
            )
            for name, tensors in statistics.items()
            for tensor, array in tensors.items()
        }
    )


class StatisticsMean:
    """The mean over nodes of what they contribute from one version to the next."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, str], tuple[NDArray[np.float32], float]] = {}

    def add(
        self,
        payload: bytes,
        wanted: tuple[str, ...],
        shapes: Mapping[str, tuple[int, ...]],
        weight: float = 1.0,
    ) -> None:
        """Count what one node contributed.

        Args:
            payload: of `pack_statistics`; what it may allocate is bounded by the next two.
            wanted: names of the statistics that it was asked for.
            shapes: of the tensors of the model that it has.
            weight: how often it counts; once unless that is finite and above 0.

        Raises:
            BadPayload: damaged, not finite, or not what was asked for; nothing was counted.
        """
        size = 4 * len(wanted) * sum(math.prod(shape) for shape in shapes.values())
        opened = open_plain(payload, limits=Limits(decoded_bytes=size, free_bytes=size))
        found: dict[tuple[str, str], NDArray[np.float32]] = {}
        for key, spec in opened.specs.items():
            name, _, tensor = key.partition(_OF)
            asked = name in wanted and tensor in shapes
            asked = asked and spec.shape == statistic_shape(name, shapes[tensor])
            if not asked or spec.dtype != np.float32:
                raise BadPayload(f"nobody asked for the statistic {name[:80]!r} of {tensor[:80]!r}")
            try:
                found[name, tensor] = opened[key]
            except CodecError as error:
                raise BadPayload(f"a statistic cannot be decoded: {error}") from error
            if not (np.abs(found[name, tensor]) <= 2 * _LARGEST).all():
                raise BadPayload(f"statistic {name!r} of {tensor!r} holds NaN or infinity")
        weight = weight if math.isfinite(weight) and weight > 0 else 1.0
        for place, values in found.items():
            mean, before = self._means.get(place, (values, 0.0))
            if mean.shape != values.shape:  # the model changed under way
                mean, before = values, 0.0
            share = np.float32(weight / (before + weight))
            self._means[place] = (mean + (values - mean) * share, before + weight)

    def so_far(self) -> dict[str, dict[str, NDArray[np.float32]]]:
        """The mean so far, by statistic and tensor."""
        found: dict[str, dict[str, NDArray[np.float32]]] = {}
        for (name, tensor), (mean, _) in self._means.items():
            found.setdefault(name, {})[tensor] = mean
        return found

    def take(self) -> dict[str, dict[str, NDArray[np.float32]]]:
        """The mean so far; begins anew."""
        taken = self.so_far()
        self._means.clear()
        return taken

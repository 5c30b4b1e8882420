"""What nodes contribute to a criterion: named arrays, in one small payload.

A statistic has one value per weight, or per input channel. It only ranks weights, so its values
travel with one bit of mantissa: within 20 %, and five to six bits each after the codec.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import CodecError, Limits
from prunecast.compression.versions import BadPayload, encode_plain, open_plain, rounded_floats

__all__ = [
    "ACTIVATION",
    "GRADIENT",
    "GROWTH",
    "RECALIBRATE",
    "RUNNING_STATISTICS",
    "SENSITIVITY",
    "VOTES",
    "Statistics",
    "StatisticsMean",
    "asked",
    "named",
    "pack_statistics",
    "statistic_shape",
]

GRADIENT = "gradient"
"""The statistic *root mean square over steps of the loss's gradient*, one value per weight."""
SENSITIVITY = "sensitivity"
"""*Weight times gradient* of the mean loss, at the weights a node was sent; with its sign."""
ACTIVATION = "activation"
"""*Mean absolute input* of a linear or convolutional layer, one value per input channel."""
GROWTH = "growth"
"""The statistic *mean gradient over steps*, with its sign, of pruned weights; 0 for all but few."""
VOTES = "votes"
"""The signs of `GROWTH`: 1, -1, and 0 for all but few."""

RECALIBRATE = "recalibrate"
"""Action of the query by which a server asks for running statistics of the version it sends."""
RUNNING_STATISTICS = "running-statistics"
"""Key of the record that answers it."""

Statistics = Mapping[str, Mapping[str, NDArray[Any]]]
"""Name of a statistic to tensor to values."""
_LARGEST = 1e30  # a mean of such is finite
_BITS = 1  # of mantissa
_OF = "\0"
_SHARE = "@"


def named(statistic: str, share: float) -> str:
    """How a server asks for one of the two: with the share of the kept weights that is to grow.

    >>> named(VOTES, 0.25)
    'votes@0.25'
    """
    return f"{statistic}{_SHARE}{share:.4g}"


def asked(names: Iterable[str]) -> dict[str, float]:
    """The statistics that a server asks for, and of which share; 1 for all weights of a tensor.

    >>> asked(["gradient", "votes@0.25", "votes@much"])
    {'gradient': 1.0, 'votes': 0.25}
    """
    found: dict[str, float] = {}
    for name in names:
        statistic, told, share = name.partition(_SHARE)
        try:
            value = float(share) if told else 1.0
        except ValueError:
            continue
        if 0 < value <= 1:
            found[statistic] = value
    return found


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
            wanted: names of the statistics that it was asked for, as of `named`.
            shapes: of the tensors of the model that it has.
            weight: how often it counts; once unless that is finite and above 0.

        Raises:
            BadPayload: damaged, not finite, or not what was asked for; nothing was counted.
        """
        shares = asked(wanted)
        size = 4 * len(shares) * sum(math.prod(shape) for shape in shapes.values())
        opened = open_plain(payload, limits=Limits(decoded_bytes=size, free_bytes=size))
        found: dict[tuple[str, str], NDArray[np.float32]] = {}
        for key, spec in opened.specs.items():
            name, _, tensor = key.partition(_OF)
            fits = name in shares and tensor in shapes
            # a bias has no input channels
            fits = fits and (name != ACTIVATION or len(shapes[tensor]) > 1)
            fits = fits and spec.shape == statistic_shape(name, shapes[tensor])
            if not fits or spec.dtype != np.float32:
                raise BadPayload(f"nobody asked for the statistic {name[:80]!r} of {tensor[:80]!r}")
            try:
                found[name, tensor] = opened[key]
            except CodecError as error:
                raise BadPayload(f"a statistic cannot be decoded: {error}") from error
            if not (np.abs(found[name, tensor]) <= 2 * _LARGEST).all():
                raise BadPayload(f"statistic {name!r} of {tensor!r} holds NaN or infinity")
            most = math.ceil(shares[name] * spec.size)
            if np.count_nonzero(found[name, tensor]) > most:
                raise BadPayload(f"statistic {name!r} of {tensor!r} has more than {most} values")
            if name == VOTES and (np.abs(found[name, tensor]) > 1).any():
                raise BadPayload(f"a vote on {tensor!r} counts more than once")
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

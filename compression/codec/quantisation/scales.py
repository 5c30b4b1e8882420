"""How large a tensor's values are: what a step is measured in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import QuantiseError

__all__ = ["RelativeTo", "scales_of", "spread"]

RelativeTo = Literal["std", "rms"] | Mapping[str, float] | None
"""What the steps of several tensors are proportional to.

``"std"`` or ``"rms"``: the :func:`spread` of each; a mapping: the number given for each; None:
nothing, so all tensors get the same step.
"""

_LEAST = 1e-3  # of the root mean square: a constant tensor gets a usable step as well


def spread(
    values: NDArray[Any], kind: Literal["std", "rms"] = "std", *, count: int | None = None
) -> float:
    """Standard deviation or root mean square of an array, computed in float64.

    Args:
        values: floating-point array of any shape, finite.
        kind: ``"std"`` or ``"rms"``.
        count: for ``"rms"``, the number of values to average over where the others are zero by
            construction (off a mask); default all.

    Raises:
        QuantiseError: of another kind.

    >>> spread(np.array([2.0, 0.0, -2.0, 0.0]), "rms", count=2)
    2.0
    """
    if kind not in ("std", "rms"):
        raise QuantiseError(f"steps are relative to 'std' or 'rms', not {kind!r}")
    if not values.size:
        return 0.0
    if kind == "std":
        return float(np.std(values, dtype=np.float64))
    energy = float(np.sum(np.square(values, dtype=np.float64)))
    return float(np.sqrt(energy / max(values.size if count is None else count, 1)))


def scales_of(tensors: Mapping[str, NDArray[Any]], relative_to: RelativeTo) -> dict[str, float]:
    """Return what each tensor's step is proportional to; above zero.

    Raises:
        QuantiseError: a mapping lacks a tensor, or holds a number that is not above zero.
    """
    if relative_to is None:
        return dict.fromkeys(tensors, 1.0)
    if isinstance(relative_to, Mapping):
        scales = {}
        for name in tensors:
            scale = relative_to.get(name, 0.0)
            if not (np.isfinite(scale) and scale > 0):
                raise QuantiseError(
                    f"the scale of tensor {name!r} is {relative_to.get(name)!r}; give a finite "
                    "number above zero for every tensor"
                )
            scales[name] = float(scale)
        return scales
    return {
        name: max(spread(array, relative_to), _LEAST * spread(array, "rms")) or 1.0
        for name, array in tensors.items()
    }

"""From trained arrays to an update: mask, residual, quantisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.client.training.errors import NonFiniteUpdate
from prunecast.compression.codec import quantise, spread
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    QuantisedTensor,
    UpdateRule,
)

__all__ = ["Change", "compress_update"]


@dataclass(frozen=True)
class Change:
    """What a node sends, and what it keeps.

    Attributes:
        changes: per tensor its quantised change or its exact new array; unchanged ones absent.
        residual: per lattice tensor what quantisation dropped; empty without error feedback.
    """

    changes: dict[str, QuantisedTensor | NDArray[Any]]
    residual: dict[str, NDArray[np.floating]]


def compress_update(
    base: PublishedModel,
    trained: Mapping[str, NDArray[Any]],
    residual: Mapping[str, NDArray[np.floating]],
    rule: UpdateRule,
) -> Change:
    """Quantise ``trained - published + residual`` where the mask keeps weights.

    The step of a tensor is ``rule.step`` times the root mean square of its change over the kept
    weights. Changes off the mask are dropped: those weights are pruned.

    Args:
        base: the version that was trained from.
        trained: name to array after local training; same names, shapes and dtypes.
        residual: what earlier rounds dropped; a tensor of another shape starts afresh.
        rule: step, dead zone, error feedback.

    Raises:
        NonFiniteUpdate: a tensor holds NaN or infinity, unless the rule sends exact arrays.
    """
    changes: dict[str, QuantisedTensor | NDArray[Any]] = {}
    kept: dict[str, NDArray[np.floating]] = {}
    for name, tensor in base.tensors.items():
        array = trained[name]
        if rule.step > 0 and array.dtype.kind == "f" and not np.isfinite(array).all():
            raise NonFiniteUpdate(
                f"tensor {name!r} holds NaN or infinity after local training: the update was not "
                "sent. Lower the learning rate or clip gradients."
            )
        if not isinstance(tensor, LatticeTensor) or rule.step == 0:
            if array.tobytes() != tensor.dense().tobytes():
                changes[name] = array
            continue
        quantised, dropped = _quantise(name, tensor, array, residual.get(name), rule)
        if quantised is not None:
            changes[name] = quantised
        if rule.error_feedback:
            kept[name] = dropped
    return Change(changes, kept)


def _quantise(
    name: str,
    tensor: LatticeTensor,
    array: NDArray[Any],
    residual: NDArray[np.floating] | None,
    rule: UpdateRule,
) -> tuple[QuantisedTensor | None, NDArray[np.floating]]:
    working = np.float64 if array.dtype == np.float64 else np.float32
    change = array.astype(working) - tensor.dense().astype(working)
    mask = tensor.mask()
    if mask is not None:
        change *= mask
    weights = change.size if mask is None else int(np.count_nonzero(mask))
    step = float(np.float32(rule.step * spread(change, "rms", count=weights)))
    target = change
    if rule.error_feedback and residual is not None and residual.shape == change.shape:
        target = change + (residual if mask is None else residual * mask).astype(working)
    if step <= np.finfo(np.float32).tiny:
        return None, target
    z = quantise(target, step, dead_zone=rule.dead_zone, name=name)
    dropped = (target - z * working(np.float32(step))).astype(working)
    return (QuantisedTensor(z, step) if z.any() else None), dropped

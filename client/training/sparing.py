"""Replies that take fewer bytes than their rule's steps make, or that say nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from prunecast.client.training.encoding import (
    Coded,
    align,
    kept_whole,
)
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    Tensor,
    UpdateRule,
    exact_change,
    is_statistic,
)

__all__ = ["MOST_COARSER", "Fitted", "coarser_rule", "fitted", "unsent"]

MOST_COARSER = 48
"""Quarters of a doubling by which steps grow at most, for a number of bytes: 4,096 times."""

_COUNTER = "num_batches_tracked"  # the end of its name, in BatchNorm
_FIRST = 4  # quarters that are tried first

Arrays = Mapping[str, NDArray[Any] | None]
Fitted = tuple[Coded, bytes, int]
"""What is sent, its payload, and by how many quarters of a doubling it is coarser."""


def coarser_rule(rule: UpdateRule, quarters: int) -> UpdateRule:
    """The rule with steps and floor that are so many quarters of a doubling larger."""
    factor = 2.0 ** (quarters / 4)
    return replace(rule, step=rule.step * factor, floor=rule.floor * factor)


def fitted(
    encoded: Callable[[UpdateRule], tuple[Coded, bytes]], rule: UpdateRule, most: int
) -> Fitted | None:
    """A reply whose payload has at most so many bytes, in the finest steps that were found to fit.

    Steps are tried by doubling how much coarser they are, then by halving the interval: six or
    seven encodings at most. With error feedback nothing is lost: what coarser steps drop is kept.

    Args:
        encoded: quantises and codes by a rule.
        rule: the finest.
        most: bytes; 0 for no bound.

    Returns:
        None where the coarsest steps do not suffice.
    """
    coded, payload = encoded(rule)
    if not most or len(payload) <= most or not rule.step:
        return coded, payload, 0
    too_fine, found, tried = 0, None, _FIRST
    while found is None and too_fine < MOST_COARSER:
        coded, payload = encoded(coarser_rule(rule, tried))
        if len(payload) <= most:
            found = coded, payload, tried
        else:
            too_fine, tried = tried, min(2 * tried, MOST_COARSER)
    if found is None:
        return None
    while found[2] - too_fine > 1:
        tried = (too_fine + found[2]) // 2
        coded, payload = encoded(coarser_rule(rule, tried))
        if len(payload) <= most:
            found = coded, payload, tried
        else:
            too_fine = tried
    return found


def unsent(
    base: PublishedModel, record: Arrays, residual: Mapping[str, NDArray[Any]], below: float
) -> Coded | None:
    """A reply that says "no change", whose residual is all of what it would have said.

    Args:
        base: the version that the record answers.
        record: its arrays, see `align`.
        residual: what earlier rounds dropped, by name.
        below: the norm that change and residual together must be below; infinity for any.

    Returns:
        None where it is to be sent: it is above that, holds what is no change of the version or
        changes what has no residual, or was dropped while it was values of its own.
    """
    tensors = align(record, base.specs)
    if any(tensor.spec is None or tensor.like != name for name, tensor in tensors.items()):
        return None
    if any(a is not None and _changes_exactly(n, a, base[n]) for n, a in record.items()):
        return None
    kept = kept_whole(base, record, residual)
    return Coded(tensors, {}, kept[0]) if kept is not None and kept[1] < below else None


def _changes_exactly(name: str, array: NDArray[Any], tensor: Tensor) -> bool:
    """Whether what travels exactly has changed, but for what normalisation layers count."""
    if is_statistic(name) or name.endswith(_COUNTER):
        return False
    on_lattice = isinstance(tensor, LatticeTensor) and array.dtype.kind == "f"
    return not on_lattice and exact_change(array, tensor) is not None

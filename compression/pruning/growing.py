"""Drop and grow: masks that move to where the loss's gradient asks for weights.

Every few rounds a small share of the kept weights, the lowest by the plan's criterion, is dropped,
and as many pruned ones are grown, those with the largest gradient (RigL, Evci et al. 2020, section
3). In a federation only nodes know gradients of pruned weights. Each sends those of its strongest
few, as many as are to grow: their values (`GROWTH`), of which the server takes the mean, or their
signs alone (`VOTES`), as many votes of clients as in FedDST (Bibikar et al. 2022), where opposite
directions cancel. Grown weights begin at zero: on a lattice, at its smallest value that goes down
the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.pruning.criteria import Scores
from prunecast.compression.pruning.masks import Masks
from prunecast.compression.pruning.statistics import VOTES

__all__ = ["readjusted", "strongest", "to_grow"]


def to_grow(mask: NDArray[np.bool_], share: float) -> int:
    """How many weights of a tensor are to grow: a share of the kept, and no more than are pruned.

    >>> to_grow(np.array([True, True, True, False]), 0.5)
    1
    """
    kept = int(np.count_nonzero(mask))
    return min(math.ceil(share * kept), mask.size - kept)


def strongest(
    statistic: str, gradients: Mapping[str, NDArray[Any]], masks: Masks, share: float
) -> dict[str, NDArray[np.float32]]:
    """What a node sends: gradients, or their signs, of as many pruned weights as are to grow.

    Args:
        statistic: `GROWTH` or `VOTES`.
        gradients: of whole tensors; what is not finite counts as 0.
        masks: of the model that was trained; tensors without one, or without a gradient, are left
            out.
        share: as of `to_grow`.

    Returns:
        Arrays of the tensors' shapes, zero but for the largest by magnitude.
    """
    found: dict[str, NDArray[np.float32]] = {}
    for name, mask in masks.items():
        gradient = gradients.get(name)
        count = to_grow(mask, share)
        if gradient is None or gradient.shape != mask.shape or not count:
            continue
        values = np.nan_to_num(gradient, posinf=0.0, neginf=0.0).astype(np.float32).ravel()
        values[mask.ravel()] = 0
        sent = np.zeros_like(values)
        places = np.argpartition(-np.abs(values), count - 1)[:count]
        sent[places] = np.sign(values[places]) if statistic == VOTES else values[places]
        found[name] = sent.reshape(mask.shape)
    return found


def readjusted(
    masks: Masks, scores: Scores, votes: Mapping[str, NDArray[np.floating]], share: float
) -> tuple[dict[str, NDArray[np.bool_]], dict[str, NDArray[np.float32]]]:
    """Masks of as many weights as before, some of which moved.

    Args:
        masks: as they are.
        scores: of the weights; the lowest of the kept are dropped. Ties go by position.
        votes: what nodes sent, averaged; a tensor without any keeps its mask.
        share: as of `to_grow`.

    Returns:
        The new masks, and for every tensor the direction in which each grown weight is to go, 1 or
        -1, against the gradient; 0 for the others.
    """
    made, grown = dict(masks), {}
    for name, mask in masks.items():
        vote = votes.get(name)
        if vote is None or vote.shape != mask.shape:
            continue
        strength = np.where(mask, 0, np.abs(vote)).ravel()
        count = min(to_grow(mask, share), int(np.count_nonzero(strength)))
        if not count:
            continue
        grow = np.argsort(-strength, kind="stable")[:count]
        kept = np.flatnonzero(mask.ravel())
        drop = kept[np.argsort(scores[name].ravel()[kept], kind="stable")[:count]]
        moved = mask.copy().ravel()
        moved[drop], moved[grow] = False, True
        directions = np.zeros(mask.size, np.float32)
        directions[grow] = -np.sign(vote.ravel()[grow])
        made[name], grown[name] = moved.reshape(mask.shape), directions.reshape(mask.shape)
    return made, grown

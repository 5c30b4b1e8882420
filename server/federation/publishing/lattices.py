"""From master weights to published integers: steps, what stays, and where masks end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import QuantiseError, quantise, spread
from prunecast.compression.versions import LatticeTensor, Tensor, is_large
from prunecast.compression.versions.model import refine
from prunecast.server.federation.policy import Policy

__all__ = ["Lattices"]

_OF_SMALL = 0.4  # part of the hysteresis beyond rounding that tensors have which are not large
_VAST = 1 << 17  # weights of a model whose large tensors begin coarser
_FAR = 1.5  # times more weights, or fewer, than wanted that a finished mask may keep
_CHUNK = 1 << 15  # weights that are wide at a time
_SMALLEST_SPREAD = 1e-3  # a tensor that starts constant still gets a usable step
_LARGEST = float(np.finfo(np.float32).max) / 4


class Lattices:
    """The lattices of one stream: a step for each tensor, which follows its spread.

    Steps change by powers of two, which keeps old and new lattices nested. An integer that was
    published stays until the master is `hysteresis` steps away from it: most changes that rounding
    alone would publish go back and forth across the border of two cells. It is rate-distortion
    optimal quantisation (Sullivan 1996, section III) with the change as its rate.

    Args:
        policy: its `down_step`, `vector_step`, `hysteresis`.

    Attributes:
        steps: by name of the tensor.
        fineness: part of their ideal step that all but the fine ones have, a power of two.
        weights: of the whole model.
        lengths: shapes of what tensors are multiplied with that weight_norm divides by their norm
            first (Salimans & Kingma 2016), by the name of these directions.
        early: whether the large tensors of a large model have twice that: while it learns from
            scratch and is not pruned yet, most of a run's bytes are theirs; the bit left out costs
            little later, when few of their weights are left. Small models learn visibly worse.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.steps: dict[str, float] = {}
        self.fineness, self.early, self.weights = 1.0, False, 0
        self.lengths: dict[str, tuple[int, ...]] = {}
        self._fine: set[str] = set()
        self._vast: set[str] = set()

    def look(self, master: Mapping[str, NDArray[Any]]) -> None:
        """Take note of what the whole model says of its tensors."""
        self.weights = sum(array.size for array in master.values())
        found = {_direction(name): array.shape for name, array in master.items()}
        self.lengths = {
            name: shape
            for name, shape in found.items()
            if name in master and sum(side != 1 for side in shape) < 2
        }

    def tensor(
        self,
        name: str,
        array: NDArray[Any],
        mask: NDArray[np.bool_] | None,
        last: Tensor | None,
        *,
        fine: bool = False,
        aligned: bool = False,
        held: bool = False,
    ) -> LatticeTensor:
        """The integers of one tensor.

        A direction of weight_norm that would be zero, and NaN once it is divided by its norm, keeps
        its largest value.

        Args:
            name: of the tensor.
            array: master weights, any shape, finite.
            mask: which of them are kept; None where nothing is pruned.
            last: what was published of it last, which decides what stays; None for nothing.
            fine: whether it is few values that each matter much: a vector, a low-rank factor.
            aligned: let the mask end at the border of a cell, so that the integers almost say it;
                for masks that keep the largest weights. Where no border keeps about as many, the
                mask is kept to the weight, but not while it is early.
            held: whether the mask is to be read from the integers just as it is: a kept weight that
                rounds to zero is published as the smallest value of its sign.

        Raises:
            QuantiseError: the values do not lie on any lattice of 32-bit integers.
        """
        made = self._tensor(name, array, mask, last, fine, aligned, held)
        if name not in self.lengths:
            return made
        q = _directed(made.q, array, self.lengths[name])
        return LatticeTensor(q, made.step, made.pruned, array.dtype)

    def _tensor(
        self,
        name: str,
        array: NDArray[Any],
        mask: NDArray[np.bool_] | None,
        last: Tensor | None,
        fine: bool,
        aligned: bool,
        held: bool,
    ) -> LatticeTensor:
        step = self._step(name, array, fine)
        q = quantise(array, step, name=name)
        large = is_large(array.size, self.weights)
        beyond = self.policy.hysteresis - 0.5
        stays_within = 0.5 + beyond * (1 if large else _OF_SMALL)
        before = None
        if isinstance(last, LatticeTensor) and last.shape == array.shape:
            before = last.q if last.step == step else refine(last.q, last.step, step)
        was_pruned = isinstance(last, LatticeTensor) and last.pruned
        if before is not None and stays_within > 0.5:
            stays = _within(array, step, before, stays_within)
            if was_pruned:
                stays &= before != 0  # what comes back must be free to
            np.copyto(q, before, where=stays)
        if mask is None:
            return LatticeTensor(q, step, False, array.dtype)
        if held:
            np.copyto(q, np.where(array < 0, -1, 1).astype(q.dtype), where=mask & (q == 0))
        if not aligned or not large:
            return LatticeTensor(q * mask, step, True, array.dtype)
        size, cell = np.abs(array), np.abs(q)
        least = float(size[mask].min(initial=np.inf)) / step
        if np.isinf(least):  # nothing is kept
            least = float(size.max(initial=0)) / step + 1
        wanted = int(np.count_nonzero(mask))
        cells, times = _edge(cell, max(0, math.floor(least - 0.5)), wanted)
        if times > _FAR and not self.early:
            return LatticeTensor(q * mask, step, True, array.dtype)
        if not cells and not (was_pruned and before is not None):
            return LatticeTensor(q, step, False, array.dtype)
        kept = cell > cells
        if was_pruned and before is not None:
            kept &= (before != 0) | (size > (cells + stays_within) * step)
        return LatticeTensor(q * kept, step, True, array.dtype)

    def settles(self, early: bool) -> bool:
        """Whether `refine` would halve the steps of large tensors because it is early no more."""
        return self.early and not early and bool(self._vast)

    def refine(self, fineness: float, early: bool) -> None:
        """Make the lattices as fine as that; those that are fine in any case stay."""
        by, again = fineness / self.fineness, 0.5 if self.early and not early else 1.0
        self.fineness, self.early = fineness, early
        for name in self.steps.keys() - self._fine:
            self.steps[name] *= by * (again if name in self._vast else 1.0)

    def _step(self, name: str, array: NDArray[Any], fine: bool) -> float:
        with np.errstate(invalid="ignore"):  # a mask of infinities lies on no lattice
            unit = max(spread(array, "std"), _SMALLEST_SPREAD)
        wanted = self.policy.down_step * self.fineness
        if fine:
            self._fine.add(name)
            wanted = min(wanted, self.policy.vector_step)
        elif self.weights >= _VAST and is_large(array.size, self.weights):
            self._vast.add(name)
            wanted *= 2 if self.early else 1
        ideal = wanted * unit
        if not ideal <= _LARGEST:
            raise QuantiseError(f"the values of {name!r} spread over more than float32 holds")
        step = self.steps.get(name)
        if step is None:
            step = float(np.float32(ideal))
        while ideal >= 2 * step:
            step *= 2
        while ideal <= step / 4:
            step /= 2
        self.steps[name] = step
        return step


def _edge(cell: NDArray[np.integer], below: int, wanted: int) -> tuple[int, float]:
    """The size of integers up to which they are cut, so that about as many stay as wanted.

    Args:
        cell: sizes of the integers.
        below: the edge of a cell that is not above the threshold.
        wanted: how many are to stay.

    Returns:
        Also by how much that is missed, as a factor of 1 or more: far where weights lie on few
        cells, such as those of a model that nobody has trained yet.
    """
    kept = {edge: int(np.count_nonzero(cell > edge)) + 1 for edge in (below, below + 1)}
    missed = {e: max(n / (wanted + 1), (wanted + 1) / n) for e, n in kept.items()}
    nearest = min(missed, key=missed.__getitem__)
    return nearest, missed[nearest]


def _direction(length: str) -> str:
    """What torch's weight_norm multiplies with a length, by the names that it gives; or ""."""
    of, is_new = length[:-1], "parametrizations." in length and length.endswith(".original0")
    return f"{of}1" if is_new else f"{of}v" if length.endswith("_g") else ""


def _directed(
    q: NDArray[np.signedinteger], array: NDArray[Any], lengths: tuple[int, ...]
) -> NDArray[np.signedinteger]:
    """Integers in which every direction has its largest value at least."""
    single = lengths if len(lengths) == q.ndim else (1,) * q.ndim
    axes = tuple(axis for axis, length in enumerate(single) if length == 1)
    size = np.abs(array)
    lost = ~q.any(axes, keepdims=True) & (size == size.max(axes, keepdims=True, initial=0))
    directed = q.copy()
    np.copyto(directed, np.where(array < 0, -1, 1).astype(q.dtype), where=lost & (size > 0))
    return directed


def _within(
    array: NDArray[Any], step: float, q: NDArray[np.integer], most: float
) -> NDArray[np.bool_]:
    """Where weights are at most so many steps away from integers; in parts, which stay in cache."""
    found = np.empty(array.shape, np.bool_)
    flat, near, out = array.reshape(-1), q.reshape(-1), found.reshape(-1)
    for at in range(0, flat.size, _CHUNK):
        away = flat[at : at + _CHUNK] / np.float64(step)
        away -= near[at : at + _CHUNK]
        np.less_equal(np.abs(away, out=away), most, out=out[at : at + _CHUNK])
    return found

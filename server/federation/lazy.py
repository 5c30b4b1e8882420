"""Arrays of a reply that are formed when they are read, and not at all where they are averaged."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.lib.mixins import NDArrayOperatorsMixin
from numpy.typing import DTypeLike, NDArray

from prunecast.compression.flower import NUMPY
from prunecast.compression.flower.internals import is_averaging
from prunecast.compression.versions import Change
from prunecast.server.federation.ledger import Entry

__all__ = ["LazyArray", "WeightedSum", "largest_of"]


class LazyArray(Array):
    """An array of a reply that is formed when it is read, and not kept.

    Strategies read one array of one reply at a time, so the server never holds more than one
    dense model and what is left of the replies in narrow integers, however many clients reply.

    Args:
        form: called at every read; returns a new array.
        dtype: dtype of the array.
        shape: shape of the array.
        entry: ledger entry that the time spent forming is added to.
        summand: called instead of `form` where the array goes into Flower's own average and
            nowhere else; None where that must see the array itself.
    """

    def __init__(
        self,
        form: Callable[[], NDArray[Any]],
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        entry: Entry,
        summand: Callable[[], WeightedSum] | None = None,
    ) -> None:
        # past __setattr__ of the base class, which keeps caches for arrays that hold their bytes
        self.__dict__.update(
            _form=form,
            _summand=summand,
            _entry=entry,
            dtype=_named(dtype),
            shape=shape,
            stype=NUMPY,
        )

    def numpy(self) -> NDArray[Any]:
        """The array; for Flower's own average, a `WeightedSum` that stands for it.

        Raises:
            BadPayload: the reply's bytes for this tensor are damaged.
        """
        started = time.perf_counter()
        form = self.__dict__["_form"]
        if self.__dict__["_summand"] is not None and is_averaging(sys._getframe(1)):
            form = self.__dict__["_summand"]
        value: NDArray[Any] = form()
        self.__dict__["_entry"].decode_ms += (time.perf_counter() - started) * 1e3
        if (formed := self.__dict__.pop("_formed", None)) is not None:
            formed()
        return value

    def when_formed(self, call: Callable[[], object]) -> None:
        """Call something once, as soon as the array could be formed."""
        self.__dict__["_formed"] = call

    def reach(self, largest: Callable[[NDArray[Any]], float]) -> float:
        """The largest magnitude in a float array, or a little more; NaN where it holds NaN.

        Args:
            largest: the same of an array that many replies have in common.

        Raises:
            BadPayload: the reply's bytes for this tensor are damaged.
        """
        if self.__dict__["_summand"] is None:
            return largest_of(self.numpy())
        summand: WeightedSum = self.__dict__["_summand"]()
        return summand.reach(largest)

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in NumPy's format, serialised afresh at every access."""
        return Array(self.numpy()).data

    def __reduce__(self) -> tuple[type[Array], tuple[NDArray[Any]]]:
        # copied or pickled, it is the array alone: not the reply and the version that it is made of
        return Array, (self.numpy(),)


def largest_of(array: NDArray[Any]) -> float:
    """The largest magnitude in a float array; NaN where it holds NaN."""
    return float(max(array.max(), -array.min())) if array.size else 0.0


@cache
def _named(dtype: np.dtype[Any]) -> str:
    return str(dtype)


class WeightedSum(NDArrayOperatorsMixin):
    """``sum of weight * (master + change)`` over replies to one version, for one tensor.

    It is kept as the sum of the weights, and the weighted sum of the changes in float64 at those
    weights of the tensor that the version's mask keeps: adding a reply touches what changed, and
    no dense array is formed before the end. Multiplying by a Python number and adding another
    one of the same version stay so; anything else is done with the array.

    Args:
        master: values that the version was published from, any shape; not written to.
        change: what the reply changes; None for nothing.
    """

    def __init__(self, master: NDArray[Any], change: Change | None) -> None:
        self._master, self._weight = master, 1.0
        self._changes: list[tuple[float, Change]] = [] if change is None else [(1.0, change)]
        self._sum: NDArray[np.float64] | None = None
        self._kept: NDArray[np.int64] | None = None

    def __mul__(self, factor: Any) -> Any:
        if type(factor) not in (int, float) or self._sum is not None:
            return self.array() * factor
        scaled = WeightedSum(self._master, None)
        scaled._weight = self._weight * factor
        scaled._changes = [(weight * factor, change) for weight, change in self._changes]
        return scaled

    def __iadd__(self, other: Any) -> Any:
        if (
            not isinstance(other, WeightedSum)
            or other is self
            or other._master is not self._master
            or other._sum is not None
        ):
            return self.array() + other
        self._weight += other._weight
        for weight, change in self._take() + other._changes:
            self._add(weight, change)
        return self

    def _take(self) -> list[tuple[float, Change]]:
        own, self._changes = self._changes, []
        return own

    def _add(self, weight: float, change: Change) -> None:
        if self._sum is None:
            self._kept = change.kept
            size = self._master.size if change.kept is None else len(change.kept)
            self._sum = np.zeros(size)
        at = slice(None) if change.at is None else change.at
        self._sum[at] += np.multiply(change.values, weight * change.step, dtype=np.float64)

    def reach(self, largest: Callable[[NDArray[Any]], float]) -> float:
        """A bound on the magnitude of one reply's array, see `LazyArray.reach`."""
        return largest(self._master) + sum(change.reach for _, change in self._changes)

    def array(self) -> NDArray[Any]:
        """The sum as an array, in the master's dtype."""
        for weight, change in self._take():
            self._add(weight, change)
        out: NDArray[Any] = np.multiply(self._master, self._weight, order="C")
        if self._sum is not None:
            at = slice(None) if self._kept is None else self._kept
            wide = self._master.reshape(-1)[at].astype(np.float64)
            out.reshape(-1)[at] = wide * self._weight + self._sum
        return out

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return self.array().astype(dtype, copy=False) if dtype is not None else self.array()

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        options.pop("out", None)  # in-place operators: the result takes the name's place
        arrays = [x.array() if isinstance(x, WeightedSum) else x for x in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.array(), name)

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
from prunecast.server.federation.reporting.ledger import Entry

__all__ = ["LazyArray", "WeightedSum", "WholeSum", "largest_of"]


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
        summand: Callable[[], WeightedSum | WholeSum] | None = None,
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
        """The array; for Flower's own average, an object that stands for it.

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
        made = self.__dict__["_summand"]
        summand = None if made is None else made()
        if not isinstance(summand, WeightedSum):
            return largest_of(self.numpy())
        return summand.reach(largest)

    def moved(
        self, before: NDArray[Any], base: NDArray[Any], weight: float, *, inside: bool
    ) -> LazyArray:
        """``base + weight * (array - before)``, formed when it is read; merged where this one is.

        Args:
            before: what this array is a change of.
            base: what it is to be one of, of the same shape.
            weight: of the change.
            inside: stay between the base and the array instead: ``base + weight * (array - base)``.
        """
        made = self.__dict__["_summand"]
        start = base if inside else before

        def form() -> NDArray[Any]:
            array = self.numpy()
            return np.asarray(base + weight * (array - start), array.dtype)

        def summand() -> WeightedSum | WholeSum:
            found = made()
            if isinstance(found, WeightedSum) and found.master is before and not inside:
                return found.moved(base, weight)
            return WeightedSum(form(), None)

        of = np.dtype(self.dtype)
        return LazyArray(form, of, self.shape, self.__dict__["_entry"], made and summand)

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


class _Sum(NDArrayOperatorsMixin):
    """Behaves as its array wherever it is neither multiplied by a number nor added to its like."""

    def array(self) -> NDArray[Any]:
        """The sum as an array."""
        raise NotImplementedError

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        return self.array().astype(dtype, copy=False) if dtype is not None else self.array()

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        options.pop("out", None)  # in-place operators: the result takes the name's place
        arrays = [x.array() if isinstance(x, _Sum) else x for x in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.array(), name)


class WeightedSum(_Sum):
    """``sum of weight * (master + change)`` over replies to one version, for one tensor.

    It is kept as the sum of the weights, and the weighted sum of the changes in float64 at those
    weights of the tensor that the version's mask keeps: adding a reply touches what changed, and
    no dense array is formed before the end. Multiplying by a Python number and adding another
    one of the same version stay so; anything else is done with the array.

    Args:
        master: what the change is added to, any shape: values that the version was published
            from, or zeros; not written to.
        change: what the reply changes; None for nothing.
        dtype: of the sum; None for the master's.
    """

    def __init__(
        self, master: NDArray[Any], change: Change | None, dtype: np.dtype[Any] | None = None
    ) -> None:
        self._master, self._weight = master, 1.0
        self._dtype = master.dtype if dtype is None else dtype
        self._changes: list[tuple[float, Change]] = [] if change is None else [(1.0, change)]
        self._sum: NDArray[np.float64] | None = None
        self._kept: NDArray[np.int64] | None = None

    def __mul__(self, factor: Any) -> Any:
        if type(factor) not in (int, float) or self._sum is not None:
            return self.array() * factor
        scaled = WeightedSum(self._master, None, self._dtype)
        scaled._weight = self._weight * factor
        scaled._changes = [(weight * factor, change) for weight, change in self._changes]
        return scaled

    def __iadd__(self, other: Any) -> Any:
        if (
            not isinstance(other, WeightedSum)
            or other is self
            or other._master is not self._master
            or other._dtype != self._dtype
            or other._sum is not None
        ):
            return self.array() + other
        self._weight += other._weight
        for weight, change in self._take() + other._changes:
            self._add(weight, change)
        return self

    @property
    def master(self) -> NDArray[Any]:
        """What the change is added to."""
        return self._master

    def moved(self, master: NDArray[Any], weight: float) -> WeightedSum:
        """The change of one reply, with a weight, added to another array instead."""
        made = WeightedSum(master, None, self._dtype)
        made._changes = [(factor * weight, change) for factor, change in self._changes]
        return made

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
        """The sum as an array, in the dtype that it was asked for."""
        for weight, change in self._take():
            self._add(weight, change)
        wide = np.result_type(self._master.dtype, self._dtype)
        out: NDArray[Any] = np.multiply(self._master, self._weight, order="C", dtype=wide)
        if self._sum is not None:
            at = slice(None) if self._kept is None else self._kept
            kept = self._master.reshape(-1)[at].astype(np.float64)
            out.reshape(-1)[at] = kept * self._weight + self._sum
        return out.astype(self._dtype, copy=False)


class WholeSum(_Sum):
    """``sum of weight * array`` over replies, of whole numbers and in their dtype.

    An average of counters is a counter: plain NumPy would make a float64 array of it, which no
    client sends back. Weights that add up to 1 keep what all replies agree on, to the last bit.

    Args:
        values: integers or booleans, any shape; not written to.
    """

    def __init__(self, values: NDArray[Any]) -> None:
        self._values, self._weight, self._beside = values, 1.0, 0.0 * values

    def __mul__(self, factor: Any) -> Any:
        if type(factor) not in (int, float):
            return self.array() * factor
        scaled = WholeSum(self._values)
        scaled._weight, scaled._beside = self._weight * factor, self._beside * factor
        return scaled

    def __iadd__(self, other: Any) -> Any:
        if not isinstance(other, WholeSum) or other._values.shape != self._values.shape:
            return self.array() + other
        apart = other._values.astype(np.float64) - self._values.astype(np.float64)
        self._beside = self._beside + other._beside + other._weight * apart
        self._weight += other._weight
        return self

    def array(self) -> NDArray[Any]:
        """The sum, rounded to nearest and kept in the dtype's range."""
        dtype = self._values.dtype
        rest = self._values * (self._weight - 1.0) if abs(self._weight - 1) > 1e-9 else 0.0
        beside = np.rint(self._beside + rest)
        if dtype.kind == "b":
            return np.asarray(self._values + beside >= 1)
        if not beside.any():
            return np.array(self._values)  # also of a single number, which may be no array
        info = np.iinfo(dtype)
        high = float(info.max)
        if int(high) > info.max:  # float64 does not have the end of 64 bits' range
            high = float(np.nextafter(high, 0.0))
        apart = np.clip(self._values + beside, float(info.min), high) - self._values
        # added in integers: beyond 2**53 float64 skips some
        return np.asarray(self._values + apart.clip(-(2.0**62), 2.0**62).astype("i8").astype(dtype))

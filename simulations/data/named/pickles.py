"""Pickles of known digest, converted once: nothing but what is named here can be called by them.

A pickle is a program. Those that are read here lie in packages whose SHA-256 is known, and are read
when a data set is got, never by a run.
"""

from __future__ import annotations

import codecs
import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy._core import multiarray
from numpy.typing import NDArray

from prunecast.simulations.kinds import DataError

__all__ = ["read_frame", "unpickle"]


def _scalar(dtype: np.dtype[Any], content: bytes) -> Any:
    if dtype.hasobject:
        raise pickle.UnpicklingError("a scalar is an object")
    return np.frombuffer(content, dtype)[0]


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    return codecs.encode(text, "latin1")


_ALLOWED: Mapping[str, Callable[..., Any]] = {
    "numpy.core.multiarray._reconstruct": multiarray._reconstruct,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": _latin1,
}


# -- tables of pandas, without pandas: pickles of its versions differ in what they call ------------


class _Manager:
    """The columns: blocks of rows that belong to columns of the first axis."""

    def __init__(self, blocks: Any, axes: Any) -> None:
        names = [str(name) for name in axes[0]]
        self.columns: dict[str, NDArray[Any]] = {}
        for values, placement in blocks:
            at = range(len(names))[placement] if isinstance(placement, slice) else placement
            for number, column in zip(at, values, strict=True):
                self.columns[names[number]] = column


class _Frame:
    def __setstate__(self, state: Any) -> None:
        self.columns = state["_mgr"].columns


def _frombuffer(content: bytes, dtype: np.dtype[Any], shape: Any, order: Any) -> NDArray[Any]:
    return np.frombuffer(content, dtype).reshape(shape, order=order)


def _block(values: Any, placement: Any, ndim: int) -> tuple[Any, Any]:
    return values, placement


def _index(kind: Any, given: Any) -> Any:
    return given.get("data")


_FRAME: Mapping[str, Callable[..., Any]] = {
    "pandas.core.frame.DataFrame": _Frame,
    "pandas.core.internals.managers.BlockManager": _Manager,
    "pandas._libs.internals._unpickle_block": _block,
    "pandas.core.indexes.base._new_Index": _index,
    "pandas.core.indexes.base.Index": object,
    "pandas.core.indexes.range.RangeIndex": object,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "builtins.slice": slice,
}


def read_frame(content: bytes, label: str) -> dict[str, NDArray[Any]]:
    """The columns of a DataFrame that pandas pickled; texts are arrays of objects.

    Args:
        content: of the pickle, whose digest was compared.
        label: of the file, for messages.

    Raises:
        DataError: it is damaged, no DataFrame, or would call anything else.
    """
    found = unpickle(content, label, _FRAME)
    if not isinstance(found, _Frame):
        raise DataError(f"{label} holds no table")
    columns: dict[str, NDArray[Any]] = found.columns
    return columns


class _Restricted(pickle.Unpickler):
    def __init__(self, content: bytes, others: Mapping[str, Callable[..., Any]]) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._known = {**_ALLOWED, **others}

    def find_class(self, module: str, name: str) -> Any:
        plain = module.replace("numpy._core", "numpy.core")  # as numpy called it before 2.0
        found = self._known.get(f"{plain}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"it would call {module}.{name}")
        return found


def unpickle(
    content: bytes, label: str, others: Mapping[str, Callable[..., Any]] | None = None
) -> Any:
    """What a pickle of numpy's arrays and Python's own containers holds.

    Args:
        content: of the pickle, whose digest was compared.
        label: of the file, for messages.
        others: what it may call besides, by ``module.name``.

    Raises:
        DataError: it is damaged, or would call anything else.
    """
    try:
        return _Restricted(content, others or {}).load()
    except Exception as error:  # a damaged one may raise anything
        raise DataError(f"{label} cannot be read: {error}") from error

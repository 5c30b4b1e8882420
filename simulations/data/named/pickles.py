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

from prunecast.simulations.kinds import DataError

__all__ = ["unpickle"]


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

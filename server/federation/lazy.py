"""Arrays of a reply that are decoded when they are read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array
from numpy.typing import NDArray

from prunecast.compression.flower.records import NUMPY
from prunecast.server.federation.ledger import Entry

__all__ = ["LazyArray"]


class LazyArray(Array):
    """An array of a reply that is decoded when it is read, and not kept.

    Aggregation reads one array of one reply at a time, so the server never holds more than one
    dense model and the small payloads, however many clients reply.

    Args:
        decode: called at every read; returns the array.
        dtype: dtype of the array.
        shape: shape of the array.
        entry: ledger entry that the time spent decoding is added to.
    """

    def __init__(
        self,
        decode: Callable[[], NDArray[Any]],
        dtype: np.dtype[Any],
        shape: tuple[int, ...],
        entry: Entry,
    ) -> None:
        # past __setattr__ of the base class, which keeps caches for arrays that hold their bytes
        self.__dict__.update(
            _decode=decode, _entry=entry, dtype=str(dtype), shape=shape, stype=NUMPY
        )

    def numpy(self) -> NDArray[Any]:
        """Decode and return the array.

        Raises:
            BadPayload: the reply's bytes for this tensor are damaged.
        """
        started = time.perf_counter()
        value: NDArray[Any] = self.__dict__["_decode"]()
        self.__dict__["_entry"].decode_ms += (time.perf_counter() - started) * 1e3
        return value

    @property
    def data(self) -> bytes:  # type: ignore[override]
        """The array in NumPy's format, serialised afresh at every access."""
        return Array(self.numpy()).data

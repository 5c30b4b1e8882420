"""Secure aggregation as Flower has it, SecAgg and SecAgg+: what grid and mod do about its records.

A node's vector travels masked, as uniform integers below a power of two, so that nobody learns it
but in the sum of all. There is nothing to predict in it: it can only be written in as few bytes as
its integers have, and be shorter, where all nodes know which weights are pruned.
"""

from __future__ import annotations

import io
import math

import numpy as np
from flwr.app import ConfigRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

from prunecast.compression.flower import npy_head

__all__ = ["SECURE_RECORD", "is_secure", "masked_size", "narrowed", "widened"]

SECURE_RECORD = "secaggplus_configs"
"""Key of the config record by which Flower's workflow and mod speak to each other."""
_MASKED = "masked_params"
_NARROW, _WIDE = np.dtype("<u4"), np.dtype("<i8")


def is_secure(content: RecordDict) -> bool:
    """Whether a message is part of secure aggregation."""
    return SECURE_RECORD in content.config_records


def narrowed(record: ConfigRecord) -> ConfigRecord:
    """The record with integers of four bytes in masked vectors, where Flower has eight."""
    masked = _masked(record)
    return ConfigRecord({**record, _MASKED: [_narrow(v) for v in masked]}) if masked else record


def widened(record: ConfigRecord) -> ConfigRecord:
    """Inverse of `narrowed`; allocates twice the bytes that came.

    Raises:
        ValueError: a masked vector is not in NumPy's format.
    """
    masked = _masked(record)
    return ConfigRecord({**record, _MASKED: [_wide(v) for v in masked]}) if masked else record


def masked_size(record: ConfigRecord) -> int:
    """How many weights are in masked vectors, less the one that stands for a node's examples.

    0 where there are none.
    """
    return max(0, sum(math.prod(npy_head(vector)[1]) for vector in _masked(record)) - 1)


def _masked(record: ConfigRecord) -> list[bytes]:
    found = record.get(_MASKED)
    return [v for v in found if isinstance(v, bytes)] if isinstance(found, list) else []


def _narrow(data: bytes) -> bytes:
    dtype, shape, head = npy_head(data)
    if dtype != _WIDE:
        return data
    values = np.frombuffer(data, dtype, offset=head).reshape(shape)
    fits = not values.size or (values.min() >= 0 and values.max() <= np.iinfo(_NARROW).max)
    return _saved(values.astype(_NARROW)) if fits else data


def _wide(data: bytes) -> bytes:
    dtype, shape, head = npy_head(data)
    if dtype != _NARROW:
        return data
    if math.prod(shape) * dtype.itemsize != len(data) - head:
        raise ValueError(f"a masked vector does not have as many bytes as its shape {shape} needs")
    return _saved(np.frombuffer(data, dtype, offset=head).reshape(shape).astype(_WIDE))


def _saved(array: NDArray[np.integer]) -> bytes:
    stream = io.BytesIO()
    npy.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()

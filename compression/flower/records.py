"""Flower records: which can be coded, and how a payload travels inside one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

__all__ = [
    "CONTROL_RECORD",
    "NUMPY",
    "STYPE",
    "array_record",
    "dense_arrays",
    "is_codable",
    "payload_of",
    "payload_record",
    "stated_round",
    "stream_id",
]

NUMPY = "numpy.ndarray"
"""Flower's serialisation type for NumPy arrays."""
STYPE = "prunecast/1 (ClientApp needs compression_mod())"
"""Serialisation type of a payload; a client without the mod shows it in Flower's own error."""
CONTROL_RECORD = "prunecast"
"""Key of the config record that carries an `Instruction` or a `Report`."""
_ARRAY_NAME = "prunecast"


def stream_id(run_id: int, key: str) -> bytes:
    """Identifier of the stream of one record key in one run."""
    return f"{run_id}/{key}".encode()


def is_codable(record: ArrayRecord) -> bool:
    """Whether every array is a NumPy array of a dtype the codec knows.

    Complex numbers, strings and arrays in somebody's own serialisation are left as they are.
    """
    if len(record) == 0:
        return False
    for array in record.values():
        if array.stype != NUMPY:
            return False
        try:
            dtype = np.dtype(array.dtype)
        except TypeError:
            return False
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            return False
    return True


def dense_arrays(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Every array of a record, deserialised once."""
    return {name: array.numpy() for name, array in record.items()}


def array_record(arrays: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """An ordinary Flower record of dense arrays; reads each array of the mapping once."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = Array(array)
    return record


def payload_record(payload: bytes) -> ArrayRecord:
    """A record with one array that carries `payload` under our serialisation type.

    Flower refuses to read an unknown serialisation type, so a client without the mod fails
    instead of training on something else.
    """
    record = ArrayRecord()
    record[_ARRAY_NAME] = Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)
    return record


def payload_of(record: object) -> bytes | None:
    """The payload a record carries, or None for anything else."""
    if not isinstance(record, ArrayRecord) or list(record) != [_ARRAY_NAME]:
        return None
    return record[_ARRAY_NAME].data if record[_ARRAY_NAME].stype == STYPE else None


def stated_round(content: RecordDict) -> int:
    """Flower's ``server-round`` where a config record states it, else 0."""
    for record in content.values():
        if isinstance(record, ConfigRecord) and isinstance(
            stated := record.get("server-round"), int
        ):
            return stated
    return 0

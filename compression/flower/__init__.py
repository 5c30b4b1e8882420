"""Flower records: which can be coded, and how payloads travel inside, as grid and mod agree.

With `prunecast.compression.flower.internals` the only place below client and server that knows
Flower; `versions` stays free of it.
"""

from __future__ import annotations

import hashlib
import io
import re
import tokenize
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.lib import format as npy
from numpy.typing import NDArray

from prunecast.compression.versions import is_statistic

__all__ = [
    "CLIPPING_NORM",
    "CONTROL_RECORD",
    "ERROR_CODE",
    "ERROR_REASON",
    "NUMPY",
    "STATISTICS_RECORD",
    "STYPE",
    "array_record",
    "coded_record",
    "dense_arrays",
    "float_names",
    "is_codable",
    "is_codable_array",
    "job_id",
    "native",
    "node_reason",
    "npy_head",
    "open_coded",
    "payload_of",
    "payload_record",
    "put_back",
    "set_apart",
    "stated",
    "stated_clip",
    "stated_round",
    "stream_id",
]

NUMPY = "numpy.ndarray"
"""Flower's serialisation type for NumPy arrays."""
STYPE = "prunecast/1 (ClientApp needs compression_mod())"
"""Serialisation type of a payload; a client without the mod shows it in Flower's own error."""
CONTROL_RECORD = "prunecast"
"""Key of the config record that carries an `Instruction` or a `NodeReport`."""
ERROR_CODE, ERROR_REASON = "error-code", "error"
"""Keys of the control record of a reply in whose place the client has an error to report."""
STATISTICS_RECORD = "prunecast-statistics"
"""Key of the record with what a node contributes to pruning, in a reply whose message asked."""
CLIPPING_NORM = "clipping_norm"
"""Under which Flower's client-side differential privacy states the clip in a config record."""
_ARRAY_NAME = "prunecast"
_LONGEST_RUN_ID = 20  # digits of 64 bits
_HEADER = 10_000  # characters of the header of an array in NumPy's format
_UNREADABLE = (  # what Python raises on a header that is none
    *(ValueError, TypeError, LookupError, SyntaxError, tokenize.TokenError),
    *(RecursionError, MemoryError),
)


def job_id(job: int | str) -> str:
    """What tells the streams and stores of a job from those of others; safe as a file's name.

    Args:
        job: a name, any text; or Flower's run id, of a run that has no name. A name of digits alone
            is the job of the run with that id.

    >>> job_id(77), job_id("77"), job_id("../digits")[:12]
    ('77', '77', 'job-c9e8680d')
    """
    text = str(job)
    if text.isascii() and text.isdigit() and len(text) <= _LONGEST_RUN_ID:
        return text
    return f"job-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def stream_id(job: int | str, key: str) -> bytes:
    """Identifier of the stream of one record key in one job, see `job_id`."""
    return f"{job_id(job)}/{key}".encode()


def is_codable(record: ArrayRecord) -> bool:
    """Whether there are arrays, and every one is a NumPy array of a dtype the codec knows."""
    return len(record) > 0 and all(map(is_codable_array, record.values()))


def is_codable_array(array: Array) -> bool:
    """Whether an array is a NumPy array of a dtype the codec knows.

    Complex numbers, strings and arrays in somebody's own serialisation are left as they are.
    """
    if array.stype != NUMPY:
        return False
    try:
        dtype = np.dtype(array.dtype)
    except TypeError:
        return False
    return dtype.kind in "biuf" and dtype.itemsize <= 8


def npy_head(data: bytes) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """dtype, shape and length of the header of bytes in NumPy's format; nothing is allocated.

    Raises:
        ValueError: they are not in that format.
    """
    stream = io.BytesIO(data)
    try:
        version = npy.read_magic(stream)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(stream, max_header_size=_HEADER)
    except _UNREADABLE as error:
        raise ValueError(str(error)[:200]) from error
    return dtype, shape, stream.tell()


def stated(record: ArrayRecord) -> ArrayRecord:
    """The record with dtype and shape of every NumPy array, which Flower's legacy API leaves out.

    The same object where nothing was left out, or cannot be known.
    """
    found: dict[str, Array] = {}
    for name, array in record.items():
        if array.dtype or array.stype != NUMPY:
            continue
        with suppress(ValueError):
            dtype, shape, _ = npy_head(array.data)
            found[name] = Array(dtype=str(dtype), shape=shape, stype=NUMPY, data=array.data)
    return ArrayRecord({**record, **found}) if found else record


def native(array: Array) -> NDArray[Any]:
    """A NumPy array in this machine's byte order, deserialised once."""
    values = array.numpy()
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def dense_arrays(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Every array of a record, see `native`."""
    return {name: native(array) for name, array in record.items()}


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


def float_names(record: ArrayRecord) -> list[str]:
    """Names of the arrays that a scheme codes: NumPy's floating point, float16 to float64.

    Not running statistics: a variance that a sign or a ternary value moves may become negative.
    """
    return [
        name
        for name, array in record.items()
        if is_codable_array(array) and np.dtype(array.dtype).kind == "f" and not is_statistic(name)
    ]


def coded_record(payload: bytes, exact: Mapping[str, Array]) -> ArrayRecord:
    """A record of a payload and, as they are, the arrays that it does not hold."""
    record = payload_record(payload)
    for name, array in exact.items():
        record[f"={name}"] = array
    return record


def set_apart(record: ArrayRecord) -> tuple[ArrayRecord, dict[str, Array]]:
    """The arrays of a model that the codec knows; and the others, by place and name."""
    known, others = ArrayRecord(), {}
    for place, (name, array) in enumerate(record.items()):
        if is_codable_array(array):
            known[name] = array
        else:
            others[f"{place}={name}"] = array
    return known, others


def put_back(known: ArrayRecord, others: Mapping[str, Array]) -> ArrayRecord:
    """Inverse of `set_apart`.

    Raises:
        ValueError: the others are not by place and name.
    """
    items = list(known.items())
    for key, array in others.items():
        place, _, name = key.partition("=")
        items.insert(int(place), (name, array))
    return ArrayRecord(dict(items))


def open_coded(record: ArrayRecord) -> tuple[bytes, dict[str, Array]] | None:
    """Inverse of `coded_record`; None for any other record."""
    names = list(record)
    if not names or names[0] != _ARRAY_NAME or any(name[:1] != "=" for name in names[1:]):
        return None
    payload = payload_of(ArrayRecord({_ARRAY_NAME: record[_ARRAY_NAME]}))
    if payload is None:
        return None
    return payload, {name[1:]: record[name] for name in names[1:]}


def stated_clip(content: RecordDict) -> float | None:
    """The clipping norm that a config record states, the least of several; None for none."""
    stated = [record.get(CLIPPING_NORM) for record in content.config_records.values()]
    norms = [float(norm) for norm in stated if isinstance(norm, int | float) and norm > 0]
    return min(norms, default=None)


_RAISED = re.compile(r"<class '(?:[\w.]*\.)?(\w+)[^']*'>:<'(.*)'>", re.DOTALL)
_IN_RAY = "Exception ClientAppException occurred. Message: "


def node_reason(reason: str) -> str:
    """Why a node failed, as its exception said it: ``ValueError: ...``.

    Flower's runtimes wrap the exception of a ClientApp in its type's ``repr``; the simulation
    engine puts the traceback of Ray's process before it, and the exception itself last.

    >>> node_reason("<class 'ZeroDivisionError'>:<'division by zero'>")
    'ZeroDivisionError: division by zero'
    """
    found = _RAISED.fullmatch(reason)
    if found is None:
        return reason
    kind, text = found[1], found[2]
    if _IN_RAY in text:
        before, text = text.rsplit(_IN_RAY, 1)
        line = text.strip().partition("\n")[0]
        kinds = re.findall(rf"^(?:\w+\.)*(\w+): {re.escape(line)}", before, re.MULTILINE)
        kind = kinds[-1] if kinds else kind
    return f"{kind}: {text.strip()}"


def stated_round(content: RecordDict) -> int:
    """Flower's ``server-round`` where a config record states it, else 0."""
    for record in content.values():
        if isinstance(record, ConfigRecord) and isinstance(
            stated := record.get("server-round"), int
        ):
            return stated
    return 0

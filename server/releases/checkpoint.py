"""Weights from files: saved published models, ``.safetensors`` and ``.npz`` checkpoints."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx import SelfTestFailed, unpack_arrays
from prunecast.compression.versions import (
    LatticeTensor,
    PublishedModel,
    RawTensor,
    Tensor,
    load_model,
)
from prunecast.server.releases.errors import ReleasesError

__all__ = ["from_arrays", "read_checkpoint"]

_SAFETENSORS = {
    "BOOL": "bool",
    "F16": "<f2",
    "F32": "<f4",
    "F64": "<f8",
    **{f"I{8 * n}": f"<i{n}" for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": f"<u{n}" for n in (1, 2, 4, 8)},
}
_MOST_HEADER = 100_000_000  # bytes, the format's own limit


def read_checkpoint(path: Path, *, bits: int | None = None) -> PublishedModel:
    """Read a published model, or a dense checkpoint as one.

    Args:
        path: ``.safetensors``, ``.npz``, or a file that `save_model` wrote.
        bits: for dense checkpoints, see `from_arrays`.

    Raises:
        ReleasesError: not readable as its suffix says, or `bits` given for a published model.
        StorageError: no such file, or not a published model.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".npz"):
        if bits is not None:
            raise ReleasesError(f"{path} is a published model: its lattice is fixed already")
        return load_model(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ReleasesError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        arrays = _safetensors(data) if path.suffix == ".safetensors" else _npz(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ReleasesError(f"{path} is not a readable {path.suffix} file: {error}") from error
    return from_arrays(arrays, bits=bits)


def from_arrays(
    arrays: Mapping[str, NDArray[Any]], *, bits: int | None = None, counter: int = 0
) -> PublishedModel:
    """A dense checkpoint as a published model.

    Args:
        arrays: tensors by name.
        bits: 2 to 16: put every floating tensor of two or more dimensions on a symmetric lattice
            whose largest value takes ``2**(bits - 1) - 1`` steps, rounding to nearest. None keeps
            every value exactly, which costs more bytes.
        counter: number of the version.

    Raises:
        ReleasesError: `bits` out of range, or a value that is not finite.
    """
    if bits is not None and not 2 <= bits <= 16:
        raise ReleasesError(f"bits must be from 2 to 16, not {bits}")
    tensors: dict[str, Tensor] = {}
    for name, values in arrays.items():
        if bits is None or values.dtype.kind != "f" or values.ndim < 2 or not values.size:
            tensors[name] = RawTensor(values)
            continue
        largest = float(np.abs(values.astype(np.float64)).max())
        if not math.isfinite(largest):
            raise ReleasesError(f"tensor {name!r} holds a value that is not finite")
        step = float(np.float32(largest / (2 ** (bits - 1) - 1))) or 1.0
        q = np.rint(values.astype(np.float64) / step).astype(np.int32)
        tensors[name] = LatticeTensor(q, step, dtype=values.dtype)
    return PublishedModel(tensors, counter)


def _npz(data: bytes) -> dict[str, NDArray[Any]]:
    try:
        return dict(unpack_arrays(data, max_bytes=2**36))
    except SelfTestFailed as error:
        raise ValueError(str(error)) from error


def _safetensors(data: bytes) -> dict[str, NDArray[Any]]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(_MOST_HEADER, len(data) - 8):
        raise ValueError("its header does not fit into the file")
    header: dict[str, Any] = json.loads(data[8 : 8 + size])
    body = memoryview(data)[8 + size :]
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS:
            raise ValueError(f"tensor {name!r} is {entry['dtype']}: convert it to F32")
        dtype = np.dtype(_SAFETENSORS[entry["dtype"]])
        shape = tuple(int(n) for n in entry["shape"])
        begin, end = (int(n) for n in entry["data_offsets"])
        if min(shape, default=0) < 0 or not 0 <= begin <= end <= len(body):
            raise ValueError(f"tensor {name!r} lies outside the file")
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name!r} has not the size of its shape")
        arrays[name] = np.frombuffer(body[begin:end], dtype).reshape(shape)
    return arrays

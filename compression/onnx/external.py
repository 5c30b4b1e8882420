"""Tensors of an ``.onnx`` file, in it or beside it; nothing outside the model's folder is read."""

from __future__ import annotations

import math
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from prunecast.compression.onnx import ForeignModel, UnsafeExternalData

__all__ = ["TensorReader", "read_proto"]

_MOST_ELEMENTS = 2**33  # of one tensor
_PROTOBUF_LIMIT = 2**31 - 1
_PLAIN = "biuf"


def read_proto(path: Path) -> Any:
    """Parse an ``.onnx`` file.

    Returns:
        The `ModelProto`; external data are not loaded.

    Raises:
        ForeignModel: missing, larger than protobuf reads, damaged, or no model.
    """
    try:
        size = path.stat().st_size
        if size > _PROTOBUF_LIMIT:
            raise ForeignModel(
                f"{path} has {size} bytes and protobuf reads 2 GiB: save it with external data"
            )
        model = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise ForeignModel(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, ValueError, TypeError) as error:
        raise ForeignModel(f"{path} is not a readable .onnx model: {error}") from error
    if not model.HasField("graph") or not model.graph.output or not model.opset_import:
        raise ForeignModel(f"{path} is not an .onnx model: it lacks a graph, outputs or an opset")
    return model


class TensorReader:
    """Reads the tensors of one model.

    Args:
        path: the ``.onnx`` file; external data must lie in its folder or below.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._folder = path, path.parent.resolve()

    def plain(self, proto: Any) -> bool:
        """Whether the tensor has a dtype that a published model can hold."""
        try:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type))
        except (KeyError, TypeError, ValueError):
            return False
        return dtype.kind in _PLAIN and dtype.name in np.sctypeDict and not _packed(proto)

    def size(self, proto: Any) -> int:
        """Number of elements.

        Raises:
            ForeignModel: a negative or absurd shape.
        """
        size: int = math.prod(proto.dims)
        if any(n < 0 for n in proto.dims) or size > _MOST_ELEMENTS:
            raise ForeignModel(f"{self._label(proto)} has the impossible shape {list(proto.dims)}")
        return size

    def array(self, proto: Any) -> NDArray[Any]:
        """The values; dtype and shape as declared.

        Raises:
            ForeignModel: damaged, or its external data are missing.
            UnsafeExternalData: external data outside the model's folder.
        """
        size = self.size(proto)
        try:
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type))
            if proto.data_location == onnx.TensorProto.EXTERNAL:
                where, offset = self._place(proto, size * dtype.itemsize)
                flat = np.fromfile(where, dtype.newbyteorder("<"), size, offset=offset)
                return flat.astype(dtype, copy=False).reshape(tuple(proto.dims))
            if proto.HasField("raw_data") and len(proto.raw_data) != size * dtype.itemsize:
                raise ValueError(f"{len(proto.raw_data)} bytes for {size} values")
            return np.asarray(numpy_helper.to_array(proto))
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, ForeignModel):
                raise
            raise ForeignModel(f"{self._label(proto)} is damaged: {error}") from error

    def dense(self, sparse: Any) -> NDArray[Any]:
        """A sparse tensor as a dense array.

        Raises:
            ForeignModel: damaged.
        """
        values, indices = self.array(sparse.values).ravel(), self.array(sparse.indices)
        shape = tuple(sparse.dims)
        full = onnx.TensorProto(name=sparse.values.name, dims=shape)
        out = np.zeros(self.size(full), values.dtype)
        try:
            if indices.ndim == 2:
                indices = np.ravel_multi_index(tuple(indices.T), shape)
            out[indices.astype(np.int64)] = values
        except (IndexError, ValueError, TypeError) as error:
            raise ForeignModel(f"{self._label(sparse.values)} is damaged: {error}") from error
        return out.reshape(shape)

    def embed(self, proto: Any) -> None:
        """Move a tensor's external data into the graph.

        Raises:
            ForeignModel, UnsafeExternalData: see `array`.
        """
        if proto.data_location != onnx.TensorProto.EXTERNAL:
            return
        itemsize = np.dtype(helper.tensor_dtype_to_np_dtype(proto.data_type)).itemsize
        packed = _packed(proto)
        length = -(-self.size(proto) // packed) if packed else self.size(proto) * itemsize
        where, offset = self._place(proto, length)
        with open(where, "rb") as file:
            file.seek(offset)
            proto.raw_data = file.read(length)
        del proto.external_data[:]
        proto.data_location = onnx.TensorProto.DEFAULT

    def check(self, proto: Any) -> None:
        """Check where a tensor's external data lie, without reading them.

        Raises:
            ForeignModel, UnsafeExternalData: see `array`.
        """
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            self._place(proto, None)

    def _label(self, proto: Any) -> str:
        return f"{self._path}: tensor {str(proto.name)[:80]!r}"

    def _place(self, proto: Any, nbytes: int | None) -> tuple[Path, int]:
        """File and offset of external data."""
        entries = {str(entry.key): str(entry.value) for entry in proto.external_data}
        location = entries.get("location", "")
        parts = PurePosixPath(location).parts
        foreign = {*parts, *PureWindowsPath(location).parts}
        rooted = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
        if not location or rooted or ".." in foreign or "\0" in location:
            raise UnsafeExternalData(
                f"{self._label(proto)} names external data at {location[:200]!r}; only relative "
                "paths below the model's folder are read"
            )
        where = self._folder
        for part in parts:
            where /= part
            if where.is_symlink():
                raise UnsafeExternalData(
                    f"{self._label(proto)}: {where} is a symbolic link; put the file itself there"
                )
        if not where.is_file():
            raise ForeignModel(f"{self._path} needs {location[:200]!r} beside it: not there")
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", str(0 if nbytes is None else nbytes)))
        except ValueError as error:
            raise ForeignModel(f"{self._label(proto)}: {error}") from error
        wrong = nbytes is not None and length != nbytes
        if offset < 0 or length < 0 or wrong or offset + length > where.stat().st_size:
            raise ForeignModel(
                f"{self._label(proto)} does not fit where it should lie in {location[:200]!r}: "
                "the external data are cut short or belong to another model"
            )
        return where, offset


def _packed(proto: Any) -> int:
    """Elements in a byte for the types below eight bits, else 0."""
    names = {
        "UINT4": 2, "INT4": 2, "FLOAT4E2M1": 2, "UINT2": 4, "INT2": 4,
    }  # fmt: skip
    kinds = onnx.TensorProto.DataType.items()
    return next((names[name] for name, n in kinds if n == proto.data_type and name in names), 0)

"""Initialisers of ``.onnx`` models, external data included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from prunecast.compression.files import UnreadableFile, UnsafePath, UnsupportedTensor
from prunecast.compression.files.tensors import (
    FOREIGN,
    FileSpec,
    FileTensor,
    TensorFile,
    raw_dtype,
)

__all__ = ["open_onnx"]

# TensorProto.DataType (onnx.proto) to dtype.
_DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64",
    9: "bool", 10: "float16", 11: "float64", 12: "uint32", 13: "uint64", 16: "bfloat16",
    17: "float8_e4m3fn", 18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz",
    24: "float8_e8m0fnu",
}  # fmt: skip


def open_onnx(path: Path) -> TensorFile:
    """Open a model; its initialisers are the tensors, the graph is left alone.

    External data are read from regular files in or below the model's folder only.

    Raises:
        UnreadableFile: missing or damaged.
        UnsafePath: external data outside the model's folder.
        UnsupportedTensor: an initialiser has a type that cannot be coded.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from error
    except (DecodeError, ValueError, TypeError) as error:
        raise UnreadableFile(f"{path} is not a readable .onnx model: {error}") from error
    if not model.HasField("graph"):
        raise UnreadableFile(f"{path} is not an .onnx model: it has no graph")
    protos = {proto.name: proto for proto in model.graph.initializer}
    if len(protos) != len(model.graph.initializer):
        raise UnreadableFile(f"{path} names an initialiser twice")
    specs: dict[str, FileSpec] = {}
    places: dict[str, tuple[Path, int]] = {}
    for name, proto in protos.items():
        specs[name] = _spec(path, proto)
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            places[name] = _place(path, proto, specs[name])

    def load(name: str) -> FileTensor:
        spec = specs[name]
        dtype = raw_dtype(spec.dtype)
        try:
            if name in places:
                where, offset = places[name]
                flat = np.fromfile(where, dtype, spec.size, offset=offset)
            elif protos[name].HasField("raw_data"):
                flat = np.frombuffer(protos[name].raw_data, dtype)
            else:
                flat = onnx.numpy_helper.to_array(protos[name]).reshape(-1)
                if spec.dtype in FOREIGN:
                    flat = flat.view(dtype)
            values = flat.astype(dtype.newbyteorder("="), copy=False).reshape(spec.shape)
        except (OSError, ValueError, TypeError) as error:
            raise UnreadableFile(f"{path}: initialiser {name!r} is damaged: {error}") from error
        return FileTensor(values, spec.dtype)

    remarks = []
    inner = sum(len(graph.initializer) for graph in _subgraphs(model.graph))
    sparse = len(model.graph.sparse_initializer)
    if inner:
        remarks.append(f"{inner} initialisers of inner graphs are not among the tensors")
    if sparse:
        remarks.append(f"{sparse} sparse initialisers are not among the tensors")
    return TensorFile(path, "onnx", specs, load, remarks=remarks)


def _spec(path: Path, proto: Any) -> FileSpec:
    dtype = _DTYPES.get(proto.data_type)
    if dtype is None:
        import onnx

        known = {number: name for name, number in onnx.TensorProto.DataType.items()}
        raise UnsupportedTensor(
            f"{path}: initialiser {proto.name!r} is {known.get(proto.data_type, proto.data_type)}, "
            "which cannot be coded"
        )
    if any(d < 0 for d in proto.dims):
        raise UnreadableFile(f"{path}: initialiser {proto.name!r} has a negative dimension")
    spec = FileSpec(dtype, tuple(proto.dims))
    if proto.HasField("raw_data") and len(proto.raw_data) != spec.nbytes:
        raise UnreadableFile(f"{path}: initialiser {proto.name!r} has not the size of its shape")
    return spec


def _place(path: Path, proto: Any, spec: FileSpec) -> tuple[Path, int]:
    """File and offset of an initialiser's external data, checked."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    parts = {*PurePosixPath(location).parts, *PureWindowsPath(location).parts}
    absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
    folder = path.parent.resolve()
    if not location or absolute or ".." in parts or "\0" in location:
        raise UnsafePath(
            f"{path}: initialiser {proto.name!r} names external data at {location!r}; only paths "
            "below the model's folder are read"
        )
    where = (folder / location).resolve()
    if not where.is_relative_to(folder):
        raise UnsafePath(f"{path}: external data {location!r} leads out of the model's folder")
    if not where.is_file():
        raise UnreadableFile(f"{path} needs {location!r} beside it, which is not there")
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(spec.nbytes)))
    except ValueError as error:
        raise UnreadableFile(f"{path}: initialiser {proto.name!r}: {error}") from error
    if offset < 0 or length != spec.nbytes or offset + length > where.stat().st_size:
        raise UnreadableFile(
            f"{path}: initialiser {proto.name!r} does not fit where it should lie in {location!r}"
        )
    return where, offset


def _subgraphs(graph: Any) -> Iterator[Any]:
    """All graphs inside a graph's nodes (of If, Loop, Scan)."""
    waiting = [graph]
    while waiting:
        for node in waiting.pop().node:
            for attribute in node.attribute:
                inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                waiting += inner
                yield from inner

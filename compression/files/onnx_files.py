"""Tensors of ``.onnx`` models, in the file or beside it; nothing outside its folder is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.bounds import byte_limit, disk_bytes, too_large
from prunecast.compression.files import (
    FilesError,
    FileTooLarge,
    UnreadableFile,
    UnsafePath,
    UnsupportedTensor,
)
from prunecast.compression.files.contents import content_hint, reading
from prunecast.compression.files.onnx_skeleton import (
    PROTOBUF_LIMIT,
    Place,
    numpy_dtype,
    places,
    subgraphs,
)
from prunecast.compression.files.tensors import (
    FOREIGN,
    MOST_DIMENSIONS,
    NATIVE,
    FileSpec,
    FileTensor,
    TensorFile,
    raw_dtype,
)

__all__ = ["TensorReader", "inner_graphs", "open_onnx", "read_proto"]

_MOST_ELEMENTS = 2**33  # of one tensor
_EXTERNAL = 1  # TensorProto.DataLocation; onnx itself is imported when there is a file to read
_IN_A_BYTE = {"uint4": 2, "int4": 2, "float4_e2m1fn": 2, "uint2": 4, "int2": 4}


def open_onnx(path: Path, max_bytes: int | None = None) -> TensorFile:
    """Open a model: the tensors that can be coded, wherever they lie, and the graph without them.

    Tensors of other types (strings, four bits) stay in the graph; external data are taken in.

    Raises:
        FileTooLarge: its tensors exceed `max_bytes`, see `TensorReader`.
        UnreadableFile: missing or damaged.
        UnsafePath: external data outside the model's folder.
    """
    model, reader = read_proto(path), TensorReader(path, max_bytes)
    try:
        found = places(model)
    except FilesError as error:
        raise type(error)(f"{path}: {error}") from error
    specs: dict[str, FileSpec] = {}
    held: dict[str, Callable[[], FileTensor]] = {}
    for place in found:
        taken = _take_list(place) if place.values is not None else _take_out(place, reader)
        if taken is not None:
            specs[place.name], held[place.name] = taken
    reader.check(sum(spec.nbytes for spec in specs.values()))
    skeleton = model.SerializeToString(deterministic=True)
    return TensorFile(path, "onnx", specs, lambda name: held[name](), graph=skeleton)


Taken = tuple[FileSpec, Callable[[], FileTensor]]


def _take_list(place: Place) -> Taken:
    assert place.values is not None
    field, dtype = place.values
    values = np.array(getattr(place.holder, field), dtype)
    place.holder.ClearField(field)
    return FileSpec(dtype, values.shape), lambda: FileTensor(values, dtype)


def _take_out(place: Place, reader: TensorReader) -> Taken | None:
    """What a tensor is and how to read it, its values taken out; None if it has to stay."""
    proto = place.holder
    if not reader.codable(proto):
        reader.embed(proto)
        return None
    spec, source = reader.spec(proto), type(proto)()
    source.CopyFrom(proto)

    def load() -> FileTensor:
        values = reader.array(source)
        view = values.view(FOREIGN[spec.dtype]) if spec.dtype in FOREIGN else values
        return FileTensor(view, spec.dtype)

    if proto.data_location == _EXTERNAL or proto.HasField("raw_data"):
        proto.ClearField("data_location")
        del proto.external_data[:]
        proto.raw_data = b""  # says where the values go
    elif spec.size:
        from onnx import helper

        field = helper.tensor_dtype_to_field(proto.data_type)
        proto.ClearField(field)
        place.fill(load())
        if proto.SerializeToString(deterministic=True) != source.SerializeToString(
            deterministic=True
        ):
            proto.CopyFrom(source)  # it would not come back as it was written
            return None
        proto.ClearField(field)
    return spec, load


def read_proto(path: Path) -> Any:
    """Parse an ``.onnx`` file.

    Returns:
        The `ModelProto`; external data are not loaded.

    Raises:
        UnreadableFile: missing, larger than protobuf reads, damaged, or no model.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        size = path.stat().st_size
        if size > PROTOBUF_LIMIT:
            raise UnreadableFile(
                f"{path} has {size} bytes and protobuf reads 2 GiB: save it with external data"
            )
        model = onnx.ModelProto.FromString(path.read_bytes())
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from error
    except UnreadableFile:
        raise
    except (DecodeError, ValueError, TypeError) as error:
        raise UnreadableFile(
            f"{path} is not a readable .onnx model: {error}{content_hint(path)}"
        ) from error
    if not model.HasField("graph"):
        raise UnreadableFile(f"{path} is not an .onnx model: it has no graph{content_hint(path)}")
    return model


def inner_graphs(graph: Any) -> Iterator[Any]:
    """All graphs inside a graph's or function's nodes (of If, Loop, Scan), outer ones first."""
    for node in graph.node:
        for _, sub in subgraphs(node):
            yield sub
            yield from inner_graphs(sub)


class TensorReader:
    """Reads the tensors of one model.

    Args:
        path: the ``.onnx`` file; external data must lie in its folder or below. Links are followed
            to files there, and, where `path` is a link itself, to files beside the one it means:
            so does a cache of huggingface_hub look.
        max_bytes: most bytes that the tensors may take together; default 1 GiB, or 64 times what
            the files take on disk if that is more.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self._path, self._folder = path, path.parent.resolve()
        self._home = path.resolve().parent
        self._max_bytes = max_bytes
        self._disk = {path: disk_bytes(path)}
        self._made = 0

    @property
    def files(self) -> list[Path]:
        """The model and the external data that have been asked for, links followed."""
        return list(self._disk)

    def check(self, nbytes: int) -> None:
        """Compare what tensors take together with the limit.

        Raises:
            FileTooLarge: they take more.
        """
        limit = byte_limit(sum(self._disk.values()), self._max_bytes)
        if nbytes > limit:
            raise FileTooLarge(f"{self._path}: {too_large('its tensors take', limit)}")

    def stated(self, proto: Any) -> int:
        """Bytes that a tensor states, 0 for a type without numbers.

        Raises:
            UnreadableFile: a negative or absurd shape.
        """
        dtype = numpy_dtype(proto)
        return 0 if dtype is None or dtype.hasobject else self.size(proto) * dtype.itemsize

    def plain(self, proto: Any) -> bool:
        """Whether the tensor has a dtype of numpy's that can be coded."""
        dtype = numpy_dtype(proto)
        return dtype is not None and dtype.name in NATIVE

    def codable(self, proto: Any) -> bool:
        """Whether the tensor has a dtype that can be coded, numpy's or another."""
        dtype = numpy_dtype(proto)
        return dtype is not None and dtype.name in (*NATIVE, *FOREIGN)

    def spec(self, proto: Any) -> FileSpec:
        """dtype and shape of a tensor that can be coded, once it is known to have its size.

        Raises:
            UnreadableFile, UnsafePath: as `array`, but for values that are too few.
            UnsupportedTensor: a type that cannot be coded.
        """
        dtype = numpy_dtype(proto)
        if dtype is None or dtype.name not in (*NATIVE, *FOREIGN):
            from onnx import TensorProto

            known = {number: name for name, number in TensorProto.DataType.items()}
            raise UnsupportedTensor(
                f"{self._label(proto)} is {known.get(proto.data_type, proto.data_type)}, which "
                "cannot be coded"
            )
        self.size(proto)
        spec = FileSpec(dtype.name, tuple(proto.dims))
        if proto.data_location == _EXTERNAL:
            self.place(proto, spec.nbytes)
        elif proto.HasField("raw_data"):
            if len(proto.raw_data) != spec.nbytes:
                raise UnreadableFile(f"{self._label(proto)} has not the size of its shape")
        else:
            from onnx import helper

            count = len(getattr(proto, helper.tensor_dtype_to_field(proto.data_type)))
            if count != spec.size:
                raise UnreadableFile(
                    f"{self._label(proto)} is damaged: {count} values for the shape "
                    f"{list(spec.shape)}"
                )
        return spec

    def size(self, proto: Any, dims: Sequence[int] | None = None) -> int:
        """Number of elements; of a sparse tensor's values, with its `dims`.

        Raises:
            UnreadableFile: a negative or absurd shape.
            UnsupportedTensor: more than `MOST_DIMENSIONS` dimensions.
        """
        shape = proto.dims if dims is None else dims
        if len(shape) > MOST_DIMENSIONS:  # before they are multiplied, which takes their square
            raise UnsupportedTensor(
                f"{self._label(proto)} has {len(shape):,} dimensions, more than "
                f"{MOST_DIMENSIONS}: reshape it"
            )
        size = math.prod(shape)
        if any(n < 0 for n in shape) or max(size, *shape, 0) > _MOST_ELEMENTS:
            raise UnreadableFile(
                f"{self._label(proto)} is damaged: the impossible shape {list(shape)}"
            )
        return size

    def array(self, proto: Any) -> NDArray[Any]:
        """The values; dtype and shape as declared.

        Raises:
            UnreadableFile: damaged, or its external data are missing.
            UnsafePath: external data outside the model's folder.
        """
        from onnx import numpy_helper

        size, dtype = self.size(proto), self._known(proto)
        try:
            wire = raw_dtype(dtype.name)
            if proto.data_location == _EXTERNAL:
                where, offset = self.place(proto, size * dtype.itemsize)
                flat = np.fromfile(where, wire, size, offset=offset)
            elif proto.HasField("raw_data"):
                flat = np.frombuffer(proto.raw_data, wire)
            else:
                return np.asarray(numpy_helper.to_array(proto))
            flat = flat.astype(wire.newbyteorder("="), copy=False)
            return flat.view(dtype).reshape(tuple(proto.dims))
        except (UnreadableFile, UnsafePath):
            raise
        except (OSError, ValueError, TypeError) as error:
            raise UnreadableFile(f"{self._label(proto)} is damaged: {error}") from error

    def dense(self, sparse: Any) -> NDArray[Any]:
        """A sparse tensor as a dense array.

        Raises:
            UnreadableFile: damaged.
            FileTooLarge: all sparse tensors together exceed the limit.
        """
        values, indices = self.array(sparse.values).ravel(), self.array(sparse.indices)
        shape = tuple(sparse.dims)
        size = self.size(sparse.values, shape)
        self._made += size * values.itemsize
        self.check(self._made)
        out = np.zeros(size, values.dtype)
        try:
            if indices.ndim == 2:
                indices = np.ravel_multi_index(tuple(indices.T), shape)
            out[indices.astype(np.int64)] = values
        except (IndexError, ValueError, TypeError) as error:
            raise UnreadableFile(f"{self._label(sparse.values)} is damaged: {error}") from error
        return out.reshape(shape)

    def embed(self, proto: Any) -> None:
        """Move a tensor's external data into the graph.

        Raises:
            FileTooLarge: all that is moved exceeds the limit.
            UnreadableFile, UnsafePath: see `array`.
        """
        if proto.data_location != _EXTERNAL:
            return
        dtype = self._known(proto)
        length = -(-self.size(proto) * dtype.itemsize // _IN_A_BYTE.get(dtype.name, 1))
        where, offset = self.place(proto, length)
        self._made += length
        self.check(self._made)
        with reading(where), open(where, "rb") as file:
            file.seek(offset)
            proto.raw_data = file.read(length)
        del proto.external_data[:]
        proto.data_location = 0  # in the graph

    def location(self, proto: Any) -> PurePosixPath:
        """Where external data lie below the model's folder, as it says; no link is followed.

        Raises:
            UnsafePath: not below the folder.
        """
        location = _entries(proto).get("location", "")
        parts = PurePosixPath(location).parts
        foreign = {*parts, *PureWindowsPath(location).parts}
        rooted = PurePosixPath(location).is_absolute() or PureWindowsPath(location).anchor
        if not location or rooted or ".." in foreign or "\0" in location:
            raise UnsafePath(
                f"{self._label(proto)} names external data at {location[:200]!r}; only relative "
                "paths below the model's folder are read"
            )
        return PurePosixPath(location)

    def place(self, proto: Any, nbytes: int | None = None) -> tuple[Path, int]:
        """File and offset of external data, of `nbytes` bytes where that is known.

        Raises:
            UnreadableFile, UnsafePath: see `array`.
        """
        entries, location = _entries(proto), str(self.location(proto))
        named = self._folder / location
        try:
            where = named.resolve()
            there = where.is_file()
        except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
            raise UnreadableFile(
                f"{self._label(proto)}: external data at {location[:200]!r} cannot be looked up: "
                "get them from where the model is from"
            ) from error
        beside = self._path.is_symlink() and where.parent == self._home
        if where != named and not (where.is_relative_to(self._folder) or beside):
            raise UnsafePath(
                f"{self._label(proto)}: {named} is a symbolic link to {where}, which is out of the "
                "model's folder; put the file itself there"
            )
        if not there:
            raise UnreadableFile(
                f"{self._path} needs {location[:200]!r} beside it: not there, get it "
                "from where the model is from"
            )
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", str(0 if nbytes is None else nbytes)))
        except ValueError as error:
            raise UnreadableFile(f"{self._label(proto)}: {error}") from error
        with reading(where):
            self._disk.setdefault(where, disk_bytes(where))
            held = where.stat().st_size
        wrong = nbytes is not None and length != nbytes
        if offset < 0 or length < 0 or wrong or offset + length > held:
            raise UnreadableFile(
                f"{self._label(proto)} does not fit where it should lie in {location[:200]!r}: "
                "the external data are cut short or belong to another model"
            )
        return where, offset

    def _known(self, proto: Any) -> np.dtype[Any]:
        dtype = numpy_dtype(proto)
        if dtype is None:
            raise UnreadableFile(f"{self._label(proto)} is damaged: no type {proto.data_type}")
        return dtype

    def _label(self, proto: Any) -> str:
        return f"{self._path}: tensor {str(proto.name)[:80]!r}"


def _entries(proto: Any) -> dict[str, str]:
    """What a tensor says of its external data."""
    return {str(entry.key): str(entry.value) for entry in proto.external_data}

"""Where the tensors of a checkpoint lie, to the byte, so that it need not be loaded to change it.

One ``.safetensors`` file, several with their ``.index.json``, or an ``.onnx`` model whose weights
lie in it or beside it. Only headers and graphs are read; of a model with 2 GiB of weights inside,
that is the few bytes between them.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from prunecast.compression.files import FilesError, UnknownFormat, UnreadableFile, UnsafePath
from prunecast.compression.files.contents import CONVERSIONS, content_hint
from prunecast.compression.files.formats import open_tensors
from prunecast.compression.files.onnx_axes import input_axes
from prunecast.compression.files.onnx_files import TensorReader
from prunecast.compression.files.tensors import MOST_DIMENSIONS, FileSpec
from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.externals import FIELDS, external_tensors
from prunecast.compression.release.protobuf import ProtobufError, read_fields, read_varint

__all__ = ["MASKS", "Checkpoint", "Extent", "open_checkpoint"]

MASKS = ".masks.safetensors"
"""Ends the name of what `prunecast prune` writes beside a checkpoint, and is none."""

_INDEX = ".safetensors.index.json"
_MOST_INDEX = 1 << 28  # bytes
# numbers of fields in onnx.proto
_GRAPH, _INITIALIZER, _SPARSE = 7, 5, 15
_DIMS, _TYPE, _FLOATS, _NAME, _RAW, _DOUBLES, _LOCATION = 1, 2, 4, 8, 9, 10, 14
_FLOATING = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}  # TensorProto.DataType


@dataclass(frozen=True)
class Extent:
    """A tensor, and where it lies in the form of `raw_dtype`, row by row.

    Attributes:
        name: in the checkpoint.
        spec: dtype and shape.
        file: number of the file in `Checkpoint.files`.
        offset: of its first byte there.
        inputs: axis of its input channels: 1, unless what uses it in an ``.onnx`` model says more.
    """

    name: str
    spec: FileSpec
    file: int
    offset: int
    inputs: int = 1


@dataclass(frozen=True)
class Checkpoint:
    """One model in one file or several.

    Attributes:
        path: the file that names the others, or the only one.
        kind: ``safetensors``, ``sharded`` or ``onnx``.
        files: all of its files by the name that `path`'s folder has for them, links not followed;
            `path` comes first.
        tensors: those that lie plainly in a file, in the order of files and offsets.
        left: names of those that are no floats, or lie nowhere plainly.
        aliases: name of a tied tensor that was not written to the tensor that was.
        others: of an ``.onnx`` model, what else lies in its files of external data: number of the
            file, offsets of the first byte and behind the last, and name.
    """

    path: Path
    kind: str
    files: Mapping[str, Path]
    tensors: tuple[Extent, ...]
    left: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    others: tuple[tuple[int, int, int, str], ...] = ()

    def file(self, extent: Extent) -> Path:
        """The file that a tensor lies in."""
        return list(self.files.values())[extent.file]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.files.values())


def open_checkpoint(path: Path) -> Checkpoint:
    """Find the tensors of a checkpoint.

    Args:
        path: of a ``.safetensors``, ``.safetensors.index.json`` or ``.onnx`` file, or of the folder
            of one with an index.

    Raises:
        FilesError: missing, damaged, of another format, naming files outside its folder, or two
            tensors alike.
    """
    checkpoint = _open(path)
    seen: set[str] = set()
    for name in (*(t.name for t in checkpoint.tensors), *checkpoint.left):
        if name in seen:
            raise UnreadableFile(
                f"{checkpoint.path} holds two tensors {name[:200]!r}: it is damaged, or its files "
                "belong to different checkpoints; export it again, or get its files together"
            )
        seen.add(name)
    return checkpoint


def _open(path: Path) -> Checkpoint:
    path = Path(path)
    if os.path.isdir(path):
        tensors = [p for p in path.glob("*.safetensors") if not p.name.endswith(MASKS)]
        found = sorted(path.glob(f"*{_INDEX}")) or tensors
        if len(found) != 1:
            raise UnknownFormat(
                f"{path} is a folder with {len(found) or 'no'} checkpoints: name the file in it"
            )
        path = found[0]
    if path.name.endswith(_INDEX):
        return _sharded(path)
    if path.suffix.lower() == ".onnx":
        return _onnx(path)
    if path.suffix.lower() != ".safetensors":
        remedy = CONVERSIONS.get(path.suffix.lower(), "")
        raise UnknownFormat(
            f"{path}: a .safetensors or .onnx file can be pruned, or the {_INDEX[1:]} of several"
            f"{remedy}"
        )
    return _safetensors(path)


def _safetensors(path: Path) -> Checkpoint:
    source = open_tensors(path)
    tensors = tuple(Extent(n, s, 0, source.offsets[n]) for n, s in source.specs.items())
    aliases = {
        alias: name
        for alias, name in source.metadata.items()
        if name in source.specs and alias not in source.specs
    }
    return Checkpoint(path, "safetensors", {path.name: path}, tensors, aliases=aliases)


def _sharded(path: Path) -> Checkpoint:
    try:
        if path.stat().st_size > _MOST_INDEX:
            raise UnreadableFile(f"{path} has more than {_MOST_INDEX:,} bytes: it is no index")
        document = json.loads(path.read_bytes())
        homes = {str(name): str(file) for name, file in document["weight_map"].items()}
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableFile(
            f"{path} is no index of shards: {error}{content_hint(path)}"
        ) from error
    files = {path.name: path}
    for name in homes.values():
        if not name or name != PurePosixPath(name).name or name != PureWindowsPath(name).name:
            raise UnsafePath(f"{path} names a shard {name[:200]!r}: shards lie beside the index")
        if not name.lower().endswith(".safetensors"):
            raise UnknownFormat(
                f"{path} names a shard {name[:200]!r}: shards are .safetensors files"
                f"{CONVERSIONS.get(PurePosixPath(name).suffix.lower(), '')}"
            )
        files[name] = path.with_name(name)
    tensors: list[Extent] = []
    aliases: dict[str, str] = {}
    stated: dict[str, list[str]] = {}
    for tensor_name, home in homes.items():
        stated.setdefault(home, []).append(tensor_name)
    for number, (name, file) in enumerate(files.items()):
        if number == 0:
            continue
        shard = _safetensors(file)
        aliases |= shard.aliases
        tensors += [Extent(t.name, t.spec, number, t.offset) for t in shard.tensors]
        held = {t.name for t in shard.tensors}
        lost = [n for n in stated[name] if n not in held]
        if lost:
            raise UnreadableFile(
                f"{file} lacks the tensor {lost[0]!r}, which {path.name} says is in it: they "
                "belong to different checkpoints"
            )
    names = {t.name for t in tensors}
    aliases = {alias: name for alias, name in aliases.items() if alias not in names}
    return Checkpoint(path, "sharded", files, tuple(tensors), aliases=aliases)


# -- .onnx ----------------------------------------------------------------------------------------


def _onnx(path: Path) -> Checkpoint:
    """The floating initialisers of the graph, wherever they lie.

    Numbers that protobuf spreads out (float16 in ``int32_data``) lie nowhere plainly and are left.
    """
    from google.protobuf.message import DecodeError

    tensors: list[Extent] = []
    left: list[str] = []
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)  # closes with its last view
        whole, reader = memoryview(data), TensorReader(path)
        beside = _beside(path, whole, reader)
        files = {path.name: path, **{span[0]: path.parent / span[0] for span in beside}}
        numbers = {name: number for number, name in enumerate(files)}
        along = input_axes(whole)
        for raw in _repeated(whole, _INITIALIZER):
            name, found = _tensor(raw, whole, reader)
            if found is None:
                left.append(name)
                continue
            spec, home, offset = found
            axis = along.get(name, 1) % max(2, len(spec.shape))
            tensors.append(Extent(name, spec, numbers[home] if home else 0, offset, axis))
        for sparse in _repeated(whole, _SPARSE):
            for number, value in read_fields(sparse, FIELDS["SparseTensor"]):
                if number == 1 and isinstance(value, memoryview):
                    left.append(_name(value))
    except OSError as error:
        raise UnreadableFile(f"cannot read {path}: {error.strerror or error}") from error
    except (RuntimeFailure, DecodeError, ValueError) as error:
        if isinstance(error, FilesError):
            raise
        raise UnreadableFile(
            f"{path} is not a readable .onnx model: {error}{content_hint(path)}"
        ) from error
    tensors.sort(key=lambda t: (t.file, t.offset))
    own = Counter((t.file, t.offset, t.name) for t in tensors)
    others = []
    for home, start, stop, name in beside:
        if own[numbers[home], start, name] > 0:
            own[numbers[home], start, name] -= 1
        else:
            others.append((numbers[home], start, stop, name))
    return Checkpoint(path, "onnx", files, tuple(tensors), tuple(left), others=tuple(others))


def _beside(path: Path, model: memoryview, reader: TensorReader) -> list[tuple[str, int, int, str]]:
    """External data of all tensors, inner graphs and `Constant` nodes included.

    The model's name for the file, below its own folder (a runtime looks for it there, whatever link
    it is), where they begin and end as far as that is stated, and the tensor's name.
    """
    import onnx

    found: list[tuple[str, int, int, str]] = []
    whole = path.resolve()
    for name, entries, external in external_tensors(model):
        if not external:
            continue
        proto = onnx.TensorProto(name=name)
        for key, value in entries:
            proto.external_data.add(key=key, value=value)
        where, offset = reader.place(proto)
        if where == whole:
            raise UnreadableFile(
                f"{path}: tensor {name[:80]!r} has its external data in the model itself: it is "
                "damaged, or was renamed over them"
            )
        length = int(dict(entries).get("length", "1"))
        found.append((str(reader.location(proto)), offset, offset + length, name))
    return found


def _name(tensor: memoryview) -> str:
    fields = read_fields(tensor, FIELDS["Tensor"])
    return next((str(v, "utf-8") for n, v in fields if n == _NAME and not isinstance(v, int)), "")


def _repeated(model: memoryview, wanted: int) -> Iterator[memoryview]:
    """Messages in a repeated field of the graph."""
    graphs = [v for n, v in read_fields(model, FIELDS["Model"]) if n == _GRAPH]
    if not graphs or not isinstance(graphs[0], memoryview):
        raise ProtobufError("it has no graph")
    for number, value in read_fields(graphs[0], FIELDS["Graph"]):
        if number == wanted and isinstance(value, memoryview):
            yield value


def _tensor(
    raw: memoryview, whole: memoryview, reader: TensorReader
) -> tuple[str, tuple[FileSpec, str, int] | None]:
    """Name, and spec, external file ("" for none) and offset where it is a float that lies plainly.

    Raises:
        UnreadableFile, UnsafePath: damaged, or external data that cannot be read.
    """
    fields: dict[int, Any] = {}
    dims: list[int] = []
    for number, value in read_fields(raw, FIELDS["Tensor"]):
        if number != _DIMS:  # numbers one by one instead of packed lie nowhere plainly
            fields[number] = None if number in fields else value
            continue
        packed, at = value, 0
        while isinstance(packed, memoryview) and at < len(packed) and len(dims) <= MOST_DIMENSIONS:
            value, at = read_varint(packed, at, 10)
            dims.append(value)
        if not isinstance(packed, memoryview):
            dims.append(packed)
        if len(dims) > MOST_DIMENSIONS:
            raise UnreadableFile(f"a tensor has more than {MOST_DIMENSIONS} dimensions")
    name, dtype = str(fields.get(_NAME) or b"", "utf-8"), _FLOATING.get(fields.get(_TYPE, 0))
    if dtype is None or any(n >= 1 << 62 for n in dims) or math.prod(dims) >= 1 << 62:
        return name, None
    spec = FileSpec(dtype, tuple(dims))
    if fields.get(_LOCATION) == 1:
        import onnx

        proto = onnx.TensorProto.FromString(bytes(raw))
        return name, (spec, str(reader.location(proto)), reader.place(proto, spec.nbytes)[1])
    plain = {"float32": _FLOATS, "float64": _DOUBLES}.get(dtype, _RAW)
    values = fields.get(_RAW, fields.get(plain))
    if not isinstance(values, memoryview) or not spec.size:
        return name, None
    if len(values) != spec.nbytes:
        raise UnreadableFile(f"tensor {name[:80]!r} has not the size of its shape")
    return name, (spec, "", _address(values) - _address(whole))


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, np.uint8).ctypes.data)

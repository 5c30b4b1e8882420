"""Where a model file would read its weights from, found without the onnx package.

An ONNX tensor may name an external file, and a runtime opens it relative to the model. A release
has one such file, `weights.bin`; a model that names any other would make a device read whatever
the agent may read. The fields are those of onnx.proto, IR version 10.
"""

from __future__ import annotations

from collections.abc import Iterator

from prunecast.compression.release import RuntimeFailure

__all__ = ["check_externals"]

_MOST_DEPTH = 64
_KEYS = {"location", "offset", "length", "checksum"}
# message -> field -> message in it; everything else is skipped
_NESTED = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
}
_NAME, _EXTERNAL, _LOCATION = 8, 13, 14  # of a Tensor


def check_externals(model: bytes, *, file: str, size: int) -> None:
    """Check that every external tensor of an ONNX model lies within `file`.

    Args:
        model: content of the ``.onnx`` file.
        file: the only name that may appear.
        size: its length in bytes.

    Raises:
        RuntimeFailure: another file, bytes outside of it, or no ONNX model at all.
    """
    if model[4:8] == b"ORTM":
        raise RuntimeFailure("model.onnx is in onnxruntime's own format, which is not accepted")
    try:
        for name, entries in _externals(memoryview(model), "Model", 0):
            _check_entries(name, entries, file, size)
    except (IndexError, UnicodeDecodeError) as error:
        raise RuntimeFailure("model.onnx is damaged or no ONNX model") from error


def _check_entries(name: str, entries: list[tuple[str, str]], file: str, size: int) -> None:
    found = dict(entries)
    if len(found) != len(entries) or not set(found) <= _KEYS:
        raise RuntimeFailure(f"tensor {name[:80]!r} of model.onnx describes its file ambiguously")
    if (location := found.get("location")) != file:
        raise RuntimeFailure(
            f"tensor {name[:80]!r} of model.onnx lies in {str(location)[:80]!r}: a release may "
            f"read {file} alone"
        )
    numbers = [found.get(key, "0") for key in ("offset", "length")]
    if not all(n.isascii() and n.isdigit() for n in numbers) or sum(map(int, numbers)) > size:
        raise RuntimeFailure(
            f"tensor {name[:80]!r} of model.onnx lies outside the {size} bytes of {file}"
        )


def _externals(
    data: memoryview, kind: str, depth: int
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    if depth > _MOST_DEPTH:
        raise RuntimeFailure(f"model.onnx nests graphs more than {_MOST_DEPTH} deep")
    if kind == "Tensor":
        name, entries, external = "", [], False
        for number, value in _fields(data):
            if number == _NAME and isinstance(value, memoryview):
                name = str(value, "utf-8")
            elif number == _EXTERNAL and isinstance(value, memoryview):
                pair = {n: str(v, "utf-8") for n, v in _fields(value) if isinstance(v, memoryview)}
                entries.append((pair.get(1, ""), pair.get(2, "")))
            elif number == _LOCATION:
                external = external or value == 1
        if entries or external:
            yield name, entries
        return
    nested = _NESTED[kind]
    for number, value in _fields(data):
        if number in nested and isinstance(value, memoryview):
            yield from _externals(value, nested[number], depth + 1)


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Fields of one protobuf message: number, and integer or bytes; IndexError when damaged."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise IndexError(f"wire type {wire}")
        if at + length > len(data):
            raise IndexError("a field ends behind its message")
        if wire == 2:
            yield key >> 3, data[at : at + length]
        at += length


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
        if shift > 63:
            raise IndexError("a number is too long")

"""Which files an ONNX model reads, told without the onnx package.

An ONNX tensor may name an external file, and a runtime opens it relative to the model. A model that
names any other than `weights.bin` would make a device read whatever the agent may read. No field is
read in which another reader could see something else, see `prunecast.compression.release.protobuf`.
"""

from __future__ import annotations

from collections.abc import Iterator

from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.protobuf import Field, ProtobufError, read_fields

__all__ = ["FIELDS", "check_externals", "external_tensors"]

_MOST_DEPTH = 64
_MOST_DIGITS = 19
_KEYS = {"location", "offset", "length", "checksum"}
# What messages may hold, by the fields' numbers (onnx.proto, IR version 14), and which of them are
# messages that tensors can hide in. A later onnxruntime may know more fields: an agent that does
# not must not guess what is in them.
_ENTRY: dict[int, Field] = {1: "one", 2: "one"}
FIELDS: dict[str, dict[int, Field]] = {
    "Model": {
        **dict.fromkeys((1, 5), "int"),
        **dict.fromkeys((2, 3, 4, 6, 7), "one"),
        **dict.fromkeys((8, 14, 20, 25, 26), "many"),
    },
    "Graph": {**dict.fromkeys((2, 10), "one"), **dict.fromkeys((1, 5, *range(11, 17)), "many")},
    "Node": {**dict.fromkeys((3, 4, 6, 7, 8), "one"), **dict.fromkeys((1, 2, 5, 9, 10), "many")},
    "Attribute": {
        **dict.fromkeys((3, 20), "int"),
        2: "float",
        **dict.fromkeys((1, 4, 5, 6, 13, 14, 21, 22), "one"),
        7: "floats",
        8: "ints",
        **dict.fromkeys((9, 10, 11, 15, 23), "many"),
    },
    "Tensor": {
        **dict.fromkeys((2, 14), "int"),
        **dict.fromkeys((1, 5, 7, 11), "ints"),
        4: "floats",
        10: "doubles",
        **dict.fromkeys((3, 8, 9, 12), "one"),
        **dict.fromkeys((6, 13, 16), "many"),
    },
    "SparseTensor": {1: "one", 2: "one", 3: "ints"},
    "Function": {
        **dict.fromkeys((1, 8, 10, 13), "one"),
        **dict.fromkeys((4, 5, 6, 7, 9, 11, 12, 14), "many"),
    },
    "TrainingInfo": {1: "one", 2: "one", 3: "many", 4: "many"},
}
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
        RuntimeFailure: another file, bytes outside of it, no ONNX model at all, or one that
            onnxruntime might read in another way.
    """
    if model[4:8] == b"ORTM":
        raise RuntimeFailure("model.onnx is in onnxruntime's own format, which is not accepted")
    try:
        for name, entries, _ in external_tensors(memoryview(model)):
            _check_entries(name, entries, file, size)
    except (ProtobufError, UnicodeDecodeError) as error:
        raise RuntimeFailure(f"model.onnx is damaged or no ONNX model: {error}") from error


def external_tensors(model: memoryview) -> Iterator[tuple[str, list[tuple[str, str]], bool]]:
    """Every tensor of an ONNX model that describes a file, wherever in the model it is.

    Yields:
        Its name, keys and values of the description, and whether its data are to be read there.

    Raises:
        RuntimeFailure: graphs nested too deep.
        ProtobufError: damaged, or not written in the usual way.
        UnicodeDecodeError: a name that is not UTF-8.
    """
    return _externals(model, "Model", 0)


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
    usable = all(n.isascii() and n.isdigit() and len(n) <= _MOST_DIGITS for n in numbers)
    if not usable or sum(map(int, numbers)) > size:
        raise RuntimeFailure(
            f"tensor {name[:80]!r} of model.onnx lies outside the {size} bytes of {file}"
        )


def _externals(
    data: memoryview, kind: str, depth: int
) -> Iterator[tuple[str, list[tuple[str, str]], bool]]:
    if depth > _MOST_DEPTH:
        raise RuntimeFailure(f"model.onnx nests graphs more than {_MOST_DEPTH} deep")
    if kind == "Tensor":
        name, entries, external = "", [], False
        for number, value in read_fields(data, FIELDS[kind]):
            if number == _NAME and isinstance(value, memoryview):
                name = str(value, "utf-8")
            elif number == _EXTERNAL and isinstance(value, memoryview):
                pair = {
                    n: str(v, "utf-8")
                    for n, v in read_fields(value, _ENTRY)
                    if isinstance(v, memoryview)
                }
                entries.append((pair.get(1, ""), pair.get(2, "")))
            elif number == _LOCATION:
                if value not in (0, 1):
                    raise ProtobufError(f"a tensor's data location is {value}")
                external = value == 1
        if entries or external:
            yield name, entries, external
        return
    nested = _NESTED[kind]
    for number, value in read_fields(data, FIELDS[kind]):
        if number in nested and isinstance(value, memoryview):
            yield from _externals(value, nested[number], depth + 1)

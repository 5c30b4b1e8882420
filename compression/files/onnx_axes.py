"""Along which axis weights of an ``.onnx`` model have their input channels, by what uses them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prunecast.compression.release.externals import FIELDS
from prunecast.compression.release.protobuf import read_fields

__all__ = ["input_axes"]

_Functions = Mapping[tuple[str, str], tuple[list[str], dict[str, int]]]
_USES = {
    "MatMul": {1: -2},
    "Gemm": {1: -2},
    "ConvTranspose": {1: 0},
    **{recurrent: {1: -1, 2: -1} for recurrent in ("LSTM", "GRU", "RNN")},
}  # operator: number of an input, its axis
_TURNED = {-1: -2, -2: -1}


def input_axes(model: memoryview) -> dict[str, int]:
    """Name to axis, negative ones from the end, of weights in the graph; it is 1 of all others.

    They are followed through casts and transpositions, into inner graphs and functions.

    Args:
        model: content of the file, of which `external_tensors` has seen all.

    Raises:
        ProtobufError, UnicodeDecodeError: damaged.
    """
    functions: dict[tuple[str, str], tuple[list[str], dict[str, int]]] = {}
    for function in _messages(model, "Model", 25):
        key = (_text(function, "Function", 10), _text(function, "Function", 1))
        inputs = [str(name, "utf-8") for name in _messages(function, "Function", 4)]
        functions[key] = inputs, _axes(_messages(function, "Function", 7), functions)
    graph = next(_messages(model, "Model", 7), memoryview(b""))
    return _axes(_messages(graph, "Graph", 1), functions)


def _axes(nodes: Iterable[memoryview], functions: _Functions) -> dict[str, int]:
    found: dict[str, int] = {}
    for node in reversed(list(nodes)):  # what uses a value comes behind what makes it
        inputs = [str(name, "utf-8") for name in _messages(node, "Node", 1)]
        outputs = [str(name, "utf-8") for name in _messages(node, "Node", 2)]
        operator, domain = _text(node, "Node", 4), _text(node, "Node", 7)
        graphs, transposed, perm = [], False, list[int]()
        for attribute in _messages(node, "Node", 5):
            for number, value in read_fields(attribute, FIELDS["Attribute"]):
                if number in (6, 11) and isinstance(value, memoryview):
                    graphs.append(value)
                elif number == 3 and _text(attribute, "Attribute", 1) == "transB":
                    transposed = bool(value)
                elif number == 8 and operator == "Transpose":
                    perm += list(value) if isinstance(value, memoryview) else [value]
        for graph in graphs:
            own = {_text(tensor, "Tensor", 8) for tensor in _messages(graph, "Graph", 5)}
            for name, axis in _axes(_messages(graph, "Graph", 1), functions).items():
                if name not in own:
                    found.setdefault(name, axis)
        if (domain, operator) in functions:
            formal, inner = functions[domain, operator]
            uses = {at: inner[name] for at, name in enumerate(formal) if name in inner}
        elif operator in ("Identity", "Cast", "Transpose") and outputs and outputs[0] in found:
            axis = found[outputs[0]]
            turned = operator == "Transpose" and perm in ([], [1, 0])
            uses = {0: _TURNED.get(axis, axis) if turned else axis}
        else:
            uses = _USES.get(operator, {})
        for at, axis in uses.items():
            if at < len(inputs):
                found.setdefault(inputs[at], _TURNED.get(axis, axis) if transposed else axis)
    return found


def _messages(data: memoryview, kind: str, wanted: int) -> Iterator[memoryview]:
    for number, value in read_fields(data, FIELDS[kind]):
        if number == wanted and isinstance(value, memoryview):
            yield value


def _text(data: memoryview, kind: str, wanted: int) -> str:
    return next((str(text, "utf-8") for text in _messages(data, kind, wanted)), "")

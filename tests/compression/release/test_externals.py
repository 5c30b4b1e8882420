"""Graphs in whose bytes two readers could see different files are refused."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.externals import FIELDS, check_externals

FILE, SIZE = "weights.bin", 64


def varint(value: int, length: int = 1) -> bytes:
    """Of at least so many bytes."""
    out = bytearray()
    while value > 0x7F or len(out) + 1 < length:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(
    number: int, payload: bytes | int, *, tag: int = 1, length: int = 1, bit: int = 0
) -> bytes:
    """A field; its tag and length (or value) have at least so many bytes, the tag also `bit`."""
    wire = 0 if isinstance(payload, int) else 2
    head = varint(number << 3 | wire | bit, tag)
    if isinstance(payload, int):
        return head + varint(payload, length)
    return head + varint(len(payload), length) + payload


def entry(key: str, value: str) -> bytes:
    return field(1, key.encode()) + field(2, value.encode())


NUMBERS = field(13, entry("offset", "0")) + field(13, entry("length", "32"))
HONEST = field(13, entry("location", FILE)) + NUMBERS + field(14, 1)
BASE = TensorProto(name="s", data_type=TensorProto.UINT8, dims=[32]).SerializeToString()
AWAY = field(13, entry("location", "../secret"))


def model(tensor: bytes, *, more: bytes = b"") -> bytes:
    """A model with an initialiser of these bytes; `more` follows in the model itself."""
    ends = [helper.make_tensor_value_info(n, TensorProto.UINT8, [32]) for n in ("x", "y")]
    node = helper.make_node("Add", ["x", "s"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:]).SerializeToString()
    shell = onnx.ModelProto(ir_version=8, opset_import=[helper.make_opsetid("", 17)])
    return shell.SerializeToString() + field(7, graph + field(5, tensor)) + more


def check(data: bytes) -> None:
    check_externals(data, file=FILE, size=SIZE)


def test_what_protobuf_writes_is_read() -> None:
    check(model(BASE + HONEST))
    with pytest.raises(RuntimeFailure, match="secret"):
        check(model(BASE + AWAY + NUMBERS + field(14, 1)))


@pytest.mark.parametrize(
    "tensor",
    [
        # tags of five bytes whose 33rd bit protobuf drops
        BASE + field(13, entry("location", "../secret"), tag=5, bit=1 << 32) + NUMBERS,
        BASE + HONEST + field(14, 1, tag=5, bit=1 << 32),
        BASE + field(13, entry("location", FILE), tag=2) + NUMBERS + field(14, 1),
        BASE + field(13, entry("location", FILE), length=2) + NUMBERS + field(14, 1),
        BASE + HONEST[:-2] + field(14, 1, length=2),
        BASE + HONEST[:-2] + field(14, 1 << 32 | 1),  # an enum is cut to 32 bits
        BASE + HONEST[:-2] + varint(14 << 3) + b"\xff" * 10 + b"\x01",
        BASE + HONEST[:-2] + varint(14 << 3) + b"\xff" * 9 + b"\x7f",  # more than 64 bits
    ],
)
def test_numbers_that_are_not_in_their_shortest_form(tensor: bytes) -> None:
    with pytest.raises(RuntimeFailure, match="damaged"):
        check(model(tensor))


@pytest.mark.parametrize(
    "data",
    [
        model(BASE + HONEST + field(14, 0)),
        model(BASE + HONEST + field(8, b"t")),
        model(BASE + field(13, entry("location", "x") + entry("location", FILE)) + NUMBERS),
        model(BASE + HONEST, more=field(7, field(5, BASE + AWAY + NUMBERS))),  # graphs are merged
        model(BASE + HONEST, more=field(7, b"")),
    ],
)
def test_fields_that_are_given_twice(data: bytes) -> None:
    with pytest.raises(RuntimeFailure, match="twice"):
        check(data)


@pytest.mark.parametrize(
    "odd",
    [
        field(99, b"later onnxruntimes may know it"),
        field(0, b""),
        field(13, 1),  # a message as a number
        varint(13 << 3 | 3) + varint(13 << 3 | 4),  # a group
        varint(13 << 3 | 6),
        varint(13 << 3 | 1) + bytes(8),
        field(14, b"\x01"),  # an enum, packed
    ],
)
def test_fields_that_nobody_knows(odd: bytes) -> None:
    with pytest.raises(RuntimeFailure, match="unknown"):
        check(model(BASE + HONEST + odd))


def test_numbers_of_thousands_of_digits() -> None:
    long = field(13, entry("location", FILE)) + field(13, entry("offset", "9" * 5000))
    with pytest.raises(RuntimeFailure, match="outside"):
        check(model(BASE + long + field(14, 1)))


@pytest.mark.parametrize("message", sorted(FIELDS))
def test_the_tables_are_those_of_onnx(message: str) -> None:
    """Of the installed version, whose fields a device must know."""
    fields = getattr(onnx, f"{message}Proto").DESCRIPTOR.fields
    kinds = {1: "double", 2: "float", 9: "one", 11: "one", 12: "one"}
    found = {}
    for one in fields:
        kind = kinds.get(one.type, "int")
        many = {"one": "many"}.get(kind, f"{kind}s")
        found[one.number] = many if one.is_repeated else kind
    assert FIELDS[message] == found


def _externals(message: object) -> Iterator[tuple[str, str]]:
    """What the onnx package sees."""
    if isinstance(message, TensorProto):
        if message.data_location == TensorProto.EXTERNAL or message.external_data:
            yield from ((e.key, e.value) for e in message.external_data)
        return
    for descriptor, value in message.ListFields():  # type: ignore[attr-defined]
        if descriptor.message_type is not None:
            for one in value if descriptor.is_repeated else [value]:
                yield from _externals(one)


WHOLE = model(BASE + HONEST, more=field(25, field(1, b"f")))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_passes_is_seen_alike_by_onnx(data: st.DataObject) -> None:
    """Bytes changed, cut out and repeated anywhere."""
    mutated = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        what = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if what == "set":
            mutated[at] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del mutated[at : at + data.draw(st.integers(1, 8))]
        elif what == "insert":
            mutated[at:at] = data.draw(st.binary(min_size=1, max_size=6))
        else:
            mutated[at:at] = mutated[at : at + data.draw(st.integers(1, 60))]
        if not mutated:
            return
    try:
        check(bytes(mutated))
    except RuntimeFailure:
        return
    try:
        seen = onnx.ModelProto.FromString(bytes(mutated))
    except DecodeError:
        return
    for key, value in _externals(seen):
        assert key != "location" or value == FILE


def test_a_model_with_everything_passes() -> None:
    weights = numpy_helper.from_array(np.arange(6, dtype=np.float64), "d")
    whole = onnx.ModelProto.FromString(model(BASE + HONEST))
    whole.graph.initializer.append(weights)
    whole.graph.initializer.append(helper.make_tensor("i", TensorProto.INT8, [2], [-1, 2]))
    whole.graph.initializer.append(helper.make_tensor("f", TensorProto.FLOAT, [2], [-1.0, 2.0]))
    whole.graph.initializer.append(helper.make_tensor("t", TensorProto.STRING, [1], [b"\xff"]))
    node = whole.graph.node[0]
    for name, value in {
        "a": 1.5,
        "b": -3,
        "c": "text",
        "d": [1.5, 2.5],
        "e": [-1, 2**62],
        "f": ["x", "y"],
        "g": weights,
        "h": whole.graph,
    }.items():
        node.attribute.append(helper.make_attribute(name, value))
    whole.metadata_props.add(key="k", value="v")
    check(whole.SerializeToString())

"""Models in a serialisation of their own: bytes whose length changes with every version."""

import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunecast.compression.codec import TensorSpec, encode
from prunecast.compression.codec.context import Context
from prunecast.compression.versions import (
    BadPayload,
    PublishedModel,
    RawTensor,
    TooLarge,
    decode_model,
    encode_delta,
    encode_keyframe,
    frame,
    measure_payload,
    model_limits,
)
from prunecast.compression.versions.byte_strings import (
    LEAST_COPY,
    ByteEdits,
    apply_edits,
    find_edits,
)
from prunecast.compression.versions.layout import (
    Coding,
    Edited,
    ReplyTensor,
    UpdateHead,
    pack_update_heads,
    unpack_update_heads,
)


def text(trees):
    """Grows in the middle, as boosted trees do when they are written as JSON."""
    rng = np.random.default_rng(5)
    written = [
        {
            "id": number,
            "split": rng.normal(size=12).tolist(),
            "left": rng.integers(9, size=9).tolist(),
        }
        for number in range(trees)
    ]
    whole = {"count": trees, "trees": written, "objective": {"name": "binary:logistic" * 5}}
    return np.frombuffer(json.dumps(whole).encode(), np.uint8)


def model(counter, **arrays):
    return PublishedModel({name: RawTensor(array) for name, array in arrays.items()}, counter)


def test_what_was_added_is_all_that_travels():
    held, new = model(1, trees=text(40)), model(2, trees=text(42))
    payload = encode_delta(held, new)
    assert decode_model(payload, held=held).digest == new.digest
    added = new["trees"].values.size - held["trees"].values.size
    assert len(payload) < added
    assert len(payload) * 5 < len(encode_keyframe(new))
    assert measure_payload(payload, held=held).tensors.keys() == {"trees"}


def test_a_string_alone_takes_no_more_than_an_archiver_makes_of_it():
    assert len(encode({"trees": text(40)})) <= len(zlib.compress(text(40).tobytes(), 9)) + 20


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (text(3), text(40)),
        (text(40), text(3)),
        (text(40), text(40)[1:]),
        (text(40), np.roll(text(40), 1000)),
        (text(40), text(40)),
        (np.zeros(0, np.uint8), text(3)),
        (text(3), np.zeros(0, np.uint8)),
        (text(3), np.arange(256, dtype=np.uint8).repeat(20)),
        (np.zeros(5000, np.uint8), np.zeros(5001, np.uint8)),
        (text(3)[:LEAST_COPY], text(3)),
    ],
    ids=["longer", "shorter", "one less", "turned", "same", "from empty", "to empty", "another",
         "zeros", "shortest"],
)  # fmt: skip
def test_deltas_are_exact(before, after):
    beside = np.arange(30, dtype=np.float32)
    held, new = model(1, a=before, b=beside), model(2, a=after, b=beside * 2)
    payload = encode_delta(held, new)
    found = decode_model(payload, held=held)
    assert found.digest == new.digest
    assert found["a"].values.tobytes() == after.tobytes()


def test_bytes_that_change_at_their_places_are_no_edit():
    before = np.random.default_rng(0).integers(0, 256, 4000).astype(np.uint8)
    after = before.copy()
    after[::50] += 200  # wraps
    held, new = model(1, a=before), model(2, a=after)
    payload = encode_delta(held, new)
    assert frame.unpack(payload, stream=None).layout == b""
    assert decode_model(payload, held=held).digest == new.digest


@pytest.mark.parametrize("array", [np.zeros((50, 50), np.uint8), np.zeros(2000, np.int8)])
def test_other_shapes_and_dtypes_are_no_strings(array):
    held, new = model(1, a=text(4)), model(2, a=array)
    for one, other in ((held, new), (new, held)):
        payload = encode_delta(one, other)
        assert frame.unpack(payload, stream=None).layout[0] == 4
        assert decode_model(payload, held=one).digest == other.digest


@given(st.lists(st.tuples(st.integers(0, 900), st.binary(max_size=80)), max_size=6))
def test_edits_of_any_kind(cuts):
    before = text(3).tobytes()
    after = b"".join(before[at : at + 300] + more for at, more in cuts)
    held, new = (np.frombuffer(b, np.uint8) for b in (before, after))
    edits = find_edits(held, new)
    if edits is not None:
        assert apply_edits(held, edits, len(after)).tobytes() == after


@pytest.mark.parametrize(
    ("literals", "copies", "size"),
    [
        (4, [[0, -1, 40]], 44),
        (4, [[0, 990, 40]], 44),
        (4, [[-1, 0, 40]], 44),
        (4, [[5, 0, 40]], 44),
        (4, [[0, 0, LEAST_COPY - 1]], LEAST_COPY + 3),
        (4, [[0, 0, 40]], 43),
        (4, [[0, 0, 40], [0, 2**31 - 1, 40]], 84),
        (4, [[0, 0, 2**31 - 1]], 44),
    ],
)
def test_edits_that_cannot_be_are_refused(literals, copies, size):
    edits = ByteEdits(np.zeros(literals, np.uint8), np.array(copies, np.int32))
    with pytest.raises(BadPayload, match="edits of a string"):
        apply_edits(np.zeros(1000, np.uint8), edits, size)


def hostile(held, size, literals, copies):
    """A delta whose layout says what it likes."""
    body = {"a": np.zeros(literals, np.uint8), "a\0copies": np.zeros((copies, 3), np.int32)}
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in body.items()}
    return frame.pack(
        *(frame.Kind.DELTA, b"", 2, bytes(32)),
        base=held.digest,
        layout=b"\x10" + struct.pack("<3I", size, literals, copies),
        body=encode(body, context=Context(layout=specs)),
    )


def test_a_layout_of_edits_allocates_no_more_than_the_limits_allow():
    held = model(1, a=text(3))
    with pytest.raises(TooLarge):
        decode_model(hostile(held, 2**32 - 1, 0, 1), held=held, limits=model_limits(10_000))
    for size, literals, copies in ((10, 11, 0), (1000, 1000, 1), (1000, 0, 32)):
        with pytest.raises(BadPayload, match="more edits"):
            decode_model(hostile(held, size, literals, copies), held=held)
    with pytest.raises(BadPayload, match="edits of a string"):
        decode_model(hostile(held, 1000, 10, 2), held=held)
    numbers = model(1, a=np.zeros(100, np.int8))
    with pytest.raises(BadPayload, match="a delta cannot make this change"):
        decode_model(hostile(numbers, 100, 10, 2), held=numbers)


def test_a_tensor_of_the_name_of_its_neighbours_edits_is_refused():
    text = TensorSpec(np.dtype(np.uint8), (100,))
    heads = {
        "x": UpdateHead(Coding.EDITED, 0.0, ReplyTensor(text), Edited("model", 36, 1)),
        "x\0copies": UpdateHead(
            Coding.EXACT, 0.0, ReplyTensor(TensorSpec(np.dtype(np.float32), (2,)))
        ),
    }
    base = {"model": text}
    with pytest.raises(BadPayload, match="the name of its edits"):
        unpack_update_heads(pack_update_heads(heads, base), base)
    del heads["x\0copies"]
    assert unpack_update_heads(pack_update_heads(heads, base), base) == heads


@pytest.mark.parametrize(
    "copies", [np.zeros(3, np.int32), np.zeros((1, 2), np.int32), np.zeros((1, 3), np.float32)]
)
def test_what_is_no_table_of_copies_is_refused(copies):
    with pytest.raises(BadPayload, match="no table of copies"):
        apply_edits(np.zeros(100, np.uint8), ByteEdits(np.zeros(0, np.uint8), copies), 36)

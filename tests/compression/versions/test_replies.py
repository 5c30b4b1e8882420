"""Updates whose tensors are not the version's: their layout, and what a reader makes of it."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunecast.compression.codec import Limits, TensorSpec, encode
from prunecast.compression.versions import (
    NOTHING_SENT,
    BadPayload,
    Coding,
    InvalidModel,
    LatticeTensor,
    PublishedModel,
    QuantisedTensor,
    RawTensor,
    ReplyTensor,
    UpdateReader,
    VersionsError,
    allowed_beside,
    decode_update,
    encode_update,
    updates,
)
from prunecast.compression.versions.frame import Kind, pack, unpack
from prunecast.compression.versions.layout import (
    Edited,
    UpdateHead,
    pack_update_heads,
    unpack_update_heads,
)

F4, F8, I8 = np.dtype("f4"), np.dtype("f8"), np.dtype("i8")


def base_of():
    q = np.random.default_rng(1).integers(-9, 10, (20, 10))
    return PublishedModel(
        {
            "w": LatticeTensor(q, 0.25, True),
            "b": LatticeTensor(np.arange(-5, 5), 0.5),
            "n": RawTensor(np.array(7.0)),
            "flags": RawTensor(np.array([True, False])),
        },
        3,
    )


def like(name, dtype=None):
    spec = base_of().specs[name]
    return ReplyTensor(TensorSpec(dtype or spec.dtype, spec.shape), name)


def beside(dtype, *shape):
    return ReplyTensor(TensorSpec(np.dtype(dtype), shape))


def test_a_record_as_it_was_sent_needs_no_table():
    base = base_of()
    z = np.ones(10, np.int32)
    heads = {n: UpdateHead(Coding.UNCHANGED, 0.0, like(n)) for n in base}
    heads["b"] = UpdateHead(Coding.QUANTISED, 0.5, like("b"))
    assert pack_update_heads(heads, base.specs) == b"\0\1\0\0" + struct.pack("<f", 0.5)
    payload = encode_update(base, {"b": QuantisedTensor(z, 0.5)})
    explicit = encode_update(
        base, {"b": QuantisedTensor(z, 0.5)}, tensors={n: like(n) for n in base}
    )
    assert payload == explicit


def test_names_order_dtypes_and_shapes_of_the_reply_come_back():
    base = base_of()
    rng = np.random.default_rng(0)
    tensors = {
        "text": ReplyTensor(None),
        "b": like("b", F8),
        "other name": like("w"),
        "n": like("n", I8),
        "logits": beside("f2", 30, 4),
        "table": beside("u1", 3),
        "silent": beside("f4", 9, 9),
        "more text": ReplyTensor(None),
    }
    values = rng.integers(-3, 4, (20, 10)).astype(np.int32)
    logits = rng.integers(-3, 4, (30, 4)).astype(np.int32)
    changes = {
        "b": QuantisedTensor(np.full(10, 2, np.int32), 0.25),
        "other name": QuantisedTensor(values, 0.125, True),
        "n": np.array(9),
        "logits": QuantisedTensor(logits, 0.5, True),
        "table": np.array([1, 2, 255], np.uint8),
    }
    payload = encode_update(base, changes, stream=b"s", tensors=tensors)
    update = decode_update(payload, base, stream=b"s")
    assert update.tensors == tensors
    assert list(update.tensors) == list(tensors)
    assert not update.is_as_sent
    master = {n: a + a.dtype.type(1) for n, a in base.arrays().items() if a.dtype.kind == "f"}
    update.verify(master)
    got = {
        n: update.apply(n, update.start(n, master))
        for n, tensor in tensors.items()
        if tensor.spec is not None
    }
    assert {n: TensorSpec(a.dtype, a.shape) for n, a in got.items()} == {
        n: t.spec for n, t in tensors.items() if t.spec is not None
    }
    assert np.array_equal(got["b"], master["b"] + 0.5)
    assert np.array_equal(got["other name"], values * 0.125)  # off the mask as well
    assert got["n"] == 9
    assert np.array_equal(got["logits"], logits * 0.5)
    assert got["table"].tolist() == [1, 2, 255]
    assert not got["silent"].any()
    assert [update.coding(n) for n in ("text", "silent")] == [Coding.VERBATIM, Coding.ZERO]


@pytest.mark.parametrize(
    ("held", "dtype", "value"),
    [
        ("f8", "i8", 10), ("f8", "i8", -(2**63)), ("f8", "u8", 2**64 - 1), ("f8", "i1", 5),
        ("i8", "f8", 10.5), ("i8", "i4", -3), ("f4", "f8", 1.1), ("f8", "f4", 7.0),
        ("f8", "f2", np.inf), ("f8", "b", True), ("b", "i8", 3), ("u8", "i8", -1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("before", [7.0, 2.5, 1e300, -1e300, np.nan, np.inf])
def test_exact_arrays_of_another_dtype_come_bit_for_bit(held, dtype, value, before):
    with np.errstate(invalid="ignore", over="ignore"):
        was = np.array([before, 1]).astype(held)
        new = np.array([value, 1]).astype(dtype)
    base = PublishedModel({"x": RawTensor(was)}, 1)
    tensors = {"x": ReplyTensor(TensorSpec(new.dtype, new.shape), "x")}
    update = decode_update(encode_update(base, {"x": new}, tensors=tensors), base)
    got = update.apply("x", was)
    assert (got.dtype, got.tobytes()) == (new.dtype, new.tobytes())


def test_a_counter_that_was_averaged_into_floats_costs_next_to_nothing():
    base = PublishedModel({"x": RawTensor(np.arange(1000.0))}, 1)
    new = np.arange(1000) + 3
    tensors = {"x": ReplyTensor(TensorSpec(new.dtype, new.shape), "x")}
    assert len(encode_update(base, {"x": new}, tensors=tensors)) < 150


@pytest.mark.parametrize(
    ("change", "tensor", "says"),
    [
        (QuantisedTensor(np.ones(10, np.int32), 1.0), beside("f4", 10), "losslessly"),
        (QuantisedTensor(np.ones(10, np.int32), 1.0, True), beside("i4", 10), "int32"),
        (QuantisedTensor(np.ones(9, np.int32), 1.0, True), beside("f4", 10), "shape"),
        (np.ones(10), beside("f4", 10), "float64"),
        (np.ones(10), ReplyTensor(None), "beside"),
    ],
)
def test_what_does_not_fit_its_description_is_refused(change, tensor, says):
    with pytest.raises(InvalidModel, match=says):
        encode_update(base_of(), {"x": change}, tensors={"x": tensor})


# -- what a reader refuses ------------------------------------------------------------------------


def forged(heads, base, body=b""):
    layout = heads if isinstance(heads, bytes) else pack_update_heads(heads, base.specs)
    return pack(Kind.UPDATE, b"", 3, base.digest, base=base.digest, layout=layout, body=body)


@pytest.mark.parametrize(
    "shape",
    [(2**28,), (2**63 - 1,), (2**40, 2**40), (0, 2**62, 2**62), (2**62, 0), (1,) * 30 + (2**33,)],
)
@pytest.mark.parametrize("coding", [Coding.EXACT, Coding.VALUES, Coding.ZERO])
def test_a_few_bytes_cannot_state_gigabytes(shape, coding, monkeypatch):
    base = base_of()
    step = 1.0 if coding is Coding.VALUES else 0.0
    payload = forged({"x": UpdateHead(coding, step, beside("f4", *shape))}, base)
    monkeypatch.setattr(UpdateReader, "context", None)  # nothing is looked at before
    with pytest.raises(BadPayload, match="above the limits"):
        decode_update(payload, base)


def test_what_was_sent_allows_as_much_beside_it():
    tensors = {"x": beside("f4", 2**20)}
    payload = encode_update(NOTHING_SENT, {}, tensors=tensors)
    allowed = allowed_beside(0, len(payload))
    assert allowed < 4 * 2**20
    with pytest.raises(BadPayload, match="above the limits"):
        UpdateReader(NOTHING_SENT).read(payload)
    update = UpdateReader(NOTHING_SENT, sent=4 * 2**20).read(payload)
    assert update.apply("x", update.start("x", {})).nbytes == 4 * 2**20
    assert update.start("x", {}).base.nbytes == 4  # zeros take no memory before
    with pytest.raises(BadPayload, match="above the limits"):
        UpdateReader(NOTHING_SENT, sent=2**30, limits=Limits(decoded_bytes=2**20)).read(payload)


def test_limits_of_the_decoder_follow_from_what_was_sent(monkeypatch):
    """A version of 3 GiB may be answered; a few bytes cannot state more than was sent."""
    asked = []
    open_payload = updates.open_payload
    monkeypatch.setattr(
        updates,
        "open_payload",
        lambda body, context, limits: (
            asked.append(limits) or open_payload(body, context=context, limits=limits)
        ),
    )
    base = base_of()
    payload = encode_update(base, {})
    UpdateReader(base).read(payload)
    UpdateReader(base, sent=3 << 30).read(payload)
    assert asked[0].free_bytes < 1.1 * 2**20
    assert asked[1].decoded_bytes >= asked[1].free_bytes > 3 << 30
    assert asked[1].elements > 3 << 28


# -- strings of bytes ---------------------------------------------------------------------------


def trees(number):
    """Text that no archiver makes much of, and a little more of it with every tree."""
    rng = np.random.default_rng(5)
    return np.frombuffer(b"[" + b",".join(rng.bytes(300) for _ in range(number)) + b"]", np.uint8)


def bytes_of(*numbers):
    return PublishedModel({f"{n}": RawTensor(trees(n)) for n in numbers}, 3)


@pytest.mark.parametrize("name", ["8", "somebody's own"])
def test_bytes_that_were_sent_are_not_sent_back(name):
    """What was added to them is, under the same name or as a record of its own."""
    base, grown = bytes_of(8), trees(10)
    tensors = {name: ReplyTensor(TensorSpec(np.dtype("u1"), grown.shape))}
    payload = encode_update(base, {name: grown}, tensors=tensors)
    update = decode_update(payload, base)
    assert update.coding(name) is Coding.EDITED
    assert (
        600 < len(payload) < 900 < len(encode_update(NOTHING_SENT, {name: grown}, tensors=tensors))
    )
    update.verify({})
    assert update.apply(name, update.start(name, {})).tobytes() == grown.tobytes()


@pytest.mark.parametrize("new", [np.zeros(4000, "u1"), np.arange(40, dtype="u1"), trees(0)])
def test_where_edits_do_not_pay_bytes_are_coded_alone(new):
    base = bytes_of(8)
    tensors = {"8": ReplyTensor(TensorSpec(np.dtype("u1"), new.shape))}
    payload = encode_update(base, {"8": new}, tensors=tensors)
    update = decode_update(payload, base)
    assert update.coding("8") is Coding.EXACT
    assert update.apply("8", update.start("8", {})).tobytes() == new.tobytes()


def test_of_several_each_is_edited_from_its_own():
    base = bytes_of(6, 7)
    changes = {"7": trees(9), "6": trees(8)}
    tensors = {n: ReplyTensor(TensorSpec(np.dtype("u1"), a.shape)) for n, a in changes.items()}
    update = decode_update(encode_update(base, changes, tensors=tensors), base)
    assert [update.coding(name) for name in changes] == [Coding.EDITED] * 2
    for name, array in changes.items():
        assert update.apply(name, update.start(name, {})).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    ("of", "spec", "literals", "copies", "says"),
    [
        ("w", beside("u1", 99), 10, 1, "no vector of bytes"),
        ("8", beside("u1", 9, 9), 10, 1, "no vector of bytes"),
        ("8", beside("i1", 99), 10, 1, "no vector of bytes"),
        ("8", beside("u1", 99), 68, 1, "more than it has"),
        ("8", beside("u1", 99), 2**63, 2**31, "more than it has"),
        ("8", beside("u1", 2**30), 10, 1, "above the limits"),
        ("8", beside("u1", 99), 10, 1, "cannot be decoded"),
    ],
)
def test_edits_that_cannot_be_are_refused(of, spec, literals, copies, says):
    base = PublishedModel({"w": RawTensor(np.zeros(99)), "8": RawTensor(trees(8))}, 3)
    head = UpdateHead(Coding.EDITED, 0.0, spec, Edited(of, literals, copies))
    with pytest.raises(BadPayload, match=says):
        decode_update(forged({"x": head}, base), base)


@pytest.mark.parametrize("copy", [(11, 0, 89), (0, 2420, 90), (0, -1, 90), (-1, 0, 90), (0, 0, 31)])
def test_copies_of_what_is_not_there_are_refused(copy):
    base = bytes_of(8)
    head = UpdateHead(Coding.EDITED, 0.0, beside("u1", 100), Edited("8", 10, 1))
    values = {"x": np.zeros(10, "u1"), "x\0copies": np.array([copy], np.int32)}
    body = encode(values, context=UpdateReader(base).context({"x": head}))
    update = decode_update(forged({"x": head}, base, body), base)
    with pytest.raises(BadPayload, match="edits of a string"):
        update.verify({})


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        (b"\xff\1\0\0\0\6\0\0\0\0", "unknown update coding"),
        ({"w": UpdateHead(Coding.VALUES, 1.0, beside("i8", 3))}, "floating point"),
        ({"w": UpdateHead(Coding.QUANTISED, 1.0, like("n"))}, "losslessly"),
        ({"w": UpdateHead(Coding.UNCHANGED, 0.0, like("b", I8))}, "floating point"),
        (b"\6\0\0\0", "unknown update coding"),
        (b"\5\0\0\0", "unknown update coding"),
        (b"\xff\1\0\0\0\0\4\0\0\0", "not sent"),
        (b"\xff\1\0\0\0\x40\0\0\0\0", "not sent"),
        (b"\xff\1\0\0\0\x18\1\0x\0\0", "not sent"),
        (b"\xff\1\0\0\0\x08\1\0x\0\0", "change of nothing"),
        (b"\xff\1\0\0\0\x0a\1\0x\x0c\0", "unknown dtype"),
        (b"\xff\1\0\0\0\x0a\1\0\xff\0\0", "UTF-8"),
        (b"\xff\2\0\0\0\0\1\0\0\0\0\1\0\0\0", "twice"),
        (b"\xff\2\0\0\0\0\1\0\0\0\x10\1\0\0\0\1\0x", "not the first of 'b'"),
        (b"\xff\1\0\0\0\0\1\0\0\0x", "trailing"),
        (b"\xff\xff\xff\xff\xff", "too early"),
    ],
)
def test_layouts_that_are_refused(heads, says):
    base = base_of()
    with pytest.raises(BadPayload, match=says):
        decode_update(forged(heads, base), base)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80), st.booleans())
def test_hostile_tables_raise_only_our_errors(data, table):
    base = base_of()
    try:
        heads = unpack_update_heads(b"\xff" * table + data, base.specs)
    except BadPayload:
        return
    assert unpack_update_heads(pack_update_heads(heads, base.specs), base.specs) == heads
    with pytest.raises(VersionsError):
        decode_update(forged(b"\xff" * table + data, base), base)


def test_every_truncation_and_flip_of_a_reply_is_refused():
    base = base_of()
    tensors = {"x": beside("f4", 5), "b": like("b", F8), "text": ReplyTensor(None)}
    changes = {
        "x": np.arange(5, dtype=np.float32),
        "b": QuantisedTensor(np.ones(10, np.int32), 0.5, True),
    }
    payload = encode_update(base, changes, tensors=tensors)
    for cut in range(len(payload)):
        with pytest.raises(VersionsError):
            decode_update(payload[:cut], base)
        damaged = bytearray(payload)
        damaged[cut] ^= 0x20
        with pytest.raises(VersionsError):
            decode_update(bytes(damaged), base)


def test_a_reader_keeps_nothing_by_names_that_nodes_choose():
    base = base_of()
    reader = UpdateReader(base)
    for number in range(50):
        change = QuantisedTensor(np.ones(10, np.int32), 0.5)
        tensors = {f"x{number}": like("b"), f"y{number}": beside("f4", 2000)}
        extra = QuantisedTensor(np.ones(2000, np.int32), 0.5, True)
        changes = {f"x{number}": change, f"y{number}": extra}
        update = reader.read(encode_update(base, changes, tensors=tensors))
        update.verify(base.arrays())
    assert not reader._derived
    reader.read(encode_update(base, {"b": change})).verify(base.arrays())
    assert set(reader._derived) == {"b"}


# -- what may be non-finite -----------------------------------------------------------------------


def verify(was, new, **options):
    base = PublishedModel({"x": was}, 1)
    update = decode_update(encode_update(base, {"x": new}), base)
    update.verify(base.arrays(), **options)
    return update.apply("x", base.arrays()["x"])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_only_trained_tensors_must_stay_finite(value):
    finite, odd = np.zeros(3, np.float32), np.array([0, value, 1], np.float32)
    assert verify(RawTensor(odd), odd).tobytes() == odd.tobytes()
    assert verify(RawTensor(odd), odd[::-1].copy()).tobytes() == odd[::-1].tobytes()
    assert verify(RawTensor(finite), odd, trained=lambda name: False).tobytes() == odd.tobytes()
    with pytest.raises(BadPayload, match="'x' makes NaN or infinity"):
        verify(RawTensor(finite), odd)
    for trained in (True, False):
        with pytest.raises(BadPayload, match="'x' makes NaN or infinity"):
            verify(LatticeTensor(np.arange(3), 1.0), odd, trained=lambda name, t=trained: t)


def test_values_that_leave_their_dtype_are_refused():
    base = base_of()
    for dtype, step, fits in ((F4, 1e38, True), (F4, 3e38, False), ("f2", 3e4, False)):
        tensors = {"x": like("b", np.dtype(dtype))}
        change = QuantisedTensor(np.full(10, 3, np.int32), step, True)
        update = decode_update(encode_update(base, {"x": change}, tensors=tensors), base)
        if fits:
            update.verify(base.arrays())
        else:
            with pytest.raises(BadPayload, match="'x' makes NaN or infinity"):
                update.verify(base.arrays())


def test_the_layout_is_compressed_once_more_by_the_frame():
    base = PublishedModel({f"layer.{i}.w": LatticeTensor(np.arange(9), 0.5) for i in range(99)}, 1)
    tensors = {n: ReplyTensor(TensorSpec(F8, (9,)), n) for n in base}
    frame = unpack(encode_update(base, {}, tensors=tensors), stream=b"")
    assert len(zlib.compress(frame.layout, 9)) < 350

"""Whatever the bytes, the decoder answers with tensors or with a CodecError, within its limits."""

from __future__ import annotations

import tracemalloc
import zlib
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunecast.compression.codec import (
    CodecError,
    Context,
    ContextMismatch,
    LimitExceeded,
    Limits,
    MalformedPayload,
    MaskViolation,
    TensorMismatch,
    TensorSpec,
    TruncatedPayload,
    UnsupportedDtype,
    UnsupportedShape,
    decode,
    encode,
    encoder,
    open_payload,
)

TIGHT = Limits(elements=1 << 18, decoded_bytes=1 << 20, levels=1 << 12, serial_symbols=1 << 15)


def reseal(payload: bytes) -> bytes:
    return payload[:-4] + zlib.crc32(payload[:-4]).to_bytes(4, "little")


def samples() -> list[tuple[bytes, Context]]:
    rng = np.random.default_rng(11)
    big = np.rint(rng.laplace(size=(120, 250)) * np.exp(rng.normal(size=(120, 1)))).astype("i4")
    sparse = (big * (rng.random(big.shape) < 0.05)).astype("i4")
    smooth = np.rint(np.cumsum(rng.normal(size=(100, 300)), 1)).astype("i2")
    floats = {"f": (rng.normal(size=(30, 40)) * 0.1).astype("f4"), "s": np.float64(1.5)}
    spec = {"w": TensorSpec(np.dtype("i4"), sparse.shape)}
    mask = rng.random(big.shape) < 0.3
    contexts: list[tuple[dict[str, Any], Context]] = [
        ({"w": big}, Context()),
        ({"w": sparse}, Context(layout=spec)),
        ({"w": smooth, "v": smooth[0]}, Context()),
        (floats, Context()),
        ({"w": sparse}, Context(layout=spec, previous={"w": big})),
        ({"w": (sparse * mask).astype("i4")}, Context(mask={"w": mask})),
        ({"tiny": np.arange(6, dtype="u1"), "wide": rng.integers(-(2**62), 2**62, 9)}, Context()),
    ]
    payloads = [(encode(t, context=c), c) for t, c in contexts]
    with mock.patch.object(encoder, "_SERIAL_SYMBOLS", 0):  # with lanes, though small
        payloads += [(encode(t, context=c), c) for t, c in contexts]
    return payloads


SAMPLES = samples()


def expect_tensors_or_error(payload: bytes, context: Context) -> None:
    try:
        opened = open_payload(payload, context=context, limits=TIGHT)
    except CodecError:
        return
    for name, spec in opened.specs.items():
        try:
            value = opened[name]
        except CodecError:
            continue
        assert value.shape == spec.shape
        assert value.dtype == spec.dtype
    again = open_payload(payload, context=context, limits=TIGHT)
    for name, spec in again.specs.items():
        try:
            at, values = again.nonzeros(name)
        except CodecError:
            continue
        assert len(at) == len(values) <= spec.size
        assert values.dtype == spec.dtype


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_payloads(data: st.DataObject) -> None:
    payload, context = data.draw(st.sampled_from(SAMPLES))
    mutated = bytearray(payload)
    # Most positions near the start: there lie the lengths and the side information.
    near = st.integers(6, min(len(payload) - 5, 200))
    anywhere = st.integers(6, len(payload) - 5)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(near | anywhere)] = data.draw(st.integers(0, 255))
    expect_tensors_or_error(reseal(bytes(mutated)), context)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([0, 1, 2, 3]))
def test_arbitrary_heads(head: bytes, tail: int) -> None:
    body = bytes([len(head) & 127 | 128, len(head) >> 7]) if len(head) > 127 else bytes([len(head)])
    body += head + bytes(tail)
    total = 6 + 2 + len(body) + 4
    payload = b"PCC\x01\x00\x00" + bytes([total & 127 | 128, total >> 7]) + body + bytes(4)
    if total > 127:
        expect_tensors_or_error(reseal(payload), Context())
    else:
        payload = b"PCC\x01\x00\x00" + bytes([total - 1]) + body + bytes(4)
        expect_tensors_or_error(reseal(payload), Context())


@given(st.binary(max_size=64))
@settings(max_examples=200, deadline=None)
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_every_truncation_is_refused(index: int) -> None:
    payload, context = SAMPLES[index]
    cuts = {*range(min(len(payload), 120)), *range(0, len(payload), 97), len(payload) - 1}
    for cut in cuts:
        with pytest.raises(CodecError):
            decode(payload[:cut], context=context)
    with pytest.raises(TruncatedPayload):
        decode(payload + b"\0", context=context)


def test_a_huge_claim_is_refused_before_allocating() -> None:
    zeros = np.zeros((1 << 13, 1 << 13), np.int8)
    payload = encode({"zeros": zeros})
    assert len(payload) < 100
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded, match="expansion"):
            open_payload(payload)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    layout = {"zeros": TensorSpec(zeros.dtype, zeros.shape)}
    trusted = encode({"zeros": zeros}, context=Context(layout=layout))
    assert not decode(trusted, context=Context(layout=layout))["zeros"].any()


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("payload_bytes", 20),
        ("tensors", 1),
        ("name_bytes", 3),
        ("dimensions", 1),
        ("elements", 1000),
        ("decoded_bytes", 1000),
        ("levels", 10),
        ("lanes", 1),
        ("segments", 1),
        ("all_name_bytes", 5),
        ("table_slots", 1 << 9),
        ("steps", 20),
    ],
)
def test_each_limit_is_named(limit: str, value: int) -> None:
    rng = np.random.default_rng(1)
    w = rng.laplace(size=(200, 300)) * np.exp(rng.normal(size=(200, 1)) * 2)
    tensors = {"first": np.rint(w * 5).astype(np.int32), "second": np.ones(5, np.int8)}
    payload = encode(tensors)
    with pytest.raises(LimitExceeded, match=limit):
        decode(payload, limits=Limits(**{limit: value}))


def test_serial_symbols_limit() -> None:
    payload = encode({"w": np.arange(100)})
    with pytest.raises(LimitExceeded, match="serial_symbols"):
        decode(payload, limits=Limits(serial_symbols=50))


def test_a_failed_serial_read_is_not_resumed() -> None:
    payload = encode({"a": np.arange(100), "b": np.arange(50)})
    opened = open_payload(payload, limits=Limits(serial_symbols=50))
    with pytest.raises(LimitExceeded):
        opened["a"]
    with pytest.raises(MalformedPayload):
        opened["b"]


def test_context_is_bound() -> None:
    w = np.arange(-10, 10).reshape(4, 5)
    layout = {"w": TensorSpec(w.dtype, w.shape)}
    payload = encode({"w": w}, context=Context(layout=layout, previous={"w": w}))
    other = w.copy()
    other[0, 0] += 1
    for context in (
        None,
        Context(layout=layout),
        Context(layout=layout, previous={"w": other}),
        Context(layout={"v": layout["w"]}, previous={"w": w}),
    ):
        with pytest.raises(ContextMismatch):
            decode(payload, context=context)


def test_encode_refuses_what_contradicts_the_context() -> None:
    w = np.ones((2, 3), np.int32)
    with pytest.raises(MaskViolation, match="'w'"):
        encode({"w": w}, context=Context(mask={"w": np.zeros((2, 3), bool)}))
    with pytest.raises(MaskViolation):
        encode({"w": -0.0 * w.astype("f4")}, context=Context(mask={"w": np.zeros((2, 3), bool)}))
    for context in (
        Context(mask={"w": np.ones(3, bool)}),
        Context(mask={"w": np.ones((2, 3), "i1")}),  # type: ignore[dict-item]
        Context(previous={"w": np.ones(6, "i4")}),
        Context(previous={"w": np.ones((2, 3), "f4")}),
        Context(layout={"w": TensorSpec(w.dtype, (3, 2))}),
        Context(layout={"w": TensorSpec(np.dtype("i2"), (2, 3))}),
        Context(layout={"v": TensorSpec(w.dtype, (2, 3))}),
    ):
        with pytest.raises(TensorMismatch):
            encode({"w": w}, context=context)
    for value in (np.array([1j]), np.array(["x"]), np.array([None]), np.array([1], "M8[s]")):
        with pytest.raises(UnsupportedDtype, match="'w'"):
            encode({"w": value})
    deep = {"w": np.ones((1,) * 33, np.int8)}
    with pytest.raises(UnsupportedShape, match="'w' has 33 dimensions"):
        encode(deep)
    layout = Context(layout={"w": TensorSpec(deep["w"].dtype, deep["w"].shape)})
    assert decode(encode(deep, context=layout), context=layout)["w"].shape == (1,) * 33


def test_tensors_are_decoded_one_at_a_time() -> None:
    rng = np.random.default_rng(2)
    tensors = {f"t{i}": rng.integers(-8, 9, (300, 500)).astype("i4") for i in range(6)}
    payload = bytearray(encode(tensors))
    # Damage the last segment: the tensors before it must still come out.
    payload[-40] ^= 255
    opened = open_payload(reseal(bytes(payload)))
    assert opened.specs["t3"] == TensorSpec(np.dtype("i4"), (300, 500))
    assert (opened["t2"] == tensors["t2"]).all()
    with pytest.raises(MalformedPayload):
        opened["t5"]

"""Whatever the bytes, a decoder answers with tensors or with a CodecError, within its limits."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prunecast.compression.codec import (
    ChecksumMismatch,
    CodecError,
    LimitExceeded,
    Limits,
    MalformedPayload,
    NotAPayload,
    TruncatedPayload,
    UnsupportedVersion,
)
from prunecast.compression.schemes import StateError
from prunecast.compression.schemes.container import NAMES, seal
from prunecast.compression.schemes.dense import majority_vote
from prunecast.compression.schemes.layout import layout_of, pack_state, unpack_state
from prunecast.compression.schemes.registry import SCHEMES, decode_payload, inspect, scheme

TIGHT = Limits(
    elements=1 << 16, decoded_bytes=1 << 18, levels=1 << 12, serial_symbols=1 << 15, lanes=64
)
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("topk", {"density": 0.1}),
    ("topk", {"density": 0.1, "value_bits": 8, "scope": "payload"}),
    ("stc", {"density": 0.1}),
    ("stc", {"density": 0.5, "scope": "tensor"}),
    ("qsgd", {"levels": 2, "bucket": 100, "elias": "sparse"}),
    ("qsgd", {"levels": 40, "bucket": 0, "elias": "dense"}),
    ("signsgd", {}),
    ("int8", {}),
    ("int4", {}),
    ("fp16", {}),
]


def samples() -> list[bytes]:
    rng = np.random.default_rng(11)
    tensors = {
        "w": rng.laplace(size=(30, 41)).astype("f4"),
        "b": rng.normal(size=7).astype("f4"),
        "s": np.float32(1).reshape(()),
    }
    payloads = []
    for name, options in CONFIGS:
        for coding in ("paper", "prunecast"):
            one = scheme(name, coding=coding, **options)
            payloads.append(one.encode(tensors, one.init(layout_of(tensors)), key=3)[0])
    return payloads


SAMPLES = samples()


def reseal(payload: bytes) -> bytes:
    return payload[:-4] + zlib.crc32(payload[:-4]).to_bytes(4, "little")


def expect_tensors_or_error(payload: bytes) -> None:
    try:
        info = inspect(payload, limits=TIGHT)
        tensors = decode_payload(payload, limits=TIGHT)
    except CodecError:
        return
    assert layout_of(tensors) == info.layout
    for tensor in tensors.values():
        assert tensor.dtype == np.float32
        assert np.isfinite(tensor).all()


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_payloads(data: st.DataObject) -> None:
    payload = data.draw(st.sampled_from(SAMPLES))
    mutated = bytearray(payload)
    # Most positions in the layout and at the body's start: there lie the counts and lengths.
    near = st.integers(24, min(len(payload) - 5, 140))
    anywhere = st.integers(5, len(payload) - 5)
    for _ in range(data.draw(st.integers(1, 4))):
        mutated[data.draw(near | anywhere)] = data.draw(
            st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255)
        )
    expect_tensors_or_error(reseal(bytes(mutated)))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 8),
    st.sampled_from(["paper", "prunecast"]),
    st.lists(st.integers(0, 40), max_size=3),
    st.binary(max_size=120),
)
def test_arbitrary_bodies(number: int, coding: str, shape: list[int], body: bytes) -> None:
    layout = {"w": tuple(shape), "v": (3,)}
    payload = bytearray(seal("topk", coding, layout, body))
    payload[5] = number
    expect_tensors_or_error(reseal(bytes(payload)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_longer_and_shorter_bodies(data: st.DataObject) -> None:
    payload = data.draw(st.sampled_from(SAMPLES))
    cut = data.draw(st.integers(1, 40))
    shorter = payload[: -4 - cut] + payload[-4:] if data.draw(st.booleans()) else None
    changed = shorter or payload[:-4] + bytes(
        data.draw(st.binary(min_size=1, max_size=40))
    ) + bytes(4)
    total = struct.pack("<Q", len(changed))
    with pytest.raises(CodecError):
        decode_payload(reseal(changed[:8] + total + changed[16:]), limits=TIGHT)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode_payload(data)


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_every_truncation_is_refused(index: int) -> None:
    payload = SAMPLES[index]
    for cut in {*range(min(len(payload), 150)), *range(0, len(payload), 97), len(payload) - 1}:
        with pytest.raises((TruncatedPayload, NotAPayload)):
            decode_payload(payload[:cut])
    with pytest.raises(TruncatedPayload):
        decode_payload(payload + b"\0")


@pytest.mark.parametrize("index", range(len(SAMPLES)))
def test_every_changed_byte_is_noticed(index: int) -> None:
    payload = SAMPLES[index]
    for at in {*range(min(len(payload), 150)), *range(0, len(payload), 61), len(payload) - 1}:
        changed = bytearray(payload)
        changed[at] ^= 0x10
        with pytest.raises(CodecError) as caught:
            decode_payload(bytes(changed))
        if at >= 24:
            assert caught.type is ChecksumMismatch


@pytest.mark.parametrize(
    ("at", "value", "error"),
    [
        (0, 0, NotAPayload),
        (3, 2, UnsupportedVersion),
        (5, 0, UnsupportedVersion),
        (5, 99, UnsupportedVersion),
        (6, 2, UnsupportedVersion),
        (7, 1, UnsupportedVersion),
        (8, 0, TruncatedPayload),
    ],
)
def test_header_fields(at: int, value: int, error: type[CodecError]) -> None:
    changed = bytearray(SAMPLES[0])
    changed[at] = value
    with pytest.raises(error):
        decode_payload(reseal(bytes(changed)))


def test_a_newer_minor_version_is_read() -> None:
    changed = bytearray(SAMPLES[0])
    changed[4] = 7
    assert set(decode_payload(reseal(bytes(changed)))) == {"w", "b", "s"}


def layout_payload(section: bytes, count: int = 1) -> bytes:
    head = struct.pack("<3sBBBBBQII", b"PCS", 1, 0, 4, 0, 0, 28 + len(section), count, len(section))
    return reseal(head + section + bytes(4))


@pytest.mark.parametrize(
    ("section", "count", "error", "says"),
    [
        (b"\1\0w\1" + struct.pack("<Q", 2**40), 1, LimitExceeded, "elements"),
        (b"\1\0w\2" + struct.pack("<QQ", 2**63, 2**63), 1, LimitExceeded, "shape"),
        (b"\1\0w\2" + struct.pack("<QQ", 2**63, 0), 1, LimitExceeded, "shape"),
        (b"\1\0w\x21" + bytes(8 * 33), 1, LimitExceeded, "dimensions"),
        (b"\1\0w\0\1\0w\0", 2, MalformedPayload, "twice"),
        (b"\2\0\xff\xfe\0", 1, MalformedPayload, "UTF-8"),
        (b"\1\0w\0", 2, MalformedPayload, "announced"),
        (b"\1\0w\0", 0, MalformedPayload, "follow"),
        (b"\xff\xffw\0", 1, LimitExceeded, "name_bytes"),
        (b"\1\0w\0", 2**32 - 1, LimitExceeded, "tensors"),
    ],
)
def test_layouts(section: bytes, count: int, error: type[CodecError], says: str) -> None:
    with pytest.raises(error, match=says):
        decode_payload(layout_payload(section, count))


def test_a_layout_longer_than_the_payload() -> None:
    payload = bytearray(layout_payload(b"\1\0w\0"))
    payload[20] = 255
    with pytest.raises(MalformedPayload):
        decode_payload(reseal(bytes(payload)))


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


ONE = struct.pack("<f", 1)
BODIES: dict[str, tuple[int, str, bytes]] = {
    # name: number of the scheme, coding, body for {"w": (20,)}
    "topk: entries beyond the body": (1, "paper", b"\0\x20" + u64(2**62)),
    "topk: position beyond the tensor": (1, "paper", b"\0\x20" + u64(1) + b"\x14\0" + ONE),
    "topk: ends with a continued run": (1, "paper", b"\0\x20" + u64(1) + b"\xff\xff"),
    "topk: not a number": (1, "paper", b"\0\x20" + u64(1) + b"\0\0" + struct.pack("<f", np.nan)),
    "topk: unknown scope": (1, "paper", b"\2\x20" + u64(0)),
    "topk: unknown bits": (1, "paper", b"\0\x10" + u64(0)),
    "topk: negative scale": (1, "paper", b"\0\x08" + struct.pack("<f", -1) + u64(0)),
    "topk: mask beyond the body": (1, "prunecast", b"\0\x20" + u64(2**62)),
    "stc: more entries than there are": (2, "paper", b"\1" + ONE + u64(21) + b"\0" + u64(0)),
    "stc: bits beyond the body": (2, "paper", b"\1" + ONE + u64(1) + b"\0" + u64(2**63)),
    "stc: divisor": (2, "paper", b"\1" + ONE + u64(1) + b"\x21" + u64(8) + bytes(9)),
    "stc: position beyond the tensor": (
        2, "paper", b"\1" + ONE + u64(1) + b"\4" + u64(1) + b"\xb8" + b"\x80",
    ),
    "stc: bits left over": (2, "paper", b"\1" + ONE + u64(1) + b"\0" + u64(2) + bytes(2) + b"\x80"),
    "stc: signs fill their byte": (2, "paper", b"\1" + ONE + u64(1) + b"\0" + u64(1) + b"\0\xc0"),
    "stc: infinite mean": (2, "paper", b"\1" + struct.pack("<f", np.inf) + u64(0) + b"\0" + u64(0)),
    "stc: no codec payload": (2, "prunecast", b"\1" + ONE + b"zip"),
    "qsgd: no levels": (3, "paper", bytes(8) + b"\0"),
    "qsgd: unknown code": (3, "paper", b"\1\0\0\0" + bytes(4) + b"\2"),
    "qsgd: tiny buckets": (3, "paper", b"\1\0\0\0\1\0\0\0\1" + 20 * ONE + bytes(3)),
    "qsgd: norms beyond the body": (3, "paper", b"\1\0\0\0\x10\0\0\0\1" + ONE),
    "qsgd: level above the highest": (
        3, "paper", b"\1\0\0\0" + bytes(4) + b"\1" + ONE + b"\xff\xff\xff",
    ),
    "qsgd: counts above their bucket": (
        3, "paper", b"\1\0\0\0" + bytes(4) + b"\0" + ONE + u64(2) + b"\xa4\xff",
    ),
    "qsgd: distance beyond the bucket": (
        # one non-zero (Elias(2) = 100), at distance 32 (Elias = 10 101 100000 0)
        3, "paper", b"\1\0\0\0" + bytes(4) + b"\0" + ONE + u64(1) + b"\x80" + b"\xac\x00\x00",
    ),
    "signsgd: too few bits": (4, "paper", ONE + bytes(2)),
    "signsgd: bits fill their byte": (4, "paper", ONE + b"\0\0\1"),
    "int8: above 127": (5, "paper", ONE + b"\x80" + bytes(19)),
    "int4: above 7": (6, "paper", ONE + b"\x08" + bytes(9)),
    "fp16: infinite": (7, "paper", b"\0\x7c" + bytes(38)),
}  # fmt: skip


@pytest.mark.parametrize("case", BODIES)
def test_bodies(case: str) -> None:
    number, coding, body = BODIES[case]
    tracemalloc.start()
    try:
        with pytest.raises(MalformedPayload):
            decode_payload(seal(NAMES[number], coding, {"w": (20,)}, body))
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("coding", ["paper", "prunecast"])
def test_a_huge_claim_is_refused_before_allocating(name: str, coding: str) -> None:
    payload = seal(name, coding, {"w": (1 << 14, 1 << 13)}, bytes(40))
    tracemalloc.start()
    try:
        with pytest.raises(LimitExceeded, match="expansion"):
            decode_payload(payload)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_memory_follows_the_payload_and_the_tensors() -> None:
    """Long runs of ones and many codewords: the work space is a small multiple of both."""
    layout = {"w": (1 << 18,)}
    ones = b"\xff" * (1 << 18)
    golomb = b"\1" + ONE + u64(5) + b"\0" + u64(len(ones)) + ones + b"\0"
    omega = b"\1\0\0\0" + bytes(4) + b"\1" + ONE + ones
    zeros = b"\1\0\0\0" + bytes(4) + b"\1" + ONE + bytes(1 << 18)
    for number, body in ((2, golomb), (3, omega), (3, zeros)):
        tracemalloc.start()
        try:
            with pytest.raises(MalformedPayload):
                decode_payload(seal(NAMES[number], "paper", layout, body))
            assert tracemalloc.get_traced_memory()[1] < 40 << 20
        finally:
            tracemalloc.stop()


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("payload_bytes", 20),
        ("tensors", 2),
        ("name_bytes", 0),
        ("dimensions", 1),
        ("elements", 1000),
        ("decoded_bytes", 1000),
    ],
)
def test_each_limit_is_named(limit: str, value: int) -> None:
    for payload in SAMPLES:
        with pytest.raises(LimitExceeded, match=f"Limits.{limit}"):
            decode_payload(payload, limits=Limits(**{limit: value}))


def test_limits_reach_the_codec() -> None:
    one = scheme("int8", coding="prunecast")
    tensors = {"w": np.random.default_rng(0).laplace(size=(400, 300)).astype("f4")}
    payload, _ = one.encode(tensors, one.init(layout_of(tensors)), key=0)
    with pytest.raises(LimitExceeded, match="lanes"):
        decode_payload(payload, limits=Limits(lanes=1))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_votes(data: st.DataObject) -> None:
    votes = [p for p in SAMPLES if inspect(p).scheme == "signsgd"]
    mutated = bytearray(data.draw(st.sampled_from(votes)))
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(5, len(mutated) - 5))] = data.draw(st.integers(0, 255))
    try:
        answer = majority_vote([votes[0], reseal(bytes(mutated))], key=0, limits=TIGHT)
    except CodecError:
        return
    assert inspect(answer).layout == inspect(votes[0]).layout


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_mutated_states(data: st.DataObject) -> None:
    stc = scheme("stc", density=0.1)
    tensors = {"w": np.random.default_rng(0).normal(size=(9, 9)).astype("f4")}
    start = stc.init(layout_of(tensors))
    stored = pack_state(stc.encode(tensors, start, key=0)[1])
    mutated = bytearray(stored)
    for _ in range(data.draw(st.integers(1, 3))):
        mutated[data.draw(st.integers(0, len(mutated) - 5))] = data.draw(st.integers(0, 255))
    try:
        state = unpack_state(reseal(bytes(mutated)), start)
    except StateError:
        return
    assert layout_of(dict(state.buffers["residual"])) == start.layout

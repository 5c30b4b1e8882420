"""What a payload claims is refused before anything is allocated, or worked off, by it."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from fuzz.writer import HeadWriter
from prunecast.compression.codec import (
    CodecError,
    Context,
    LimitExceeded,
    Limits,
    MalformedPayload,
    TensorSpec,
    decode,
    encode,
    open_payload,
)
from prunecast.compression.codec.container.wire import seal
from prunecast.compression.codec.context import DTYPE_CODES
from prunecast.compression.codec.entropy.streams import LaneStream

Tensors = list[tuple[str, str, tuple[int, ...]]]
ONE_LANE = (1 << 16).to_bytes(4, "little")
MEBIBYTE = 1 << 20


def finish(w: HeadWriter, rest: bytes = b"") -> bytes:
    return seal(Context(), w.coder.finish(), rest)


def constants(tensors: Tensors) -> bytes:
    """A payload of a few bytes in which every tensor is constant."""
    w = HeadWriter()
    w.layout(tensors)
    w.coding(serial=True)
    for _, dtype, _ in tensors:
        for _ in range(int(dtype[5:]) // 8 if dtype.startswith("float") else 1):
            w.uint("mode", 0)
            w.sint("centre", 1)
    w.uint("general", 4)
    return finish(w)


def refused(payload: bytes, error: type[CodecError], match: str, limits: Limits) -> int:
    """Assert that a payload is refused; return the bytes that this took."""
    tracemalloc.start()
    try:
        with pytest.raises(error, match=match):
            decode(payload, limits=limits)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize(
    "shape",
    [(1 << 60,), (1 << 30, 1 << 30), (1, 1 << 60, 1), (1 << 20,) * 3, (1 << 61,) * 9],
    ids=len,
)
def test_2_to_the_60_elements(dtype: str, shape: tuple[int, ...]) -> None:
    payload = constants([("w", dtype, shape)])
    assert len(payload) < 200
    assert refused(payload, LimitExceeded, "elements", Limits()) < MEBIBYTE
    # Without that limit, the size is refused; without either, the expansion.
    loose = Limits(elements=1 << 2000)
    assert refused(payload, LimitExceeded, "decoded_bytes", loose) < MEBIBYTE
    loose = Limits(elements=1 << 2000, decoded_bytes=1 << 2000)
    assert refused(payload, LimitExceeded, "expansion", loose) < MEBIBYTE


def test_the_constants_of_these_tests_are_well_formed() -> None:
    tensors: Tensors = [(d, d, (2, 3)) for d in DTYPE_CODES]
    decoded = decode(constants(tensors))
    assert {k: v.shape for k, v in decoded.items()} == dict.fromkeys(DTYPE_CODES, (2, 3))
    assert decoded["int64"].tolist() == [[1] * 3] * 2


def test_a_layout_does_not_make_a_claim_acceptable() -> None:
    layout = {"w": TensorSpec("int8", (1 << 60,))}  # type: ignore[arg-type]
    context = Context(layout=layout)
    w = HeadWriter()
    w.coding(serial=True)
    payload = seal(context, w.coder.finish(), b"")
    with pytest.raises(LimitExceeded, match="elements"):
        open_payload(payload, context=context)


def test_many_tensors_add_up() -> None:
    payload = constants([(f"{i}", "int8", (1 << 18,)) for i in range(100)])
    assert refused(payload, LimitExceeded, "expansion", Limits()) < MEBIBYTE
    few = Limits(elements=99 << 18, expansion=1 << 30)
    assert refused(payload, LimitExceeded, "elements", few) < MEBIBYTE
    few = Limits(decoded_bytes=399 << 18, expansion=1 << 30)
    assert refused(payload, LimitExceeded, "decoded_bytes", few) < MEBIBYTE


def test_dimensions_beside_a_zero_cost_nothing() -> None:
    huge: Tensors = [("a", "int8", (1 << 61, 0)), ("b", "float64", (0, 1 << 59))]
    tracemalloc.start()
    decoded = decode(_empties(huge))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert decoded["a"].shape == (1 << 61, 0)
    assert decoded["b"].shape == (0, 1 << 59)
    assert peak < MEBIBYTE


def _empties(tensors: Tensors) -> bytes:
    """Empty tensors have no field to code."""
    w = HeadWriter()
    w.layout(tensors)
    w.coding(serial=True)
    w.uint("general", 4)
    return finish(w)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("int32", (1 << 61, 0)), ("int8", (1 << 32, 1 << 31, 0)), ("float64", (0, 1 << 60))],
)
def test_an_empty_tensor_must_have_a_shape_that_arrays_can_have(
    dtype: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(MalformedPayload, match="no array has its shape"):
        open_payload(_empties([("w", dtype, shape)]))


def lanes(*, clusters: int, precision: int, segments: int = 1, size: int = 1) -> HeadWriter:
    """Sparse clusters without tables, and the directory of segments in which all is zero."""
    w = HeadWriter()
    w.layout([(f"{i}", "int8", (size,)) for i in range(segments)])
    w.coding(serial=False)
    for _ in range(segments):
        w.field(serial=False)
    w.clusters(clusters)
    w.uint("general", 4)
    for _ in range(clusters):
        w.bit("sparse", True)
    w.uint("general", precision)
    for _ in range(2 * clusters):
        w.bit("table", False)
    for _ in range(segments):
        w.stream(LaneStream(1, 4, 0))
        w.uint("raw", 0)
        for _ in range(clusters):
            w.uint("nonzeros", 0)
        w.uint("tail", 0)
    return w


def test_tables_are_limited() -> None:
    payload = finish(lanes(clusters=255, precision=14), ONE_LANE)
    assert len(payload) < 50
    assert refused(payload, LimitExceeded, "table_slots", Limits()) < MEBIBYTE
    # What the limit lets in stays within a small multiple of it.
    payload = finish(lanes(clusters=64, precision=14), ONE_LANE)
    tracemalloc.start()
    assert decode(payload)["0"].tolist() == [0]
    assert tracemalloc.get_traced_memory()[1] < 16 * Limits().table_slots
    tracemalloc.stop()


def test_the_directory_grows_with_the_payload() -> None:
    payload = finish(lanes(clusters=60, precision=9, segments=300), ONE_LANE)
    assert refused(payload, MalformedPayload, "segments are longer", Limits()) < 2 * MEBIBYTE


def test_free_symbols_are_limited() -> None:
    # A table of one token: symbols cost no bits, but each takes a step of the only lane.
    w = HeadWriter()
    w.layout([("w", "int8", (1 << 23,))])
    w.coding(serial=False)
    w.field(serial=False)
    w.clusters(1)
    w.uint("general", 4)
    w.bit("sparse", False)
    w.uint("general", 9)
    w.bit("table", False)
    w.stream(LaneStream(1, 4, 0))
    w.uint("raw", 0)
    w.uint("tail", 0)
    payload = finish(w, ONE_LANE)
    assert len(payload) < 50
    started = time.process_time()
    with pytest.raises(LimitExceeded, match="steps"):
        decode(payload)
    assert time.process_time() - started < 5


def test_steps_are_counted_once() -> None:
    w = lanes(clusters=1, precision=9, segments=3, size=5)
    payload = open_payload(finish(w, 3 * ONE_LANE), limits=Limits(steps=0))
    for _ in range(2):
        assert [payload[name].tolist() for name in payload] == [[0] * 5] * 3


def test_what_was_let_in_can_be_read_again_beside_what_was_refused() -> None:
    rng = np.random.default_rng(2)
    tensors = {name: rng.integers(-20, 21, (300, 600)).astype("i4") for name in ("a", "b")}
    payload = open_payload(encode(tensors), limits=Limits(steps=400))  # enough for one of them
    for _ in range(2):
        np.testing.assert_array_equal(payload["a"], tensors["a"])
        with pytest.raises(LimitExceeded, match="steps"):
            payload["b"]


def test_names_are_limited_together() -> None:
    w = HeadWriter()
    w.layout([(f"{i:04}".ljust(100, "x"), "int8", ()) for i in range(60)])
    with pytest.raises(LimitExceeded, match="all_name_bytes"):
        open_payload(finish(w), limits=Limits(all_name_bytes=5900))

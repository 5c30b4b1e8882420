"""Corners of the format that the encoder never writes."""

from __future__ import annotations

import numpy as np
import pytest

from fuzz.writer import HeadWriter
from prunecast.compression.codec import Context, MalformedPayload, decode, measure_costs
from prunecast.compression.codec.container.wire import seal
from prunecast.compression.codec.entropy import symbols
from prunecast.compression.codec.entropy.rans import RansTables
from prunecast.compression.codec.entropy.streams import write_stream


def one_nonzero(dtype: str, value: int) -> bytes:
    """A serial payload of one element in a sparse cluster: z - 1 is ``value``."""
    w = HeadWriter()
    w.layout([("w", dtype, (1,))])
    w.coding(serial=True)
    w.uint("mode", 1)
    w.sint("centre", 0)
    w.uint("set", 0)
    w.bit("rows", False)
    w.bit("columns", False)
    w.sint("base", 0)
    if not dtype.endswith("64"):
        w.uint("depth", 0)
    w.clusters(1)
    w.uint("general", 4)
    w.bit("sparse", True)
    w.uint("number", 1)
    w.uint("gap", 0)
    w.uint("value", value)
    return seal(Context(), w.coder.finish(), b"")


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_a_value_of_two_to_the_width_is_refused(bits: int) -> None:
    top = decode(one_nonzero(f"int{bits}", 2**bits - 2))["w"]
    assert top.tolist() == [-(2 ** (bits - 1))]
    for z in (2**bits, 2**32, 2**64):
        if z >= 2**bits:
            with pytest.raises(MalformedPayload, match="exceeds"):
                decode(one_nonzero(f"int{bits}", z - 1))


def coded_vector(levels_step: int | None = None, sets: int = 1) -> HeadWriter:
    """The start of a payload with one vector of three for each table set, and two more."""
    w = HeadWriter()
    w.layout([(f"{i}", "int8", (3,)) for i in range(sets + 2)])
    w.coding(serial=True)
    for i in range(sets + 2):
        w.uint("mode", 1)
        w.sint("centre", 0)
        w.uint("set", i if i < sets else 0)
        w.bit("rows", False)
        w.bit("columns", levels_step is not None)
        w.sint("base", 0)
        if levels_step is not None:
            w.uint("step", levels_step - 1)
            w.uint("middle", 0)
            for _ in range(3):
                w.sint("level 3", 0)
        w.uint("depth", 0)
    w.clusters(1, sets=sets)
    w.uint("general", 4)
    w.bit("sparse", False)
    for value in range(3 * (sets + 2)):
        w.uint("dense", value % 5)
    return w


@pytest.mark.parametrize("sets", [1, 255, 256])
def test_there_may_be_256_table_sets(sets: int) -> None:
    decoded = decode(seal(Context(), coded_vector(sets=sets).coder.finish(), b""))
    assert len(decoded) == sets + 2
    assert decoded["0"].tolist() == [0, -1, 1]


def test_levels_have_a_largest_step() -> None:
    decoded = decode(seal(Context(), coded_vector(levels_step=64).coder.finish(), b""))
    assert decoded["1"].tolist() == [-2, 2, 0]
    for step in (65, 256, 257, 2**64):
        with pytest.raises(MalformedPayload, match="multiples"):
            decode(seal(Context(), coded_vector(levels_step=step).coder.finish(), b""))


@pytest.mark.parametrize("words", [0, 1, 2])
def test_a_field_of_no_bits_may_come_last(words: int) -> None:
    # With direct = mantissa = 1, token 2 has no raw bits, token 4 one and token 6 two.
    tokens = [4] * (64 * words) + [2]
    w = HeadWriter()
    w.layout([("w", "int8", (len(tokens),))])
    w.coding(serial=False)
    w.field(serial=False)
    w.clusters(1)
    w.uint("general", 4 * 1 + 1)
    w.bit("sparse", False)
    w.uint("general", 9)
    w.bit("table", True)
    w.uint("tokens", 4)
    before = False
    for i in range(5):
        present = i in (2, 4)
        if i < 4:
            w.bit(f"absent {before}", not present)
        before = not present
        if present:
            w.sint(f"log {min(i, 3)}", 0)
    f = np.zeros((1, 5), np.uint32)
    f[0, [2, 4]] = 256
    raw = bytes(8 * words)
    entry, rest = write_stream(np.array(tokens), RansTables(f, 9), 1, raw)
    w.stream(entry)
    w.uint("raw", len(raw))
    w.uint("tail", 0)
    payload = seal(Context(), w.coder.finish(), rest)
    # z is 4 where the raw bit is 0, and 2 at the end.
    assert decode(payload)["w"].tolist() == [2] * (64 * words) + [1]


def test_static_side_information_may_be_empty() -> None:
    w = HeadWriter()
    w.layout([("w", "int8", (2,))])
    w.coding(serial=True, static=True)
    w.uint("mode", 0)
    w.sint("centre", 7)
    w.uint("general", 4)
    for _ in range(16):
        w.bit("present", False)
    w.coder.bits(1 << 16, 32)
    w.uint("static words", 0)
    payload = seal(Context(), w.coder.finish(), b"")
    assert decode(payload)["w"].tolist() == [7, 7]
    assert sum(measure_costs(payload).sections.values()) == len(payload)


@pytest.mark.parametrize("size", [0, 1, 1 << 18, (1 << 18) + 1, 700_003])
@pytest.mark.parametrize("buckets", [2, 256])
def test_positions_are_sorted_by_bucket_and_in_order(size: int, buckets: int) -> None:
    rng = np.random.default_rng(size)
    clusters = rng.integers(0, buckets, size).astype(np.uint8)
    bucket = rng.permutation(buckets).astype(np.uint8)
    order, sizes = symbols._sorted_positions(clusters, bucket, buckets)
    assert np.array_equal(order, np.argsort(bucket[clusters], kind="stable"))
    assert np.array_equal(sizes, np.bincount(bucket[clusters], minlength=buckets))

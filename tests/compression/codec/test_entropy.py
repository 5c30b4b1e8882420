"""The coders below the format: rANS lanes and packed bits, by themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prunecast.compression.codec import MalformedPayload
from prunecast.compression.codec.entropy.rans import RansTables, rans_decode, rans_encode
from prunecast.compression.codec.entropy.rawbits import pack_bits, unpack_bits
from prunecast.compression.codec.entropy.tokens import bit_length_minus_one

ALPHABET = 20
Stream = tuple[np.ndarray, np.ndarray, np.ndarray]
UINT64 = st.integers(0, 2**64 - 1) | st.integers(0, 64).map(lambda k: min(2**k, 2**64 - 1))


def random_tables(rng: np.random.Generator, precision: int) -> RansTables:
    """Tables of very different shapes; the last has one token alone."""
    size = 1 << precision
    rows = [
        rng.multinomial(size - ALPHABET, rng.dirichlet(np.full(ALPHABET, share))) + 1
        for share in (1.0, 0.3, 0.01)
    ]
    rows.append(np.eye(1, ALPHABET, dtype=np.int64)[0] * size)
    return RansTables(np.array(rows, np.uint32), precision)


def random_stream(rng: np.random.Generator, tables: RansTables, count: int, lanes: int) -> Stream:
    """Contexts, tokens and first words of a stream of so many symbols and lanes."""
    p = tables.frequencies / (1 << tables.precision)
    contexts = rng.integers(0, len(p), count)
    tokens = (rng.random((count, 1)) > np.cumsum(p, 1)[contexts]).sum(1)
    return contexts, tokens, rng.integers(0, 1 << 16, lanes).astype(np.uint16)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    precision=st.integers(9, 14),
    count=st.integers(0, 300),
    lanes=st.integers(1, 40),
)
def test_streams_of_any_length(seed: int, precision: int, count: int, lanes: int) -> None:
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, precision)
    contexts, tokens, initial = random_stream(rng, tables, count, lanes)
    states, words = rans_encode(contexts * ALPHABET + tokens, tables, lanes, initial)
    found, first = rans_decode(contexts, tables, states, words)
    assert found.tolist() == tokens.tolist()
    assert first.tolist() == initial.tolist()


@pytest.mark.parametrize(
    "damage",
    ["few words", "hardly any", "left over", "other words", "other states", "zero", "fewer"],
)
def test_damaged_streams_are_refused(damage: str) -> None:
    rng = np.random.default_rng(2)
    tables = random_tables(rng, 12)
    contexts, tokens, initial = random_stream(rng, tables, 5_000, 16)
    states, words = rans_encode(contexts * ALPHABET + tokens, tables, 16, initial)
    zero = states.copy()
    zero[3] = 0
    damaged = {
        "few words": (contexts, states, words[:-1]),
        "hardly any": (contexts, states, words[:3]),
        "left over": (contexts, states, np.append(words, np.uint16(1))),
        "other words": (contexts, states, words ^ np.uint16(77)),
        "other states": (contexts, states ^ np.uint32(1 << 20), words),
        "zero": (contexts, zero, words),
        "fewer": (contexts[:-100], states, words),
    }[damage]
    with pytest.raises(MalformedPayload):
        rans_decode(damaged[0], tables, *damaged[1:])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), lanes=st.integers(1, 7), count=st.integers(0, 30))
def test_states_that_no_encoder_makes(seed: int, lanes: int, count: int) -> None:
    """States below 2**16 are refused, or end well: nothing else is raised."""
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, 9)
    contexts = rng.integers(0, 4, count)
    states = rng.integers(0, 1 << rng.integers(1, 20), lanes).astype(np.uint32)
    words = np.where(rng.random(lanes) < 0.7, 1, rng.integers(0, 1 << 16, lanes)).astype(np.uint16)
    for n in range(len(words) + 1):
        try:
            tokens, initial = rans_decode(contexts, tables, states, words[:n])
        except MalformedPayload:
            continue
        assert (len(tokens), len(initial)) == (count, lanes)


@settings(deadline=None)
@given(fields=st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 63)), max_size=40))
def test_packed_bits_come_back_and_nothing_may_follow(fields: list[tuple[int, int]]) -> None:
    widths = np.array([w for _, w in fields], np.int64)
    values = np.array([v & (1 << w) - 1 for v, w in fields], np.uint64)
    packed = pack_bits(values, widths)
    assert len(packed) == -(-int(widths.sum()) // 8)
    assert unpack_bits(packed, widths).tolist() == values.tolist()
    with pytest.raises(MalformedPayload):
        unpack_bits(packed + b"\0", widths)


@given(values=st.lists(UINT64.filter(bool), min_size=1, max_size=20))
def test_exponents_are_exact(values: list[int]) -> None:
    exact = [v.bit_length() - 1 for v in values]
    assert bit_length_minus_one(np.array(values, np.uint64)).tolist() == exact

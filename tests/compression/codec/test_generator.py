"""The counter-based generator: against the published algorithm, and in any order."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from prunecast.compression.codec import CounterStream

MASK = (1 << 64) - 1


def splitmix64(state: int, count: int) -> list[int]:
    """Steele, Lea & Flood 2014, figure 16, one number at a time."""
    out = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        out.append(z ^ (z >> 31))
    return out


@given(st.integers(0, MASK), st.integers(0, 40), st.integers(0, 40))
def test_words_are_those_of_the_sequential_algorithm(origin: int, begin: int, count: int) -> None:
    expected = splitmix64(origin, begin + count)[begin:]
    words = CounterStream(origin).words(begin, begin + count)
    assert words.dtype == np.uint64
    assert words.tolist() == expected


def test_a_label_is_hashed_to_the_origin() -> None:
    digest = hashlib.sha256(b"label").digest()
    assert CounterStream.of(b"label").origin == int.from_bytes(digest[:8], "little")


def test_blocks_join_to_the_whole() -> None:
    stream = CounterStream(MASK)
    count = (1 << 20) + 77
    blocks = list(stream.blocks(count))
    assert [begin for begin, _ in blocks] == [0, 1 << 20]
    assert (np.concatenate([words for _, words in blocks]) == stream.words(0, count)).all()
    assert list(stream.blocks(0)) == []

"""Streams coded together are those that the codec makes and reads one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from prunecast.compression.accelerated import rans
from prunecast.compression.accelerated.rans import (
    LaneTables,
    ToDecode,
    ToEncode,
    rans_decode,
    rans_encode,
)
from prunecast.compression.codec import MalformedPayload
from prunecast.compression.codec.entropy import rans as codec_rans
from prunecast.compression.codec.entropy.rans import RansTables
from support.devices import on_every_device


def random_tables(rng: np.random.Generator, precision: int) -> RansTables:
    """Tables of very different shapes; the last has one token alone."""
    size, rows = 1 << precision, []
    for share in (1.0, 0.3, 0.01):
        f = rng.multinomial(size - 20, rng.dirichlet(np.full(20, share))) + 1
        rows.append(f)
    rows.append(np.eye(1, 20, dtype=np.int64)[0] * size)
    return RansTables(np.array(rows, np.uint32), precision)


def random_streams(
    rng: np.random.Generator, tables: RansTables, shapes: list[tuple[int, int]]
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Contexts, tokens and first words of streams of so many symbols and lanes."""
    p = tables.frequencies / (1 << tables.precision)
    streams = []
    for count, lanes in shapes:
        contexts = rng.integers(0, len(p), count)
        tokens = (rng.random((count, 1)) > np.cumsum(p, 1)[contexts]).sum(1)
        streams.append((contexts, tokens, rng.integers(0, 1 << 16, lanes).astype(np.uint16)))
    return streams


def code_both_ways(
    device: str, tables: RansTables, streams: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> None:
    on_device = LaneTables(tables, torch.device(device))
    keys = [contexts * tables.frequencies.shape[1] + tokens for contexts, tokens, _ in streams]
    coded = rans_encode(
        [
            ToEncode(torch.from_numpy(key).to(device), initial)
            for key, (_, _, initial) in zip(keys, streams, strict=True)
        ],
        on_device,
    )
    jobs = []
    for key, made, (contexts, _, initial) in zip(keys, coded, streams, strict=True):
        states, words = codec_rans.rans_encode(key, tables, len(initial), initial)
        assert made.states.tolist() == states.tolist()
        assert made.words.tolist() == words.tolist()
        jobs.append(ToDecode(torch.from_numpy(contexts).to(device), states, words))
    for found, (_, tokens, initial) in zip(rans_decode(jobs, on_device), streams, strict=True):
        assert found.tokens.tolist() == tokens.tolist()
        assert found.initial.tolist() == initial.tolist()


@on_every_device
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    precision=st.integers(9, 14),
    shapes=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), max_size=8),
)
def test_ragged_batches(
    device: str, seed: int, precision: int, shapes: list[tuple[int, int]]
) -> None:
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, precision)
    code_both_ways(device, tables, random_streams(rng, tables, shapes))


@on_every_device
def test_more_streams_than_a_batch_and_several_runs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rans, "_CELLS", 1 << 10)
    rng = np.random.default_rng(1)
    tables = random_tables(rng, 12)
    shapes = [(20_000, 512), (9_001, 500), (4_000, 1), *[(i, 1 + i % 7) for i in range(150)]]
    code_both_ways(device, tables, random_streams(rng, tables, shapes))


def damaged(rng: np.random.Generator) -> list[tuple[str, Any, Any, Any]]:
    """Ways in which a stream can be wrong."""
    tables = random_tables(rng, 12)
    ((contexts, tokens, initial),) = random_streams(rng, tables, [(5_000, 16)])
    keys = contexts * tables.frequencies.shape[1] + tokens
    states, words = codec_rans.rans_encode(keys, tables, 16, initial)
    zero = states.copy()
    zero[3] = 0
    return [
        ("too few words", contexts, states, words[:-1]),
        ("hardly any words", contexts, states, words[:3]),
        ("words left over", contexts, states, np.append(words, np.uint16(1))),
        ("other words", contexts, states, words ^ np.uint16(77)),
        ("other states", contexts, states ^ np.uint32(1 << 20), words),
        ("a state of zero", contexts, zero, words),
        ("fewer symbols", contexts[:-100], states, words),
    ]


@on_every_device
@pytest.mark.parametrize("number", range(7))
def test_damaged_streams_are_refused(device: str, number: int) -> None:
    rng = np.random.default_rng(2)
    tables = random_tables(rng, 12)
    _, contexts, states, words = damaged(np.random.default_rng(2))[number]
    with pytest.raises(MalformedPayload):
        codec_rans.rans_decode(contexts, tables, states, words)
    good = ToDecode(torch.zeros(0, dtype=torch.int64, device=device), *no_symbols(4))
    job = ToDecode(torch.from_numpy(contexts).to(device), states, words)
    with pytest.raises(MalformedPayload):
        rans_decode([good, job, good], LaneTables(tables, torch.device(device)))


def no_symbols(lanes: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(lanes, (1 << 16) + 5, np.uint32), np.zeros(0, np.uint16)


@on_every_device
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), lanes=st.integers(1, 7), count=st.integers(0, 30))
def test_states_that_no_encoder_makes(device: str, seed: int, lanes: int, count: int) -> None:
    """States below 2**16 are accepted wherever they end well, beside longer streams too."""
    rng = np.random.default_rng(seed)
    tables = random_tables(rng, 9)
    contexts = rng.integers(0, 4, count)
    states = rng.integers(0, 1 << rng.integers(1, 20), lanes).astype(np.uint32)
    words = np.where(rng.random(lanes) < 0.7, 1, rng.integers(0, 1 << 16, lanes)).astype(np.uint16)
    ((longer, tokens, initial),) = random_streams(rng, tables, [(400, 5)])
    keys = longer * tables.frequencies.shape[1] + tokens
    beside = ToDecode(
        torch.from_numpy(longer).to(device), *codec_rans.rans_encode(keys, tables, 5, initial)
    )
    for n in range(len(words) + 1):
        job = ToDecode(torch.from_numpy(contexts).to(device), states, words[:n])
        together = [job, beside]
        try:
            expected = codec_rans.rans_decode(contexts, tables, states, words[:n])
        except MalformedPayload:
            with pytest.raises(MalformedPayload):
                rans_decode(together, LaneTables(tables, torch.device(device)))
            continue
        found = rans_decode(together, LaneTables(tables, torch.device(device)))[0]
        assert found.tokens.tolist() == expected[0].tolist()
        assert found.initial.tolist() == expected[1].tolist()


class Launches(TorchDispatchMode):
    """Counts operations that would be kernels on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_launches_a_step() -> None:
    """What docs/accelerated.md states, for one stream and for several."""
    rng = np.random.default_rng(3)
    tables = random_tables(rng, 12)
    on_device = LaneTables(tables, torch.device("cpu"))
    for rows in (1, 5):
        counts = []
        for steps in (100, 200):
            streams = random_streams(rng, tables, [(steps * 64, 64)] * rows)
            keys = [c * tables.frequencies.shape[1] + t for c, t, _ in streams]
            with Launches() as encoding:
                jobs = zip(keys, streams, strict=True)
                coded = rans_encode(
                    [ToEncode(torch.from_numpy(k), first) for k, (_, _, first) in jobs], on_device
                )
            reads = [
                ToDecode(torch.from_numpy(c), made.states, made.words)
                for made, (c, _, _) in zip(coded, streams, strict=True)
            ]
            with Launches() as decoding:
                rans_decode(reads, on_device)
            counts.append((encoding.count, decoding.count))
        (encode_less, decode_less), (encode_more, decode_more) = counts
        assert encode_more - encode_less == 6 * 100
        assert decode_more - decode_less == 12 * 100

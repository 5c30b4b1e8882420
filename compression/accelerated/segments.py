"""Segments of symbols (:mod:`prunecast.compression.codec.entropy.lanes`, in torch).

All segments that do not wait for each other are coded at once: their main streams together, and
their tails together, which main streams carry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prunecast.compression.codec.container.head import Body, Segment
from prunecast.compression.codec.entropy.lanes import tail_room, tail_symbols, tail_window
from prunecast.compression.codec.entropy.rans import RansTables
from prunecast.compression.codec.entropy.streams import (
    LaneStream,
    finished,
    first_words,
    opened,
    rest_of,
)
from prunecast.compression.codec.entropy.tokens import GAP_TOKENS
from prunecast.compression.codec.errors import MalformedPayload

from .arrays import download
from .rans import LaneTables, ToDecode, ToEncode, rans_decode, rans_encode
from .rawbits import pack
from .symbols import Symbols, repeated
from .tokens import join, split

__all__ = ["ToRead", "TokenStream", "read_segments", "write_segments"]


class TokenStream:
    """Tokens of a segment in coding order (dense, gaps, values) and their raw bits, packed."""

    def __init__(self, body: Body, symbols: Symbols, dense_cluster: torch.Tensor) -> None:
        runs = [(body.scheme, symbols.dense), (GAP_TOKENS, symbols.gaps)]
        runs.append((body.scheme, symbols.values))
        parts = [split(z, scheme) for scheme, z in runs]
        tokens, low, widths = (torch.cat(each) for each in zip(*parts, strict=True))
        self._counts: NDArray[np.int64] | None = None
        self.tokens = tokens
        self.raw = pack(low, widths)
        self.tables = table_of_symbols(body.sparse, dense_cluster, symbols.counts)
        self.counts: list[int] = symbols.counts[body.sparse].tolist()

    def histogram(self, length: int) -> NDArray[np.int64]:
        """Counts of ``table * 256 + token``."""
        if self._counts is None or len(self._counts) != length:
            key = (self.tables.to(torch.int64) << 8) | self.tokens
            self._counts = download(torch.bincount(key, minlength=length))
        return self._counts


def table_of_symbols(
    sparse: NDArray[np.bool_], dense_cluster: torch.Tensor, counts: NDArray[np.int64]
) -> torch.Tensor:
    """Index of every symbol's table, in coding order, int16."""
    gaps = np.arange(len(sparse))
    values = len(sparse) + np.cumsum(sparse) - 1
    runs = [repeated(tables, counts, dense_cluster) for tables in (gaps, values)]
    return torch.cat([dense_cluster, *runs]).to(torch.int16)


def write_segments(
    tables: RansTables,
    streams: Sequence[TokenStream],
    lanes: Sequence[int],
    segments: Sequence[Segment],
    device: torch.device,
) -> list[bytes]:
    """Code segments; complete their directory entries and return their bytes."""
    on_device = LaneTables(tables, device)
    keys, rests, tails = [], [], []
    for i, (stream, n, segment) in enumerate(zip(streams, lanes, segments, strict=True)):
        segment.counts, segment.raw_bytes = stream.counts, len(stream.raw)
        key = stream.tables.to(torch.int64) * tables.frequencies.shape[1] + stream.tokens
        few, spare = tail_room(n, len(stream.raw))
        window = tail_window(len(key), spare)
        segment.tail_symbols = tail_symbols(download(key[len(key) - window :]), tables, spare)
        if segment.tail_symbols:
            cut = len(key) - segment.tail_symbols
            tails.append((i, ToEncode(key[cut:], first_words(few, stream.raw))))
            key = key[:cut]
        keys.append(key)
        rests.append(stream.raw)
    coded = rans_encode([job for _, job in tails], on_device)
    for (i, _), made in zip(tails, coded, strict=True):
        segments[i].tail, rests[i] = finished(made.states, made.words, rests[i])
    jobs = [
        ToEncode(key, first_words(n, rest)) for key, n, rest in zip(keys, lanes, rests, strict=True)
    ]
    data = []
    for segment, rest, made in zip(segments, rests, rans_encode(jobs, on_device), strict=True):
        segment.stream, whole = finished(made.states, made.words, rest)
        data.append(whole)
    return data


@dataclass(frozen=True)
class ToRead:
    """A segment to be read: its entry and bytes, clusters of dense symbols, width of its values."""

    segment: Segment
    data: bytes
    dense_cluster: torch.Tensor
    bits: int


@dataclass(frozen=True)
class _Stream:
    contexts: torch.Tensor
    entry: LaneStream
    data: bytes
    rest_bytes: int


def read_segments(body: Body, tables: LaneTables, jobs: Sequence[ToRead]) -> list[Symbols]:
    """Decode segments.

    Raises:
        MalformedPayload: a segment's bytes do not hold its symbols.
    """
    mains, ends, counts = [], [], []
    for job in jobs:
        segment = job.segment
        count = np.zeros(len(body.sparse), np.int64)
        count[body.sparse] = segment.counts
        counts.append(count)
        contexts = table_of_symbols(body.sparse, job.dense_cluster, count)
        cut = len(contexts) - segment.tail_symbols
        if cut < 0:
            raise MalformedPayload("a segment's tail has more symbols than the segment")
        mains.append(_Stream(contexts[:cut], segment.stream, job.data, segment.rest_bytes))
        ends.append(contexts[cut:])
    read = _read(mains, tables)
    with_tail = [i for i, job in enumerate(jobs) if job.segment.tail_symbols]
    tails = [
        _Stream(ends[i], jobs[i].segment.tail, read[i][1], jobs[i].segment.raw_bytes)
        for i in with_tail
    ]
    for i, (last, raw) in zip(with_tail, _read(tails, tables), strict=True):
        read[i] = torch.cat([read[i][0], last]), raw
    return [
        _symbols(body, job, count, *each)
        for job, count, each in zip(jobs, counts, read, strict=True)
    ]


def _read(streams: Sequence[_Stream], tables: LaneTables) -> list[tuple[torch.Tensor, bytes]]:
    """Tokens and rest of each stream."""
    jobs = [ToDecode(s.contexts, *opened(s.entry, s.data)) for s in streams]
    return [
        (found.tokens, rest_of(s.entry, s.data, found.initial, s.rest_bytes))
        for s, found in zip(streams, rans_decode(jobs, tables), strict=True)
    ]


def _symbols(
    body: Body, job: ToRead, counts: NDArray[np.int64], tokens: torch.Tensor, raw: bytes
) -> Symbols:
    n, k = len(job.dense_cluster), int(counts.sum())
    dense, gaps, values = join(
        torch.split(tokens, [n, k, k]),
        (body.scheme, GAP_TOKENS, body.scheme),
        (job.bits, 32, job.bits),
        raw,
    )
    return Symbols(dense, counts, gaps, values)

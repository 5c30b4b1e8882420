"""Symbols of large segments: tokens by lane-interleaved rANS, remaining bits raw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..container.head import Body, Segment
from ..errors import MalformedPayload
from .rans import RansTables
from .rawbits import BitReader, BitWriter
from .streams import read_stream, write_stream
from .symbols import Symbols
from .tables import frequencies
from .tokens import GAP_TOKENS

__all__ = [
    "SymbolStream",
    "rans_tables",
    "read_segment",
    "write_segment",
]

# Lanes of a segment for each lane of its tail; bytes of first words that make a tail worth it.
_TAIL = 12
_LEAST_SPARE = 64
_CHUNK = 1 << 16


class SymbolStream:
    """Tokens of a segment in coding order (dense, gaps, values) and their raw bits, packed."""

    def __init__(self, body: Body, symbols: Symbols, dense_cluster: NDArray[np.uint8]) -> None:
        raw = BitWriter()
        parts = [(body.scheme, symbols.dense)]
        if len(symbols.gaps):
            parts += [(GAP_TOKENS, symbols.gaps), (body.scheme, symbols.values)]
        tokens = [scheme.split(z, raw) for scheme, z in parts]
        self.tokens = tokens[0] if len(tokens) == 1 else np.concatenate(tokens)
        self.raw = raw.finish()
        self.tables = table_of_symbols(body.sparse, dense_cluster, symbols.counts)
        self.counts = symbols.counts[body.sparse].tolist()

    def histogram(self, length: int) -> NDArray[np.int64]:
        """Counts of ``table * 256 + token``."""
        h = np.zeros(length, np.int64)
        for s in range(0, len(self.tokens), _CHUNK):  # in chunks, to bound temporary arrays
            key = self.tables[s : s + _CHUNK].astype(np.int64) << 8
            key |= self.tokens[s : s + _CHUNK]
            h += np.bincount(key, minlength=length)
        return h


def table_of_symbols(
    sparse: NDArray[np.bool_], dense_cluster: NDArray[np.uint8], counts: NDArray[np.int64]
) -> NDArray[np.uint16]:
    """Index of every symbol's table, in coding order."""
    owner = np.repeat(np.arange(len(sparse), dtype=np.uint16), counts)
    value_table = (len(sparse) + np.cumsum(sparse) - 1).astype(np.uint16)
    return np.concatenate([dense_cluster.astype(np.uint16), owner, value_table[owner]])


def rans_tables(body: Body) -> RansTables:
    """Return the payload's frequency tables in full."""
    alphabet = max((len(t) for t in body.tables), default=1)
    f = np.zeros((len(body.tables), max(alphabet, 1)), np.uint32)
    for row, logs in zip(f, body.tables, strict=True):
        if logs:
            row[: len(logs)] = frequencies(logs, body.precision)
        else:
            row[0] = 1 << body.precision
    return RansTables(f, body.precision)


def write_segment(tables: RansTables, stream: SymbolStream, lanes: int, segment: Segment) -> bytes:
    """Code one segment; complete its directory entry and return its bytes."""
    keys = stream.tables.astype(np.uint32)
    keys *= np.uint32(tables.frequencies.shape[1])
    keys += stream.tokens
    segment.counts, segment.raw_bytes = stream.counts, len(stream.raw)
    rest, few = stream.raw, max(1, lanes // _TAIL)
    segment.tail_symbols = _tail_symbols(keys, tables, 2 * lanes - len(rest) - 3 * few)
    if segment.tail_symbols:
        cut = len(keys) - segment.tail_symbols
        segment.tail, rest = write_stream(keys[cut:], tables, few, rest)
        keys = keys[:cut]
    segment.stream, data = write_stream(keys, tables, lanes, rest)
    return data


def _tail_symbols(keys: NDArray[np.uint32], tables: RansTables, spare: int) -> int:
    """Number of last symbols that take about ``spare`` bytes; 0 where that is not worth it."""
    if spare < _LEAST_SPARE:
        return 0
    last = keys[len(keys) - min(len(keys) // 2, 16 * spare) :][::-1]
    cost = tables.precision - np.log2(np.maximum(tables.frequencies.ravel(), 1))
    return int(np.searchsorted(np.cumsum(cost.take(last)), 8 * spare))


def read_segment(
    body: Body,
    tables: RansTables,
    segment: Segment,
    data: bytes,
    dense_cluster: NDArray[np.uint8],
    bits: int,
) -> Symbols:
    """Decode one segment."""
    counts = np.zeros(len(body.sparse), np.int64)
    counts[body.sparse] = segment.counts
    contexts = table_of_symbols(body.sparse, dense_cluster, counts)
    cut = len(contexts) - segment.tail_symbols
    if cut < 0:
        raise MalformedPayload("a segment's tail has more symbols than the segment")
    tokens, raw = read_stream(contexts[:cut], tables, segment.stream, data, segment.rest_bytes)
    if segment.tail_symbols:
        tail = contexts[cut:]
        last, raw = read_stream(tail, tables, segment.tail, raw, segment.raw_bytes)
        tokens = np.concatenate([tokens, last])
    del contexts

    n, k = len(dense_cluster), int(counts.sum())
    reader = BitReader(raw)
    dense = body.scheme.join(tokens[:n], reader, bits)
    gaps = GAP_TOKENS.join(tokens[n : n + k], reader, 32)
    values = body.scheme.join(tokens[n + k :], reader, bits)
    reader.close()
    return Symbols(dense, counts, gaps.astype(np.int64), values)

"""Symbols of large segments: tokens by lane-interleaved rANS, remaining bits raw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..container.head import Body, Segment
from ..errors import MalformedPayload
from .rans import RansTables, rans_decode, rans_encode
from .rawbits import BitReader, BitWriter
from .states import pack_states, unpack_states
from .symbols import Symbols
from .tables import frequencies
from .tokens import GAP_TOKENS

__all__ = ["SymbolStream", "rans_tables", "read_segment", "write_segment"]


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
    raw = stream.raw
    initial = np.frombuffer(raw[: 2 * lanes].ljust(2 * lanes, b"\0"), "<u2").astype(np.uint16)
    alphabet = tables.frequencies.shape[1]
    keys = stream.tables.astype(np.uint32)
    keys *= np.uint32(alphabet)
    keys += stream.tokens
    states, words = rans_encode(keys, tables, lanes, initial)
    packed = pack_states(states)
    segment.lanes, segment.state_bytes = lanes, len(packed)
    segment.words, segment.raw_bytes = len(words), len(raw)
    segment.counts = stream.counts
    return packed + words.astype("<u2").tobytes() + raw[2 * lanes :]


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
    at = segment.state_bytes
    states = unpack_states(data[:at], segment.lanes)
    words = np.frombuffer(data[at : at + 2 * segment.words], "<u2").astype(np.uint16)
    tokens, initial = rans_decode(contexts, tables, states, words)
    del contexts, words
    first = initial.astype("<u2").tobytes()
    if any(first[segment.raw_bytes :]):
        raise MalformedPayload("padding of the lanes' first words is not zero")
    raw = first[: segment.raw_bytes] + data[at + 2 * segment.words :]

    n, k = len(dense_cluster), int(counts.sum())
    reader = BitReader(raw)
    dense = body.scheme.join(tokens[:n], reader, bits)
    gaps = GAP_TOKENS.join(tokens[n : n + k], reader, 32)
    values = body.scheme.join(tokens[n + k :], reader, bits)
    reader.close()
    return Symbols(dense, counts, gaps.astype(np.int64), values)

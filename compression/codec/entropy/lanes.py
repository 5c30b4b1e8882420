"""Symbols of large segments: tokens by lane-interleaved rANS, remaining bits raw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..container.head import Body, Segment
from ..errors import MalformedPayload
from .rans import RansTables, rans_decode, rans_encode
from .rawbits import pack_bits, unpack_bits
from .symbols import Symbols
from .tables import frequencies
from .tokens import GAP_TOKENS

__all__ = ["SymbolStream", "rans_tables", "read_segment", "write_segment"]


class SymbolStream:
    """Tokens of a segment in coding order: dense, gaps, values; and their raw bits."""

    def __init__(self, body: Body, symbols: Symbols, dense_cluster: NDArray[np.uint8]) -> None:
        parts = [
            (symbols.dense, body.scheme),
            (symbols.gaps.astype(np.uint64), GAP_TOKENS),
            (symbols.values, body.scheme),
        ]
        split = [scheme.split(z) for z, scheme in parts]
        self.tokens = np.concatenate([s[0] for s in split])
        self.raw = np.concatenate([s[2] for s in split])
        self.widths = np.concatenate([s[3] for s in split])
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
    raw = pack_bits(stream.raw, stream.widths)
    initial = np.frombuffer(raw[: 2 * lanes].ljust(2 * lanes, b"\0"), "<u2").astype(np.uint16)
    alphabet = tables.frequencies.shape[1]
    keys = stream.tables.astype(np.uint32)
    keys *= np.uint32(alphabet)
    keys += stream.tokens
    states, words = rans_encode(keys, tables, lanes, initial)
    segment.lanes, segment.words, segment.raw_bytes = lanes, len(words), len(raw)
    segment.counts = stream.counts
    return states.astype("<u4").tobytes() + words.astype("<u2").tobytes() + raw[2 * lanes :]


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
    at = 4 * segment.lanes
    states = np.frombuffer(data[:at], "<u4").astype(np.uint32)
    words = np.frombuffer(data[at : at + 2 * segment.words], "<u2").astype(np.uint16)
    tokens, initial = rans_decode(contexts, tables, states, words)
    first = initial.astype("<u2").tobytes()
    if any(first[segment.raw_bytes :]):
        raise MalformedPayload("padding of the lanes' first words is not zero")
    raw = first[: segment.raw_bytes] + data[at + 2 * segment.words :]

    n, k = len(dense_cluster), int(counts.sum())
    schemes = [
        (body.scheme, 0, n, bits),
        (GAP_TOKENS, n, n + k, 32),
        (body.scheme, n + k, n + 2 * k, bits),
    ]
    parts, widths = [], []
    for scheme, start, stop, most in schemes:
        t = tokens[start:stop]
        big = np.flatnonzero(t >= 1 << scheme.direct)
        w = scheme.widths()[t[big]]
        if len(w) and int(w.max()) > most:
            raise MalformedPayload(f"a token stands for a value of more than {most} bits")
        parts.append((scheme, t, big, most))
        widths.append(w)
    fields = unpack_bits(raw, np.concatenate(widths))
    ends = np.cumsum([len(w) for w in widths])
    out = [
        scheme.join(t, big, fields[end - len(big) : end], most)
        for (scheme, t, big, most), end in zip(parts, ends, strict=True)
    ]
    return Symbols(out[0], counts, out[1].astype(np.int64), out[2])

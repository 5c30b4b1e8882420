"""QSGD's two codes for a vector of levels (Alistarh et al. 2017, section 3.1 and appendix A).

The codewords are the paper's. They are grouped by kind, and the numbers of non-zeros stand in
front of them, so that the receiver knows where a bucket ends and can decode them all at once.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .bitcodes import BitView, decode_omega, encode_omega, pack_fields, walk
from .container import Reader
from .errors import MalformedPayload

__all__ = ["read_dense", "read_sparse", "write_dense", "write_sparse"]

_U64 = np.uint64


def write_dense(levels: NDArray[np.int32]) -> bytes:
    """``Elias(|l| + 1)`` of every level, and one bit (1: negative) after those not zero."""
    size = np.abs(levels.astype(np.int64))
    codes, widths = encode_omega(size + 1)
    signed = size > 0
    codes = (codes << signed.astype(np.uint64)) | (levels < 0).astype(np.uint64)
    return pack_fields(codes, widths + signed)


def read_dense(data: bytes, lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    """Inverse of `write_dense`.

    Raises:
        MalformedPayload: not exactly the codewords of that many levels.
    """
    view = BitView(data)
    levels = np.zeros(int(lengths.sum()), np.int32)
    done = 0
    # Only the codeword of 1, a single bit, has no sign after it.
    for starts in walk(view, len(levels), lambda omega: omega + (omega > 1)):
        values, widths = decode_omega(view, starts)
        some = _levels(values - 1)
        signed = np.flatnonzero(some)
        negative = view.fields(starts[signed] + widths[signed], 1) == 1
        some[signed[negative]] *= -1
        levels[done : done + len(some)] = some
        done += len(some)
    return levels


def write_sparse(levels: NDArray[np.int32], lengths: NDArray[np.int64]) -> bytes:
    """Per non-zero: ``Elias(distance)``, its sign, ``Elias(|l|)``; distances start per bucket.

    Before them ``Elias(non-zeros + 1)`` of every bucket, in a section of its own.
    """
    positions = np.flatnonzero(levels)
    starts = np.cumsum(lengths) - lengths
    bucket = np.searchsorted(starts, positions, side="right") - 1
    counts = np.bincount(bucket, minlength=len(lengths)).astype(np.int64)
    first = np.diff(bucket, prepend=-1) > 0
    before = np.where(first, starts[bucket] - 1, np.roll(positions, 1))
    gap_codes, gap_widths = encode_omega(positions - before)
    chosen = levels[positions].astype(np.int64)
    codes, widths = encode_omega(np.abs(chosen))
    codes |= (chosen < 0).astype(np.uint64) << widths.astype(np.uint64)
    entries = pack_fields(
        np.stack([gap_codes, codes], 1).ravel(), np.stack([gap_widths, widths + 1], 1).ravel()
    )
    heads = pack_fields(*encode_omega(counts + 1))
    return len(heads).to_bytes(8, "little") + heads + entries


def read_sparse(reader: Reader, lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    """Inverse of `write_sparse`; reads to the end.

    Raises:
        MalformedPayload: not exactly such codewords, or a position beyond its bucket.
    """
    counts = _read_counts(reader.take(reader.unsigned(8)), lengths)
    view = BitView(reader.rest())
    last = np.cumsum(counts)  # number of the first non-zero of the next bucket
    start = np.cumsum(lengths) - lengths
    base = np.zeros(len(lengths), np.int64)  # what the distances add up to before a bucket
    levels = np.zeros(int(lengths.sum()), np.int32)
    done, reached = 0, 0
    for at in walk(view, int(counts.sum()), _entry_lengths):
        gaps, widths = decode_omega(view, at)
        chosen = _levels(decode_omega(view, at + widths + 1)[0])
        chosen[view.fields(at + widths, 1) == 1] *= -1
        number = np.arange(done, done + len(at))
        bucket = np.searchsorted(last, number, side="right")
        if (gaps > lengths[bucket]).any():  # before they are added up
            raise MalformedPayload("a distance reaches beyond its bucket")
        sums = reached + np.cumsum(gaps)
        first = np.flatnonzero(number == (last - counts)[bucket])
        base[bucket[first]] = sums[first] - gaps[first]
        inside = sums - base[bucket] - 1
        if (inside >= lengths[bucket]).any():
            raise MalformedPayload("a distance reaches beyond its bucket")
        levels[start[bucket] + inside] = chosen
        done, reached = done + len(at), int(sums[-1])
    return levels


def _read_counts(data: bytes, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    view = BitView(data)
    counts = np.zeros(len(lengths), np.int64)
    done = 0
    for at in walk(view, len(lengths)):
        counts[done : done + len(at)] = decode_omega(view, at)[0] - 1
        done += len(at)
    if (counts > lengths).any():
        raise MalformedPayload("the numbers of non-zeros do not fit their buckets")
    return counts


def _entry_lengths(omega: NDArray[np.int64]) -> NDArray[np.int64]:
    """Distance, sign and level together, were they to start at each bit."""
    after = np.arange(len(omega)) + omega + 1
    lengths: NDArray[np.int64] = omega + 1 + omega[np.minimum(after, len(omega) - 1)]
    return lengths


def _levels(values: NDArray[np.int64]) -> NDArray[np.int32]:
    if len(values) and int(values.max()) >= 1 << 31:
        raise MalformedPayload("a level is beyond 32 bits")
    return np.asarray(values, np.int32)

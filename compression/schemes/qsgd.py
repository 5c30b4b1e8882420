"""Quantised SGD (Alistarh et al. 2017, "QSGD: Communication-Efficient SGD via Gradient
Quantization and Encoding", sections 3.1 and 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Limits, MalformedPayload

from . import OutOfRange
from .bitcodes import BitView, decode_omega, encode_omega, pack_fields, walk
from .container import Reader, checked_scales, coded, decoded
from .interface import Draws, Quantised, Scheme
from .layout import Arrays, Layout, State, concatenated, scaled, split

__all__ = ["Qsgd", "read_dense", "read_sparse", "write_dense", "write_sparse"]

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


_MAX_LEVELS = 1 << 20
_MIN_BUCKET = 16  # so that norms stay small beside the tensors
_ELIAS = ("sparse", "dense")


@dataclass(frozen=True)
class Qsgd(Scheme):
    """Every bucket is its norm times random multiples of ``1 / levels``, right on average.

    ``Q(v_i) = |v| sign(v_i) l / s`` where ``l`` is ``s |v_i| / |v|`` rounded down or up at
    random, up with the probability of its fractional part, so that ``E[Q(v)] = v``; for the L2
    norm ``E|Q(v) - v|^2 <= min(n / s^2, sqrt(n) / s) |v|^2`` (lemma 3.1).

    Attributes:
        levels: ``s``, 1 to 2**20.
        bucket: consecutive entries of a tensor that share a norm, 16 or more; 0 for the
            whole tensor.
        norm: "l2", or "max" as in the paper's experiments (section 4).
        elias: "sparse" codes the distance to the next non-zero, its sign and its level
            (theorem 3.2); "dense" codes every level plus one, and signs where it is not zero
            (corollary 3.3, for ``s`` about ``sqrt(n)``); "auto" takes the shorter one.
        error_feedback: add what rounding changed to the next message. It makes the error of a
            sum vanish, but messages are then no unbiased estimates of their own tensors.

    >>> qsgd = Qsgd(levels=1, bucket=0)
    >>> payload, _ = qsgd.encode({"w": np.float32([3, -4])}, qsgd.init({"w": (2,)}), key=1)
    >>> qsgd.decode(payload)["w"].tolist()
    [0.0, -5.0]
    """

    name: ClassVar[str] = "qsgd"
    choices: ClassVar = {"norm": ("l2", "max"), "elias": ("auto", *_ELIAS)}

    levels: int = 8
    bucket: int = 512
    norm: str = "l2"
    elias: str = "auto"
    error_feedback: bool = False

    def _check(self) -> None:
        if not 1 <= self.levels <= _MAX_LEVELS:
            raise self._bad("levels", f"from 1 to {_MAX_LEVELS}")
        if self.bucket and not _MIN_BUCKET <= self.bucket < 1 << 32:
            raise self._bad("bucket", f"0 or a number of entries from {_MIN_BUCKET}")

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        values: dict[str, NDArray[np.int32]] = {}
        norms: list[NDArray[np.float32]] = []
        for name, tensor in tensors.items():
            size = np.abs(tensor.ravel(), dtype=np.float64)
            starts = np.arange(0, tensor.size, self.bucket or max(tensor.size, 1))
            mine = self._norms(size, starts, name)
            norms.append(mine)
            # What the receiver multiplies by, so that the mean is right with its rounding too.
            step = _steps(mine, self.levels).astype(np.float64)
            step[step == 0] = np.inf  # nothing, or too small for float32
            step = np.repeat(step, _lengths(tensor.size, self.bucket))
            level = (size / step + draws.uniform(name, tensor.size)).astype(np.int32)
            np.minimum(level, self.levels, out=level)  # by float32's rounding of norm and step
            values[name] = np.where(tensor.ravel() < 0, -level, level).reshape(tensor.shape)
        scales = np.concatenate([np.zeros(0, np.float32), *norms])
        return Quantised(values, scales, (self.levels, self.bucket))

    def _norms(
        self, size: NDArray[np.float64], starts: NDArray[np.int64], name: str
    ) -> NDArray[np.float32]:
        """Norm of every bucket, computed in float64 and rounded to float32."""
        if not len(starts):
            return np.zeros(0, np.float32)
        if self.norm == "l2":
            exact = np.sqrt(np.add.reduceat(size * size, starts))
        else:
            exact = np.maximum.reduceat(size, starts)
        with np.errstate(over="ignore"):
            norms = exact.astype(np.float32)
        if not np.isfinite(norms).all():
            raise OutOfRange(f"the norm of a bucket of tensor {name!r} is beyond float32")
        return norms

    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        head = self.levels.to_bytes(4, "little") + self.bucket.to_bytes(4, "little")
        norms = quantised.scales.astype("<f4").tobytes()
        if self.coding == "prunecast":
            scales = coded({"": quantised.scales})
            return head + len(scales).to_bytes(8, "little") + scales + coded(quantised.values)
        flat = concatenated(quantised.values, list(layout), np.int32)
        lengths = _all_lengths(layout, self.bucket)
        wanted = _ELIAS if self.elias == "auto" else (self.elias,)
        bodies = []
        if "sparse" in wanted:
            bodies.append(b"\0" + norms + write_sparse(flat, lengths))
        if "dense" in wanted:
            bodies.append(b"\1" + norms + write_dense(flat))
        return head + min(bodies, key=len)

    @classmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        levels, bucket = reader.unsigned(4), reader.unsigned(4)
        if not 1 <= levels <= _MAX_LEVELS or 0 < bucket < _MIN_BUCKET:
            raise MalformedPayload(f"{levels} levels in buckets of {bucket}")
        parameters, lengths = (levels, bucket), _all_lengths(layout, bucket)
        if coding == "prunecast":
            norms = _read_norms(reader, len(lengths), limits)
            values = decoded(reader.rest(), layout, "int32", limits)
            for value in values.values():
                if value.size and not -levels <= value.min() <= value.max() <= levels:
                    raise MalformedPayload(f"a level is above {levels}")
            return Quantised(values, norms, parameters)
        dense = reader.unsigned(1)
        if dense >= len(_ELIAS):
            raise MalformedPayload(f"unknown Elias code {dense}")
        norms = reader.scales(len(lengths))
        flat = read_dense(reader.rest(), lengths) if dense else read_sparse(reader, lengths)
        if len(flat) and int(np.abs(flat).max()) > levels:
            raise MalformedPayload(f"a level is above {levels}")
        return Quantised(split(flat, list(layout), layout), norms, parameters)

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        levels, bucket = quantised.parameters
        steps = _steps(quantised.scales, levels)
        arrays: Arrays = {}
        at = 0
        for name, value in quantised.values.items():
            lengths = _lengths(value.size, bucket)
            mine = np.repeat(steps[at : at + len(lengths)], lengths)
            arrays[name] = scaled(value.ravel(), mine).reshape(value.shape)
            at += len(lengths)
        return arrays


def _all_lengths(layout: Layout, bucket: int) -> NDArray[np.int64]:
    """Entries of each bucket of all tensors."""
    sizes = map(math.prod, layout.values())
    return np.concatenate([np.zeros(0, np.int64), *(_lengths(size, bucket) for size in sizes)])


def _lengths(size: int, bucket: int) -> NDArray[np.int64]:
    """Entries of each bucket of a tensor: all full but the last."""
    lengths = np.full(-(-size // (bucket or max(size, 1))), bucket or size)
    if size and bucket:
        lengths[-1] = (size - 1) % bucket + 1
    return lengths


def _steps(norms: NDArray[np.float32], levels: int) -> NDArray[np.float32]:
    return np.asarray(norms / np.float32(levels), np.float32)


def _read_norms(reader: Reader, count: int, limits: Limits) -> NDArray[np.float32]:
    data = reader.take(reader.unsigned(8))
    return checked_scales(decoded(data, {"": (count,)}, "float32", limits)[""])

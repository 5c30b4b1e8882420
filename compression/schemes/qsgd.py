"""Quantised SGD (Alistarh et al. 2017, "QSGD: Communication-Efficient SGD via Gradient
Quantization and Encoding", sections 3.1 and 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Limits

from .arithmetic import scaled
from .container import Reader
from .draws import Draws
from .errors import MalformedPayload, OutOfRange
from .interface import Quantised, Scheme
from .layout import Arrays, Layout, concatenated, split
from .levels import read_dense, read_sparse, write_dense, write_sparse
from .recoding import coded, decoded
from .state import State

__all__ = ["Qsgd"]

_MAX_LEVELS = 1 << 20
_MIN_BUCKET = 16  # so that norms stay small beside the tensors
_NORMS = ("l2", "max")
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
    number: ClassVar[int] = 3

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
        if self.norm not in _NORMS:
            raise self._bad("norm", " or ".join(map(repr, _NORMS)))
        if self.elias not in ("auto", *_ELIAS):
            raise self._bad("elias", "'auto', 'sparse' or 'dense'")

    def _buffers(self) -> tuple[str, ...]:
        return ("residual",) if self.error_feedback else ()

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
        lengths = np.concatenate(
            [np.zeros(0, np.int64), *(_lengths(size, self.bucket) for size in _sizes(layout))]
        )
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
        parameters = (levels, bucket)
        if coding == "prunecast":
            norms = _read_norms(reader, sum(_count(n, bucket) for n in _sizes(layout)), limits)
            values = decoded(reader.rest(), layout, "int32", limits)
            for value in values.values():
                if value.size and not -levels <= value.min() <= value.max() <= levels:
                    raise MalformedPayload(f"a level is above {levels}")
            return Quantised(values, norms, parameters)
        dense = reader.unsigned(1)
        if dense >= len(_ELIAS):
            raise MalformedPayload(f"unknown Elias code {dense}")
        norms = reader.scales(sum(_count(n, bucket) for n in _sizes(layout)))
        lengths = np.concatenate(
            [np.zeros(0, np.int64), *(_lengths(size, bucket) for size in _sizes(layout))]
        )
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


def _sizes(layout: Layout) -> list[int]:
    return [math.prod(shape) for shape in layout.values()]


def _count(size: int, bucket: int) -> int:
    """Number of buckets of a tensor."""
    return -(-size // (bucket or max(size, 1)))


def _lengths(size: int, bucket: int) -> NDArray[np.int64]:
    """Entries of each bucket of a tensor: all full but the last."""
    lengths = np.full(_count(size, bucket), bucket or size)
    if size and bucket:
        lengths[-1] = (size - 1) % bucket + 1
    return lengths


def _steps(norms: NDArray[np.float32], levels: int) -> NDArray[np.float32]:
    return np.asarray(norms / np.float32(levels), np.float32)


def _read_norms(reader: Reader, count: int, limits: Limits) -> NDArray[np.float32]:
    data = reader.take(reader.unsigned(8))
    norms = decoded(data, {"": (count,)}, "float32", limits)[""]
    if not (np.isfinite(norms) & (norms >= 0)).all():
        raise MalformedPayload("a norm is negative or no number")
    return norms

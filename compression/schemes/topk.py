"""Deep gradient compression (Lin et al. 2018, "Deep Gradient Compression: Reducing the
Communication Bandwidth for Distributed Training", sections 3.1 to 3.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Limits, MalformedPayload

from .container import Reader, coded, decoded
from .interface import Draws, Quantised, Scheme
from .layout import Arrays, Layout, State, added, concatenated, split, step_of
from .sparse import SCOPES, groups, kept, read_scope, restored, top_k

__all__ = ["TopK"]

_ZERO_RUN = 0xFFFF  # as many zeros, and no value after them: how a run beyond 16 bits goes on
_BITS = (8, 32)
_TOP = 127


@dataclass(frozen=True)
class TopK(Scheme):
    """The largest entries travel, the others wait and add up until they are large.

    With all options, step ``t`` does, for the new tensors ``g``::

        g = g * min(1, clip / sqrt(nodes) / |g|)      local clipping, over all tensors
        u = momentum * u + g                          momentum correction
        v = v + u                                     local accumulation
        send v where |v| is among the largest
        v = 0 there, and u = 0 there                  momentum factor masking

    Attributes:
        density: fraction of entries that are sent, in (0, 1].
        scope: "tensor" ranks the entries tensor by tensor (algorithm 1), "payload" all together.
        accumulate: keep in ``v`` what was not sent.
        momentum: factor of ``u``, in [0, 1); 0 sends accumulated tensors and not velocities.
            The receiver must then apply what it gets without a momentum of its own.
        factor_masking: clear ``u`` where something was sent.
        clip: L2 norm over all tensors above which they are scaled down, divided by the root of
            `nodes`; 0 does nothing.
        nodes: number of senders.
        warmup: messages in which the density falls exponentially to its final value: message
            ``t`` (from 1) has ``density ** (t / warmup)``; 0 for none.
        value_bits: 32 sends float32; 8 sends integers of -127 to 127 and one scale per group,
            and `accumulate` then keeps the rounding error too.

    >>> topk = TopK(density=0.5)
    >>> state = topk.init({"w": (4,)})
    >>> payload, state = topk.encode({"w": np.float32([1, -5, 3, 2])}, state, key=0)
    >>> topk.decode(payload)["w"].tolist()
    [0.0, -5.0, 3.0, 0.0]
    >>> payload, state = topk.encode({"w": np.float32([1, 0, 0, 1])}, state, key=0)
    >>> topk.decode(payload)["w"].tolist()
    [2.0, 0.0, 0.0, 3.0]
    """

    name: ClassVar[str] = "topk"
    number: ClassVar[int] = 1

    density: float = 0.01
    scope: str = "tensor"
    accumulate: bool = True
    momentum: float = 0.0
    factor_masking: bool = True
    clip: float = 0.0
    nodes: int = 1
    warmup: int = 0
    value_bits: int = 32

    def _check(self) -> None:
        if not 0 < self.density <= 1:
            raise self._bad("density", "above 0 and at most 1")
        if self.scope not in SCOPES:
            raise self._bad("scope", " or ".join(map(repr, SCOPES)))
        if not 0 <= self.momentum < 1:
            raise self._bad("momentum", "at least 0 and below 1")
        if self.momentum and not self.accumulate:
            raise self._bad("momentum", "0 without accumulate: it is velocities that accumulate")
        if self.clip < 0:
            raise self._bad("clip", "0 or a norm")
        if self.nodes < 1:
            raise self._bad("nodes", "at least 1")
        if self.warmup < 0:
            raise self._bad("warmup", "a number of messages")
        if self.value_bits not in _BITS:
            raise self._bad("value_bits", "8 or 32")

    def density_at(self, step: int) -> float:
        """Density of the message after `step` others (section 3.3, warm-up training).

        >>> [round(TopK(density=0.001, warmup=5).density_at(t), 4) for t in range(6)]
        [0.2512, 0.0631, 0.0158, 0.004, 0.001, 0.001]
        """
        if step + 1 >= self.warmup:
            return self.density
        return float(self.density ** ((step + 1) / self.warmup))

    def _buffers(self) -> tuple[str, ...]:
        if not self.accumulate:
            return ()
        return ("residual", "velocity") if self.momentum else ("residual",)

    def _accumulate(self, tensors: Arrays, state: State) -> dict[str, Arrays]:
        tensors = self._clipped(tensors)
        if not self.accumulate:
            return {"input": tensors}
        wanted = {"input": tensors}
        if self.momentum:
            wanted["velocity"] = added(tensors, state.buffers["velocity"], self.momentum)
        flow = wanted.get("velocity", tensors)
        wanted["residual"] = added(flow, state.buffers["residual"])
        return wanted

    def _clipped(self, tensors: Arrays) -> Arrays:
        if not self.clip:
            return tensors
        squares = [np.square(t, dtype=np.float64).sum() for t in tensors.values()]
        norm, most = math.sqrt(sum(squares)), self.clip / math.sqrt(self.nodes)
        if norm <= most:
            return tensors
        factor = np.float32(most / norm)
        return {name: np.asarray(t * factor, np.float32) for name, t in tensors.items()}

    def _remember(self, wanted: Mapping[str, Arrays], sent: Arrays) -> dict[str, Arrays]:
        buffers = super()._remember(wanted, sent)
        if self.momentum:
            velocity = wanted["velocity"]
            if self.factor_masking:
                velocity = {
                    name: np.where(sent[name] != 0, np.float32(0), u)
                    for name, u in velocity.items()
                }
            buffers["velocity"] = velocity
        return buffers

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        density = self.density_at(state.step)
        values: dict[str, NDArray[Any]] = {}
        scales: list[np.float32] = []
        for names in groups(state.layout, self.scope):
            flat = concatenated(tensors, names, np.float32)
            positions = top_k(flat, kept(len(flat), density))
            chosen = flat[positions]
            if self.value_bits == 32:
                sparse = np.zeros(len(flat), np.float32)
                sparse[positions] = chosen
            else:
                step = float(step_of(np.abs(chosen).max(initial=0), _TOP))
                scales.append(np.float32(step))
                sparse = np.zeros(len(flat), np.int8)
                if step:
                    sparse[positions] = np.rint(chosen.astype(np.float64) / step)
            values.update(split(sparse, names, state.layout))
        return Quantised(values, np.array(scales, np.float32), (SCOPES.index(self.scope),))

    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        head = bytes([SCOPES.index(self.scope), self.value_bits])
        head += quantised.scales.astype("<f4").tobytes()
        if self.coding == "prunecast":
            if self.value_bits == 8:
                return head + coded(quantised.values)
            masks = coded({name: value != 0 for name, value in quantised.values.items()})
            flat = concatenated(quantised.values, list(layout), np.float32)
            return head + len(masks).to_bytes(8, "little") + masks + coded({"": flat[flat != 0]})
        parts = [head]
        wire = "<f4" if self.value_bits == 32 else "<i1"
        for names in groups(layout, self.scope):
            flat = concatenated(quantised.values, names, np.dtype(wire).newbyteorder("="))
            positions = np.flatnonzero(flat)
            runs = _runs(positions)
            parts.append(len(runs).to_bytes(8, "little") + runs.astype("<u2").tobytes())
            parts.append(flat[positions].astype(wire).tobytes())
        return b"".join(parts)

    @classmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        scope, bits = reader.unsigned(1), reader.unsigned(1)
        grouped = groups(layout, read_scope(scope))
        if bits not in _BITS:
            raise MalformedPayload(f"values of {bits} bits")
        scales = reader.scales(len(grouped) if bits == 8 else 0)
        if coding == "prunecast":
            if bits == 8:
                dense = decoded(reader.rest(), layout, "int8", limits)
                return Quantised(dense, scales, (scope,))
            return Quantised(_read_floats(reader, layout, limits), scales, (scope,))
        wire = "<f4" if bits == 32 else "<i1"
        values: dict[str, NDArray[Any]] = {}
        for names in grouped:
            size = sum(math.prod(layout[name]) for name in names)
            positions = _positions(reader.array("<u2", reader.unsigned(8)), size)
            flat = np.zeros(size, np.dtype(wire).newbyteorder("="))
            flat[positions] = _finite(reader.array(wire, len(positions)))
            values.update(split(flat, names, layout))
        return Quantised(values, scales, (scope,))

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        if not len(quantised.scales):
            return {n: np.asarray(v, np.float32) for n, v in quantised.values.items()}
        return restored(quantised, layout)


def _runs(positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """Run lengths of zeros before each position, long ones cut into pieces of 65,535."""
    zeros = np.diff(positions, prepend=-1) - 1
    pieces = zeros // _ZERO_RUN
    runs = np.full(len(zeros) + int(pieces.sum()), _ZERO_RUN)
    runs[np.cumsum(pieces + 1) - 1] = zeros % _ZERO_RUN
    return runs


def _positions(runs: NDArray[np.uint16], size: int) -> NDArray[np.int64]:
    """Inverse of `_runs`.

    Raises:
        MalformedPayload: a position lies beyond `size`.
    """
    piece = runs == _ZERO_RUN
    steps = runs.astype(np.int64) + ~piece
    positions = np.cumsum(steps)[~piece] - 1
    if len(runs) and (piece[-1] or positions[-1] >= size):
        raise MalformedPayload("the run lengths reach beyond the tensors")
    return np.asarray(positions, np.int64)


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise MalformedPayload("a value is NaN or infinite")
    return values


def _read_floats(reader: Reader, layout: Layout, limits: Limits) -> dict[str, NDArray[Any]]:
    masks = decoded(reader.take(reader.unsigned(8)), layout, "bool", limits)
    mask = concatenated(masks, list(layout), np.bool_)
    flat = np.zeros(len(mask), np.float32)
    shape = (int(mask.sum()),)
    flat[mask] = _finite(decoded(reader.rest(), {"": shape}, "float32", limits)[""])
    return split(flat, list(layout), layout)

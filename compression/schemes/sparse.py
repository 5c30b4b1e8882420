"""The largest entries alone: sparse ternary and deep gradient compression.

Sattler et al. 2019 ("Robust and Communication-Efficient Federated Learning from Non-IID Data",
algorithm 1 and section VI) and Lin et al. 2018 ("Deep Gradient Compression: Reducing the
Communication Bandwidth for Distributed Training", sections 3.1 to 3.3).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Limits, MalformedPayload

from .bitcodes import MAX_PARAMETER, decode_gaps, encode_gaps, rice_parameter
from .container import Reader, coded, decoded
from .interface import Draws, Quantised, Scheme
from .layout import Arrays, Layout, State, added, concatenated, scaled, split, step_of, total_size

__all__ = ["Stc", "TopK", "top_k"]

SCOPES = ("tensor", "payload")
"""What an entry competes with: its own tensor, or all of them. The index is on the wire."""


def top_k(values: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Positions of the `count` largest magnitudes of a vector, in order, without zeros.

    Of equal magnitudes the first are taken, so that the selection is one of a kind.

    >>> top_k(np.array([1, -3, 0, 3, 3], np.float32), 2).tolist()
    [1, 3]
    """
    if not count:
        return np.zeros(0, np.int64)
    size = np.abs(values)
    threshold = np.partition(size, len(size) - count)[len(size) - count]
    above = np.flatnonzero(size > threshold)
    if not threshold:
        return above
    level = np.flatnonzero(size == threshold)[: count - len(above)]
    return np.sort(np.concatenate([above, level]))


@dataclass(frozen=True)
class _Sparse(Scheme):
    choices: ClassVar = {"scope": SCOPES}

    density: float = 0.01
    scope: str = "tensor"

    def _check(self) -> None:
        if not 0 < self.density <= 1:
            raise self._bad("density", "above 0 and at most 1")

    def density_at(self, step: int) -> float:
        """Density of the message after `step` others."""
        return self.density

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        values: dict[str, NDArray[Any]] = {}
        scales: list[NDArray[np.float32]] = []
        for names in _groups(state.layout, self.scope):
            flat = concatenated(tensors, names, np.float32)
            wanted = max(1, round(self.density_at(state.step) * len(flat)))
            count = min(len(flat), wanted)  # 0 of nothing
            positions = top_k(flat, count)
            chosen, scale = self._coarse(flat[positions], count)
            sparse = np.zeros(len(flat), chosen.dtype)
            sparse[positions] = chosen
            scales.append(scale)
            values.update(split(sparse, names, state.layout))
        all_scales = np.concatenate([np.zeros(0, np.float32), *scales])
        return Quantised(values, all_scales, (SCOPES.index(self.scope),))

    @abstractmethod
    def _coarse(
        self, chosen: NDArray[np.float32], count: int
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """What is sent of the largest entries of a group, and its scales, of which it has 0 or 1.

        Args:
            chosen: the entries, zeros left out.
            count: number of entries that were to be chosen.
        """

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        if not len(quantised.scales):  # these are the values
            return {n: np.asarray(v, np.float32) for n, v in quantised.values.items()}
        grouped = _groups(layout, SCOPES[quantised.parameters[0]])
        return {
            name: scaled(quantised.values[name], scale)
            for names, scale in zip(grouped, quantised.scales, strict=True)
            for name in names
        }


def _groups(layout: Layout, scope: str) -> list[Sequence[str]]:
    """Names of the tensors that are selected from together."""
    return [[name] for name in layout] if scope == "tensor" else [list(layout)]


def _read_groups(reader: Reader, layout: Layout) -> tuple[tuple[int], list[Sequence[str]]]:
    """The number of the scope, which comes first, and the groups that it makes."""
    scope = reader.unsigned(1)
    if scope >= len(SCOPES):
        raise MalformedPayload(f"unknown scope {scope}")
    return (scope,), _groups(layout, SCOPES[scope])


@dataclass(frozen=True)
class Stc(_Sparse):
    """The ``k = max(p n, 1)`` largest entries become ``+mu`` or ``-mu``, their mean magnitude.

    Their positions are Golomb coded with the best divisor for ``p`` and their signs take a bit
    each. What was dropped is added to the next message.

    Attributes:
        density: ``p``, the fraction of entries that are sent, in (0, 1].
        scope: "payload" ranks the entries of all tensors together and sends one ``mu``, as the
            paper's algorithm on the flattened update; "tensor" does it tensor by tensor.
        error_feedback: keep what was dropped (the paper's residual ``A``).

    >>> stc = Stc(density=0.25)
    >>> update = {"w": np.array([0.5, -4.0, 2.0, 0.1, 0.0, 0.2, 0.3, 0.1], np.float32)}
    >>> payload, state = stc.encode(update, stc.init({"w": (8,)}), key=0)
    >>> stc.decode(payload)["w"].tolist()
    [0.0, -3.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    >>> state.buffers["residual"]["w"][:3].tolist()
    [0.5, -1.0, -1.0]
    """

    name: ClassVar[str] = "stc"

    density: float = 0.01
    scope: str = "payload"
    error_feedback: bool = True

    def _coarse(
        self, chosen: NDArray[np.float32], count: int
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        mean = np.abs(chosen).sum(dtype=np.float64) / max(count, 1)
        return np.sign(chosen).astype(np.int8), np.array([mean], np.float32)

    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        head = bytes([SCOPES.index(self.scope)])
        if self.coding == "prunecast":
            return head + quantised.scales.astype("<f4").tobytes() + coded(quantised.values)
        parts = [head]
        for names, scale in zip(_groups(layout, self.scope), quantised.scales, strict=True):
            flat = concatenated(quantised.values, names, np.int8)
            positions = np.flatnonzero(flat)
            parameter = rice_parameter(len(positions) / len(flat)) if len(positions) else 0
            gaps = encode_gaps(np.diff(positions, prepend=-1), parameter)
            parts += [
                scale.astype("<f4").tobytes(),
                len(positions).to_bytes(8, "little"),
                bytes([parameter]),
                len(gaps).to_bytes(8, "little"),
                gaps,
                np.packbits(flat[positions] > 0).tobytes(),
            ]
        return b"".join(parts)

    @classmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        scope, grouped = _read_groups(reader, layout)
        if coding == "prunecast":
            scales = reader.scales(len(grouped))
            dense = decoded(reader.rest(), layout, "int8", limits)
            for name, array in dense.items():
                if array.size and not -1 <= array.min() <= array.max() <= 1:
                    raise MalformedPayload(f"tensor {name[:80]!r} is not ternary")
            return Quantised(dense, scales, scope)
        values: dict[str, NDArray[np.int8]] = {}
        scales_read = []
        for names in grouped:
            scales_read.append(reader.scales(1)[0])
            flat = np.zeros(total_size({name: layout[name] for name in names}), np.int8)
            count, parameter = reader.unsigned(8), reader.unsigned(1)
            if count > len(flat) or parameter > MAX_PARAMETER:
                raise MalformedPayload(f"{count} of {len(flat)} entries, divisor 2**{parameter}")
            golomb = reader.take(reader.unsigned(8))
            ternary = np.where(reader.bits(count), np.int8(1), np.int8(-1))
            done, last = 0, -1
            for gaps in decode_gaps(golomb, count, parameter, len(flat)):
                positions = last + np.cumsum(gaps)
                flat[positions] = ternary[done : done + len(gaps)]
                done, last = done + len(gaps), int(positions[-1])
            values.update(split(flat, names, layout))
        return Quantised(values, np.array(scales_read, np.float32), scope)


_ZERO_RUN = 0xFFFF  # as many zeros, and no value after them: how a run beyond 16 bits goes on
_BITS = (8, 32)
_TOP = 127


@dataclass(frozen=True)
class TopK(_Sparse):
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
    choices: ClassVar = {**_Sparse.choices, "value_bits": _BITS}

    accumulate: bool = True
    momentum: float = 0.0
    factor_masking: bool = True
    clip: float = 0.0
    nodes: int = 1
    warmup: int = 0
    value_bits: int = 32

    def _check(self) -> None:
        super()._check()
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

    def _coarse(
        self, chosen: NDArray[np.float32], count: int
    ) -> tuple[NDArray[Any], NDArray[np.float32]]:
        if self.value_bits == 32:
            return chosen, np.zeros(0, np.float32)
        step = step_of(np.abs(chosen).max(initial=0), _TOP).reshape(1)
        whole = np.rint(chosen.astype(np.float64) / (float(step[0]) or 1.0))
        return whole.astype(np.int8), step

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
        for names in _groups(layout, self.scope):
            flat = concatenated(quantised.values, names, np.dtype(wire).newbyteorder("="))
            positions = np.flatnonzero(flat)
            runs = _runs(positions)
            parts.append(len(runs).to_bytes(8, "little") + runs.astype("<u2").tobytes())
            parts.append(flat[positions].astype(wire).tobytes())
        return b"".join(parts)

    @classmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        scope, grouped = _read_groups(reader, layout)
        bits = reader.unsigned(1)
        if bits not in _BITS:
            raise MalformedPayload(f"values of {bits} bits")
        scales = reader.scales(len(grouped) if bits == 8 else 0)
        if coding == "prunecast":
            if bits == 8:
                dense = decoded(reader.rest(), layout, "int8", limits)
                return Quantised(dense, scales, scope)
            return Quantised(_read_floats(reader, layout, limits), scales, scope)
        wire = "<f4" if bits == 32 else "<i1"
        values: dict[str, NDArray[Any]] = {}
        for names in grouped:
            size = total_size({name: layout[name] for name in names})
            positions = _positions(reader.array("<u2", reader.unsigned(8)), size)
            flat = np.zeros(size, np.dtype(wire).newbyteorder("="))
            flat[positions] = _finite(reader.array(wire, len(positions)))
            values.update(split(flat, names, layout))
        return Quantised(values, scales, scope)


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

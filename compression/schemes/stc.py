"""Sparse ternary compression (Sattler et al. 2019, "Robust and Communication-Efficient Federated
Learning from Non-IID Data", algorithm 1 and section VI)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Limits, MalformedPayload

from .bitcodes import decode_gaps, encode_gaps, rice_parameter
from .container import Reader, coded, decoded
from .interface import Draws, Quantised, Scheme
from .layout import Arrays, Layout, State, concatenated, split
from .sparse import SCOPES, groups, kept, read_scope, restored, top_k

__all__ = ["Stc"]

_MAX_PARAMETER = 32


@dataclass(frozen=True)
class Stc(Scheme):
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
    number: ClassVar[int] = 2

    density: float = 0.01
    scope: str = "payload"
    error_feedback: bool = True

    def _check(self) -> None:
        if not 0 < self.density <= 1:
            raise self._bad("density", "above 0 and at most 1")
        if self.scope not in SCOPES:
            raise self._bad("scope", " or ".join(map(repr, SCOPES)))

    def _buffers(self) -> tuple[str, ...]:
        return ("residual",) if self.error_feedback else ()

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        values: dict[str, NDArray[np.int8]] = {}
        scales: list[np.float32] = []
        for names in groups(state.layout, self.scope):
            flat = concatenated(tensors, names, np.float32)
            count = kept(len(flat), self.density)
            positions = top_k(flat, count)
            total = np.abs(flat[positions]).sum(dtype=np.float64)
            scales.append(np.float32(total / max(count, 1)))
            ternary = np.zeros(len(flat), np.int8)
            ternary[positions] = np.sign(flat[positions])
            values.update(split(ternary, names, state.layout))
        return Quantised(values, np.array(scales, np.float32), (SCOPES.index(self.scope),))

    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        head = bytes([SCOPES.index(self.scope)])
        if self.coding == "prunecast":
            return head + quantised.scales.astype("<f4").tobytes() + coded(quantised.values)
        parts = [head]
        for names, scale in zip(groups(layout, self.scope), quantised.scales, strict=True):
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
        scope = reader.unsigned(1)
        grouped = groups(layout, read_scope(scope))
        if coding == "prunecast":
            scales = reader.scales(len(grouped))
            dense = decoded(reader.rest(), layout, "int8", limits)
            for name, array in dense.items():
                if array.size and not -1 <= array.min() <= array.max() <= 1:
                    raise MalformedPayload(f"tensor {name[:80]!r} is not ternary")
            return Quantised(dense, scales, (scope,))
        values: dict[str, NDArray[np.int8]] = {}
        scales_read = []
        for names in grouped:
            scales_read.append(reader.scales(1)[0])
            flat = np.zeros(sum(math.prod(layout[name]) for name in names), np.int8)
            count, parameter = reader.unsigned(8), reader.unsigned(1)
            if count > len(flat) or parameter > _MAX_PARAMETER:
                raise MalformedPayload(f"{count} of {len(flat)} entries, divisor 2**{parameter}")
            golomb = reader.take(reader.unsigned(8))
            ternary = np.where(reader.bits(count), np.int8(1), np.int8(-1))
            done, last = 0, -1
            for gaps in decode_gaps(golomb, count, parameter, len(flat)):
                positions = last + np.cumsum(gaps)
                flat[positions] = ternary[done : done + len(gaps)]
                done, last = done + len(gaps), int(positions[-1])
            values.update(split(flat, names, layout))
        return Quantised(values, np.array(scales_read, np.float32), (scope,))

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        return restored(quantised, layout)

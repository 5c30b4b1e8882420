"""IEEE 754 half precision (binary16), the plainest of the schemes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.codec import Limits

from .container import Reader
from .draws import Draws
from .errors import MalformedPayload, OutOfRange
from .interface import Quantised, Scheme
from .layout import Arrays, Layout, concatenated, split, total_size
from .recoding import coded, decoded
from .state import State

__all__ = ["Fp16"]

_OVERFLOW = ("error", "saturate")
_TOP = np.finfo(np.float16).max


@dataclass(frozen=True)
class Fp16(Scheme):
    """Every entry as IEEE half precision, rounded to nearest even as numpy does.

    Attributes:
        overflow: what happens to magnitudes that round beyond 65,504: "error", or "saturate",
            they become ±65,504.
        error_feedback: add what rounding changed to the next message.

    >>> fp16 = Fp16()
    >>> payload, _ = fp16.encode({"w": np.float32([0.1, 2])}, fp16.init({"w": (2,)}), key=0)
    >>> fp16.decode(payload)["w"].tolist()
    [0.0999755859375, 2.0]
    """

    name: ClassVar[str] = "fp16"
    number: ClassVar[int] = 7

    overflow: str = "error"
    error_feedback: bool = False

    def _check(self) -> None:
        if self.overflow not in _OVERFLOW:
            raise self._bad("overflow", " or ".join(map(repr, _OVERFLOW)))

    def _buffers(self) -> tuple[str, ...]:
        return ("residual",) if self.error_feedback else ()

    def _quantise(self, tensors: Arrays, state: State, draws: Draws) -> Quantised:
        values: dict[str, NDArray[np.float16]] = {}
        for name, tensor in tensors.items():
            with np.errstate(over="ignore", under="ignore"):
                half = tensor.astype(np.float16)
            if not np.isfinite(half).all():
                if self.overflow == "error":
                    raise OutOfRange(
                        f"tensor {name!r} reaches {float(np.abs(tensor).max()):g}, beyond half "
                        f"precision ({_TOP:g}); scale it, or choose overflow='saturate'"
                    )
                half = np.clip(half, -_TOP, _TOP)
            values[name] = half
        return Quantised(values, np.zeros(0, np.float32))

    def _write(self, quantised: Quantised, layout: Layout) -> bytes:
        if self.coding == "prunecast":
            return coded(quantised.values)
        return concatenated(quantised.values, list(layout), np.float16).astype("<f2").tobytes()

    @classmethod
    def _read(cls, reader: Reader, layout: Layout, coding: str, limits: Limits) -> Quantised:
        if coding == "prunecast":
            values = decoded(reader.rest(), layout, "float16", limits)
        else:
            flat = reader.array("<f2", total_size(layout))
            values = split(flat, list(layout), layout)
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise MalformedPayload(f"tensor {name[:80]!r} holds NaN or an infinity")
        return Quantised(values, np.zeros(0, np.float32))

    @classmethod
    def _restore(cls, quantised: Quantised, layout: Layout) -> Arrays:
        return {name: value.astype(np.float32) for name, value in quantised.values.items()}

"""Static entropy coding with each array's own histogram: what zeroth-order entropy costs really."""

from __future__ import annotations

import importlib
import importlib.metadata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cases import Case, from_arrays, sizes, to_arrays
from .coder import Absent, Array, Bound, NotApplicable

__all__ = ["ans_coder"]


def ans_coder() -> _Ans:
    """Asymmetric numeral systems of constriction (Bamler 2022)."""
    try:
        library = importlib.import_module("constriction")
    except ImportError as error:
        raise Absent("pip install constriction") from error
    version = importlib.metadata.version("constriction")
    return _Ans(
        "static ANS",
        f"constriction {version}, a histogram per array, histograms with zlib -9",
        library.stream,
    )


@dataclass(frozen=True)
class _Ans:
    name: str
    settings: str
    stream: Any

    def bind(self, case: Case) -> Bound:
        """See :class:`Coder`."""
        if case.kind.startswith("float"):
            raise NotApplicable
        return Bound(
            lambda: self._encode(to_arrays(case)),
            lambda data: from_arrays(case, self._decode(data, sizes(case))),
        )

    def _model(self, counts: NDArray[np.int64]) -> Any:
        return self.stream.model.Categorical(counts / counts.sum(), perfect=False)

    def _encode(self, arrays: Sequence[Array]) -> bytes:
        coder = self.stream.stack.AnsCoder()
        tables: list[NDArray[np.int64]] = []
        for a in reversed(arrays):  # the decoder reads a stack
            low = int(a.min(initial=0))
            dense = np.bincount((a - low).astype(np.int64))
            values = np.flatnonzero(dense)
            counts = dense[values]
            tables.append(
                np.concatenate([[len(values), -2 * low], np.diff(values, prepend=0), counts])
            )
            if len(values) > 1:
                index = np.zeros(len(dense), np.int32)
                index[values] = np.arange(len(values))
                coder.encode_reverse(index[a - low], self._model(counts))
        words = np.asarray(coder.get_compressed()).astype("<u4").tobytes()
        head = zlib.compress(_varints(np.concatenate(tables[::-1] or [np.zeros(0, int)])), 9)
        return len(head).to_bytes(4, "little") + head + words

    def _decode(self, data: bytes, counts: Sequence[int]) -> list[Array]:
        end = 4 + int.from_bytes(data[:4], "little")
        table = _integers(zlib.decompress(data[4:end]))
        coder = self.stream.stack.AnsCoder(np.frombuffer(data[end:], "<u4").astype(np.uint32))
        out: list[Array] = []
        at = 0
        for size in counts:
            count, low = int(table[at]), -int(table[at + 1]) // 2
            values = np.cumsum(table[at + 2 : at + 2 + count]) + low
            weights = table[at + 2 + count : at + 2 + 2 * count]
            at += 2 + 2 * count
            if count < 2:
                out.append(np.full(size, values[0] if count else 0, np.int32))
            else:
                index = coder.decode(self._model(weights), size)
                out.append(values[index].astype(np.int32))
        return out


def _varints(values: NDArray[np.int64]) -> bytes:
    """Non-negative integers, seven bits a byte."""
    parts = [(values >> shift) & 127 for shift in range(0, 63, 7)]
    used = np.maximum(1, sum((values >> s) > 0 for s in range(0, 63, 7)))
    grid = np.stack(parts, 1).astype(np.uint8)
    column = np.arange(len(parts))
    grid |= np.where(column < used[:, None] - 1, 128, 0).astype(np.uint8)
    return grid[column < used[:, None]].tobytes()


def _integers(data: bytes) -> NDArray[np.int64]:
    raw = np.frombuffer(data, np.uint8)
    last = np.flatnonzero(raw < 128)
    first = np.concatenate([[0], last[:-1] + 1]) if len(last) else last
    place = np.arange(len(raw)) - np.repeat(first, last - first + 1)
    parts = (raw & 127).astype(np.int64) << (7 * place)
    return np.add.reduceat(parts, first) if len(first) else np.zeros(0, np.int64)

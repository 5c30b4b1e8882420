"""NNCodec's DeepCABAC: the arithmetic coder of ISO/IEC 15938-17, on given integers."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cases import Case
from .coder import Absent, Array, Bound, NotApplicable

__all__ = ["nnc_coder"]

_PROFILE, _ROW_SKIP, _OPTIMISE, _NO_TRELLIS, _ROW_MAJOR = 1, 1, 1, 0, 0
# Flags of a decision each that come before escape codes: NNCodec's default, and a higher number
# that suits the wide values of pruned weights. A stream's header states the number.
_UNARY = (11, 21)


def nnc_coder() -> _Nnc:
    """The coder alone: no quantiser of its own, no headers of its bitstream."""
    try:
        library = importlib.import_module("nncodec.extensions.deepCABAC")
    except ImportError as error:
        raise Absent(f"pip install --no-deps nncodec ({error})") from error
    version = importlib.metadata.version("nncodec")
    return _Nnc(
        "NNCodec",
        f"nncodec {version}: DeepCABAC, row skipping, optimised context states, "
        f"temporal contexts or not and {_UNARY[0]} or {_UNARY[1]} unary flags, whichever is "
        "smaller; only entries under a mask; headers not counted",
        library,
    )


@dataclass(frozen=True)
class _Nnc:
    name: str
    settings: str
    library: Any

    def bind(self, case: Case) -> Bound:
        """See :class:`Coder`."""
        if case.kind.startswith("float"):
            raise NotApplicable
        arrays, bases = _arrays(case)
        choices = [(known, n) for known in (False, True) for n in _UNARY]
        if all(b is None for b in bases):
            choices = [choice for choice in choices if not choice[0]]
        known, unary = min(choices, key=lambda choice: len(self._encode(arrays, bases, *choice)))
        return Bound(
            lambda: self._encode(*_arrays(case), known, unary),
            lambda data: self._decode(data, case, known, unary),
        )

    @property
    def _off(self) -> tuple[Any, Array]:
        return self.library.HdspMode.AlwaysOff, np.zeros(2, np.int8)

    def _encode(
        self, arrays: Sequence[Array], bases: Sequence[Array | None], known: bool, unary: int
    ) -> bytes:
        coder = self.library.Encoder()
        for q, base in zip(arrays, bases, strict=True):
            coder.initCtxModels(unary, _OPTIMISE)
            used = np.any(q.reshape(len(q), -1), axis=1) if q.ndim > 1 else np.ones(len(q), bool)
            empty = np.logical_not(used).astype(np.int32)
            temporal = known and base is not None
            rest = (_PROFILE, int(temporal), _ROW_SKIP, empty, *self._off, 0, 0)
            if temporal:
                coder.encodeLayer2(q, base, _NO_TRELLIS, _ROW_MAJOR, *rest)
            else:
                coder.encodeLayer(q, _NO_TRELLIS, _ROW_MAJOR, *rest)
        return bytes(coder.finish())

    def _decode(self, data: bytes, case: Case, known: bool, unary: int) -> list[Array]:
        coder = self.library.Decoder()
        coder.setStream(np.frombuffer(data, np.uint8))
        out = []
        for name, like in case.tensors.items():
            mask, base = case.known(name)
            shape = like.shape if mask is None else (int(np.count_nonzero(mask)),)
            q: Array = np.zeros(shape, np.int32)
            if q.size:
                coder.initCtxModels(unary)
                temporal = known and base is not None
                rest = (_PROFILE, int(temporal), *self._off, 0, 0)
                if temporal:
                    coder.decodeLayer2(q, _base(base, mask), _NO_TRELLIS, _ROW_MAJOR, *rest)
                else:
                    coder.decodeLayer(q, _NO_TRELLIS, _ROW_MAJOR, *rest)
            if mask is not None:
                whole = np.zeros(like.shape, np.int32)
                whole[mask] = q
                q = whole
            out.append(q)
        coder.finish()
        return out


def _arrays(case: Case) -> tuple[list[Array], list[Array | None]]:
    """Tensors, or their entries under the mask; with previous values where there are any."""
    arrays: list[Array] = []
    bases: list[Array | None] = []
    for name, values in case.tensors.items():
        mask, base = case.known(name)
        if mask is not None:
            values = values[mask]
        if values.size:
            arrays.append(np.ascontiguousarray(values, np.int32))
            bases.append(_base(base, mask))
    return arrays, bases


def _base(previous: Array | None, mask: Array | None) -> Array | None:
    if previous is None:
        return None
    return np.ascontiguousarray(previous if mask is None else previous[mask], np.int32)

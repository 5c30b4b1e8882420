"""What of the encoder touches every value, apart from what it decides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .container.head import Body, Segment
from .entropy.lanes import SymbolStream, write_segment
from .entropy.rans import RansTables
from .entropy.symbols import Symbols
from .entropy.tokens import TokenScheme
from .modelling.classes import FieldCode
from .modelling.copies import find_copies
from .modelling.fields import Field, split_tensor, to_z
from .modelling.observed import Observed, ObservedArray
from .modelling.parts import histogram, split_phases, symbols_of

__all__ = ["Engine"]


class Engine:
    """Passes over the values in numpy. All decisions are the encoder's, made on what these return.

    A subclass that makes them elsewhere and gives the same answers makes the same bytes; what it
    returns for values, parts and streams is handed back to it alone.
    """

    def split(self, array: Any, fields: list[Field]) -> Iterator[Any]:
        """Yield each field's values, as :func:`split_tensor`."""
        return split_tensor(array, fields)

    def copies(self, array: Any) -> tuple[Any, Any] | None:
        """Return references and the rows kept, as :func:`find_copies`."""
        return find_copies(array)

    def byte_counts(self, v: Any, step: int) -> NDArray[np.int64]:
        """Count every step-th value of a plane, [256], from -128 on."""
        return np.bincount(v[::step] + 128, minlength=256)

    def bounds(self, v: Any) -> tuple[int, int]:
        """Least and greatest value."""
        return int(v.min()), int(v.max())

    def median(self, v: Any, step: int) -> int:
        """Return the upper median of every step-th value."""
        sample = np.sort(v[::step])
        return int(sample[len(sample) // 2])

    def to_z(self, v: Any, centre: int, f: Field) -> Any:
        """Zigzag of ``v - centre``."""
        z = to_z(v, centre, f)
        # Four of the planes take the place of one float.
        return z if f.plane is None else z.astype(np.uint8)

    def every(self, zs: Sequence[Any], step: int) -> NDArray[Any]:
        """Every step-th value of each, as zigzag (unsigned), one after the other."""
        parts = [z[::step] for z in zs]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def stored(self, v: Any) -> bytes:
        """Return a plane's bytes as they are."""
        return bytes(v.astype(np.int8).tobytes())

    def observe(self, f: Field, z: Any) -> Observed:
        """Return what the plan asks of a field's values."""
        return ObservedArray(f, z)

    def phases(self, f: Field, code: FieldCode, z: Any) -> list[Any]:
        """Return a field's parts, as :func:`split_phases`."""
        return split_phases(f, code, z)

    def histogram(self, parts: list[Any], scheme: TokenScheme) -> NDArray[np.int64]:
        """Count tokens by raw context, as :func:`histogram`."""
        return histogram(parts, scheme)

    def symbols(self, body: Body, parts: list[Any]) -> tuple[Symbols, NDArray[np.uint8]]:
        """Symbols of a segment and the clusters of its dense ones, in numpy arrays."""
        return symbols_of(parts)

    def stream(self, body: Body, parts: list[Any]) -> Any:
        """Tokens and raw bits of a segment, as :class:`SymbolStream`."""
        return SymbolStream(body, *symbols_of(parts))

    def write(
        self, tables: RansTables, streams: list[Any], lanes: list[int], segments: list[Segment]
    ) -> list[bytes]:
        """Code all segments; complete their directory entries and return their bytes."""
        return [write_segment(tables, *each) for each in zip(streams, lanes, segments, strict=True)]

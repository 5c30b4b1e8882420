"""encode: tensors on a device to one payload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from prunecast.compression.codec.container.head import Body, Segment
from prunecast.compression.codec.context import Context
from prunecast.compression.codec.encoder import encode_with
from prunecast.compression.codec.engine import Engine
from prunecast.compression.codec.entropy import symbols as codec_symbols
from prunecast.compression.codec.entropy.rans import RansTables
from prunecast.compression.codec.entropy.tokens import TokenScheme
from prunecast.compression.codec.modelling.classes import ACTIVITIES, FieldCode, phase_slice
from prunecast.compression.codec.modelling.fields import PREVIOUS_CLASSES, Field
from prunecast.compression.codec.modelling.observed import Observed, ObservedArray

from .arrays import download, spec_of, upload
from .classes import Classifier, flip_signs, neighbour_sums
from .copies import find_copies
from .fields import split_tensor, to_z
from .integers import unsigned_max
from .known import KnownTensors
from .observed import ObservedTensor
from .segments import TokenStream, write_segments
from .symbols import Placement, Symbols, collect
from .tokens import tokens_of

__all__ = ["TorchEngine", "encode"]

_SMALL = 1 << 12
"""Values that are planned in numpy: hundreds of launches would take longer."""
_RAW = PREVIOUS_CLASSES * ACTIVITIES
_RAW_TABLE = np.arange(_RAW, dtype=np.int16).reshape(PREVIOUS_CLASSES, ACTIVITIES)


def encode(
    tensors: Mapping[str, torch.Tensor],
    *,
    device: torch.device | str,
    context: Context | None = None,
) -> bytes:
    """Return the bytes that the codec's own ``encode`` returns for these tensors, made by torch.

    Args:
        tensors: name to dense tensor of any shape, wherever it is: bool, int8 to int64, uint8 to
            uint64, float16 to float64.
        device: where the work is done, ``"cuda"`` or ``"cpu"``, say.
        context: what both sides know; see the codec's class.

    Raises:
        UnsupportedDtype: a tensor has another dtype, or is sparse.
        UnsupportedShape: a tensor has more than 32 dimensions, and the context no layout.
        TensorMismatch: a tensor contradicts the context.
        MaskViolation: a tensor is non-zero where the mask is False.

    >>> from prunecast.compression.accelerated import decode
    >>> payload = encode({"w": torch.tensor([[0, -3], [1, 0]])}, device="cpu")
    >>> decode(payload, device="cpu")["w"].tolist()
    [[0, -3], [1, 0]]
    """
    specs = {name: spec_of(name, tensor) for name, tensor in tensors.items()}
    return encode_with(TorchEngine(torch.device(device)), tensors, specs, context or Context())


class _Part:
    """One phase of one field: values (as zigzag) and raw contexts, then clusters."""

    def __init__(self, z: torch.Tensor, raw: torch.Tensor) -> None:
        self.z, self.raw = z, raw
        self.clusters = raw[:0].to(torch.uint8)
        self.work = 0
        """Symbols to code, about, once it is placed."""

    def place(self, table: NDArray[np.uint8], sparse: NDArray[np.bool_]) -> None:
        """Look up clusters and let go of the raw contexts."""
        device = self.z.device
        self.clusters = upload(table, device).index_select(0, self.raw.to(torch.int32))
        self.raw = self.raw[:0]
        skips = upload(sparse, device).index_select(0, self.clusters.to(torch.int32))
        skipped = int(torch.count_nonzero(skips))
        nonzero = int(torch.count_nonzero(self.z)) if skipped else 0
        self.work = len(self.z) - skipped + 2 * nonzero

    def release(self) -> None:
        """Let go of the tensors."""
        self.z, self.clusters = self.z[:0].clone(), self.clusters[:0].clone()


class TorchEngine(Engine):
    """The codec's encoder on tensors of one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = KnownTensors(device)

    def split(self, array: Any, fields: list[Field]) -> Iterator[torch.Tensor]:
        """Yield each field's values, int64."""
        return split_tensor(array, fields, self._known.of(fields[0]))

    def copies(self, array: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return references and the rows kept, where rows repeat earlier ones."""
        return find_copies(array, self._device)

    def byte_counts(self, v: Any, step: int) -> NDArray[np.int64]:
        """Count every step-th value of a plane, [256], from -128 on."""
        return download(torch.bincount(v[::step] + 128, minlength=256))

    def bounds(self, v: Any) -> tuple[int, int]:
        """Least and greatest value."""
        least, most = torch.aminmax(v)
        return int(least), int(most)

    def median(self, v: Any, step: int) -> int:
        """Return the upper median of every step-th value."""
        sample = torch.sort(v[::step]).values
        return int(sample[len(sample) // 2])

    def every(self, zs: Sequence[Any], step: int) -> NDArray[Any]:
        """Every step-th value of each, as zigzag, one after the other."""
        return download(torch.cat([z[::step].to(torch.int64) for z in zs])).view(np.uint64)

    def to_z(self, v: Any, centre: int, f: Field) -> torch.Tensor:
        """Zigzag of ``v - centre``."""
        z = to_z(v, centre, f)
        # Four of the planes take the place of one float.
        return z if f.plane is None else z.to(torch.uint8)

    def stored(self, v: Any) -> bytes:
        """Return a plane's bytes as they are."""
        return bytes(download(v.to(torch.int8)).tobytes())

    def observe(self, f: Field, z: Any) -> Observed:
        """Return what the plan asks of a field's values."""
        if len(z) <= _SMALL:
            return ObservedArray(f, download(z.to(torch.int64)).view(np.uint64))
        return ObservedTensor(f, z, self._known.of(f))

    def phases(self, f: Field, code: FieldCode, z: Any) -> list[_Part]:
        """Return a field's parts."""
        look = Classifier(f, code, self._known.of(f))
        parts = []
        for phase in range(1 + code.depth):
            part, around = z[phase_slice(code.depth, phase)], None
            if phase:
                around = neighbour_sums(z, code.depth, phase)
                part = flip_signs(part, around, f.width)
            parts.append(_Part(part, look.look_up(_RAW_TABLE, phase, around)))
        return parts

    def histogram(self, parts: list[Any], scheme: TokenScheme) -> NDArray[np.int64]:
        """Count tokens by raw context, [16 * 64, tokens]."""
        largest = max(unsigned_max(part.z) for part in parts if len(part.z))
        shift = (scheme.alphabet(largest) - 1).bit_length()
        counts = torch.zeros(_RAW << shift, dtype=torch.int64, device=self._device)
        for part in parts:
            key = part.raw.to(torch.int64) << shift
            key |= tokens_of(part.z, scheme)
            counts += torch.bincount(key, minlength=_RAW << shift)
        return download(counts).reshape(_RAW, -1)

    def _collected(
        self, parts: list[Any], sparse: NDArray[np.bool_]
    ) -> tuple[Symbols, torch.Tensor]:
        clusters = torch.cat([part.clusters for part in parts])
        placement = Placement.of(clusters, sparse)
        z = torch.cat([part.z.to(torch.int64) for part in parts])
        return collect(placement, z), placement.dense_cluster

    def symbols(
        self, body: Body, parts: list[Any]
    ) -> tuple[codec_symbols.Symbols, NDArray[np.uint8]]:
        """Symbols of a segment and the clusters of its dense ones, in numpy arrays."""
        found, dense_cluster = self._collected(parts, body.sparse)
        dense, gaps, values = (download(t) for t in (found.dense, found.gaps, found.values))
        symbols = codec_symbols.Symbols(
            dense.view(np.uint64), found.counts, gaps, values.view(np.uint64)
        )
        return symbols, download(dense_cluster)

    def stream(self, body: Body, parts: list[Any]) -> TokenStream:
        """Tokens and raw bits of a segment."""
        return TokenStream(body, *self._collected(parts, body.sparse))

    def write(
        self, tables: RansTables, streams: list[Any], lanes: list[int], segments: list[Segment]
    ) -> list[bytes]:
        """Code all segments; complete their directory entries and return their bytes."""
        return write_segments(tables, streams, lanes, segments, self._device)

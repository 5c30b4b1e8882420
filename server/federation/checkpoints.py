"""Checkpoints: the master weights and where their stream of versions stands, in one file.

The file is an ordinary safetensors file of the master weights, so every tool reads it; what a
resumed run needs beside them is in its metadata. Nodes of a resumed run start with a keyframe,
since Flower gives it a new run id.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.documents import from_document
from prunecast.common.files import replacing
from prunecast.compression.pruning.channels import ChannelPlan
from prunecast.server.federation.errors import CheckpointError
from prunecast.server.federation.progress import Progress
from prunecast.server.federation.pruner import MaskState

__all__ = ["Checkpoint"]

_METADATA = "prunecast"
_SCHEMA = 7
_MASK, _EARLY = "prunecast.mask.", "prunecast.early."  # before names of tensors
_KNOWN, _SUM = "prunecast.statistic.", "prunecast.sum."
_WIDTH = "prunecast.width."
_OF = "/"  # between a statistic or class and its tensor


@dataclass(frozen=True)
class _Metadata:
    schema: int
    counter: int
    steps: dict[str, float]
    clock: int
    progress: tuple[float, ...]
    key: str
    order: tuple[str, ...]
    stage: float
    masks: tuple[str, ...]
    early: tuple[str, ...]
    known: tuple[str, ...]
    accumulated: tuple[str, ...]
    moved: int
    searched: tuple[float, ...]
    channels: str
    widths: tuple[str, ...]
    tried: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """State of one stream.

    Attributes:
        arrays: master weights, name to array.
        counter: number of the version last published.
        steps: lattice step per tensor.
        clock: round of the pruning schedule that the arrays are published in, counted from 1.
        progress: of pruning that follows learning, see `Progress.position`; empty for none.
        masks: those that are held, and what is kept for later events; in the file as tensors whose
            names begin with ``prunecast.``.
        searched: where automatic pruning stands; empty for none.
        key: record key of the stream.
        channels: which channels remain of the module that everybody's code makes; None for all.
        widths: running statistics of each width class, by class and tensor.
        tried: of these, which remain where automatic pruning tries how many; by plan.
    """

    arrays: Mapping[str, NDArray[Any]]
    counter: int
    steps: Mapping[str, float]
    clock: int = 0
    progress: tuple[float, ...] = ()
    masks: MaskState = field(default_factory=MaskState)
    searched: tuple[float, ...] = ()
    key: str = "arrays"
    channels: ChannelPlan | None = None
    widths: Mapping[str, Mapping[str, NDArray[Any]]] = field(default_factory=dict)
    tried: tuple[ChannelPlan, ...] = ()

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            StorageError: the file system refuses; an old file is untouched.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        steps, order = dict(self.steps), tuple(self.arrays)
        held, early, sums = self.masks.masks, self.masks.early, self.masks.accumulated
        known, widths = _joined(self.masks.known), _joined(self.widths)
        channels = "" if self.channels is None else self.channels.to_text()
        meta = _Metadata(
            *(_SCHEMA, self.counter, steps, self.clock, self.progress, self.key, order),
            *(self.masks.stage, tuple(held), tuple(early), tuple(known), tuple(sums)),
            self.masks.moved,
            *(self.searched, channels, tuple(widths)),
            tuple(plan.to_text() for plan in self.tried),
        )
        arrays = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        arrays |= {_EARLY + name: np.asarray(array, order="C") for name, array in early.items()}
        arrays |= {_KNOWN + name: np.asarray(array, order="C") for name, array in known.items()}
        arrays |= {_SUM + name: np.asarray(array, order="C") for name, array in sums.items()}
        arrays |= {_WIDTH + name: np.asarray(array, order="C") for name, array in widths.items()}
        arrays |= {_MASK + name: np.packbits(mask) for name, mask in held.items()}
        with replacing(Path(path)) as temporary:
            try:
                save_file(arrays, temporary, metadata={_METADATA: json.dumps(asdict(meta))})
            except SafetensorError as error:
                raise OSError(str(error)) from error

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a file that `save` wrote.

        Raises:
            CheckpointError: missing, damaged, or a safetensors file without our metadata.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                meta = from_document(_Metadata, json.loads((file.metadata() or {})[_METADATA]))
                arrays = {name: file.get_tensor(name) for name in meta.order}
                early = {name: file.get_tensor(_EARLY + name) for name in meta.early}
                masks = {
                    name: _mask(name, file.get_tensor(_MASK + name), arrays[name])
                    for name in meta.masks
                }
                known = _parted({n: file.get_tensor(_KNOWN + n) for n in meta.known})
                widths = _parted({n: file.get_tensor(_WIDTH + n) for n in meta.widths})
                sums = {n: _finite(n, file.get_tensor(_SUM + n)) for n in meta.accumulated}
            if meta.schema != _SCHEMA or meta.counter < 0 or meta.clock < 0:
                raise ValueError(f"schema {meta.schema} or counter {meta.counter} is not supported")
            if not all(math.isfinite(step) and step > 0 for step in meta.steps.values()):
                raise ValueError("a lattice step is not a positive number")
            if meta.progress:
                Progress(0, 0).resume(meta.progress)
            channels = ChannelPlan.from_text(meta.channels) if meta.channels else None
            tried = tuple(map(ChannelPlan.from_text, meta.tried))
            at = meta.counter, meta.steps, meta.clock, meta.progress
            state = MaskState(meta.stage, masks, early, known, sums, meta.moved)
            return cls(arrays, *at, state, meta.searched, meta.key, channels, widths, tried)
        except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is not a usable checkpoint ({error}): give a file that "
                "Checkpoint.save wrote"
            ) from error


def _joined(found: Mapping[str, Mapping[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    return {of + _OF + name: a for of, arrays in found.items() for name, a in arrays.items()}


def _parted(arrays: Mapping[str, NDArray[Any]]) -> dict[str, dict[str, NDArray[Any]]]:
    parted: dict[str, dict[str, NDArray[Any]]] = {}
    for joined, array in arrays.items():
        of, _, name = joined.partition(_OF)
        parted.setdefault(of, {})[name] = _finite(joined, array)
    return parted


def _mask(name: str, packed: NDArray[Any], array: NDArray[Any]) -> NDArray[np.bool_]:
    if packed.dtype != np.uint8 or packed.ndim != 1 or packed.size != -(-array.size // 8):
        raise ValueError(f"the mask of {name!r} is not of its shape")
    return np.unpackbits(packed, count=array.size).astype(bool).reshape(array.shape)


def _finite(name: str, array: NDArray[Any]) -> NDArray[Any]:
    if array.dtype.kind != "f" or not np.isfinite(array).all():
        raise ValueError(f"what is known of {name!r} is not finite")
    return array

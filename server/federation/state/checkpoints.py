"""Checkpoints: the master weights and where their stream of versions stands, in one file.

The file is an ordinary safetensors file of the master weights, so every tool reads it; what a
resumed run needs beside them is in its metadata, and in tensors whose names begin with
``prunecast.``. A checksum of every tensor tells a damaged file.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from prunecast.common.documents import from_document
from prunecast.common.files import replacing
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.server.federation.errors import CheckpointError
from prunecast.server.federation.publishing.masks.mask_state import MaskState
from prunecast.server.federation.publishing.masks.progress import Progress
from prunecast.server.federation.state.snapshots import Packer, Unpacker

__all__ = [
    "Checkpoint",
    "check_model_of",
    "forget_earlier",
    "newest_checkpoint",
    "note_attempt",
    "save_newest",
]

_METADATA, _STATE, _SUMS = "prunecast", "prunecast.state", "prunecast.sums"
_SCHEMA = 8
_MASK, _EARLY = "prunecast.mask.", "prunecast.early."  # before names of tensors
_KNOWN, _SUM = "prunecast.statistic.", "prunecast.sum."
_WIDTH = "prunecast.width."
_UNUSABLE = (
    *(OSError, ValueError, KeyError, RecursionError),
    *(TypeError, AttributeError, IndexError, CheckpointError),  # of a state that is none
)
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
        state: all that a run goes on with exactly, see
            `prunecast.server.federation.state.resuming`; None for what the other fields say alone.
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
    state: Mapping[str, Any] | None = None

    def save(self, path: Path) -> None:
        """Write one safetensors file, whole or not at all.

        Raises:
            StorageError: the file system refuses; an old file is untouched.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        steps, order = dict(self.steps), tuple(self.arrays)
        held, early, total = self.masks.masks, self.masks.early, self.masks.accumulated
        known, widths = _joined(self.masks.known), _joined(self.widths)
        channels = "" if self.channels is None else self.channels.to_text()
        meta = _Metadata(
            *(_SCHEMA, self.counter, steps, self.clock, self.progress, self.key, order),
            *(self.masks.stage, tuple(held), tuple(early), tuple(known), tuple(total)),
            self.masks.moved,
            *(self.searched, channels, tuple(widths)),
            tuple(plan.to_text() for plan in self.tried),
        )
        arrays = {name: np.asarray(array, order="C") for name, array in self.arrays.items()}
        arrays |= {_EARLY + name: np.asarray(array, order="C") for name, array in early.items()}
        arrays |= {_KNOWN + name: np.asarray(array, order="C") for name, array in known.items()}
        arrays |= {_SUM + name: np.asarray(array, order="C") for name, array in total.items()}
        arrays |= {_WIDTH + name: np.asarray(array, order="C") for name, array in widths.items()}
        arrays |= {_MASK + name: np.packbits(mask) for name, mask in held.items()}
        packer = Packer(arrays)
        told = {_METADATA: json.dumps(asdict(meta)), _STATE: json.dumps(packer.pack(self.state))}
        arrays |= packer.tensors
        sums = {name: _sum(array) for name, array in arrays.items()}
        sums |= {name: zlib.crc32(text.encode()) for name, text in told.items()}
        told[_SUMS] = json.dumps(sums)
        with replacing(Path(path)) as temporary:
            try:
                save_file(arrays, temporary, metadata=told)
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
                told = file.metadata() or {}
                meta = from_document(_Metadata, json.loads(told[_METADATA]))
                if meta.schema != _SCHEMA:
                    raise ValueError(f"schema {meta.schema} is not supported")
                sums = json.loads(told[_SUMS])
                for part in (_METADATA, _STATE):
                    if zlib.crc32(told[part].encode()) != sums[part]:
                        raise ValueError("its metadata are damaged")

                def tensor(name: str) -> NDArray[Any]:
                    found: NDArray[Any] = file.get_tensor(name)
                    if _sum(found) != sums[name]:
                        raise ValueError(f"tensor {name!r} is damaged")
                    return found

                arrays = {name: tensor(name) for name in meta.order}
                early = {name: tensor(_EARLY + name) for name in meta.early}
                masks = {
                    name: _mask(name, tensor(_MASK + name), arrays[name]) for name in meta.masks
                }
                known = _parted({n: tensor(_KNOWN + n) for n in meta.known})
                widths = _parted({n: tensor(_WIDTH + n) for n in meta.widths})
                total = {n: _finite(n, tensor(_SUM + n)) for n in meta.accumulated}
                whole = Unpacker(tensor).unpack(json.loads(told[_STATE]))
            if meta.counter < 0 or meta.clock < 0:
                raise ValueError(f"counter {meta.counter} is not supported")
            if not all(math.isfinite(step) and step > 0 for step in meta.steps.values()):
                raise ValueError("a lattice step is not a positive number")
            if meta.progress:
                Progress(0, 0).resume(meta.progress)
            channels = ChannelPlan.from_text(meta.channels) if meta.channels else None
            tried = tuple(map(ChannelPlan.from_text, meta.tried))
            at = meta.counter, meta.steps, meta.clock, meta.progress
            state = MaskState(meta.stage, masks, early, known, total, meta.moved)
            return cls(arrays, *at, state, meta.searched, meta.key, channels, widths, tried, whole)
        except (*_UNUSABLE, SafetensorError) as error:
            raise CheckpointError(
                f"{path} is not a usable checkpoint ({error}): give a file that "
                "Checkpoint.save wrote"
            ) from error


def save_newest(checkpoint: Checkpoint, path: Path, keep: int, *, instead: bool = False) -> None:
    """Write the newest checkpoint of a run; those before it go on under numbered names.

    At every moment there is a whole file, and `path` is the newest one.

    Args:
        checkpoint: the newest one.
        path: of the newest one; the one before it is ``<stem>-1<suffix>`` then, and so on.
        keep: how many there are in all, 1 or more.
        instead: take the place of the newest one, which is then no older one.

    Raises:
        StorageError: the file system refuses; the old files are there, but for the oldest, which
            makes room for a next try.
    """
    with suppress(OSError):  # the last try made that room; a link to the same file moves nothing
        instead = instead or path.samefile(earlier_checkpoint(path, 1))
    for number in range(keep - 1, 0, -1) if not instead else ():
        source = earlier_checkpoint(path, number - 1)
        beside = path.with_name(f".{path.name}.before")
        with suppress(OSError):  # then there is one fewer to fall back to
            beside.unlink(missing_ok=True)
            os.link(source, beside)  # so that `path` itself is always there
            os.replace(beside, earlier_checkpoint(path, number))
    checkpoint.save(path)


def earlier_checkpoint(path: Path, number: int) -> Path:
    """The file of the checkpoint that was written so many before the newest one."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path


def forget_earlier(path: Path) -> None:
    """Remove the checkpoints before the newest one."""
    number = 1
    while (found := earlier_checkpoint(path, number)).exists():
        with suppress(OSError):
            found.unlink()
        number += 1


def note_attempt(path: Path, attempt: int) -> None:
    """Let whichever earlier checkpoint is gone on from next know of an attempt.

    Nodes answer no attempt that is older than one they know, and take one that they know for the
    same.

    Args:
        path: of the newest checkpoint, which knows of it.
        attempt: how often the job was resumed.

    Raises:
        StorageError: the file system refuses; a file is as it was, or knows.
    """
    number = 1
    while (found := earlier_checkpoint(path, number)).exists():
        number += 1
        with suppress(CheckpointError, TypeError, KeyError):  # it is passed over then, too
            checkpoint = Checkpoint.load(found)
            state = dict(checkpoint.state or {})
            state["grid"] = {**state["grid"], "attempt": attempt}
            replace(checkpoint, state=state).save(found)


def check_model_of(checkpoint: Checkpoint, arrays: ArrayRecord, source: str) -> None:
    """See that a checkpoint is of the same model as the arrays that a run would begin with.

    Raises:
        CheckpointError: it is not.
    """
    given, channels = _shapes(arrays), checkpoint.channels
    found = _shapes(checkpoint.arrays if checkpoint.state is None else checkpoint.state["arrays"])
    if channels is not None and channels.fits(given):
        given = channels.shapes(given)
    if found != given:
        raise CheckpointError(
            f"{source} is of another model: its tensors are not those of the configured one"
        )


def _shapes(arrays: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in arrays.items()}


def newest_checkpoint(path: Path) -> Checkpoint | None:
    """The newest usable checkpoint of those that `save_newest` wrote; None where there is none.

    A damaged one is passed over with a warning.

    Raises:
        CheckpointError: there are some, and none is usable.
    """
    failure: CheckpointError | None = None
    number = 0
    while (found := earlier_checkpoint(path, number)).exists() or not number:
        number += 1
        if not found.exists():
            continue
        try:
            checkpoint = Checkpoint.load(found)
        except CheckpointError as error:
            log(WARNING, "%s; the checkpoint before it is used, if there is one", error)
            failure = failure or error
            continue
        return checkpoint
    if failure is not None:
        raise failure
    return None


def _sum(array: NDArray[Any]) -> int:
    return zlib.crc32(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)


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

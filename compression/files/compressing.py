"""Compress a checkpoint file, with the steps that a lossy one takes, and restore it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import remove_abandoned, replacing
from prunecast.compression.codec import (
    relative_error,
    spread,
    step_for_bits,
    step_for_error,
)
from prunecast.compression.files import FilesError, UnreadableFile, UnsupportedTensor
from prunecast.compression.files.archive import PART_BYTES, Archive, plan_parts
from prunecast.compression.files.formats import writable_format, write_tensors
from prunecast.compression.files.inspection import InspectedTensor, Inspection, Progress, own_limits
from prunecast.compression.files.onnx_skeleton import write_onnx
from prunecast.compression.files.parts import (
    Coded,
    keep,
    lattice_coding,
    open_part,
    pack_part,
    put_on_lattice,
    restore,
)
from prunecast.compression.files.tensors import FileSpec, FileTensor, TensorFile
from prunecast.compression.pruning.plan import is_named

__all__ = [
    "KEPT",
    "Lossy",
    "compress_file",
    "restore_file",
]

KEPT = ("*running_mean", "*running_var", "*num_batches_tracked")
"""Names that are never quantised: statistics, on which every output depends."""

_SMALLEST = 16  # elements; below, the step alone costs more than rounding saves
_VECTOR = 0.25  # biases and norms are few and sensitive: a finer lattice for them

Measure = Callable[[Mapping[str, Coded]], int]


@dataclass(frozen=True)
class Lossy:
    """How floating tensors are quantised; exactly one of step, error and bits.

    Attributes:
        step: lattice step of all tensors, in the unit of the values.
        error: relative L2 error, ``||x - restored|| / ||x||``, of every tensor by itself.
        bits: bits per parameter of the whole file; steps follow each tensor's standard deviation,
            and are four times finer for tensors of fewer than two dimensions.
        common: for `error` and `bits`, one step for all tensors instead; the error is then that
            of all together, before bfloat16 is rounded.
        dead_zone: part of a step, above 0 and up to 1, below which a magnitude is rounded down.
        kept: further name patterns that stay exact, see `KEPT`.
    """

    step: float | None = None
    error: float | None = None
    bits: float | None = None
    common: bool = False
    dead_zone: float = 0.5
    kept: Sequence[str] = ()

    def __post_init__(self) -> None:
        given = [v for v in (self.step, self.error, self.bits) if v is not None]
        if len(given) != 1:
            raise FilesError("give exactly one of step, error and bits")
        if not (math.isfinite(given[0]) and given[0] > 0):
            raise FilesError(f"step, error and bits are numbers above zero, not {given[0]}")

    def takes(self, name: str, spec: FileSpec) -> bool:
        """Whether a tensor is quantised: large enough, floating, and not to be kept."""
        kept = is_named(name, (*KEPT, *self.kept))
        return spec.floating and spec.size >= _SMALLEST and not kept


def _choose_steps(source: TensorFile, lossy: Lossy, measure: Measure) -> dict[str, float]:
    """The step of every tensor to be quantised; `measure` tells the whole file's bytes.

    Raises:
        UnsupportedTensor: a tensor to be quantised holds NaN or an infinity.
        QuantiseError: what is wanted cannot be had; the message says what can.
    """
    reals: dict[str, NDArray[Any]] = {}
    dtypes: dict[str, str] = {}
    steps: dict[str, float] = {}
    together = lossy.bits is not None or lossy.common
    for name, spec in source.specs.items():
        if not lossy.takes(name, spec):
            continue
        tensor = source[name]
        real = tensor.real()
        if not np.isfinite(real).all():
            raise UnsupportedTensor(
                f"tensor {name!r} holds NaN or an infinity and cannot be quantised; keep it as it "
                f"is with --keep {name!r}"
            )
        if lossy.step is not None:
            steps[name] = float(np.float32(lossy.step))
        elif together:
            reals[name], dtypes[name] = real, tensor.dtype
        else:
            steps[name] = _step_of_one(name, tensor, lossy)
    if not reals:
        if lossy.bits is not None:
            raise UnsupportedTensor(f"{source.path} holds no floats to quantise to so many bits")
        return steps
    if lossy.error is not None:
        return step_for_error(reals, lossy.error, dead_zone=lossy.dead_zone)

    def length(q: Mapping[str, NDArray[np.int32]], chosen: Mapping[str, float]) -> int:
        return measure({n: Coded(v, lattice_coding(dtypes[n]), chosen[n]) for n, v in q.items()})

    assert lossy.bits is not None
    return step_for_bits(
        reals,
        lossy.bits,
        dead_zone=lossy.dead_zone,
        relative_to=None if lossy.common else {n: _scale(x) for n, x in reals.items()},
        measure=length,
        parameters=source.size,
    )


def _scale(real: NDArray[Any]) -> float:
    unit = max(spread(real, "std"), 1e-3 * spread(real, "rms")) or 1.0
    return unit * (1.0 if real.ndim > 1 else _VECTOR)


def _step_of_one(name: str, tensor: FileTensor, lossy: Lossy) -> float:
    """Step at which a tensor's own error is at most the wanted one, after its dtype's rounding."""
    assert lossy.error is not None
    real, wanted = tensor.real(), lossy.error
    while True:
        step = step_for_error({name: real}, wanted, dead_zone=lossy.dead_zone)[name]
        coded = put_on_lattice(tensor, step, dead_zone=lossy.dead_zone, name=name)
        error = relative_error(real, restore(coded).real())
        if error <= lossy.error:
            return step
        wanted *= 0.99 * lossy.error / error  # bfloat16 rounds what the lattice gives


def compress_file(
    source: TensorFile,
    path: Path,
    *,
    lossy: Lossy | None = None,
    part_bytes: int = PART_BYTES,
    on_progress: Progress = lambda done, total, what: None,
) -> Inspection:
    """Write the tensors of a file as a compressed one, atomically.

    Every bit of every tensor is kept unless `lossy` says otherwise: each part is decoded again and
    compared before the file appears. One part after the other is
    held in memory, except with `Lossy.bits` or `Lossy.common`, which need all floats at once.

    Args:
        source: the tensors.
        path: the compressed file.
        lossy: how floating tensors are quantised; None keeps them.
        part_bytes: tensors of up to so many bytes together make one part.
        on_progress: told what is being done.

    Raises:
        FilesError, CodecError: a tensor cannot be read or coded.
        StorageError: the file system refuses.
    """
    plan = plan_parts(source.specs, part_bytes)
    total = source.nbytes
    steps: dict[str, float] = {}
    if lossy is not None:
        on_progress(0, total, "choosing steps")
        measure = _Measure(source, plan, lambda text: on_progress(0, total, text))
        steps = _choose_steps(source, lossy, measure)
    dead_zone = lossy.dead_zone if lossy else 0.5
    result, done = Inspection(), 0
    remove_abandoned(Path(path).parent, {Path(path).name})
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        for number, names in enumerate(plan):
            coded: dict[str, Coded] = {}
            seen: dict[str, InspectedTensor] = {}
            for name in names:
                on_progress(done, total, f"encoding {name}")
                tensor, step, error = source[name], steps.get(name), None
                if step is None:
                    coded[name] = keep(tensor)
                else:
                    coded[name] = put_on_lattice(tensor, step, dead_zone=dead_zone, name=name)
                    error = relative_error(tensor.real(), restore(coded[name]).real())
                seen[name] = InspectedTensor(source.specs[name], step=step, error=error)
                done += source.specs[name].nbytes
            metadata, graph = ({}, None) if number else (source.metadata, source.graph)
            payload = pack_part(
                coded, number=number, count=len(plan), metadata=metadata, graph=graph
            )
            on_progress(done, total, "verifying")
            _verify(payload, coded, graph)
            file.write(payload)
            result.add(payload, own_limits(), seen)
            on_progress(done, total, "")
    return result


def _verify(payload: bytes, coded: Mapping[str, Coded], graph: bytes | None) -> None:
    """Decode a part and compare every bit with what went into it.

    Raises:
        UnreadableFile: they differ, so that the file must not be written.
    """
    part = open_part(payload, own_limits())
    for name, tensor in coded.items():
        wanted, found = restore(tensor), part.load(name)
        same = found.spec == wanted.spec and np.array_equal(_bits(found), _bits(wanted))
        if not same:
            raise UnreadableFile(
                f"tensor {name!r} does not come back as it was: nothing was written; please "
                "report the file"
            )
    if part.graph != graph:
        raise UnreadableFile("the graph does not come back as it was: nothing was written")


def _bits(tensor: FileTensor) -> NDArray[np.uint8]:
    return np.ascontiguousarray(tensor.values).reshape(-1).view(np.uint8)


class _Measure:
    """Size of the whole file for given quantised tensors; parts without any are coded once."""

    def __init__(
        self, source: TensorFile, plan: list[list[str]], say: Callable[[str], None]
    ) -> None:
        self._source, self._plan, self._say = source, plan, say
        self._fixed: dict[int, int] = {}
        self._calls = 0

    def __call__(self, quantised: Mapping[str, Coded]) -> int:
        self._calls += 1
        total = 0
        for number, names in enumerate(self._plan):
            if number in self._fixed:
                total += self._fixed[number]
                continue
            coded = {n: quantised[n] if n in quantised else keep(self._source[n]) for n in names}
            whole = self._source
            metadata, graph = ({}, None) if number else (whole.metadata, whole.graph)
            length = len(
                pack_part(
                    coded, number=number, count=len(self._plan), metadata=metadata, graph=graph
                )
            )
            total += length
            if not any(name in quantised for name in names):
                self._fixed[number] = length
        bits = 8 * total / max(self._source.size, 1)
        self._say(f"try {self._calls}: {bits:.3g} bits per parameter")
        return total


def restore_file(
    archive: Archive, path: Path, *, on_progress: Progress = lambda done, total, what: None
) -> None:
    """Write a compressed file as ``.safetensors`` or ``.npz``, or as the ``.onnx`` it was.

    It is written whole or not at all.

    Raises:
        FilesError: it cannot be decoded, the format cannot hold a tensor, or it holds no graph.
        StorageError: the file system refuses.
    """
    total, done = archive.nbytes, 0
    tensors: dict[str, FileTensor] = {}
    for name, spec in archive.specs.items():
        on_progress(done, total, f"decoding {name}")
        tensors[name] = archive[name]
        done += spec.nbytes
    on_progress(total, total, f"writing {Path(path).name}")
    if writable_format(path) == ".onnx":
        if archive.graph is None:
            raise UnsupportedTensor(
                f"{archive.path} holds tensors without a graph: write .safetensors or .npz"
            )
        write_onnx(path, tensors, archive.graph)
    else:
        write_tensors(path, tensors, archive.metadata)

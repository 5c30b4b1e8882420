"""Compress a checkpoint file, and restore it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from prunecast.common.files import replacing
from prunecast.compression.codec import Limits, measure_costs, relative_error
from prunecast.compression.files.archive import PART_BYTES, Archive, plan_parts
from prunecast.compression.files.codings import Coded, keep, put_on_lattice, restore
from prunecast.compression.files.lossy import Lossy, choose_steps
from prunecast.compression.files.parts import held_name, pack_part
from prunecast.compression.files.sources import write_tensors
from prunecast.compression.files.tensors import FileSpec, FileTensor, TensorFile

__all__ = [
    "Compressed",
    "CompressedTensor",
    "Progress",
    "compress_file",
    "own_limits",
    "restore_file",
]

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes to do, and what is being done."""


@dataclass(frozen=True)
class CompressedTensor:
    """What became of one tensor.

    Attributes:
        spec: its dtype and shape.
        nbytes: what it costs in the compressed file.
        step: lattice step; None where it is exact.
        error: relative L2 error; None where it is exact.
    """

    spec: FileSpec
    nbytes: int
    step: float | None
    error: float | None


@dataclass(frozen=True)
class Compressed:
    """What `compress_file` wrote.

    Attributes:
        tensors: name to what became of it.
        nbytes: size of the file.
        parts: number of parts.
    """

    tensors: dict[str, CompressedTensor]
    nbytes: int
    parts: int

    @property
    def common(self) -> int:
        """Bytes that belong to no tensor."""
        return self.nbytes - sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def lossy(self) -> bool:
        """Whether any tensor was quantised."""
        return any(tensor.step is not None for tensor in self.tensors.values())


def compress_file(
    source: TensorFile,
    path: Path,
    *,
    lossy: Lossy | None = None,
    part_bytes: int = PART_BYTES,
    on_progress: Progress = lambda done, total, what: None,
) -> Compressed:
    """Write the tensors of a file as a compressed one, atomically.

    Every bit of every tensor is kept unless `lossy` says otherwise. One part after the other is
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
        steps = choose_steps(source, lossy, measure)
    dead_zone = lossy.dead_zone if lossy else 0.5
    tensors: dict[str, CompressedTensor] = {}
    nbytes = done = 0
    with replacing(Path(path)) as temporary, open(temporary, "wb") as file:
        for number, names in enumerate(plan):
            coded: dict[str, Coded] = {}
            errors: dict[str, float] = {}
            for name in names:
                on_progress(done, total, f"encoding {name}")
                tensor = source[name]
                if name not in steps:
                    coded[name] = keep(tensor)
                    continue
                coded[name] = put_on_lattice(tensor, steps[name], dead_zone=dead_zone, name=name)
                errors[name] = relative_error(tensor.real(), restore(coded[name]).real())
            payload = pack_part(
                coded, number=number, count=len(plan), metadata={} if number else source.metadata
            )
            file.write(payload)
            nbytes += len(payload)
            costs = measure_costs(payload, limits=own_limits()).tensors
            for name in names:
                spec, cost = source.specs[name], costs[held_name(name)].nbytes
                tensors[name] = CompressedTensor(spec, cost, steps.get(name), errors.get(name))
                done += spec.nbytes
            on_progress(done, total, "")
    return Compressed(tensors, nbytes, len(plan))


def own_limits() -> Limits:
    """Limits for what was coded here: none that matters."""
    return Limits(**dict.fromkeys((f.name for f in fields(Limits)), 1 << 62))


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
            metadata = {} if number else self._source.metadata
            length = len(pack_part(coded, number=number, count=len(self._plan), metadata=metadata))
            total += length
            if not any(name in quantised for name in names):
                self._fixed[number] = length
        bits = 8 * total / max(self._source.size, 1)
        self._say(f"try {self._calls}: {bits:.3g} bits per parameter")
        return total


def restore_file(
    archive: Archive, path: Path, *, on_progress: Progress = lambda done, total, what: None
) -> None:
    """Write the tensors of a compressed file as ``.safetensors`` or ``.npz``, atomically.

    Raises:
        FilesError: it cannot be decoded, or the format cannot hold a tensor.
        StorageError: the file system refuses.
    """
    total, done = archive.nbytes, 0
    tensors: dict[str, FileTensor] = {}
    for name, spec in archive.specs.items():
        on_progress(done, total, f"decoding {name}")
        tensors[name] = archive[name]
        done += spec.nbytes
    on_progress(total, total, f"writing {Path(path).name}")
    write_tensors(path, tensors, archive.metadata)

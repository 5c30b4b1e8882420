"""Prune a checkpoint that need not fit into memory: the same files with zeros, masks, a report.

Pruning changes neither dtypes nor shapes, so every byte stays where it is: files are copied, and
the weights that go become zero on the way. What is held at a time is a chunk of one tensor.
"""

from __future__ import annotations

import fnmatch
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from prunecast.common.files import StorageError, replacing
from prunecast.common.text import bytes_text
from prunecast.compression.files import CannotPrune, UnreadableFile
from prunecast.compression.files.checkpoints import Checkpoint, Extent
from prunecast.compression.files.inspection import Progress
from prunecast.compression.files.mask_files import MaskFile
from prunecast.compression.files.selection import (
    CHUNK,
    SCORED,
    Cut,
    Grouping,
    Part,
    Ranking,
    Run,
    one_after_the_other,
    read_part,
    select,
    stay,
)
from prunecast.compression.files.ties import tied_tensors
from prunecast.compression.pruning.allocation import kernel_numbers
from prunecast.compression.pruning.patterns import NOfM, parse_pattern
from prunecast.compression.pruning.plan import PruningPlan

__all__ = [
    "SPREADS",
    "PrunedTensor",
    "Pruning",
    "PruningResult",
    "Targets",
    "default_targets",
    "prune_checkpoint",
]

SPREADS = ("layer", "global", "erk")
"""Allocations that can be computed in pieces."""

_BLOCK = 1 << 23  # bytes copied at a time
_MOST_PARTS = 1024
_SMALLEST_PART = 16 * CHUNK
_MOST_DIMENSIONS = 32
_NEAR = 1e-6


@dataclass(frozen=True)
class Pruning:
    """How a checkpoint is pruned.

    Attributes:
        sparsity: share of the prunable weights that goes, 0 < sparsity < 1.
        criterion: one of `SCORED`.
        allocation: one of `SPREADS`.
        min_size: tensors with fewer elements stay whole.
        exclude: name patterns (shell style) of tensors that stay whole.
        adapters: whether low-rank factors may be pruned.
        seed: of the criterion "random".
        pattern: "N:M", such as "2:4", along the input channels; "" for single weights.

    Raises:
        CannotPrune: a value outside of its range.
    """

    sparsity: float
    criterion: str = "magnitude"
    allocation: str = "layer"
    min_size: int = PruningPlan.min_size
    exclude: tuple[str, ...] = ()
    adapters: bool = False
    seed: int = 0
    pattern: str = ""

    def __post_init__(self) -> None:
        try:
            pattern = parse_pattern(self.pattern)
        except ValueError as error:
            raise CannotPrune(str(error)) from error
        if isinstance(pattern, NOfM):
            if self.allocation != "layer":
                raise CannotPrune(
                    f"{self.pattern} is the same sparsity for every tensor: choose the allocation "
                    "layer"
                )
            if abs(self.sparsity - pattern.sparsity) > _NEAR:
                raise CannotPrune(
                    f"{self.pattern} comes to a sparsity of {pattern.sparsity:g}, not "
                    f"{self.sparsity:g}: give that, or none"
                )
        elif pattern is not None:
            raise CannotPrune(
                f"blocks such as {self.pattern} cannot be ranked in pieces: give N:M, or prune the "
                "module with prune_module"
            )
        if not 0 < self.sparsity < 1:
            raise CannotPrune(
                f"sparsity {self.sparsity:g} removes {'nothing' if self.sparsity <= 0 else 'all'}: "
                "give one above 0 and below 1"
            )
        if self.criterion not in SCORED:
            raise CannotPrune(
                f"a file does not hold what the criterion {self.criterion!r} needs: choose "
                f"{' or '.join(SCORED)}, or prune the module with prune_module and a loader"
            )
        if self.allocation not in SPREADS:
            raise CannotPrune(
                f"the allocation {self.allocation!r} cannot be computed in pieces: choose "
                f"{' or '.join(SPREADS)}, or prune the module with prune_module"
            )

    def prunable(self, checkpoint: Checkpoint) -> list[Extent]:
        """The tensors that may lose weights; norms, biases and adapters are not among them."""
        plan = PruningPlan(min_size=self.min_size, exclude=self.exclude, adapters=self.adapters)
        shapes = {
            t.name: np.broadcast_to(np.float32(0), t.spec.shape)  # takes no memory
            for t in checkpoint.tensors
            if len(t.spec.shape) <= _MOST_DIMENSIONS
        }
        names = plan.prunable(shapes)
        return [t for t in checkpoint.tensors if t.name in names and t.spec.floating]


@dataclass(frozen=True)
class PrunedTensor:
    """What became of one tensor.

    Attributes:
        dtype: by name.
        shape: of the tensor.
        removed: how many of its weights are zero now; 0 where it was left whole.
        prunable: whether it could lose any.
        same_as: the tensor that it is tied with, which counts instead of it; "" for none.
    """

    dtype: str
    shape: tuple[int, ...]
    removed: int
    prunable: bool
    same_as: str = ""

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Share of its weights that went."""
        return self.removed / max(1, self.size)


@dataclass(frozen=True)
class PruningResult:
    """What was written.

    Attributes:
        tensors: by name, in the order of the checkpoint.
        settings: that it was pruned by.
        nbytes: of the files, before and after: zeros take as much as other weights.
        outputs: the files of the checkpoint, the one that names the others first.
        passes: how often the prunable weights were read to choose, and once more to write.
    """

    tensors: Mapping[str, PrunedTensor]
    settings: Pruning
    nbytes: int
    outputs: Sequence[Path] = field(default_factory=list)
    passes: int = 0

    @property
    def prunable(self) -> int:
        """Weights that could be removed, tied ones once."""
        return sum(t.size for t in self.tensors.values() if t.prunable and not t.same_as)

    @property
    def removed(self) -> int:
        """Weights that were removed, tied ones once."""
        return sum(t.removed for t in self.tensors.values() if not t.same_as)

    @property
    def parameters(self) -> int:
        """Weights of all tensors, tied ones once."""
        return sum(t.size for t in self.tensors.values() if not t.same_as)


@dataclass(frozen=True)
class Targets:
    """Where it is written.

    Attributes:
        files: name of a file of the checkpoint to where its pruned copy goes.
        masks: the file of masks.
        report: the JSON that the caller writes.
    """

    files: Mapping[str, Path]
    masks: Path
    report: Path

    @property
    def all(self) -> list[Path]:
        """Every path, the file that names the others first."""
        return [*self.files.values(), self.masks, self.report]


def default_targets(checkpoint: Checkpoint, output: Path | None = None) -> Targets:
    """Where a pruned checkpoint goes.

    Args:
        checkpoint: one file, or several that keep their names in a folder of their own.
        output: the file, or for several files the folder; by default ``NAME.pruned.SUFFIX`` beside
            the checkpoint, or ``pruned/``.

    Raises:
        CannotPrune: it would overwrite the checkpoint itself, or is of another format.
    """
    path = checkpoint.path
    if len(checkpoint.files) == 1:
        whole = output or path.with_name(f"{path.stem}.pruned{path.suffix}")
        if whole.suffix.lower() != path.suffix.lower():
            raise CannotPrune(f"{whole}: a pruned {path.suffix} file is one again, name it so")
        files = {path.name: whole}
        masks, report = (whole.with_suffix(s) for s in (".masks.safetensors", ".report.json"))
    else:
        folder = output or path.parent / "pruned"
        if folder.suffix.lower() in (".safetensors", ".onnx", ".json"):
            raise CannotPrune(
                f"{folder}: the checkpoint has {len(checkpoint.files)} files, which keep their "
                "names: give a folder"
            )
        files = {name: folder / name for name in checkpoint.files}
        masks, report = folder / "pruning.masks.safetensors", folder / "pruning.report.json"
    own = {p.resolve() for p in checkpoint.files.values()}
    for target in (*files.values(), masks, report):
        if target.resolve() in own:
            raise CannotPrune(f"{target} is the checkpoint itself: give another --out")
    return Targets(files, masks, report)


def prune_checkpoint(
    checkpoint: Checkpoint,
    targets: Targets,
    settings: Pruning,
    *,
    run: Run = one_after_the_other,
    on_progress: Progress = lambda done, total, what: None,
) -> PruningResult:
    """Write a checkpoint with its least important weights set to zero, and their masks.

    All files appear together, after everything was written and synced; the one that names the
    others comes last. What fails or is interrupted leaves nothing behind.

    Args:
        checkpoint: the files; left as they are.
        targets: where the copies and the masks go. `Targets.report` is left to the caller.
        settings: what goes.
        run: how the work on parts of tensors is done, here or on other machines.
        on_progress: told bytes read and to be read.

    Raises:
        CannotPrune: nothing is prunable, a layer would vanish, tied weights would be pruned apart,
            a weight is not finite, or the disk is too small; nothing was written.
        FilesError: the checkpoint cannot be read.
        StorageError: the file system refuses.
    """
    chosen = settings.prunable(checkpoint)
    ties = tied_tensors(checkpoint, settings.min_size)
    _refuse_apart(settings, {t.name for t in chosen}, ties)
    if not chosen:
        raise CannotPrune(
            f"{checkpoint.path} has no tensor that may be pruned: none is a matrix or kernel of "
            f"floats with at least {settings.min_size} elements that no pattern excludes"
        )
    _refuse_without_room(checkpoint, targets, chosen)
    single = [t for t in chosen if t.name not in ties]
    if settings.pattern:
        return _by_pattern(checkpoint, targets, settings, chosen, ties, run, on_progress)
    parts = {t.name: _parts(checkpoint, t, _most(chosen)) for t in chosen}
    rankings = _rankings(single, settings)
    weights = sum(t.spec.nbytes for t in single)
    passes = max(-(-r.bits // 16) for r in rankings.values()) + 1
    progress = _Progress(on_progress, weights * passes + checkpoint.nbytes)
    cuts: dict[str, list[Cut]] = {}
    for group, remove in _groups(single, settings):
        joined = [part for tensor in group for part in parts[tensor.name]]
        progress.what = f"ranking {group[0].name}" if len(group) == 1 else "ranking all weights"
        found = iter(select(joined, remove, rankings[group[0].name], run, progress.add))
        for tensor in group:
            cuts[tensor.name] = [next(found) for _ in parts[tensor.name]]
    for copy, first in ties.items():
        if first in cuts:
            cuts[copy] = cuts[first]
            rankings[copy] = rankings[first]
    jobs = [
        _Write(part, rankings[t.name], cut, CHUNK)
        for t in chosen
        for part, cut in zip(parts[t.name], cuts[t.name], strict=True)
    ]
    _write(checkpoint, targets, chosen, jobs, run, progress)
    return _result(checkpoint, targets, settings, jobs, ties, passes + 1)


def _by_pattern(
    checkpoint: Checkpoint,
    targets: Targets,
    settings: Pruning,
    chosen: Sequence[Extent],
    ties: Mapping[str, str],
    run: Run,
    on_progress: Progress,
) -> PruningResult:
    """N of every M: each group by itself, so one pass is enough."""
    pattern = parse_pattern(settings.pattern)
    assert isinstance(pattern, NOfM)
    jobs = []
    for tensor in chosen:
        shape = tensor.spec.shape
        if misfit := pattern.misfit(shape if tensor.inputs == 1 else shape[1::-1]):
            raise CannotPrune(
                f"{settings.pattern} does not divide {tensor.name!r} of shape {list(shape)}: "
                f"{misfit}; leave it out with --exclude {tensor.name!r}"
            )
        row = math.prod(shape[1:])
        rows = 8 if tensor.inputs == 1 else math.lcm(8, pattern.of)
        step = row * rows
        chunk = max(step, CHUNK // step * step)
        ranking = Ranking.of([tensor.spec.dtype], settings.criterion, settings.seed)
        grouping = Grouping(pattern, shape[1:], tensor.inputs)
        for part in _parts(checkpoint, tensor, -(-_most(chosen) // chunk) * chunk):
            size = part.stop - part.start
            cut = Cut(0, 0, -1, size - size // pattern.of * pattern.kept)
            jobs.append(_Write(part, ranking, cut, chunk, grouping))
    weights = sum(t.spec.nbytes for t in chosen)
    progress = _Progress(on_progress, weights + checkpoint.nbytes)
    _write(checkpoint, targets, chosen, jobs, run, progress)
    return _result(checkpoint, targets, settings, jobs, ties, 1)


def _result(
    checkpoint: Checkpoint,
    targets: Targets,
    settings: Pruning,
    jobs: Sequence[_Write],
    ties: Mapping[str, str],
    passes: int,
) -> PruningResult:
    removed: dict[str, int] = {}
    for job in jobs:
        removed[job.part.name] = removed.get(job.part.name, 0) + job.cut.removed
    return PruningResult(
        {
            t.name: PrunedTensor(
                t.spec.dtype,
                t.spec.shape,
                removed.get(t.name, 0),
                t.name in removed,
                ties.get(t.name, ""),
            )
            for t in checkpoint.tensors
        },
        settings,
        checkpoint.nbytes,
        list(targets.files.values()),
        passes,
    )


# -- before anything is written -------------------------------------------------------------------


def _refuse_apart(settings: Pruning, chosen: set[str], ties: Mapping[str, str]) -> None:
    """Tied weights keep one mask, so all of their names are pruned or none is."""
    for copy, first in ties.items():
        excluded = [
            any(fnmatch.fnmatchcase(name, pattern) for pattern in settings.exclude)
            for name in (copy, first)
        ]
        if excluded[0] != excluded[1] and (first in chosen or copy in chosen or excluded[1]):
            raise CannotPrune(
                f"tied weights would be pruned apart: {first!r} and {copy!r} are the same, and "
                "only one of them is excluded; exclude both or neither"
            )


def _refuse_without_room(checkpoint: Checkpoint, targets: Targets, chosen: list[Extent]) -> None:
    folder = next(p for p in targets.masks.absolute().parents if p.exists())
    needed = checkpoint.nbytes + sum(-(-t.spec.size // 8) for t in chosen)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CannotPrune(
            f"{folder} has {bytes_text(free)} free and the pruned checkpoint takes "
            f"{bytes_text(needed)}: make room, or name another place with --out"
        )


def _most(chosen: Sequence[Extent]) -> int:
    """Weights of a part, so that parts are worth a task and are not too many; a multiple of 8."""
    return max(_SMALLEST_PART, -(-sum(t.spec.size for t in chosen) // _MOST_PARTS // 8) * 8)


def _parts(checkpoint: Checkpoint, tensor: Extent, most: int) -> list[Part]:
    path, size = checkpoint.file(tensor), tensor.spec.size
    return [
        Part(tensor.name, tensor.spec.dtype, path, tensor.offset, at, min(at + most, size))
        for at in range(0, size, most)
    ]


def _rankings(single: Sequence[Extent], settings: Pruning) -> dict[str, Ranking]:
    together = Ranking.of((t.spec.dtype for t in single), settings.criterion, settings.seed)
    if settings.allocation == "global":
        return {t.name: together for t in single}
    return {t.name: Ranking.of([t.spec.dtype], settings.criterion, settings.seed) for t in single}


def _groups(single: list[Extent], settings: Pruning) -> Iterator[tuple[list[Extent], int]]:
    """Tensors that are ranked together, and how many of their weights go.

    As `prunecast.compression.pruning.allocation` has it.
    """
    if settings.allocation == "layer":
        for tensor in single:
            yield [tensor], int(settings.sparsity * tensor.spec.size)
        return
    if settings.allocation == "erk":
        try:
            numbers = kernel_numbers({t.name: t.spec.shape for t in single}, settings.sparsity)
        except ValueError as error:
            raise CannotPrune(str(error)) from error
        for tensor in single:
            yield [tensor], tensor.spec.size - numbers[tensor.name]
        return
    total = sum(t.spec.size for t in single)
    remove = int(settings.sparsity * total)
    if total - remove < len(single):
        smallest = min(single, key=lambda t: t.spec.size)
        raise CannotPrune(
            f"sparsity {settings.sparsity:g} leaves {total - remove:,} of {total:,} weights for "
            f"{len(single)} tensors, so layers such as {smallest.name!r} would vanish: lower it, "
            "or exclude them"
        )
    yield single, remove


# -- writing --------------------------------------------------------------------------------------


@dataclass
class _Progress:
    """Bytes that were read, of all that will be."""

    tell: Progress
    total: int
    done: int = 0
    what: str = ""

    def add(self, count: int) -> None:
        self.done += count
        self.tell(self.done, self.total, self.what)


@dataclass(frozen=True)
class _Write:
    part: Part
    ranking: Ranking
    cut: Cut
    chunk: int
    grouping: Grouping | None = None
    target: Path = Path()
    masks: Path = Path()
    mask_offset: int = 0


def _write(
    checkpoint: Checkpoint,
    targets: Targets,
    chosen: Sequence[Extent],
    jobs: Sequence[_Write],
    run: Run,
    progress: _Progress,
) -> None:
    masks = MaskFile({t.name: t.spec.shape for t in chosen})
    with ExitStack() as files:
        # the first that is opened is the last to appear: the one that names the others
        made = {
            name: files.enter_context(replacing(target)) for name, target in targets.files.items()
        }
        temporary = files.enter_context(replacing(targets.masks))
        masks.begin(temporary)
        by_path = {checkpoint.files[name]: path for name, path in made.items()}
        for number, (name, source) in enumerate(checkpoint.files.items()):
            progress.what = f"writing {name}"
            held = [(t.offset, t.spec.nbytes) for t in chosen if t.file == number]
            _copy_between(source, made[name], held, progress.add)
        ready = [
            replace(
                job,
                target=by_path[job.part.path],
                masks=temporary,
                mask_offset=masks.places[job.part.name] + job.part.start // 8,
            )
            for job in jobs
        ]
        for job, removed in zip(ready, run(_write_part, ready), strict=True):
            if removed != job.cut.removed:
                raise UnreadableFile(f"{job.part.path} changed while it was read: try again")
            progress.what = f"writing {job.part.name}"
            progress.add(job.part.nbytes)


def _copy_between(
    source: Path, target: Path, held: list[tuple[int, int]], tick: Callable[[int], None]
) -> None:
    """Copy a file but for some places, which are left empty."""
    size, at = source.stat().st_size, 0
    try:
        with open(source, "rb") as read, open(target, "r+b") as write:
            write.truncate(size)
            for offset, length in [*sorted(set(held)), (size, 0)]:
                if offset < at:
                    raise UnreadableFile(f"tensors of {source} overlap: it is damaged")
                read.seek(at)
                write.seek(at)
                while at < offset:
                    block = read.read(min(_BLOCK, offset - at))
                    if not block:
                        raise UnreadableFile(f"{source} became shorter while it was read")
                    write.write(block)
                    at += len(block)
                    tick(len(block))
                at = offset + length
    except OSError as error:
        raise StorageError(f"cannot copy {source}: {error.strerror or error}") from error


def _write_part(job: _Write) -> int:
    """Write a part of a tensor with zeros, and its bits of the mask; returns how many went."""
    removed, ties = 0, job.cut.ties
    with open(job.target, "r+b") as file, open(job.masks, "r+b") as masks:
        for start, values in read_part(job.part, job.chunk):
            if job.grouping is None:
                kept, ties = stay(job.part, start, values, job.ranking, job.cut, ties)
            else:
                kept = job.grouping.stay(job.part, start, values, job.ranking)
            removed += kept.size - int(np.count_nonzero(kept))
            values = values.copy() if not values.flags.writeable else values
            values[~kept] = 0
            file.seek(job.part.offset + start * values.itemsize)
            values.astype(values.dtype.newbyteorder("<"), copy=False).tofile(file)
            masks.seek(job.mask_offset + (start - job.part.start) // 8)
            np.packbits(kept).tofile(masks)
    return removed

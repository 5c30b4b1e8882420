"""Prune a checkpoint that need not fit into memory: the same files with zeros, masks, a report.

Pruning changes neither dtypes nor shapes, so every byte stays where it is: files are copied, and
the weights that go become zero on the way. What is held at a time is a chunk of one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from prunecast.common.text import bytes_text
from prunecast.compression.files import CannotPrune
from prunecast.compression.files.checkpoints import Checkpoint, Extent
from prunecast.compression.files.inspection import Progress
from prunecast.compression.files.pruned import PrunedTensor, PruningResult
from prunecast.compression.files.selection import (
    CHUNK,
    DIGIT,
    SCORED,
    Cut,
    Part,
    Ranking,
    select,
)
from prunecast.compression.files.shares import MOST_GATHERED, SHARED, removed_by_share
from prunecast.compression.files.tensors import MOST_DIMENSIONS, raw_dtype
from prunecast.compression.files.ties import refuse_apart, refuse_shared, tied_tensors
from prunecast.compression.files.workers import Run, one_after_the_other
from prunecast.compression.files.zeroing import (
    Grouping,
    Targets,
    Zeroed,
    default_targets,
    refuse_without_room,
    remove_left_over,
    write_pruned,
)
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

SPREADS = ("layer", "global", "erk", *SHARED)
"""Allocations that can be computed in pieces."""

_PROGRAM = 192 << 20  # bytes of Python, NumPy and onnx
_A_WEIGHT = 48  # bytes that are held for each weight of a chunk
_MOST_PARTS = 1024
_SMALLEST_PART = 16 * CHUNK
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
        memory: most bytes that a process may take; LAMP and the allocation by sensitivity sort one
            tensor at a time, and a row of a pattern is looked at whole.

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
    memory: int = 1 << 30

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
                f"a file does not hold what the criterion {self.criterion!r} looks at: choose one "
                f"of {', '.join(SCORED)}, or prune the module with prune_module and a loader"
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
            if len(t.spec.shape) <= MOST_DIMENSIONS
        }
        names = plan.prunable(shapes)
        return [t for t in checkpoint.tensors if t.name in names and t.spec.floating]


def prune_checkpoint(
    checkpoint: Checkpoint,
    targets: Targets,
    settings: Pruning,
    *,
    run: Run = one_after_the_other,
    on_progress: Progress = lambda done, total, what: None,
) -> PruningResult:
    """Write a checkpoint with its least important weights set to zero, and their masks.

    Files appear once all of them are written and synced, the one that names the others last; see
    `write_pruned`. What fails or is interrupted before that leaves everything as it was.

    Args:
        checkpoint: the files; left as they are.
        targets: where the copies and the masks go. `Targets.report` is left to the caller; what is
            there is removed.
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
    names = {t.name for t in chosen}
    refuse_apart(checkpoint, names, ties, settings.exclude)
    refuse_shared(checkpoint, names)
    if not chosen:
        raise CannotPrune(
            f"{checkpoint.path} has no tensor that may be pruned: none is a matrix or kernel of "
            f"floats with at least {settings.min_size} elements that no pattern excludes"
        )
    remove_left_over(targets)
    refuse_without_room(checkpoint, targets, chosen)
    if settings.pattern:
        return _by_pattern(checkpoint, targets, settings, chosen, ties, run, on_progress)
    single = [t for t in chosen if t.name not in ties]
    most = _most(chosen)
    parts = {
        t.name: _parts(checkpoint, t, most, _step(t, settings), ties.get(t.name, ""))
        for t in chosen
    }
    memory = _memory(single, settings, max(p.chunk for each in parts.values() for p in each))
    rankings = _rankings(single, settings)
    passes = {t.name: rankings[t.name].bits // DIGIT + 1 for t in single}  # before the writing
    read = sum(t.spec.nbytes * passes[t.name] for t in single)
    progress = _Progress(on_progress, read + checkpoint.nbytes, sum(t.spec.nbytes for t in single))
    cuts: dict[str, list[Cut]] = {}
    for group, remove in _groups(checkpoint, single, rankings, settings, run, progress):
        if not remove:  # no threshold, at which ties would be counted
            passes |= {t.name: passes[t.name] - 1 for t in group}
        joined = [part for tensor in group for part in parts[tensor.name]]
        progress.what = f"ranking {group[0].name}" if len(group) == 1 else "ranking all weights"
        found = iter(select(joined, remove, rankings[group[0].name], run, progress.add))
        for tensor in group:
            cuts[tensor.name] = [next(found) for _ in parts[tensor.name]]
    for twin, first in ties.items():
        if first in cuts:
            cuts[twin], rankings[twin] = cuts[first], rankings[first]
    jobs = [
        Zeroed(part, rankings[t.name], cut)
        for t in chosen
        for part, cut in zip(parts[t.name], cuts[t.name], strict=True)
    ]
    write_pruned(checkpoint, targets, chosen, jobs, run, progress.add)
    return PruningResult.of(
        checkpoint, jobs, ties, max(passes.values()) + progress.sortings + 1, memory
    )


def _memory(single: Sequence[Extent], settings: Pruning, chunk: int) -> int:
    """Bytes that a process takes at most.

    Raises:
        CannotPrune: they are more than is allowed.
    """
    memory, largest = _PROGRAM + _A_WEIGHT * chunk, max(single, key=lambda t: t.spec.size)
    remedy = "allow more with --memory"
    if settings.allocation in SHARED:
        remedy += ", or choose the allocation layer, global or erk"
        itemsize = raw_dtype(_ranking([largest], settings).dtype).itemsize
        memory += 2 * 8 * MOST_GATHERED + itemsize * largest.spec.size
    if memory > settings.memory:
        raise CannotPrune(
            f"tensor {largest.name!r} of shape {list(largest.spec.shape)} takes "
            f"{bytes_text(memory)} of memory, more than {bytes_text(settings.memory)}: {remedy}"
        )
    return memory


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
    jobs, memory, most = [], 0, _most(chosen)
    along = {t.name: t.inputs for t in chosen}
    for tensor in chosen:
        shape, twin = tensor.spec.shape, ties.get(tensor.name, "")
        if twin and along[twin] != tensor.inputs:
            raise CannotPrune(
                f"tied weights would be pruned apart: {twin!r} and {tensor.name!r} are the same, "
                f"and {settings.pattern} runs along other axes of them; leave out both with "
                f"--exclude {twin!r} --exclude {tensor.name!r}"
            )
        if misfit := pattern.misfit((0, shape[tensor.inputs])):
            raise CannotPrune(
                f"{settings.pattern} does not divide {tensor.name!r} of shape {list(shape)}: "
                f"{misfit}; leave it out with --exclude {tensor.name!r}"
            )
        step = math.prod(shape[1:]) * 8 * (1 if tensor.inputs else pattern.of)
        parts = _parts(checkpoint, tensor, most, step, twin)
        memory = max(memory, _memory([tensor], settings, parts[0].chunk))
        ranking = _ranking([tensor], settings)
        grouping = Grouping(pattern, shape[1:], tensor.inputs)
        for part in parts:
            size = part.stop - part.start
            cut = Cut(0, 0, -1, size - size // pattern.of * pattern.kept)
            jobs.append(Zeroed(part, ranking, cut, grouping))
    weights = sum(t.spec.nbytes for t in chosen)
    progress = _Progress(on_progress, weights + checkpoint.nbytes)
    write_pruned(checkpoint, targets, chosen, jobs, run, progress.add)
    return PruningResult.of(checkpoint, jobs, ties, 1, memory)


# -- before anything is written -------------------------------------------------------------------


def _most(chosen: Sequence[Extent]) -> int:
    """Weights of a part, so that parts are worth a task and are not too many; a multiple of 8."""
    return max(_SMALLEST_PART, -(-sum(t.spec.size for t in chosen) // _MOST_PARTS // 8) * 8)


def _step(tensor: Extent, settings: Pruning) -> int:
    """Weights that are looked at together at least: what the criterion looks at, eightfold."""
    return 8 * (1 if settings.criterion != "l2" else math.prod(tensor.spec.shape[1:]))


def _parts(
    checkpoint: Checkpoint, tensor: Extent, most: int, step: int, twin: str = ""
) -> list[Part]:
    spec, most = tensor.spec, -(-most // step) * step
    whole = Part(
        tensor.name,
        spec.dtype,
        checkpoint.file(tensor),
        tensor.offset,
        0,
        spec.size,
        math.prod(spec.shape[1:]),
        step,
        twin,
    )
    return [
        replace(whole, start=at, stop=min(at + most, spec.size)) for at in range(0, spec.size, most)
    ]


def _ranking(tensors: Sequence[Extent], settings: Pruning) -> Ranking:
    return Ranking.of((t.spec.dtype for t in tensors), settings.criterion, settings.seed)


def _rankings(single: Sequence[Extent], settings: Pruning) -> dict[str, Ranking]:
    if settings.allocation == "global":
        return dict.fromkeys((t.name for t in single), _ranking(single, settings))
    return {t.name: _ranking([t], settings) for t in single}


def _groups(
    checkpoint: Checkpoint,
    single: list[Extent],
    rankings: Mapping[str, Ranking],
    settings: Pruning,
    run: Run,
    progress: _Progress,
) -> Iterator[tuple[list[Extent], int]]:
    """Tensors that are ranked together, and how many of their weights go.

    As `prunecast.compression.pruning.allocation` has it.
    """
    sizes = [t.spec.size for t in single]
    remove = int(settings.sparsity * sum(sizes))
    if settings.allocation == "layer":
        numbers = [int(settings.sparsity * size) for size in sizes]
    elif sum(sizes) - remove < len(single):
        smallest = min(single, key=lambda t: t.spec.size)
        raise CannotPrune(
            f"sparsity {settings.sparsity:g} leaves {sum(sizes) - remove:,} of {sum(sizes):,} "
            f"weights for {len(single)} tensors, so layers such as {smallest.name!r} would vanish: "
            "lower it, or exclude them"
        )
    elif settings.allocation == "global":
        yield single, remove
        return
    elif settings.allocation == "erk":
        kept = kernel_numbers({t.name: t.spec.shape for t in single}, settings.sparsity)
        numbers = [t.spec.size - kept[t.name] for t in single]
    else:
        whole = [
            (_parts(checkpoint, t, t.spec.size, _step(t, settings))[0], rankings[t.name])
            for t in single
        ]
        numbers = removed_by_share(
            whole, settings.allocation, remove, run, progress.add, progress.begin_sorting
        )
    for tensor, number in zip(single, numbers, strict=True):
        yield [tensor], number


@dataclass
class _Progress:
    """Bytes that were read, of all that will be; passes that sort count once they begin."""

    tell: Progress
    total: int
    sorted_bytes: int = 0
    sortings: int = 0
    done: int = 0
    what: str = ""

    def begin_sorting(self) -> None:
        self.sortings += 1
        self.total += self.sorted_bytes
        self.what = "sorting tensors"

    def add(self, count: int, what: str = "") -> None:
        self.done += count
        self.what = what or self.what
        self.tell(self.done, self.total, self.what)

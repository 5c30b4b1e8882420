"""Write a pruned copy of a checkpoint: every byte as it was, but for the weights that go.

Files appear once all of them are written and synced, the one that names the others last. One of
that name and a report that were there are removed just before: whatever ends the renames between
two files, no file is left that would name both old and new ones.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import StorageError, remove_abandoned, replacing_all
from prunecast.common.text import bytes_text
from prunecast.compression.files import CannotPrune, UnreadableFile
from prunecast.compression.files.checkpoints import MASKS, Checkpoint, Extent
from prunecast.compression.files.mask_files import MaskFile
from prunecast.compression.files.selection import (
    Cut,
    Part,
    Ranking,
    highest_key,
    read_part,
)
from prunecast.compression.files.workers import Run
from prunecast.compression.pruning.allocation import ALLOCATIONS
from prunecast.compression.pruning.patterns import NOfM

__all__ = [
    "Grouping",
    "Targets",
    "Zeroed",
    "default_targets",
    "refuse_without_room",
    "remove_left_over",
    "write_pruned",
]

_BLOCK = 1 << 23  # bytes copied at a time


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
        CannotPrune: it would overwrite the checkpoint itself, is of another format, or two files
            would have one name.
    """
    path = checkpoint.path
    if len(checkpoint.files) == 1:
        whole = output or path.with_name(f"{path.stem}.pruned{path.suffix}")
        if whole.suffix.lower() != path.suffix.lower():
            raise CannotPrune(f"{whole}: a pruned {path.suffix} file is one again, name it so")
        files = {path.name: whole}
        masks, report = (whole.with_suffix(s) for s in (MASKS, ".report.json"))
    else:
        folder = output or path.parent / "pruned"
        if folder.suffix.lower() in (".safetensors", ".onnx", ".json"):
            raise CannotPrune(
                f"{folder}: the checkpoint has {len(checkpoint.files)} files, which keep their "
                "names: give a folder"
            )
        files = {name: folder / name for name in checkpoint.files}
        masks, report = folder / f"pruning{MASKS}", folder / "pruning.report.json"
    own = {p.resolve() for p in checkpoint.files.values()}
    targets = Targets(files, masks, report)
    seen: set[Path] = set()
    folders = {folder for name in files for folder in files[name].parents}
    for target in targets.all:
        if target.resolve() in own:
            raise CannotPrune(f"{target} is the checkpoint itself: give another --out")
        if target in seen or target in folders:
            raise CannotPrune(
                f"{target} would be both a file of the checkpoint and one that is made beside it: "
                "rename the checkpoint's"
            )
        seen.add(target)
    return targets


def remove_left_over(targets: Targets) -> None:
    """Remove temporary files of these targets that a killed process left; no others."""
    for target in targets.all:
        remove_abandoned(target.parent, {target.name})


def refuse_without_room(checkpoint: Checkpoint, targets: Targets, chosen: Sequence[Extent]) -> None:
    """Raise `CannotPrune` where the disk has no room for the pruned checkpoint and its masks."""
    folder = next(p for p in targets.masks.absolute().parents if p.exists())
    needed = checkpoint.nbytes + sum(-(-t.spec.size // 8) for t in chosen)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CannotPrune(
            f"{folder} has {bytes_text(free)} free and the pruned checkpoint takes "
            f"{bytes_text(needed)}: make room, or name another place with --out"
        )


def _stay(
    part: Part, start: int, values: NDArray[Any], ranking: Ranking, cut: Cut, ties: int
) -> tuple[NDArray[np.bool_], int]:
    """Which weights of a chunk stay.

    Args:
        part: that they are of.
        start: number of the first of them in their tensor.
        values: as `raw_dtype` has them.
        ranking: what they were ranked by.
        cut: of the part.
        ties: how many at the threshold may still stay.

    Returns:
        One boolean a weight, and how many at the threshold may stay behind the chunk.
    """
    keys = ranking.keys(part, start, values)
    kept = keys > cut.threshold
    tied = np.flatnonzero(keys == cut.threshold)
    spared = cut.spared - start
    if 0 <= spared < kept.size:
        tied = tied[tied != spared]
        kept[spared] = True
    kept[tied[:ties]] = True
    return kept, ties - min(ties, tied.size)


@dataclass(frozen=True)
class Grouping:
    """N of every M along the input channels, whole rows at a time.

    Attributes:
        pattern: N and M.
        row: shape of a tensor without its first axis.
        inputs: axis of the input channels.
    """

    pattern: NOfM
    row: tuple[int, ...]
    inputs: int

    def stay(
        self, part: Part, start: int, values: NDArray[Any], ranking: Ranking
    ) -> NDArray[np.bool_]:
        """Which weights of some rows stay; arguments as of `_stay`.

        Raises:
            CannotPrune: a weight is NaN or infinite.
        """
        keys = ranking.keys(part, start, values)
        highest_key(part, ranking, start, keys)
        scores = ranking.magnitudes(keys).reshape(-1, *self.row).swapaxes(1, self.inputs)
        kept = self.pattern.masks({"": scores}, 1.0, ALLOCATIONS["layer"])[""]
        return np.ascontiguousarray(kept.swapaxes(1, self.inputs)).ravel()


@dataclass(frozen=True)
class Zeroed:
    """One part of a tensor, and what goes of it.

    Attributes:
        part: the weights.
        ranking: what they were ranked by.
        cut: what goes.
        grouping: of a pattern, which decides instead of the cut's threshold; None without.
        target: the file that it is written into; set when there is one, as are those that follow.
        masks: the file of masks.
        mask_offset: where the part's bits begin there.
    """

    part: Part
    ranking: Ranking
    cut: Cut
    grouping: Grouping | None = None
    target: Path = Path()
    masks: Path = Path()
    mask_offset: int = 0


def write_pruned(
    checkpoint: Checkpoint,
    targets: Targets,
    chosen: Sequence[Extent],
    jobs: Sequence[Zeroed],
    run: Run,
    tick: Callable[[int, str], None],
) -> None:
    """Write the files and the masks of a checkpoint.

    Nothing that was there is touched before all are written and synced. Then the old file that
    names the others and the old report go, and the new files appear, the one that names the others
    last; so where that is there, all that it names are the new ones.

    Args:
        checkpoint: what is copied.
        targets: where it goes.
        chosen: the tensors of the jobs.
        jobs: every part of these.
        run: how the work on parts is done.
        tick: told the bytes that were done, and what was.

    Raises:
        FilesError: the checkpoint is damaged or changes meanwhile; nothing was written.
        StorageError: the file system refuses; nothing was written, but where it refuses a rename
            the file that names the others is missing.
    """
    masks = MaskFile({t.name: t.spec.shape for t in chosen})
    naming, *others = targets.files.values()
    with replacing_all(
        [targets.masks, *others, naming], outdated=[naming, targets.report]
    ) as temporaries:
        temporary = temporaries[0]
        made = dict(zip(targets.files, [temporaries[-1], *temporaries[1:-1]], strict=True))
        masks.begin(temporary)
        by_path = {checkpoint.files[name]: path for name, path in made.items()}
        for number, (name, source) in enumerate(checkpoint.files.items()):
            held = [(t.offset, t.spec.nbytes) for t in chosen if t.file == number]
            for count in _copy_between(source, made[name], held):
                tick(count, f"copying {name}")
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
            tick(job.part.nbytes, f"writing {job.part.name}")


def _copy_between(source: Path, target: Path, held: list[tuple[int, int]]) -> Iterator[int]:
    """Copy a file but for some places, which are left empty; yields the bytes of each step."""
    size, at = source.stat().st_size, 0
    try:
        with open(source, "rb") as read, open(target, "r+b") as write:
            write.truncate(size)
            for offset, length in [*sorted(set(held)), (size, 0)]:
                read.seek(at)
                write.seek(at)
                while at < offset:
                    block = read.read(min(_BLOCK, offset - at))
                    if not block:
                        raise UnreadableFile(f"{source} became shorter while it was read")
                    write.write(block)
                    at += len(block)
                    yield len(block)
                at = offset + length
    except OSError as error:
        raise StorageError(f"cannot copy {source}: {error.strerror or error}") from error


def _write_part(job: Zeroed) -> int:
    """Write a part of a tensor with zeros, and its bits of the mask; returns how many went."""
    removed, ties = 0, job.cut.ties
    with open(job.target, "r+b") as file, open(job.masks, "r+b") as masks:
        for start, values in read_part(job.part):
            if job.grouping is None:
                kept, ties = _stay(job.part, start, values, job.ranking, job.cut, ties)
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

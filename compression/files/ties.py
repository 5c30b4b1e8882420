"""Tensors of a checkpoint that hold the same weights: tied layers that were written twice."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from prunecast.compression.files import CannotPrune
from prunecast.compression.files.checkpoints import Checkpoint, Extent
from prunecast.compression.files.contents import reading
from prunecast.compression.pruning.plan import is_named

__all__ = ["refuse_apart", "refuse_shared", "tied_tensors"]

_SAMPLE = 1 << 16  # bytes from the beginning, the middle and the end tell nearly all apart
_BLOCK = 1 << 22


def tied_tensors(checkpoint: Checkpoint, min_size: int) -> dict[str, str]:
    """Names of tensors that hold what one before them holds, and the name of that.

    As `prunecast.compression.pruning.plan.tied_weights` for arrays: of tensors of two axes or more,
    and not of zeros alone. Where a file says under which other names it left a tensor out, those
    are told too.

    Args:
        checkpoint: the files.
        min_size: smaller tensors are not looked at.

    Raises:
        UnreadableFile: a file cannot be read.
    """
    found = {}
    alike: dict[tuple[object, ...], list[Extent]] = {}
    for tensor in checkpoint.tensors:
        if len(tensor.spec.shape) < 2 or tensor.spec.size < min_size:
            continue
        path = checkpoint.file(tensor)
        key = (tensor.spec, _sample(path, tensor))
        others = alike.setdefault(key, [])
        first = next((o for o in others if _same(checkpoint, o, tensor)), None)
        if first is None:
            others.append(tensor)
        else:
            found[tensor.name] = first.name
    return {**found, **checkpoint.aliases}


def refuse_apart(
    checkpoint: Checkpoint, chosen: Collection[str], ties: Mapping[str, str], exclude: Sequence[str]
) -> None:
    """Tied weights keep one mask, so all of their names are pruned or none is.

    Args:
        checkpoint: the files.
        chosen: names of tensors that may be pruned.
        ties: as `tied_tensors` finds them.
        exclude: name patterns (shell style) of tensors that stay whole.

    Raises:
        CannotPrune: one of two names would be pruned, and the other would not.
    """
    held = {t.name for t in checkpoint.tensors}
    for copy, first in ties.items():
        excluded = [is_named(name, exclude) for name in (copy, first)]
        left_out = copy not in held and excluded[1]
        if excluded[0] != excluded[1] and (first in chosen or copy in chosen or left_out):
            raise CannotPrune(
                f"tied weights would be pruned apart: {first!r} and {copy!r} are the same, and "
                "only one of them is excluded; exclude both or neither"
            )
        if copy in held and (copy in chosen) != (first in chosen):
            stays = copy if first in chosen else first
            raise CannotPrune(
                f"tied weights would be pruned apart: {first!r} and {copy!r} are the same, and "
                f"{stays!r} stays whole as an adapter does; leave out both with --exclude "
                f"{first!r} --exclude {copy!r}, or prune low-rank factors too with --adapters"
            )


def refuse_shared(checkpoint: Checkpoint, chosen: Collection[str]) -> None:
    """What loses weights has its bytes for itself, or for tensors of its dtype and shape alone.

    Files of external data may lie in one another as an ``.onnx`` model likes; what is zeroed there
    would be zero in all of them.

    Raises:
        CannotPrune: bytes of a chosen tensor are another's too.
    """
    spans: dict[tuple[object, ...], tuple[int, int, int, str, bool]] = {}
    for t in checkpoint.tensors:
        key, before = (t.file, t.offset, t.spec), spans.get((t.file, t.offset, t.spec))
        loses = t.name in chosen or (before is not None and before[4])
        spans[key] = (t.file, t.offset, t.offset + t.spec.nbytes, t.name, loses)
    others = [(file, start, stop, name, False) for file, start, stop, name in checkpoint.others]
    last: dict[bool, tuple[int, int, str]] = {}  # whether it is chosen: file, end, name
    for file, start, stop, name, loses in sorted([*spans.values(), *others]):
        for other in (True, False):
            at, end, neighbour = last.get(other, (-1, 0, ""))
            if at == file and start < min(end, stop) and (loses or other):
                raise CannotPrune(
                    f"{neighbour!r} and {name!r} share bytes of {checkpoint.path.name}'s external "
                    "data, so both would be pruned: export them apart, or leave out the one with "
                    f"--exclude {name if loses else neighbour!r}"
                )
        if last.get(loses, (-1, 0, ""))[:2] < (file, stop):
            last[loses] = (file, stop, name)


def _sample(path: Path, tensor: Extent) -> bytes:
    size, digest = tensor.spec.nbytes, hashlib.blake2b()
    with reading(path), open(path, "rb") as file:
        for at in (0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)):
            file.seek(tensor.offset + at)
            digest.update(file.read(min(_SAMPLE, size)))
    return digest.digest()


def _same(checkpoint: Checkpoint, one: Extent, other: Extent) -> bool:
    """Whether every byte is the same, and not all are zero."""
    here, there = checkpoint.file(one), checkpoint.file(other)
    with reading(here), open(here, "rb") as first, reading(there), open(there, "rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        left, some = one.spec.nbytes, False
        while left:
            block = first.read(min(_BLOCK, left))
            if block != second.read(len(block)) or not block:
                return False
            some = some or block.count(0) != len(block)
            left -= len(block)
    return some

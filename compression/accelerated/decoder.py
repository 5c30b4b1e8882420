"""decode: one payload to tensors on a device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prunecast.compression.codec.container.head import Segment
from prunecast.compression.codec.context import Context, Limits
from prunecast.compression.codec.entropy.lanes import rans_tables
from prunecast.compression.codec.entropy.serial import SerialModels, read_serial
from prunecast.compression.codec.errors import CodecError, MalformedPayload
from prunecast.compression.codec.modelling.classes import CONSTANT, STORED, phase_slice
from prunecast.compression.codec.payload import FOREIGN, OpenedPayload, wrapped

from .arrays import download, upload
from .classes import Classifier, flip_signs, neighbour_sums
from .copies import expand_copies
from .fields import assemble, check_width, from_z
from .known import KnownTensors
from .rans import LaneTables
from .segments import ToRead, read_segments
from .symbols import Placement, Symbols, distribute

__all__ = ["decode"]

_TOGETHER = 1 << 26
"""Positions of groups that are decoded at once: enough to share steps, and memory has a bound."""


def decode(
    payload: bytes,
    *,
    device: torch.device | str,
    context: Context | None = None,
    limits: Limits | None = None,
) -> dict[str, torch.Tensor]:
    """Return what the codec's own ``decode`` returns, as tensors on a device.

    Args:
        payload: what either ``encode`` returned.
        device: where the work is done and the tensors are, ``"cuda"`` or ``"cpu"``, say.
        context: what both sides know; see the codec's class.
        limits: what is accepted; see the codec's class.

    Raises:
        CodecError: a subclass for each way in which the bytes may be wrong, the one that the
            codec's own ``decode`` raises.
    """
    try:
        opened = _TensorPayload(
            bytes(payload), context or Context(), limits or Limits(), torch.device(device)
        )
    except FOREIGN as error:
        raise wrapped(error, "the payload") from error
    return {name: opened.tensor(name) for name in opened.specs}


@dataclass(frozen=True)
class _Job:
    """A segment with its places filled in."""

    segment: Segment
    placement: Placement
    sizes: list[int]
    """Positions of each of the segment's parts."""
    around: dict[int, torch.Tensor]
    bits: int


class _TensorPayload(OpenedPayload):
    """A payload that is decoded in the order of its tensors, several groups of fields at a time."""

    def __init__(
        self, payload: bytes, context: Context, limits: Limits, device: torch.device
    ) -> None:
        super().__init__(payload, context, limits)
        self._device = device
        self._known = KnownTensors(device)
        self._tables: LaneTables | None = None
        self._serial_left = limits.serial_symbols
        self._one_by_one = False
        self._kept: dict[int, torch.Tensor] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """Decode one tensor; each once, in order."""
        fields = self._by_tensor[name]
        try:
            known, index = self._known.of(fields[0]), self._index[name]
            if name not in self._copies:
                return assemble((self._values(i) for i in index), fields, known)
            references, kept = (
                assemble(iter([self._values(i)]), [f], known)
                for f, i in zip(fields, index, strict=True)
            )
            return expand_copies(references, kept, self.specs[name])
        except FOREIGN as error:
            raise wrapped(error, f"tensor {name!r}") from error
        except torch.OutOfMemoryError as error:
            raise wrapped(MemoryError(), f"tensor {name!r}") from error

    def _values(self, i: int) -> torch.Tensor:
        f, code = self._fields[i], self._body.codes[i]
        if not f.size or code.mode == CONSTANT:
            return torch.full((f.size,), code.centre, dtype=torch.int64, device=self._device)
        if code.mode == STORED:
            at = self._stored_at[i]
            data = self._rest[at : at + f.size * f.width // 8]
            values = np.frombuffer(data, f"<i{f.width // 8}")
            return upload(values, self._device).to(torch.int64)
        if i not in self._kept:
            self._kept.update(self._decoded(self._group_of[i]))
        return from_z(self._kept.pop(i), code.centre, f)

    def _decoded(self, number: int) -> dict[int, torch.Tensor]:
        """Values of a group of fields, and of others after it where that is possible."""
        groups, steps = self._together(number), self._steps
        try:
            return self._decode_groups(groups)
        except (CodecError, torch.OutOfMemoryError):
            if len(groups) == 1:
                raise
        # Several things may be wrong: the error is that of the first in the payload's order.
        self._one_by_one, self._steps = True, steps
        return self._decode_groups([number])

    def _together(self, number: int) -> list[int]:
        if self._one_by_one:
            return [number]
        groups: list[int] = []
        left = _TOGETHER
        for group in range(number, len(self._body.groups)):
            left -= sum(self._fields[i].size for i in self._body.groups[group])
            if groups and left < 0:
                break
            groups.append(group)
        return groups

    def _decode_groups(self, groups: Sequence[int]) -> dict[int, torch.Tensor]:
        body = self._body
        members = [i for group in groups for i in body.groups[group]]
        known = self._known
        looks = {i: Classifier(f := self._fields[i], body.codes[i], known.of(f)) for i in members}
        whole: dict[int, torch.Tensor] = {}
        models = SerialModels(self._coder, len(body.sparse)) if body.serial else None
        for phase in range(1 + max(body.codes[i].depth for i in members)):
            jobs = [
                self._placed(group, phase, looks, whole)
                for group in groups
                if any(body.codes[i].depth >= phase for i in body.groups[group])
            ]
            if models is not None:
                read = [self._read_serial(models, job) for job in jobs]
            else:
                read = self._read_lanes(groups, phase, jobs)
            for job, symbols in zip(jobs, read, strict=True):
                z = distribute(job.placement, symbols, job.bits)
                self._keep(job, phase, z, whole)
            del jobs, read
        return whole

    def _placed(
        self,
        group: int,
        phase: int,
        looks: dict[int, Classifier],
        whole: dict[int, torch.Tensor],
    ) -> _Job:
        """Find the clusters of a segment's positions."""
        body = self._body
        segment = body.segments[self._first_segment[group] + phase]
        around, clusters = {}, []
        for i, _ in segment.parts:
            code = body.codes[i]
            if phase:
                around[i] = neighbour_sums(whole[i], code.depth, phase)
            clusters.append(looks[i].look_up(body.maps[code.table_set], phase, around.get(i)))
        sizes = [len(part) for part in clusters]
        # A map names clusters that exist, unless there are none at all.
        if not len(body.sparse) and any(sizes):
            raise MalformedPayload("a position belongs to no cluster")
        bits = max(self._fields[i].bits for i in body.groups[group])
        placement = Placement.of(torch.cat(clusters), body.sparse)
        return _Job(segment, placement, sizes, around, bits)

    def _read_serial(self, models: SerialModels, job: _Job) -> Symbols:
        dense, counts = download(job.placement.dense_cluster), job.placement.counts
        found = read_serial(
            self._coder, models, dense, self._body.sparse, counts, job.bits, self._serial_left
        )
        self._serial_left -= len(found.dense) + 2 * len(found.gaps)
        z, gaps, values = (
            upload(array.astype(np.int64), self._device)
            for array in (found.dense, found.gaps, found.values)
        )
        return Symbols(z, found.counts, gaps, values)

    def _read_lanes(self, groups: Sequence[int], phase: int, jobs: Sequence[_Job]) -> list[Symbols]:
        body, numbers = self._body, []
        for group in groups:
            if any(body.codes[i].depth >= phase for i in body.groups[group]):
                numbers.append(self._first_segment[group] + phase)
        for job in jobs:
            if (job.placement.counts[body.sparse] < job.segment.counts).any():
                raise MalformedPayload("a cluster has more non-zeros than positions")
            self._admit(job.segment.steps(len(job.placement.dense_cluster)))
        if self._tables is None:
            self._tables = LaneTables(rans_tables(body), self._device)
        to_read = []
        for number, job in zip(numbers, jobs, strict=True):
            at = self._offsets[number]
            data = self._rest[at : at + job.segment.nbytes]
            to_read.append(ToRead(job.segment, data, job.placement.dense_cluster, job.bits))
        return read_segments(body, self._tables, to_read)

    def _keep(self, job: _Job, phase: int, z: torch.Tensor, whole: dict[int, torch.Tensor]) -> None:
        """Give a segment's values to its fields."""
        parts = torch.split(z, job.sizes)
        for (i, _), part in zip(job.segment.parts, parts, strict=True):
            f, depth = self._fields[i], self._body.codes[i].depth
            if not depth:
                whole[i] = part
                continue
            check_width(part, f)
            if not phase:
                whole[i] = torch.zeros(f.size, dtype=torch.int64, device=self._device)
            else:
                part = flip_signs(part, job.around[i], f.width)
            whole[i][phase_slice(depth, phase)] = part

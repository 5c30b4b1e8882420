"""Which part of a segment's bytes belongs to which tensor, by ideal code length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .container.head import Body
from .entropy.lanes import rans_tables
from .modelling.classes import CODED
from .modelling.fields import Field, split_tensor, to_z
from .modelling.forms import parted
from .modelling.parts import Phase, split_phases, symbols_of
from .payload import Payload

__all__ = ["Shares"]


class Shares:
    """Whose symbols each segment of a payload holds."""

    def __init__(
        self,
        body: Body,
        by_tensor: Mapping[str, list[Field]],
        tensors: Payload,
    ) -> None:
        self._body, self._by_tensor, self._tensors = body, by_tensor, tensors
        self._owner = [number for number, own in enumerate(by_tensor.values()) for _ in own]
        self._group_of = [
            number for number, group in enumerate(body.groups) for _ in range(_phases(body, group))
        ]
        self._kept: tuple[int, list[dict[int, float]]] = (-1, [])
        together = [{self._owner[i] for i in group} for group in body.groups]
        self.sharing = {tensor for group in together if len(group) > 1 for tensor in group}
        """Numbers of the tensors that share segments with others."""

    def of_segment(self, index: int) -> dict[int, float]:
        """Tensor to its part of a segment's bytes, summing to one."""
        owners = {self._owner[i] for i, _ in self._body.segments[index].parts}
        if len(owners) == 1:
            return {owners.pop(): 1.0}
        group = self._group_of[index]
        if self._kept[0] != group:
            self._kept = (group, self._measured(group))
        return _normalised(self._kept[1][index - self._group_of.index(group)])

    def of_serial(self) -> dict[int, float]:
        """Tensor to its part of all symbols of a small payload, summing to one."""
        total: dict[int, float] = defaultdict(float)
        for bits in self._measured(0):
            for tensor, cost in bits.items():
                total[tensor] += cost
        return _normalised(total)

    def _measured(self, group: int) -> list[dict[int, float]]:
        """For each segment of a group: tensor to the ideal bits of its symbols."""
        parts = self._parts(self._body.groups[group])
        start = self._group_of.index(group)
        segments = self._body.segments[
            start : start + _phases(self._body, self._body.groups[group])
        ]
        members = [[(self._owner[i], parts[i][phase]) for i, phase in s.parts] for s in segments]
        cost = _table_costs(self._body, [part for m in members for _, part in m])
        result = []
        for some in members:
            bits: dict[int, float] = defaultdict(float)
            for tensor, symbols, flags in _ideal(self._body, some, cost):
                bits[tensor] += symbols + flags
            result.append(dict(bits))
        return result

    def _parts(self, group: Sequence[int]) -> dict[int, list[Phase]]:
        """Values and placements of a group's fields, from the decoded tensors."""
        wanted, parts = set(group), {}
        first = 0
        for name, own in self._by_tensor.items():
            numbers = range(first, first + len(own))
            first += len(own)
            if wanted.isdisjoint(numbers):
                continue
            arrays = self._tensors.parts(name)
            each = zip(arrays, parted(own), strict=True)
            values = [v for array, part in each for v in split_tensor(array, part)]
            for i, f, v in zip(numbers, own, values, strict=True):
                code = self._body.codes[i]
                if i not in wanted or code.mode != CODED:
                    continue
                parts[i] = split_phases(f, code, to_z(v, code.centre, f))
                table = self._body.maps[code.table_set].reshape(-1)
                for part in parts[i]:
                    part.place(table, self._body.sparse)
        return parts


def _normalised(bits: Mapping[int, float]) -> dict[int, float]:
    whole = sum(bits.values())
    return {t: b / whole if whole else 1 / len(bits) for t, b in bits.items()}


def _phases(body: Body, group: Sequence[int]) -> int:
    return 1 + max(body.codes[i].depth for i in group)


def _symbols(body: Body, part: Phase) -> tuple[NDArray[Any], NDArray[Any], float]:
    """Tables and tokens of a part's dense symbols and sparse values, and their raw bits."""
    symbols, dense = symbols_of([part])
    values = np.repeat(len(body.sparse) + np.cumsum(body.sparse) - 1, symbols.counts)
    tokens = np.concatenate([body.scheme.tokens(z) for z in (symbols.dense, symbols.values)])
    counts = np.bincount(tokens, minlength=256)
    raw = float((counts * np.where(counts > 0, body.scheme.widths(), 0)).sum())
    return np.concatenate([dense, values]).astype(np.int64), tokens, raw


def _table_costs(body: Body, parts: Sequence[Phase]) -> NDArray[np.float64]:
    """Bits of every [table, token]: the payload's tables, or how often a small one has them."""
    if not body.serial:
        tables = rans_tables(body)
        return tables.precision - np.log2(np.maximum(tables.frequencies, 1))
    counts = np.zeros((len(body.sparse) + int(body.sparse.sum()), 256))
    for part in parts:
        table, token, _ = _symbols(body, part)
        np.add.at(counts, (table, token), 1)
    whole = np.maximum(counts.sum(1, keepdims=True), 1)
    return np.asarray(np.log2(whole) - np.log2(np.maximum(counts, 1)))


def _ideal(
    body: Body, members: Sequence[tuple[int, Phase]], cost: NDArray[np.float64]
) -> Iterator[tuple[int, float, float]]:
    """For each member: tensor, bits of its symbols, bits of the zeros of its sparse clusters."""
    places, nonzeros = [], []
    for _, part in members:
        assert part.placement is not None
        places.append(part.placement.counts)
        nonzeros.append(symbols_of([part])[0].counts)
    n, k = np.sum(places, axis=0), np.sum(nonzeros, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        one = np.where(k > 0, np.log2(n / k), 0.0)
        zero = np.where(k < n, np.log2(n / (n - k)), 0.0)
    for (tensor, part), own, ones in zip(members, places, nonzeros, strict=True):
        table, token, raw = _symbols(body, part)
        flags = float((ones * one + (own - ones) * zero)[body.sparse].sum())
        yield tensor, float(cost[table, token].sum()) + raw, flags

"""Lane-interleaved rANS (:mod:`prunecast.compression.codec.entropy.rans`, in torch).

A step advances all lanes at once, and costs as many kernel launches for one lane as for
thousands. Streams that do not depend on each other are therefore coded together, as rows of a
matrix: the number of steps is that of the longest stream, not of all of them in turn. States are
uint32 and so their own value in int64, which no step exceeds.

Launches a step, for a whole batch: 12 to decode, 6 to encode. The host waits for the device once
in a run of steps (``_CELLS`` states), not at every step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from prunecast.compression.codec.entropy.rans import RansTables
from prunecast.compression.codec.errors import MalformedPayload

from .arrays import download, upload

__all__ = ["Coded", "Decoded", "LaneTables", "ToDecode", "ToEncode", "rans_decode", "rans_encode"]

_CELLS = 1 << 20
"""States in a run of steps."""
_WIDEST = 1 << 16
_ROWS = 64
_ONE = 1 << 16


class LaneTables:
    """Frequency tables on a device, with one more that leaves a state as it is."""

    def __init__(self, tables: RansTables, device: torch.device) -> None:
        self.device = device
        self.precision = tables.precision
        self.count, self.alphabet = tables.frequencies.shape
        self._tables = tables

    def by_key(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Frequency and cumulative frequency of ``table * alphabet + token``; the last is idle."""
        freq = np.append(self._tables.frequencies.ravel(), np.uint32(1 << self.precision))
        start = np.append(self._tables.cumulative.ravel(), np.uint32(0))
        return (
            upload(freq.astype(np.int64), self.device),
            upload(start.astype(np.int64), self.device),
        )

    def by_slot(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token, frequency, and slot - cumulative of each table's slots; the last table is idle."""
        token, step = self._tables.slots
        pairs = step.view(np.uint32).reshape(-1, 2).astype(np.int64)
        size = 1 << self.precision
        idle = np.stack([np.full(size, size), np.arange(size)], axis=1)
        both = upload(np.concatenate([pairs, idle]).T, self.device)
        tokens = upload(np.append(token, np.zeros(size, np.uint8)), self.device)
        return tokens, both[0], both[1]


@dataclass(frozen=True)
class ToEncode:
    """A stream to be made: keys (``table * alphabet + token``), and a first word of each lane."""

    keys: torch.Tensor
    initial: NDArray[np.uint16]

    @property
    def steps(self) -> int:
        """Number of steps, the last one perhaps not of all lanes."""
        return -(-len(self.keys) // len(self.initial))


@dataclass(frozen=True)
class Coded:
    """A stream that was made."""

    states: NDArray[np.uint32]
    words: NDArray[np.uint16]


@dataclass(frozen=True)
class ToDecode:
    """A stream to be read: the table of each symbol, states and words."""

    contexts: torch.Tensor
    states: NDArray[np.uint32]
    words: NDArray[np.uint16]

    @property
    def steps(self) -> int:
        """Number of steps of all lanes; one of some of them may follow."""
        return len(self.contexts) // len(self.states)


@dataclass(frozen=True)
class Decoded:
    """A stream that was read: tokens, uint8, and the first words."""

    tokens: torch.Tensor
    initial: NDArray[np.uint16]


def _batches(lanes: Sequence[int]) -> Iterator[list[int]]:
    """Streams to code together: of similar width, as all take the room of the widest."""
    batch: list[int] = []
    for i in sorted(range(len(lanes)), key=lambda i: -lanes[i]):
        widest = lanes[batch[0]] if batch else 0
        full = len(batch) == _ROWS or (len(batch) + 1) * widest > _WIDEST
        if batch and (full or 4 * lanes[i] < widest):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _runs(steps: Sequence[int], width: int) -> Iterator[tuple[int, int, int]]:
    """First step, end and active rows of runs in which the same rows are active.

    ``steps`` falls from row to row, so the active rows are always the first ones.
    """
    first, rows = 0, len(steps)
    while True:
        while rows and steps[rows - 1] <= first:
            rows -= 1
        if not rows:
            return
        end = min(steps[rows - 1], first + max(1, _CELLS // (rows * width)))
        yield first, end, rows
        first = end


def rans_decode(jobs: Sequence[ToDecode], tables: LaneTables) -> list[Decoded]:
    """Decode streams that do not depend on each other.

    Raises:
        MalformedPayload: the words run out, are left over, or the states do not end in
            [2**16, 2**17).
    """
    slots = tables.by_slot()
    done: dict[int, Decoded] = {}
    for batch in _batches([len(job.states) for job in jobs]):
        batch.sort(key=lambda i: jobs[i].steps, reverse=True)
        results = _Decoding([jobs[i] for i in batch], tables, slots).run()
        done.update(zip(batch, results, strict=True))
    return [done[i] for i in range(len(jobs))]


class _Decoding:
    """The state of one batch; rows are streams, columns lanes."""

    def __init__(
        self,
        jobs: Sequence[ToDecode],
        tables: LaneTables,
        slots: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> None:
        self._jobs, self._device = jobs, tables.device
        self._token_of, self._freq, self._bias = slots
        self._lanes = [len(job.states) for job in jobs]
        self._width = width = max(self._lanes)
        self._idle = tables.count << tables.precision
        self._precision = tables.precision
        # Lanes that a stream does not have keep the state in which all lanes must end.
        states = np.full((len(jobs), width), _ONE, np.int64)
        for row, job in enumerate(jobs):
            states[row, : self._lanes[row]] = job.states
        self._x = upload(states, self._device)
        # Words of all rows in turn. A damaged stream may read on by a run of steps beyond its own
        # before that is noticed: there is something to be read even after the last.
        ends = np.cumsum([len(job.words) for job in jobs])
        most = max(job.steps for job in jobs)
        slack = np.zeros(min(_CELLS, most * width) + width + 1, np.uint16)
        words = np.concatenate([*(job.words for job in jobs), slack]).view(np.int16)
        self._words = upload(words, self._device).to(torch.int64) & 0xFFFF
        self._ends = ends.tolist()
        # Of each row: where its next word is, then whether each lane takes one.
        self._takes = self._empty(len(jobs), width + 1)
        self._takes[:, 0] = upload(ends - [len(job.words) for job in jobs], self._device)
        self._at = self._empty(len(jobs), width + 1)
        self._f, self._b, self._w = (self._empty(len(jobs), width) for _ in range(3))
        self._scalars = [
            torch.tensor(value, device=self._device)
            for value in ((1 << tables.precision) - 1, tables.precision, _ONE)
        ]
        self._tokens = [
            torch.empty(len(job.contexts), dtype=torch.uint8, device=self._device) for job in jobs
        ]

    def _empty(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=self._device)

    def run(self) -> list[Decoded]:
        """Decode all rows."""
        full = [job.steps for job in self._jobs]
        for first, end, rows in _runs(full, self._width):
            spans = [(first * n, end * n) for n in self._lanes[:rows]]
            grid = self._grid(spans, end - first)
            self._steps(grid, rows, None)
            self._keep(spans, grid)
            self._check_words(rows, last=False)
        starts = [n * k for n, k in zip(self._lanes, full, strict=True)]
        rest = [(at, len(job.contexts)) for at, job in zip(starts, self._jobs, strict=True)]
        if any(start < end for start, end in rest):
            # Lanes behind a row's last symbol do not take part.
            count = upload(np.array([end - start for start, end in rest]), self._device)
            taking = torch.arange(self._width, device=self._device) < count[:, None]
            grid = self._grid(rest, 1)
            self._steps(grid, len(rest), taking.to(torch.int64))
            self._keep(rest, grid)
        self._check_words(len(self._jobs), last=True)
        x = download(self._x)
        if (x >> 16 != 1).any():
            raise MalformedPayload("a segment's coder states do not end where they started")
        return [
            Decoded(tokens, row[:n].astype(np.uint16))
            for tokens, row, n in zip(self._tokens, x, self._lanes, strict=True)
        ]

    def _grid(self, spans: Sequence[tuple[int, int]], steps: int) -> torch.Tensor:
        """Where the tables of the symbols in each row's span start, [steps, rows, lanes]."""
        shape = (steps, len(spans), self._width)
        grid = torch.full(shape, self._idle, dtype=torch.int64, device=self._device)
        for row, (start, end) in enumerate(spans):
            n = min(self._lanes[row], end - start)
            if n:
                part = self._jobs[row].contexts[start:end].reshape(-1, n).to(torch.int64)
                grid[:, row, :n] = part << self._precision
        return grid

    def _keep(self, spans: Sequence[tuple[int, int]], slots: torch.Tensor) -> None:
        """Turn slots into tokens."""
        tokens = self._token_of.index_select(0, slots.reshape(-1)).reshape(slots.shape)
        for row, (start, end) in enumerate(spans):
            n = min(self._lanes[row], end - start)
            self._tokens[row][start:end] = tokens[:, row, :n].reshape(-1)

    def _steps(self, grid: torch.Tensor, rows: int, taking: torch.Tensor | None) -> None:
        """Advance the first rows; the grid's entries become slots."""
        x, takes, at = self._x[:rows], self._takes[:rows], self._at[:rows]
        f, b, w = self._f[:rows], self._b[:rows], self._w[:rows]
        flat_f, flat_b = f.reshape(-1), b.reshape(-1)
        take, before, cursor, after = takes[:, 1:], at[:, :-1], takes[:, :1], at[:, -1:]
        mask, precision, one = self._scalars
        for slots in grid:
            torch.bitwise_and(x, mask, out=w)
            slots.add_(w)
            index = slots.reshape(-1)
            torch.index_select(self._freq, 0, index, out=flat_f)
            torch.index_select(self._bias, 0, index, out=flat_b)
            x.bitwise_right_shift_(precision)
            torch.addcmul(b, x, f, out=x)
            torch.lt(x, one, out=take)
            if taking is not None:
                take.mul_(taking)
            # With the cursor in front, the running sum says where each lane's word is.
            torch.cumsum(takes, 1, out=at)
            torch.take(self._words, before, out=w)
            torch.add(w, x, alpha=_ONE - 1, out=w)
            x.addcmul_(w, take)  # x << 16 | word, where it takes one
            cursor.copy_(after)

    def _check_words(self, rows: int, *, last: bool) -> None:
        cursors = download(self._takes[:rows, 0]).tolist()
        for cursor, end in zip(cursors, self._ends, strict=False):
            if cursor > end:
                raise MalformedPayload("a segment has too few words for its symbols")
            if last and cursor < end:
                raise MalformedPayload(f"a segment has {end - cursor} words left over")


def rans_encode(jobs: Sequence[ToEncode], tables: LaneTables) -> list[Coded]:
    """Code streams that do not depend on each other."""
    keyed = tables.by_key()
    done: dict[int, Coded] = {}
    for batch in _batches([len(job.initial) for job in jobs]):
        batch.sort(key=lambda i: jobs[i].steps, reverse=True)
        results = _encoded([jobs[i] for i in batch], tables, *keyed)
        done.update(zip(batch, results, strict=True))
    return [done[i] for i in range(len(jobs))]


def _encoded(
    jobs: Sequence[ToEncode], tables: LaneTables, freq: torch.Tensor, start: torch.Tensor
) -> list[Coded]:
    device, size = tables.device, 1 << tables.precision
    lanes = [len(job.initial) for job in jobs]
    width, idle = max(lanes), len(freq) - 1
    states = np.full((len(jobs), width), _ONE, np.int64)
    for row, job in enumerate(jobs):
        states[row, : lanes[row]] |= job.initial
    x = upload(states, device)
    shift, d = torch.empty_like(x), torch.empty_like(x)
    words: list[torch.Tensor] = []
    counts: list[torch.Tensor] = []
    for first, end, rows in reversed(list(_runs([job.steps for job in jobs], width))):
        keys = torch.full((end - first, rows, width), idle, dtype=torch.int64, device=device)
        for row in range(rows):
            _fill(keys[:, row], jobs[row].keys[first * lanes[row] : end * lanes[row]], lanes[row])
        f = freq.index_select(0, keys.reshape(-1)).reshape(keys.shape)
        c = start.index_select(0, keys.reshape(-1)).reshape(keys.shape)
        least = f << (32 - tables.precision)
        rest = size - f
        # The state before each step, in coding order from the end, and whether it gives a word.
        before = torch.empty((len(keys) + 1, rows, width), dtype=torch.int64, device=device)
        gives = torch.empty_like(keys)
        before[-1] = x[:rows]
        by, y = shift[:rows], d[:rows]
        for k in range(len(keys) - 1, -1, -1):
            state, after = before[k + 1], before[k]
            torch.ge(state, least[k], out=gives[k])
            torch.mul(gives[k], 16, out=by)
            torch.bitwise_right_shift(state, by, out=after)
            torch.div(after, f[k], rounding_mode="trunc", out=y)
            # x becomes (x // f << precision) + x % f + c.
            after.addcmul_(y, rest[k])
            after.add_(c[k])
        x[:rows] = before[0]
        given = gives.transpose(0, 1) != 0
        words.append((before[1:].transpose(0, 1)[given] & 0xFFFF).to(torch.int32))
        counts.append(given.sum((1, 2)))
    final = download(x).astype(np.uint32)
    of_row = _by_row(words[::-1], counts[::-1], len(jobs))
    return [Coded(final[row, :n], of_row[row]) for row, n in enumerate(lanes)]


def _fill(target: torch.Tensor, keys: torch.Tensor, lanes: int) -> None:
    """Lay keys out as [steps, lanes]; what is not filled stays idle."""
    whole = len(keys) // lanes
    target[:whole, :lanes] = keys[: whole * lanes].reshape(whole, lanes)
    if whole < len(target):
        left = keys[whole * lanes :]
        target[whole, : len(left)] = left


def _by_row(
    words: list[torch.Tensor], counts: list[torch.Tensor], rows: int
) -> list[NDArray[np.uint16]]:
    """Words of each row; ``counts`` says how many each run has of each of its rows."""
    found: list[list[NDArray[np.uint16]]] = [[np.zeros(0, np.uint16)] for _ in range(rows)]
    if words:
        flat = download(torch.cat(words)).astype(np.uint16)
        sizes = download(torch.cat(counts))
        owners = [row for count in counts for row in range(len(count))]
        for row, part in zip(owners, np.split(flat, np.cumsum(sizes)[:-1]), strict=True):
            found[row].append(part)
    return [np.concatenate(parts) for parts in found]

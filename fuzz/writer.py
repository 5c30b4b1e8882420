"""Heads written item by item, by the names that docs/format.md gives to models and contexts."""

from __future__ import annotations

from collections.abc import Iterable

from prunecast.compression.codec.context import DTYPE_CODES
from prunecast.compression.codec.entropy.adaptive import UINT_CONTEXTS, AdaptiveEncoder
from prunecast.compression.codec.entropy.streams import LaneStream

__all__ = ["HeadWriter"]


class HeadWriter:
    """The adaptive coder with models by name.

    Contexts do not depend on each other, so the order in which they are made has no effect.

    >>> w = HeadWriter()
    >>> w.layout([("w", "int8", (3,))])
    >>> len(w.coder.finish())
    5
    """

    def __init__(self) -> None:
        self.coder = AdaptiveEncoder()
        self._first: dict[str, int] = {}

    def _at(self, name: str, count: int) -> int:
        if name not in self._first:
            self._first[name] = self.coder.contexts(count)
        return self._first[name]

    def uint(self, model: str, value: int) -> int:
        """Write an integer; return what was written."""
        self.coder.uint(self._at(model, UINT_CONTEXTS), value)
        return value

    def sint(self, model: str, value: int) -> int:
        """Write a signed integer; return what was written."""
        z = self.uint(model, 2 * value if value >= 0 else -2 * value - 1)
        return -(z + 1 >> 1) if z & 1 else z >> 1

    def bit(self, context: str, value: bool) -> bool:
        """Write a decision; return what was written."""
        self.coder.bit(self._at(context, 1), int(value))
        return value

    def tensor(self, name: str, dtype: str, shape: Iterable[int]) -> tuple[int, ...]:
        """Write one tensor's name, dtype and shape; return the shape as written."""
        raw, dims = name.encode("utf-8", "surrogatepass"), tuple(shape)
        self.uint("length", len(raw))
        for byte in raw:
            node = 1
            for shift in range(7, -1, -1):
                node = 2 * node + self.bit(f"letter {node}", bool(byte >> shift & 1))
        self.uint("kind", 33 * DTYPE_CODES.index(dtype) + len(dims))
        return tuple(self.uint("dimension", d) for d in dims)

    def layout(self, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        """Write names, dtypes and shapes (section 4, item 1)."""
        tensors = list(tensors)
        self.uint("count", len(tensors))
        for name, dtype, shape in tensors:
            self.tensor(name, dtype, shape)

    def coding(self, *, serial: bool, static: bool = False) -> None:
        """Write how symbols and side information are coded (item 2)."""
        self.bit("serial", serial)
        self.bit("static", static)

    def field(self, *, serial: bool, table_set: int = 0, grouping: int = 1) -> None:
        """Write a coded field without levels, centre or neighbours (item 3)."""
        self.uint("mode", 1)
        self.sint("centre", 0)
        self.uint("set", table_set)
        self.bit("rows", False)
        self.bit("columns", False)
        self.sint("base", 0)
        self.uint("depth", 0)
        if not serial:
            self.uint("grouping", grouping)

    def clusters(self, new: int, *, sets: int = 1) -> None:
        """Write maps: the first names so many clusters, the others none (item 4)."""
        for _ in range(sets):
            for row in range(16):
                count = min(new, 64)
                new -= count
                if self.bit(f"class {row}", count > 0):
                    self.uint("range", 0)
                    self.uint("range", count - 1)
                    for _ in range(count):
                        self.uint("cluster", 1)

    def stream(self, entry: LaneStream) -> None:
        """Write a stream's entry in the directory (item 7)."""
        self.uint("lanes", entry.lanes - 1)
        if entry.lanes >= 8:
            self.sint("states", 4 * entry.lanes - entry.state_bytes)
        self.uint("words", entry.words)

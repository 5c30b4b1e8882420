"""One tool on one case: size, CPU seconds, peak memory, and whether the file came back."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from harness.memory import peak_resident

from .state import Pair
from .tools import Tool

__all__ = ["Row", "measure"]

_ENOUGH = 3.0  # seconds of repetitions, after which no further one is begun
T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """What was measured.

    Attributes:
        tool: its name.
        bytes: of the patch.
        create_seconds: CPU time of the process and its children, the least of the repetitions.
        apply_seconds: likewise, patch to `weights.bin` in memory.
        create_memory: growth of the resident set in bytes, result included; None if unknown, as
            it is for a program of its own: Linux counts what its parent held when it started it.
        apply_memory: likewise.
    """

    tool: str
    bytes: int
    create_seconds: float
    apply_seconds: float
    create_memory: int | None
    apply_memory: int | None


def measure(tool: Tool, case: Pair, small: Pair, *, repeat: int) -> Row:
    """Measure `tool` on `case`; `small` is a tiny case that loads its code first.

    Raises:
        RuntimeError: what came back is not the new file.
    """
    patch, create_seconds = _timed(lambda: tool.create(case), repeat)
    back, apply_seconds = _timed(lambda: tool.apply(case, patch), repeat)
    if back != case.new_file:
        raise RuntimeError(f"{tool.name} does not give the new file back on {case.name}")
    del back
    little = tool.create(small)
    memory: tuple[int | None, int | None] = (None, None)
    if not tool.outside:
        memory = (
            peak_resident(lambda: tool.create(case), lambda: tool.create(small)),
            peak_resident(lambda: tool.apply(case, patch), lambda: tool.apply(small, little)),
        )
    return Row(tool.name, len(patch), create_seconds, apply_seconds, *memory)


def _seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _timed(call: Callable[[], T], repeat: int) -> tuple[T, float]:
    """Result, and the least CPU seconds after one warm-up."""
    result = call()
    least, spent = float("inf"), 0.0
    for _ in range(repeat):
        start = _seconds()
        call()
        took = _seconds() - start
        least, spent = min(least, took), spent + took
        if spent > _ENOUGH:
            break
    return result, least

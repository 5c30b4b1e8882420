"""Progress of a simulation on a terminal, or as plain lines in a log."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from prunecast.common.text import bytes_text

__all__ = ["RunProgress"]

_LINES_PER_ARM = 6


class RunProgress:
    """Shows the events of `run_scenario`; a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._name, self._rounds = "", 0
        self._arm: TaskID | None = None
        self._step: TaskID | None = None
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> RunProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end_step()
        self._bars.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take in one event."""
        kind = event["event"]
        if kind == "step":
            self._begin_step(event["text"])
        elif kind == "run-started":
            self._end_step()
            self._name, self._rounds = event["name"], event["rounds"]
            self._arm = self._bars.add_task(self._name, total=self._rounds, detail="")
        elif kind == "round-finished" and self._arm is not None:
            detail = _detail(event, self._rounds)
            self._bars.update(self._arm, completed=event["round"], detail=detail)
            every = max(1, self._rounds // _LINES_PER_ARM)
            if event["round"] % every == 0 or event["round"] == self._rounds:
                self._line(f"{self._name:<12} {detail}")

    def _begin_step(self, text: str) -> None:
        self._end_step()
        self._step = self._bars.add_task("", total=None, detail=text)
        self._line(text)

    def _end_step(self) -> None:
        if self._step is not None:
            self._bars.remove_task(self._step)
            self._step = None

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text)


def _detail(event: Mapping[str, Any], rounds: int) -> str:
    spent = bytes_text(event["bytes_up"] + event["bytes_down"])
    return f"round {event['round']:>2}/{rounds}  {event['score']:>6}  {spent:>8}"

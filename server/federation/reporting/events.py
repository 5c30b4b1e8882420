"""What happens in a run, as it happens: ``events.jsonl``, for everything that follows it.

docs/run.md lists the events and their fields.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prunecast.common.files import StorageError
from prunecast.common.journal import Journal, new_run_id, read_run

__all__ = ["EventLog", "EventTail", "OnEvent", "read_events"]

OnEvent = Callable[[Mapping[str, Any]], None]
"""Told of every event: a mapping of JSON values with the keys ``event``, ``run`` and ``time``."""

_SCHEMA = 1
_LONGEST = 500  # characters of a warning
_LONGEST_LINE = 1 << 24  # bytes; what is longer was not written here


class EventLog(logging.Handler):
    """Passes the events of one run on: to the end of a file, and to a listener.

    As a handler of a logger it passes warnings on as events. What cannot be written is left out
    of the file, and never ends the training.

    Args:
        path: of the file; None for the listener alone.
        on_event: the listener.
        run: id of the run, by default a new one.
        begin: fields of the event ``run-started``, which begins the run in the file.

    Raises:
        StorageError: the file cannot be written, or another run is writing it.
    """

    def __init__(
        self,
        path: Path | None = None,
        on_event: OnEvent | None = None,
        *,
        run: str = "",
        **begin: Any,
    ) -> None:
        super().__init__(logging.WARNING)
        self.run = run or new_run_id()
        self._on_event = on_event
        self._journal: Journal | None = None
        header = {"schema": _SCHEMA, **self._event("run-started", begin)}
        if path is not None:
            self._journal = Journal(path, header)
        if on_event is not None:
            try:
                on_event(header)
            except BaseException:
                self.close()
                raise

    def write(self, event: str, **fields: Any) -> None:
        """Pass one event on; numbers that JSON cannot express become null."""
        whole = self._event(event, fields)
        if self._journal is not None:
            try:
                self._journal.append([whole])
            except StorageError as error:
                self._journal.close()  # a warning about every event would be no help
                self._journal = None
                logging.getLogger("flwr").warning("Events end here: %s", error)
        if self._on_event is not None:
            self._on_event(whole)

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a warning on."""
        try:
            self.write("warning", text=record.getMessage()[:_LONGEST])
        except Exception:  # as every handler: logging must not break what logs
            self.handleError(record)

    @property
    def place(self) -> int:
        """Bytes of the file so far; 0 without one."""
        return 0 if self._journal is None else self._journal.place

    def close(self) -> None:
        """Close the file."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        super().close()

    def _event(self, event: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        made: dict[str, Any] = _plain({"event": event, "run": self.run, "time": now, **fields})
        return made


def read_events(
    path: Path, run: str | None = None, *, whole: bool = True
) -> Iterator[dict[str, Any]]:
    """Events of one run, as they are read from a file; the run may go on.

    Of a run that was stopped and resumed each round is told once: what was told after the last
    checkpoint, and happened again, is left out.

    Args:
        path: of a file that an `EventLog` wrote.
        run: id or name of the run; None for the last one.
        whole: also those of the runs of Flower before, which it goes on with.

    Raises:
        StorageError: the file cannot be read, is damaged or of a newer schema, or has no such run.
    """
    return read_run(path, schema=_SCHEMA, run=run, whole=whole)


class EventTail:
    """Reads a file of events as it grows, run after run.

    Args:
        path: of the file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._place, self._file = path, 0, (0, 0)

    def read(self) -> Iterator[dict[str, Any]]:
        """What was written since; from the beginning where the file is another one.

        Lines that are no events are passed over.

        Raises:
            StorageError: the file is there and cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._place:
                    self._file, self._place = (found.st_dev, found.st_ino), 0
                file.seek(self._place)
                while (line := file.readline(_LONGEST_LINE)).endswith(b"\n"):
                    self._place += len(line)
                    try:
                        event = json.loads(line)
                    except (ValueError, RecursionError):
                        continue  # a run was cut off
                    if isinstance(event, dict):
                        yield event
        except FileNotFoundError:
            return
        except OSError as error:
            raise StorageError(
                f"cannot read {self._path} ({error.strerror or error}): let this user read it"
            ) from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)

"""Append-only JSON Lines files: runs one after the other, each begun by a header line.

A header is the line with the key ``schema``, a whole number that grows when old readers would
misread the lines below; it also holds ``run`` (an id) and ``name``. A run that goes on with an
earlier one of the file names it, as ``continues``, and with ``until`` the place in bytes up to
which that counts. What one writer appends is one ``write``, so that others can follow the file
while it grows.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from prunecast.common.files import StorageError, take_lock

__all__ = ["Journal", "new_run_id", "read_run"]

_LONGEST = 1 << 24  # bytes of a line: what is longer was not written here


def new_run_id() -> str:
    """An id of a run: when it began, in UTC, and enough chance to be the only one."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


class Journal:
    """Writes one run at the end of a file, which keeps the runs before it.

    A line that a crash left unfinished is ended first, so that it spoils nothing after it.

    Args:
        path: the file; its folder is made.
        header: of the run, JSON values; must have an int ``schema``.

    Raises:
        StorageError: the file cannot be written, or another run is writing it.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._failed(error) from error
        try:
            try:
                take_lock(self._fd)
            except BlockingIOError as error:
                raise StorageError(
                    f"another run is writing {path}: give this one a file of its own"
                ) from error
            except OSError:
                pass  # a file system without locks: appending still keeps lines whole
            size = os.fstat(self._fd).st_size
            if size and os.pread(self._fd, 1, size - 1) != b"\n":
                self._write(b"\n")
            # the schema first: whoever looks for headers need not parse every line
            self.append([{"schema": header["schema"], **header}])
        except BaseException:
            self.close()
            raise

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines of JSON values; all of them or, where the disk is full, none.

        Raises:
            StorageError: they cannot be written, or the journal is closed.
        """
        text = "".join(json.dumps(line) + "\n" for line in lines)
        if text:
            self._write(text.encode())

    @property
    def place(self) -> int:
        """Bytes of the file so far."""
        return os.fstat(self._fd).st_size if self._fd >= 0 else 0

    def close(self) -> None:
        """Bring everything to the disk and close the file; closing twice is harmless."""
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            except OSError:
                pass  # a pipe, say; nothing here can be repaired by knowing
            finally:
                os.close(self._fd)
                self._fd = -1

    def _write(self, data: bytes) -> None:
        if self._fd < 0:
            raise StorageError(f"{self.path} is closed")
        try:
            size, written = os.fstat(self._fd).st_size, 0
            try:
                while written < len(data):
                    written += os.write(self._fd, data[written:])
            except OSError:
                if written:
                    os.ftruncate(self._fd, size)
                raise
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> StorageError:
        return StorageError(
            f"cannot write {self.path} ({error.strerror or error}): make room, or give another path"
        )


def read_run(
    path: Path, *, schema: int, run: str | None = None, whole: bool = True
) -> Iterator[dict[str, Any]]:
    """Lines of one run, its header first, as they are read from the file.

    Then come those of the runs that it continues, without their headers, and its own.

    Fields are passed on as they are, known or not. A last line that is not finished (a crash, or
    a run that goes on) is left out.

    Args:
        path: of the journal.
        schema: the newest one that the caller understands.
        run: id or name; None for the last run, and of several of one name the last.
        whole: also what it continues.

    Raises:
        StorageError: the file cannot be read, has no such run, is damaged, or is of a newer schema.
    """
    found: list[tuple[int, dict[str, Any]]] = []
    at = None
    with _open(path) as file:
        for place, header in _headers(file, path):
            if run is None or run in (header.get("run"), header.get("name")):
                at = len(found)
            found.append((place, header))
    if at is None:
        raise StorageError(f"{path} has no run" + ("" if run is None else f" {run!r}"))
    header = found[at][1]
    if type(header["schema"]) is not int or header["schema"] > schema:
        raise StorageError(
            f"{path} is of schema {header['schema']!r}, and this Prunecast reads up to {schema}: "
            "update Prunecast to read it"
        )
    return _lines_of_runs(path, header, _parts(found, at) if whole else [(found[at][0], None)])


def _parts(found: list[tuple[int, dict[str, Any]]], at: int) -> list[tuple[int, int | None]]:
    """Where a run and those that it continues begin and end, None for their own end; in order."""
    parts: list[tuple[int, int | None]] = [(found[at][0], None)]
    while earlier := found[at][1].get("continues"):
        until = found[at][1].get("until")
        before = [n for n in range(at) if found[n][1].get("run") == earlier]
        if not before:
            break
        at = before[-1]
        parts.insert(0, (found[at][0], until if type(until) is int else None))
    return parts


def _lines_of_runs(
    path: Path, header: dict[str, Any], parts: list[tuple[int, int | None]]
) -> Iterator[dict[str, Any]]:
    yield header
    for place, until in parts:
        lines = _lines_of_run(path, place, until)
        next(lines, None)  # a header
        yield from lines


def _lines_of_run(path: Path, place: int, until: int | None) -> Iterator[dict[str, Any]]:
    torn = False
    with _open(path) as file:
        file.seek(place)
        for number, line in enumerate(_lines(file, path)):
            if until is not None and place >= until:
                return
            place += len(line)
            parsed = _parsed(line)
            if number and parsed is not None and "schema" in parsed:
                return
            if torn:
                raise StorageError(f"{path} is damaged: a line in the middle of a run is not JSON")
            if not line.endswith(b"\n"):
                return  # the end so far: what is read next would be the rest of it
            torn = parsed is None
            if parsed is not None:
                yield parsed


def _headers(file: IO[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    place = 0
    for line in _lines(file, path):
        if b'"schema"' in line[:24] and line.endswith(b"\n"):
            parsed = _parsed(line)
            if parsed is not None and "schema" in parsed:
                yield place, parsed
        place += len(line)


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    while line := file.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise StorageError(f"{path} is no journal: it has a line over {_LONGEST} bytes")
        yield line


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _open(path: Path) -> IO[bytes]:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise StorageError(f"cannot read {path} ({error.strerror or error})") from error

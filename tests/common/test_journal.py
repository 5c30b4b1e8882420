"""Append-only files of runs: nothing is lost, a crash spoils nothing, newer ones are refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from prunecast.common.files import StorageError
from prunecast.common.journal import Journal, new_run_id, read_run


def write(path: Path, run: str, *lines: dict[str, Any], **header: Any) -> None:
    journal = Journal(path, {"schema": 1, "run": run, **header})
    journal.append(lines)
    journal.close()


def numbers(path: Path, run: str | None = None) -> list[int]:
    return [line["n"] for line in list(read_run(path, schema=1, run=run))[1:]]


def test_a_run_is_appended_and_found_by_id_or_name(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "journal"
    write(path, "one", {"n": 1}, {"n": 2}, name="a")
    write(path, "two", {"n": 3}, name="b")
    write(path, "three", name="a")
    headers = [next(read_run(path, schema=1, run=run)) for run in ("one", "two", "three")]
    assert [header["run"] for header in headers] == ["one", "two", "three"]
    assert numbers(path) == []
    assert numbers(path, "one") == [1, 2]
    assert numbers(path, "b") == [3]
    assert next(read_run(path, schema=1, run="a")) == {"schema": 1, "run": "three", "name": "a"}
    with pytest.raises(StorageError, match="no run 'four'"):
        read_run(path, schema=1, run="four")


def test_every_cut_leaves_a_file_that_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, "one", {"n": 1}, {"n": 2})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole) + 1):
        path.write_bytes(whole[:cut])
        before = [1, 2][: whole[:cut].count(b"\n") - 1]
        assert numbers(path) == before
        write(path, "two", {"n": 3})
        assert numbers(path) == [3]
        assert numbers(path, "one")[: len(before)] == before
    for cut in range(first):  # not even the header is there
        path.write_bytes(whole[:cut])
        with pytest.raises(StorageError, match="no run"):
            read_run(path, schema=1)
        write(path, "two", {"n": 3})
        assert numbers(path) == [3]


def test_a_running_run_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, {"schema": 1, "run": "one"})
    journal.append([{"n": 1}])
    assert numbers(path) == [1]
    with pytest.raises(StorageError, match=r"another run is writing .*: give this one a file"):
        Journal(path, {"schema": 1, "run": "two"})
    journal.append([{"n": 2}])
    journal.close()
    journal.close()
    assert numbers(path) == [1, 2]
    with pytest.raises(StorageError, match="closed"):
        journal.append([{"n": 3}])


def test_a_line_that_is_being_written_is_the_end_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    write(path, "one", {"n": 1})
    with path.open("ab", buffering=0) as file:
        file.write(b'{"n": ')
        really = json.loads

        def loads(line: bytes) -> Any:
            if not line.endswith(b"\n"):
                file.write(b"2}\n")  # the rest comes while the reader is at it
            return really(line)

        monkeypatch.setattr(json, "loads", loads)
        assert numbers(path) == [1]
        assert numbers(path) == [1, 2]


def test_damage_in_the_middle_is_told(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, "one", {"n": 1}, {"n": 2})
    path.write_bytes(path.read_bytes().replace(b'{"n": 1}', b'{"n": 1'))
    with pytest.raises(StorageError, match="damaged"):
        numbers(path)


@pytest.mark.parametrize("schema", [2, "1", None, True])
def test_a_newer_schema_is_refused_with_the_remedy(tmp_path: Path, schema: Any) -> None:
    path = tmp_path / "journal"
    path.write_text(json.dumps({"schema": schema, "run": "one"}) + "\n")
    with pytest.raises(StorageError, match="update Prunecast"):
        read_run(path, schema=1)


def test_a_file_of_something_else_is_no_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"\0" * (17 << 20))
    with pytest.raises(StorageError, match="no journal"):
        read_run(path, schema=1)
    path.write_bytes(b"[" * 100_000 + b"\n" + b'{"schema": 1}')
    with pytest.raises(StorageError, match="no run"):
        read_run(path, schema=1)
    with pytest.raises(StorageError, match="cannot read"):
        read_run(tmp_path, schema=1)
    with pytest.raises(StorageError, match="cannot write"):
        Journal(tmp_path, {"schema": 1})


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, {"schema": 1, "run": "one"})
    really = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) > 5:
            return really(fd, data[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match=r"No space left.*make room"):
        journal.append([{"n": 1}])
    monkeypatch.undo()
    journal.append([{"n": 2}])
    journal.close()
    assert numbers(path) == [2]


def test_ids_are_sorted_by_time_and_never_the_same() -> None:
    ids = [new_run_id() for _ in range(50)]
    assert len(set(ids)) == 50
    assert [i[:16] for i in ids] == sorted(i[:16] for i in ids)

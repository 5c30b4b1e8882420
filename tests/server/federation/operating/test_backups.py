"""Backups of a database that somebody writes meanwhile, and back."""

from __future__ import annotations

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.common.files import StorageError
from prunecast.server.federation.operating.backups import back_up, restore


def opened(path: Path) -> sqlite3.Connection:
    """As the SuperLink opens it."""
    found = sqlite3.connect(path)
    found.execute("PRAGMA journal_mode = WAL")
    found.execute("PRAGMA synchronous = NORMAL")
    found.execute("PRAGMA wal_autocheckpoint = 100000")
    found.execute("CREATE TABLE IF NOT EXISTS node (name TEXT, data BLOB)")
    return found


def put(database: sqlite3.Connection, *names: str) -> None:
    database.executemany("INSERT INTO node VALUES (?, ?)", [(n, bytes(5000)) for n in names])
    database.commit()


def names_in(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as found:
        return [name for (name,) in found.execute("SELECT name FROM node ORDER BY name")]


def test_a_copy_is_whole_while_the_database_is_written(tmp_path: Path) -> None:
    path, copy = tmp_path / "state.db", tmp_path / "copies" / "state.backup"
    with closing(opened(path)) as database:
        put(database, "a", "b")
        database.execute("INSERT INTO node VALUES ('under way', NULL)")  # not committed
        assert back_up(path, copy) == copy.stat().st_size
        assert names_in(copy) == ["a", "b"]  # which are in the log alone
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert [one.name for one in copy.parent.iterdir()] == ["state.backup"]
        database.commit()
        back_up(path, copy)
        assert names_in(copy) == ["a", "b", "under way"]


def test_a_copy_comes_back_without_the_log_of_what_it_replaces(tmp_path: Path) -> None:
    path, copy = tmp_path / "state.db", tmp_path / "state.backup"
    with closing(opened(path)) as database:
        put(database, "a")
        back_up(path, copy)
        put(database, "b")
        with pytest.raises(StorageError, match="in use: stop the SuperLink first"):
            restore(copy, path)
        wal = path.with_name("state.db-wal").read_bytes()
        assert names_in(path) == ["a", "b"]
    path.with_name("state.db-wal").write_bytes(wal)  # as of a SuperLink that was killed
    restore(copy, path)
    assert names_in(path) == ["a"]
    with closing(opened(path)) as database:
        put(database, "c")
    assert names_in(path) == ["a", "c"]
    path.write_bytes(b"damaged" * 1000)
    restore(copy, path)
    path.unlink()
    restore(copy, path)
    assert names_in(path) == ["a"]


def test_a_copy_never_takes_the_place_of_a_database_that_is_in_use(tmp_path: Path) -> None:
    path, copy = tmp_path / "state.db", tmp_path / "state.backup"
    with closing(opened(path)) as database:
        put(database, "a")
        back_up(path, copy)
        for source in (path, copy):  # onto itself, and the two files the wrong way round
            with pytest.raises(StorageError, match=r"state\.db is in use: name another file"):
                back_up(source, path)
        put(database, "b")
    assert names_in(path) == ["a", "b"]


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone gives files away")
def test_what_root_restores_stays_its_owners(tmp_path: Path) -> None:
    path, copy = tmp_path / "lib" / "state.db", tmp_path / "state.backup"
    path.parent.mkdir()
    with closing(opened(path)) as database:
        put(database, "a")
        back_up(path, copy)
    os.chown(path, 12345, 12346)
    restore(copy, path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12345, 12346)
    path.unlink()
    os.chown(path.parent, 12347, 12348)
    restore(copy, path)
    assert (path.stat().st_uid, path.stat().st_gid) == (12347, 12348)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_database_in_a_folder_that_is_closed_to_others_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(StorageError, match=r"cannot read \S+state\.db: Permission denied"):
        back_up(tmp_path / "state.db", tmp_path / "state.backup")


def test_what_is_missing_or_damaged_replaces_nothing(tmp_path: Path) -> None:
    path, copy = tmp_path / "state.db", tmp_path / "state.backup"
    with closing(opened(path)) as database:
        put(database, *"abcdef")
    with pytest.raises(StorageError, match="there is no database"):
        back_up(tmp_path / "none.db", copy)
    assert not (tmp_path / "none.db").exists()
    back_up(path, copy)
    whole = copy.read_bytes()
    copy.write_bytes(whole[:8192] + b"x" * 4096 + whole[12288:])
    for action in (lambda: restore(copy, path), lambda: back_up(copy, path)):
        with pytest.raises(StorageError, match=r"state\.backup (is damaged|cannot be copied)"):
            action()
    copy.write_bytes(b"no database at all" * 100)
    with pytest.raises(StorageError, match="cannot be copied"):
        restore(copy, path)
    assert names_in(path) == list("abcdef")


def test_an_empty_file_replaces_neither_a_database_nor_a_backup(tmp_path: Path) -> None:
    """What `cp` leaves on a full disk is a sound database to SQLite: one without tables."""
    path, copy, empty = (tmp_path / name for name in ("state.db", "state.backup", "empty"))
    with closing(opened(path)) as database:
        put(database, "a")
    back_up(path, copy)
    empty.touch()
    for action in (lambda: restore(empty, path), lambda: back_up(empty, copy)):
        with pytest.raises(
            StorageError, match="empty is empty, not a SuperLink's: take an earlier"
        ):
            action()
    assert names_in(path) == names_in(copy) == ["a"]


def test_what_a_link_leads_to_is_replaced_and_not_the_link(tmp_path: Path) -> None:
    path, volume = tmp_path / "state.db", tmp_path / "volume"
    volume.mkdir()
    path.symlink_to(volume / "state.db")
    with closing(opened(path)) as database:
        put(database, "a")
    copy = tmp_path / "latest.backup"
    copy.symlink_to(volume / "monday.backup")
    back_up(path, copy)
    assert names_in(volume / "monday.backup") == ["a"]
    with closing(opened(path)) as database:
        put(database, "b")
    restore(copy, path)
    assert names_in(volume / "state.db") == ["a"]
    assert path.is_symlink()
    assert copy.is_symlink()


def test_the_commands(tmp_path: Path) -> None:
    path, copy = tmp_path / "state.db", tmp_path / "state.backup"
    with closing(opened(path)) as database:
        put(database, "a")

    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["federation", *arguments])
        return result.exit_code, result.output

    code, said = run("backup", str(path), str(copy))
    assert (code, said.endswith(" kB, whole\n")) == (0, True)
    assert run("restore", str(copy), str(path))[0] == 2  # not without --force
    assert run("restore", "--force", str(copy), str(path))[0] == 0
    assert run("backup", str(tmp_path / "none"), str(copy))[0] == 1

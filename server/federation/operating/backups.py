"""Backups of a SuperLink's database: while it runs, and back.

The database (``flower-superlink --database FILE``) holds which nodes are registered, the runs, and
the messages under way. It is SQLite with a write-ahead log: a copy of the file alone lacks what is
in the log, and is damaged where the SuperLink writes meanwhile.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from prunecast.common.files import StorageError, replacing, replacing_all

__all__ = ["back_up", "restore"]

_WAITS = 30.0  # seconds for a writer to be done
_PAGES = 4096  # copied at a time; the SuperLink may write in between


def back_up(database: Path, file: Path) -> int:
    """Copy a database that may be in use, as it is at one moment.

    Args:
        database: the SuperLink's.
        file: replaced whole or not at all, of mode 0600; where it is a link, what that leads to.

    Returns:
        Bytes of the copy.

    Raises:
        StorageError: the database is missing, empty, damaged or locked, or the copy cannot be
            written, or would replace a database that is in use.
    """
    file = Path(os.path.realpath(file))
    if file.exists():
        _see_that_nobody_uses(file, "name another file for the copy")
    with replacing(file) as temporary:
        os.chmod(temporary, 0o600)
        try:
            with (
                closing(_open(database)) as source,
                closing(sqlite3.connect(temporary)) as target,
            ):
                source.backup(target, pages=_PAGES)
                # one file: whoever copies it further needs no log beside it
                target.execute("PRAGMA journal_mode = DELETE")
        except sqlite3.Error as error:
            raise _failed(database, error) from error
        _check(temporary, database)
        return temporary.stat().st_size


def restore(file: Path, database: Path) -> None:
    """Put a backup in the place of a database; the SuperLink must have ended.

    Args:
        file: that `back_up` wrote.
        database: the SuperLink's, which need not be there; its log goes with it. Where it is a
            link, what that leads to. Restored by root, it belongs to whom it belonged, or to the
            owner of its folder.

    Raises:
        StorageError: the backup is missing, empty or damaged, the database is in use, or the file
            system refuses; the database is as it was.
    """
    _check(file, file)
    database = Path(os.path.realpath(database))
    if database.exists():
        _see_that_nobody_uses(database, "stop the SuperLink first")
    # the old one's log, which SQLite would play into the new one
    logs = [database.with_name(database.name + suffix) for suffix in ("-wal", "-shm")]
    with replacing_all([database], outdated=logs) as (temporary,):
        os.chmod(temporary, 0o600)
        temporary.write_bytes(file.read_bytes())
        if os.geteuid() == 0:  # the SuperLink has a user of its own, who must be able to open it
            owner = (database if database.exists() else database.parent).stat()
            os.chown(temporary, owner.st_uid, owner.st_gid)


def _see_that_nobody_uses(database: Path, remedy: str) -> None:
    try:
        with closing(sqlite3.connect(database, timeout=0.1)) as found:
            # with a log, whoever has the database open shares a lock on it
            found.execute("PRAGMA locking_mode = EXCLUSIVE")
            found.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StorageError(f"{database} is in use: {remedy}") from error
    except sqlite3.DatabaseError:
        pass  # damaged, which is what a backup is for


def _open(database: Path) -> sqlite3.Connection:
    try:
        there = database.is_file()
    except OSError as error:  # of its folder, which may be closed to others
        raise StorageError(f"cannot read {database}: {error.strerror}") from error
    if not there:
        raise StorageError(f"there is no database {database}: see --database of the SuperLink")
    return sqlite3.connect(f"{database.resolve().as_uri()}?mode=rw", uri=True, timeout=_WAITS)


def _check(file: Path, named: Path) -> None:
    try:
        with closing(_open(file)) as found:
            (said,) = found.execute("PRAGMA integrity_check(1)").fetchone()
            (tables,) = found.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise _failed(named, error) from error
    if said != "ok":
        raise StorageError(f"{named} is damaged ({said}): take an earlier backup")
    if not tables:  # as a full disk leaves it, which SQLite takes for a sound one
        raise StorageError(f"{named} is empty, not a SuperLink's: take an earlier backup")


def _failed(database: Path, error: sqlite3.Error) -> StorageError:
    return StorageError(f"{database} cannot be copied: {error}")

"""The connection: SQLite or PostgreSQL, the schema's version, and what a transaction means.

SQLite: every transaction begins with ``BEGIN IMMEDIATE``, so one writer at a time. PostgreSQL:
READ COMMITTED with row locks, always in the order groups, rollouts, devices (`transactions`).
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    String,
    column,
    create_engine,
    event,
    func,
    insert,
    inspect,
    select,
    table,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from prunecast.server.fleet.errors import (
    AlreadyExists,
    DatabaseError,
    DatabaseMissing,
    SchemaMismatch,
    Unusable,
)
from prunecast.server.fleet.tables import REVISION, REVISION_TABLE, Base, MetaRow

__all__ = ["Database", "lasting_url"]

_WAIT = 30.0
"""Seconds that a SQLite transaction waits for another one."""
_LOCK = 0x5072756E65636173
"""Of PostgreSQL, for whoever changes tables."""
_MIGRATIONS = Path(__file__).with_name("migrations")


def lasting_url(url: str) -> str:
    """A database's URL as it may be written down: without a password, SQLite's path absolute.

    PostgreSQL's own ways give the password then: ``PGPASSWORD`` or ``~/.pgpass``.

    Raises:
        Unusable: the URL is none, or of another database.

    >>> lasting_url("postgresql://fleet:secret@db/fleet")
    'postgresql+psycopg://fleet@db/fleet'
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite" and parsed.database:
        parsed = parsed.set(database=str(Path(parsed.database).absolute()))
    kept = {key: value for key, value in parsed.query.items() if key != "password"}
    bare = URL.create(
        parsed.drivername, parsed.username, None, parsed.host, parsed.port, parsed.database, kept
    )
    return bare.render_as_string()


class Database:
    """A fleet's database.

    Args:
        url: as SQLAlchemy reads it: ``sqlite:///fleet.db``, ``postgresql://user@host/name``.

    Raises:
        Unusable: the URL is none, or of another database.
        DatabaseMissing: the database holds no fleet.
        SchemaMismatch: it was made by another version.
        DatabaseError: it cannot be reached.
    """

    def __init__(self, url: str) -> None:
        self._engine = _engine(_existing(url))
        try:
            self._check_schema()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, url: str, settings: dict[str, str]) -> Database:
        """Make the tables.

        Raises:
            AlreadyExists: the database holds a fleet.
            DatabaseError: it cannot be reached, or refuses.
        """
        parsed = _parse(url)
        with _changing(parsed) as connection:
            if inspect(connection).has_table(MetaRow.__tablename__):
                raise AlreadyExists(f"{parsed} holds a fleet already: use it, or another one")
            Base.metadata.create_all(connection)
            _migrate(connection, REVISION)
            if settings:
                rows = [{"key": key, "value": value} for key, value in settings.items()]
                connection.execute(insert(MetaRow), rows)
        return cls(url)

    @classmethod
    def upgrade(cls, url: str) -> Database:
        """Bring a fleet that an earlier version made up to date; a present one stays as it is.

        Raises:
            DatabaseMissing: the database holds no fleet.
            SchemaMismatch: a later version made it.
            DatabaseError: it cannot be reached, or refuses.
        """
        with _changing(_existing(url)) as connection:
            held = _revision(connection)
            if held is not None and held < REVISION:
                _migrate(connection, held)
        return cls(url)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A transaction: committed at the end, rolled back by an exception.

        Raises:
            DatabaseError: the database refuses.
        """
        with (
            _translated(self._engine.url),
            Session(self._engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    def settings(self) -> dict[str, str]:
        """What `create` was given."""
        with self.transaction() as session:
            return {row.key: row.value for row in session.scalars(select(MetaRow))}

    @property
    def revision(self) -> str | None:
        """Number of the schema that is there; None: no fleet.

        Raises:
            DatabaseError: the database refuses.
        """
        with _translated(self._engine.url), self._engine.begin() as connection:
            return _revision(connection)

    def _check_schema(self) -> None:
        held = self.revision
        if held is None:
            raise _missing(self._engine.url)
        if held != REVISION:
            older = held < REVISION
            remedy = "run `prunecast fleet upgrade`" if older else "install a later prunecast"
            has = f"{self._engine.url} has fleet schema {held}"
            raise SchemaMismatch(f"{has}, this version needs {REVISION}: {remedy}")


def _revision(connection: Connection) -> str | None:
    """The schema's number; before Alembic the settings had it, as 1 or 2."""
    tables = inspect(connection)
    if tables.has_table(REVISION_TABLE):
        number = column("version_num", String)
        return connection.scalar(select(number).select_from(table(REVISION_TABLE)))
    if not tables.has_table(MetaRow.__tablename__):
        return None
    schema = connection.scalar(select(MetaRow.value).where(MetaRow.key == "schema"))
    return None if schema is None else schema.zfill(len(REVISION))


def _migrate(connection: Connection, held: str) -> None:
    """Apply the revisions after the one that is there, within the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    if not inspect(connection).has_table(REVISION_TABLE):
        command.stamp(config, held)
    command.upgrade(config, "head")


@contextmanager
def _changing(url: URL) -> Iterator[Connection]:
    """A connection in one transaction that changes tables; only one process does so at a time."""
    engine = _engine(url)
    try:
        with _translated(url), engine.begin() as connection:
            if url.get_backend_name() == "postgresql":  # SQLite's transactions exclude each other
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
            yield connection
    finally:
        engine.dispose()


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise Unusable(
            f"{url!r} is no database URL: give sqlite:///fleet.db or postgresql://user@host/name"
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise _unsupported(parsed)
    return parsed


def _engine(url: URL) -> Engine:
    sqlite = url.get_backend_name() == "sqlite"
    options: dict[str, Any] = {"pool_pre_ping": True, "isolation_level": "READ COMMITTED"}
    if sqlite:
        options = {"connect_args": {"timeout": _WAIT}}
    try:
        engine = create_engine(url, **options)
    except NoSuchModuleError as error:
        raise _unsupported(url) from error
    except ModuleNotFoundError as error:
        raise DatabaseError(
            "the driver for PostgreSQL is not installed: pip install 'prunecast[postgres]'"
        ) from error
    if sqlite:
        event.listen(engine, "connect", _set_up)
        event.listen(engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
    return engine


def _set_up(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    deadline = time.monotonic() + _WAIT
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError as error:
            # of two that open a new database, SQLite refuses one here at once, whatever its timeout
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA foreign_keys=ON")


def _existing(url: str) -> URL:
    """The parsed URL; SQLite would make an empty file where there is none."""
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or ":memory:").is_file():
        raise _missing(parsed)
    return parsed


def _missing(url: URL) -> DatabaseMissing:
    return DatabaseMissing(f"{url} holds no fleet: make one with `prunecast fleet init`")


def _unsupported(url: URL) -> Unusable:
    return Unusable(f"{url.drivername} is not supported: use sqlite or postgresql")


@contextmanager
def _translated(url: URL) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        words = " ".join(str(cause).split())[:300]
        raise DatabaseError(f"{url}: {words}") from error

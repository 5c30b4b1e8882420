"""Databases that earlier versions made, and whether the revisions lead to the tables of today."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from prunecast.server.fleet import database as module
from prunecast.server.fleet.audit import AuditKind, audit_text
from prunecast.server.fleet.database import Database
from prunecast.server.fleet.errors import AlreadyExists, SchemaMismatch, TokenRefused
from prunecast.server.fleet.events import Resume
from prunecast.server.fleet.model import Failure, Outcome, Status, Tally
from prunecast.server.fleet.reports import (
    Certified,
    DeviceReport,
    DeviceState,
    DirectiveAnswer,
    Health,
)
from prunecast.server.fleet.service import FleetService
from prunecast.server.fleet.tables import REVISION, REVISION_TABLE, Base
from support.fleet import open_service, releases
from support.fleet_schema1 import make_schema_1

SCHEMA_2 = Path(__file__).with_name("schema2.sql")
"""Dump of a database that prunecast made before it used Alembic."""
TOKEN = "token-of-a-device-1-".ljust(43, "x")
OTHER = "token-of-a-device-2-".ljust(43, "x")


def on(url: str, work: Callable[[Connection], object]) -> object:
    engine = module._engine(module._parse(url))
    try:
        with engine.begin() as connection:
            return work(connection)
    finally:
        engine.dispose()


def differences(connection: Connection) -> list[object]:
    options = {"version_table": REVISION_TABLE, "compare_server_default": True}
    context = MigrationContext.configure(connection, opts=options)
    return list(compare_metadata(context, Base.metadata))


def as_before(url: str, monkeypatch: pytest.MonkeyPatch, schema: str) -> None:
    """A database of schema 1 or 2 with one device, which was told release 2."""

    def make(connection: Connection) -> None:
        with monkeypatch.context() as patch:
            upgrade = command.upgrade
            patch.setattr(command, "upgrade", lambda given, _: upgrade(given, f"000{schema}"))
            make_schema_1(connection)
            module._migrate(connection, "0001")
        for statement in (
            f"DROP TABLE {REVISION_TABLE}",
            f"INSERT INTO fleet_meta VALUES ('schema', '{schema}')",
            "INSERT INTO fleet_groups VALUES ('lab', 'digits', 1, NULL, NULL)",
            "INSERT INTO fleet_devices"
            " (id, group_id, revoked, agent, refused, serial, told_version)"
            " VALUES ('cam', 'lab', false, '', '[]', 2, 2)",
            "INSERT INTO fleet_audit (at, actor, action, subject, detail)"
            " VALUES (1, 'ada', 'group added', 'lab', 'follows digits')",
        ):
            connection.execute(text(statement))

    on(url, make)


def test_the_revisions_make_the_tables_of_today(service: FleetService, url: str) -> None:
    assert on(url, differences) == []
    assert service._database.revision == REVISION
    script = ScriptDirectory(str(module._MIGRATIONS))
    assert script.get_current_head() == REVISION
    assert [r.revision for r in script.walk_revisions()] == ["0004", "0003", "0002", "0001"]


@pytest.mark.parametrize("schema", ["1", "2"])
def test_a_fleet_from_before_alembic_is_refused_and_upgraded(
    url: str, schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_before(url, monkeypatch, schema)
    with pytest.raises(SchemaMismatch, match=rf"has fleet schema 000{schema}.*fleet upgrade`"):
        open_service(url)
    with pytest.raises(AlreadyExists, match="holds a fleet already"):
        FleetService.create(url, releases)
    for _ in range(2):
        Database.upgrade(url).close()
    assert on(url, differences) == []
    with open_service(url) as upgraded:
        assert upgraded._database.revision == REVISION
        assert upgraded.settings() == {}
        (entry,) = upgraded.audit()
        assert (entry.kind, audit_text(entry)) == (AuditKind.GROUP_ADDED, "follows digits")
        failed = DirectiveAnswer(2, 2, Outcome.SELFTEST_FAILED, "off by\n0.5")
        report = DeviceReport("12345678", None, failed)
        assert upgraded.receive(Certified("cam"), report, 4).counted
        assert [e.kind for e in upgraded.audit()][1:] == [AuditKind.RELEASE_FAILED]


def test_what_an_earlier_version_stored_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "100 %.db"  # a percent sign means something to Alembic's configuration
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA_2.read_text())
    connection.close()
    url = f"sqlite:///{path}"
    with pytest.raises(SchemaMismatch, match="has fleet schema 0002, this version needs 0004: run"):
        open_service(url)
    Database.upgrade(url).close()
    assert on(url, differences) == []
    with open_service(url) as service:
        assert service.settings() == {"repository": "/srv/repository"}
        assert service.identify(TOKEN).device == "cam-1"
        rollout = service.rollout("r2")
        assert (rollout.status, rollout.reason, rollout.told) == (Status.PAUSED, "lunch", 2)
        assert (rollout.tally, rollout.windows) == (Tally(failed=1), ())
        failed = Failure(Outcome.SELFTEST_FAILED, "off by 0.5", 6.0)
        assert service.device("cam-2").failures == {2: failed}
        said = [(e.kind.words, e.subject, audit_text(e)) for e in service.audit(limit=3)]
        assert said == [
            ("release failed", "cam-2", "digits 2: self-test failed: off by 0.5"),
            ("device told", "cam-2", "digits 1"),
            ("rollout paused", "r2", "lunch"),
        ]
        assert service.health("cam-2") == (Health("hot", {"celsius": 71.5}, 6.0), 6.0)
        replayed = DeviceReport("report01", DeviceState(1))
        assert service.receive(OTHER, replayed, 8).replayed
        service.operate(Resume(at=9, actor="ada", rollout="r2"))
        assert audit_text(service.audit(limit=1)[0]) == "was paused: lunch"
        assert service.poll(TOKEN, DeviceState(1), 10).serial == 2
        with pytest.raises(TokenRefused):
            service.identify("x" * 43)


def test_windows_that_are_over_are_counted_from_the_devices(tmp_path: Path) -> None:
    path = tmp_path / "fleet.db"
    with sqlite3.connect(path) as connection:
        connection.executescript(SCHEMA_2.read_text())
        connection.executescript(
            """
            UPDATE fleet_rollouts SET epoch = 3, status = 'completed', succeeded = 1, failed = 0;
            UPDATE fleet_devices SET part_progress = 'succeeded', told_outcome = 'succeeded';
            UPDATE fleet_devices SET part_epoch = 3 WHERE id = 'cam-1';
            UPDATE fleet_devices SET refused = '[2, 3]' WHERE id = 'cam-2';
            """
        )
    connection.close()
    Database.upgrade(f"sqlite:///{path}").close()
    with open_service(f"sqlite:///{path}") as service:
        rollout = service.rollout("r2")
        assert (rollout.tally, rollout.windows) == (Tally(1), (Tally(1), Tally()))
        assert rollout.completed == rollout.since == 4.0
        device = service.device("cam-2")
        assert (device.told.outcome, device.refused) == (Outcome.CONFIRMED, {2, 3})
        assert device.failures[3] == Failure(Outcome.ROLLED_BACK)  # no report of it was kept


def test_a_later_schema_is_refused(service: FleetService, url: str) -> None:
    with service._database.transaction() as session:
        session.execute(text(f"UPDATE {REVISION_TABLE} SET version_num = '0099'"))
    for opened in (open_service, Database.upgrade):
        with pytest.raises(SchemaMismatch, match="schema 0099, this version needs 0004: install"):
            opened(url)


def test_an_upgrade_that_fails_changes_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    as_before(url, monkeypatch, "2")

    def fail(*_: object) -> None:
        raise RuntimeError("the power is gone")

    with monkeypatch.context() as patch:
        patch.setattr(module.Connection, "_commit_impl", fail)
        with pytest.raises(RuntimeError, match="the power is gone"):
            Database.upgrade(url)
    with pytest.raises(SchemaMismatch, match="schema 0002"):
        open_service(url)
    Database.upgrade(url).close()
    assert on(url, differences) == []


def test_a_new_file_that_another_is_writing_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite's own timeout does not hold where a file's journal mode changes."""
    other = sqlite3.connect(tmp_path / "fleet.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waits = []

    def end(seconds: float) -> None:
        waits.append(seconds)
        other.close()

    monkeypatch.setattr("prunecast.server.fleet.database.time.sleep", end)
    Database.create(f"sqlite:///{tmp_path / 'fleet.db'}", {}).close()
    assert len(waits) == 1


def test_of_two_that_change_tables_one_waits(url: str) -> None:
    def create(_: int) -> str:
        try:
            Database.create(url, {}).close()
        except AlreadyExists:
            return "there already"
        return "made"

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(create, range(2))) == ["made", "there already"]

        def before_alembic(connection: Connection) -> None:
            for statement in (
                "ALTER TABLE fleet_audit RENAME COLUMN kind TO action",
                "ALTER TABLE fleet_audit RENAME COLUMN fields TO detail",
                "ALTER TABLE fleet_rollouts RENAME COLUMN confirmed TO succeeded",
                "ALTER TABLE fleet_rollouts DROP COLUMN windows",
                "ALTER TABLE fleet_rollouts DROP COLUMN completed",
                "ALTER TABLE fleet_devices RENAME COLUMN failures TO refused",
                f"DROP TABLE {REVISION_TABLE}",
                "INSERT INTO fleet_meta VALUES ('schema', '2')",
            ):
                connection.execute(text(statement))

        on(url, before_alembic)
        opened = list(pool.map(lambda _: Database.upgrade(url), range(2)))
    assert [database.revision for database in opened] == [REVISION] * 2
    for database in opened:
        database.close()

"""Databases: SQLite always, PostgreSQL where its programs are installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prunecast.server.fleet.service import FleetService
from support.fleet import find_postgres, postgres, releases


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    pytest.importorskip("psycopg", reason="psycopg is not installed: pip install '.[postgres]'")
    binaries = find_postgres()
    if binaries is None:
        pytest.skip("PostgreSQL's programs are not installed: apt-get install postgresql")
    with postgres(binaries) as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.engine)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'fleet.db'}"
    from sqlalchemy import create_engine, make_url

    from prunecast.server.fleet.tables import REVISION_TABLE, Base

    cluster: str = request.getfixturevalue("cluster")
    engine = create_engine(make_url(cluster).set(drivername="postgresql+psycopg"))
    Base.metadata.drop_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {REVISION_TABLE}")
    engine.dispose()
    return cluster


@pytest.fixture
def service(url: str) -> Iterator[FleetService]:
    with FleetService.create(url, releases) as made:
        yield made

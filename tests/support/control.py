"""Fixtures of a control server: a repository with two releases, a fleet on SQLite, TLS on loopback.

A conftest imports them by name: ``from support.control import authority, ...``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from prunecast.server.control import ControlLimits, ControlServer
from prunecast.server.fleet.events import AddGroup
from prunecast.server.fleet.model import Release
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import KeyRing, Repository
from support.authority import Authority
from support.classifier import classifier, classifier_graph, classifier_inputs
from support.releases import publish_model

__all__ = ["LIMITS", "authority", "database", "fleet", "repository", "server"]

LIMITS = ControlLimits(keep_alive=1.0, report_burst=20, reports_per_second=0.01, drain=2.0)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("releases")
    made = Repository.create(folder / "repository", KeyRing.create(folder / "keys"))
    for version in (1, 2):
        publish_model(
            made,
            "toy",
            classifier(version),
            classifier_graph(),
            selftest_inputs=classifier_inputs(),
        )
    return made


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('fleet') / 'fleet.db'}"


@pytest.fixture(scope="module")
def fleet(database: str, repository: Repository) -> Iterator[FleetService]:
    """The fleet, in this process: what an operator's commands would do."""
    live = [Release("toy", 1), Release("toy", 2)]
    with FleetService.create(database, lambda: live, repository=repository.path) as made:
        made.operate(AddGroup(at=0, group="lab", release="toy", stable=1))
        yield made


@pytest.fixture(scope="module")
def server(
    database: str, fleet: FleetService, repository: Repository, authority: Authority
) -> Iterator[ControlServer]:
    certificate, key = authority.server()
    with ControlServer(
        *(database, repository.path),
        certificate=certificate, key=key, limits=LIMITS, interval=0.1,
    ) as running:  # fmt: skip
        yield running

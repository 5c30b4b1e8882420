"""Releases to serve, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunecast.client.edge.slots.slot import LoadedRelease
from support.served import echo_release, loaded_release


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[LoadedRelease]:
    """Releases 1 to 4 of the classifier."""
    folder = tmp_path_factory.mktemp("toys")
    return [loaded_release(number, folder) for number in range(1, 5)]


@pytest.fixture(scope="session")
def echo(tmp_path_factory: pytest.TempPathFactory) -> LoadedRelease:
    folder: Path = tmp_path_factory.mktemp("echo")
    return echo_release(folder)

"""A small classifier, a repository, and a network in memory that tests can tamper with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from prunecast.client.edge import Agent, AgentConfig
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import Repository
from support.network import Network
from support.releases import graph, images, keys, model, publish_model, repository

__all__ = ["graph", "images", "keys", "model", "repository"]

URL = "http://repository.invalid/"


@pytest.fixture
def network(repository: Repository) -> Network:
    return Network(repository.path)


@pytest.fixture
def publish(
    repository: Repository,
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
) -> Callable[..., ReleaseManifest]:
    """A function: number -> publishes that version of the model under the name ``toy``."""

    def publish(number: int, name: str = "toy") -> ReleaseManifest:
        made = publish_model(repository, name, model(number), graph, selftest_inputs=images)
        return made.manifest

    return publish


@pytest.fixture
def config(repository: Repository, tmp_path: Path) -> AgentConfig:
    return AgentConfig(tmp_path / "state", URL, "toy", repository.trusted_root(), threads=1)


@pytest.fixture
def start(config: AgentConfig, network: Network) -> Iterator[Callable[..., Agent]]:
    """A function: an agent on the test's state folder; closed at the end."""
    agents: list[Agent] = []

    def start(**options: object) -> Agent:
        for agent in agents:
            agent.close()
        agents.append(Agent(config, fetcher=network, wait=lambda _: None, **options))  # type: ignore[arg-type]
        return agents[-1]

    start.agents = agents  # type: ignore[attr-defined]
    yield start
    for agent in agents:
        agent.close()


@pytest.fixture
def kill(start: Callable[..., Agent], config: AgentConfig, tmp_path: Path) -> Callable[[], None]:
    """A function: the agent that `start` made last is gone without having written anything."""

    def kill() -> None:
        left = tmp_path / "left"
        shutil.copytree(config.state, left, symlinks=True)
        start.agents[-1].close()  # type: ignore[attr-defined]
        shutil.rmtree(config.state)
        left.rename(config.state)

    return kill

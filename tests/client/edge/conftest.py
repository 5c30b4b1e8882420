"""A small classifier, a repository, and a network in memory that tests can tamper with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from tuf.api.exceptions import DownloadError, DownloadHTTPError

from prunecast.client.edge import Agent, AgentConfig, Fetcher, Stream
from prunecast.compression.onnx import ExportedGraph, ReleaseManifest
from prunecast.compression.versions import PublishedModel
from prunecast.server.releases import KeyRing, Repository
from support.classifier import classifier, classifier_graph, classifier_inputs


@pytest.fixture(scope="session")
def graph() -> ExportedGraph:
    return classifier_graph()


@pytest.fixture(scope="session")
def model() -> Callable[[int], PublishedModel]:
    """A function: number -> that version of the model."""
    return classifier


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return classifier_inputs()


@pytest.fixture
def keys(tmp_path: Path) -> KeyRing:
    return KeyRing.create(tmp_path / "keys")


@pytest.fixture
def repository(tmp_path: Path, keys: KeyRing) -> Repository:
    return Repository.create(tmp_path / "repository", keys)


URL = "http://repository.invalid/"


@dataclass
class Network(Fetcher):
    """A repository's folder as a network.

    Attributes:
        folder: what is served.
        replaced: content by path that takes the place of the real one; None answers 404.
        cut: by path, after how many bytes the connection breaks, once.
        asked: every request: path and offset.
    """

    folder: Path
    replaced: dict[str, bytes | None] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, int]] = field(default_factory=list)
    down: bool = False

    def open(self, url: str, offset: int = 0) -> Stream:
        path = unquote(urlsplit(url).path).lstrip("/")
        self.asked.append((path, offset))
        if self.down:
            raise DownloadError("no route")
        file = self.folder / path
        data = self.replaced.get(path, file.read_bytes() if file.is_file() else None)
        if data is None:
            raise DownloadHTTPError(f"{url} answered 404", 404)
        return Stream(offset, self._chunks(path, data[offset:]))

    def _chunks(self, path: str, data: bytes) -> Iterator[bytes]:
        limit = self.cut.pop(path, None)
        yield from (data[i : i + 64] for i in range(0, len(data[:limit]), 64))
        if limit is not None:
            raise DownloadError("connection broke")


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
        made = repository.publish(name, model(number), graph, selftest_inputs=images)
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

    yield start
    for agent in agents:
        agent.close()

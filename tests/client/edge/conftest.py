"""A small classifier, a repository, and a network in memory that tests can tamper with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from onnx import TensorProto, helper
from tuf.api.exceptions import DownloadError, DownloadHTTPError

from prunecast.client.edge import Agent, AgentConfig, Fetcher, Stream
from prunecast.compression.codec import TensorSpec
from prunecast.compression.onnx import ExportedGraph, ReleaseManifest
from prunecast.compression.versions import LatticeTensor, PublishedModel, RawTensor
from prunecast.server.releases import KeyRing, Repository

WIDTHS = (12, 64, 5)


@pytest.fixture(scope="session")
def graph() -> ExportedGraph:
    gemm = {"transB": 1}
    nodes = [
        helper.make_node("Gemm", ["input", "w1", "b1"], ["h"], **gemm),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["output"], **gemm),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
        for name, width in (("input", WIDTHS[0]), ("output", WIDTHS[2]))
    ]
    body = helper.make_graph(nodes, "classifier", ends[:1], ends[1:])
    proto = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    single = np.dtype(np.float32)
    parameters = {
        "w1": TensorSpec(single, (WIDTHS[1], WIDTHS[0])),
        "b1": TensorSpec(single, (WIDTHS[1],)),
        "w2": TensorSpec(single, (WIDTHS[2], WIDTHS[1])),
        "b2": TensorSpec(single, (WIDTHS[2],)),
    }
    return ExportedGraph(proto.SerializeToString(), parameters)


def _model(number: int) -> PublishedModel:
    """Version `number` of a model that drifts a little from version to version."""
    rng = np.random.default_rng(7)
    w1 = rng.integers(-60, 61, (WIDTHS[1], WIDTHS[0])) * (rng.random((WIDTHS[1], WIDTHS[0])) < 0.3)
    w2 = rng.integers(-60, 61, (WIDTHS[2], WIDTHS[1]))
    for _ in range(number):
        w1 = w1 + (rng.random(w1.shape) < 0.05) * rng.integers(-2, 3, w1.shape) * (w1 != 0)
        w2 = w2 + (rng.random(w2.shape) < 0.05) * rng.integers(-2, 3, w2.shape)
    b1 = rng.standard_normal(WIDTHS[1]).astype(np.float32)
    b2 = rng.standard_normal(WIDTHS[2]).astype(np.float32)
    return PublishedModel(
        {
            "w1": LatticeTensor(w1.astype(np.int32), 0.01, pruned=True),
            "b1": RawTensor(b1),
            "w2": LatticeTensor(w2.astype(np.int32), 0.02),
            "b2": RawTensor(b2),
        },
        number,
    )


@pytest.fixture(scope="session")
def model() -> Callable[[int], PublishedModel]:
    """A function: number -> that version of the model."""
    return _model


@pytest.fixture(scope="session")
def images() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((4, WIDTHS[0])).astype(np.float32)


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

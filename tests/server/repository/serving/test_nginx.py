"""A repository behind the real nginx, with the configuration that the repository documents."""

from __future__ import annotations

import http.client
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tuf.api.exceptions import DownloadError

from benchmarks.loopback.nginx import CONFIGURATION, Nginx, nginx, program, render
from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.errors import NetworkError
from prunecast.client.edge.updating.transport import HttpFetcher, Stream
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.versions import PublishedModel
from prunecast.server.repository import KeyRing, Repository
from support.releases import publish_model

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        program() is None, reason="nginx is not installed (apt-get install nginx-light)"
    ),
]
CUT = 100  # bytes of the keyframe that come before the connection breaks


class Breaking(HttpFetcher):
    """HTTP whose connection breaks within one file."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def open(self, url: str, offset: int = 0) -> Stream:
        stream = super().open(url, offset)
        return Stream(stream.start, self._broken(stream)) if self.name in url else stream

    def _broken(self, stream: Stream) -> Iterator[bytes]:
        yield next(stream.chunks)[:CUT]
        raise DownloadError("the connection broke")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    folder = tmp_path_factory.mktemp("behind-nginx")
    return Repository.create(folder / "repository", KeyRing.create(folder / "keys"))


@pytest.fixture(scope="module")
def server(repository: Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with nginx(repository.path, tmp_path_factory.mktemp("nginx")) as running:
        yield running


def _get(server: Nginx, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)) as connection:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()


def test_an_agent_resumes_and_patches_itself(
    server: Nginx,
    repository: Repository,
    tmp_path: Path,
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
) -> None:
    first = publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    keyframe = first.manifest.keyframe
    config = AgentConfig(
        tmp_path / "state", server.url, "toy", repository.trusted_root(), threads=1
    )

    def end(seconds: float) -> None:
        raise NetworkError("this life of the agent ends")

    with Agent(config, fetcher=Breaking(keyframe.sha256), wait=end) as agent:
        with pytest.raises(NetworkError):
            agent.update_once()
        assert agent.model.version is None
    with Agent(config) as agent:
        result = agent.update_once()
        assert (result.outcome, result.version, result.payload) == ("updated", 1, "keyframe")
        assert result.downloaded["keyframe"] == keyframe.length - CUT
        publish_model(repository, "toy", model(2), graph, selftest_inputs=images)
        result = agent.update_once()
        assert (result.outcome, result.version, result.payload) == ("updated", 2, "patch")
    asked = [line.split(" ", 3) for line in server.log.read_text().splitlines()]
    resumed = [line for line in asked if keyframe.sha256 in line[2]][-1]
    assert resumed[0] == "206"
    assert int(resumed[1]) == keyframe.length - CUT
    assert resumed[3] == f'"bytes={CUT}-"'


def test_it_serves_what_prunecast_serves(server: Nginx, repository: Repository) -> None:
    root = "/metadata/1.root.json"
    status, headers, body = _get(server, root)
    assert (status, body) == (200, repository.trusted_root())
    assert headers["cache-control"] == "public, max-age=31536000, immutable"
    assert headers["content-type"] == "application/json"
    assert _get(server, root, **{"if-none-match": headers["etag"]})[0] == 304
    assert _get(server, root, range="bytes=1-3")[2] == body[1:4]
    assert _get(server, root, range="bytes=1-3", **{"if-range": '"another"'})[0] == 200
    assert _get(server, root, range="bytes=0-1,3-4")[0] == 200  # ignored; prunecast refuses it
    status, headers, _ = _get(server, "/metadata/timestamp.json")
    assert (status, headers["cache-control"]) == (200, "public, max-age=60")
    for missing in ("/metadata/99.root.json", "/blobs/" + "0" * 64):
        status, headers, _ = _get(server, missing)
        assert (status, headers["cache-control"]) == (404, "no-store")


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/.lock", "/blobs/", "/metadata", "/blobs/../.lock", "/metadata/root.pem"),
        *("/blobs/" + "1" * 64, "/metadata/..%2f.lock", "/targets/../../keys/root.pem"),
    ],
)
def test_nothing_else_is_public(server: Nginx, repository: Repository, path: str) -> None:
    (repository.path / ".lock").touch()
    (repository.path / "metadata" / "root.pem").write_text("secret")
    link = repository.path / "blobs" / ("1" * 64)
    if not link.is_symlink():
        link.symlink_to(repository.path / "metadata" / "root.pem")
    status, _, body = _get(server, path)
    assert status in (400, 403, 404)
    assert b"secret" not in body


def test_every_replaced_directive_must_be_there() -> None:
    text = CONFIGURATION.read_text("utf-8")
    rendered = render(text, 1234, Path("/r"), Path("/c"), Path("/k"))
    for line in ("listen 127.0.0.1:1234 ssl;", "root /r;", "ssl_certificate_key /k;"):
        assert f"    {line}\n" in rendered
    with pytest.raises(ValueError, match="stands 0 times"):
        render(text.replace("listen 443 ssl;", ""), 1, Path("/r"), None, None)

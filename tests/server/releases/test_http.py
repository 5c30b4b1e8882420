"""The distribution server: a real one on loopback, and its routes without one."""

from __future__ import annotations

import datetime as dt
import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from prunecast.compression.onnx import ExportedGraph
from prunecast.compression.versions import PublishedModel
from prunecast.server.releases import ReleaseServer, Repository, ServerError

pytestmark = pytest.mark.engine


@pytest.fixture
def served(
    repository: Repository,
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
) -> Iterator[tuple[ReleaseServer, Repository]]:
    repository.publish("toy", model(1), graph, selftest_inputs=images)
    with ReleaseServer(repository.path) as server:
        yield server, repository


def _get(server: ReleaseServer, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    try:
        names = {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request("GET", path, headers=names)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    finally:
        connection.close()


def test_ranges_tags_and_caching(served: tuple[ReleaseServer, Repository]) -> None:
    server, repository = served
    ref = repository.show("toy").keyframe
    path, data = f"/blobs/{ref.sha256}", repository.blob(ref)
    status, headers, body = _get(server, path)
    assert (status, body) == (200, data)
    assert headers["etag"] == f'"{ref.sha256}"'
    assert "immutable" in headers["cache-control"]
    status, headers, body = _get(server, path, Range="bytes=10-")
    assert (status, body) == (206, data[10:])
    assert headers["content-range"] == f"bytes 10-{len(data) - 1}/{len(data)}"
    assert _get(server, path, Range="bytes=5-9")[2] == data[5:10]
    assert _get(server, path, Range=f"bytes={len(data)}-")[0] == 416
    assert _get(server, path, If_None_Match=f'"{ref.sha256}"')[0] == 304


def test_timestamp_is_revalidated_and_roots_are_numbered(
    served: tuple[ReleaseServer, Repository],
) -> None:
    server, repository = served
    status, headers, body = _get(server, "/metadata/timestamp.json")
    assert (status, headers["cache-control"]) == (200, "no-cache")
    assert body == (repository.path / "metadata" / "timestamp.json").read_bytes()
    assert _get(server, "/metadata/1.root.json")[0] == 200
    assert _get(server, "/metadata/2.root.json")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        *("/", "/.lock", "/blobs/", "/metadata", "/blobs/../.lock", "/blobs/%2e%2e/.lock"),
        *("//etc/passwd", "/targets/../../keys/root.pem", "/targets/toy/1/release.json"),
        *("/targets/..%2f..%2fkeys%2froot.pem", "/blobs/" + "0" * 64, "/metadata/root.json%00"),
    ],
)
def test_nothing_beside_the_repository_is_reachable(
    served: tuple[ReleaseServer, Repository], path: str
) -> None:
    assert _get(served[0], path)[0] == 404


def test_other_methods_are_refused(served: tuple[ReleaseServer, Repository]) -> None:
    server, _ = served
    connection = http.client.HTTPConnection(server.host, server.port, timeout=10)
    connection.request("POST", "/metadata/timestamp.json", b"x")
    assert connection.getresponse().status == 405
    connection.close()


def test_stopping_frees_the_port(repository: Repository) -> None:
    with ReleaseServer(repository.path) as server:
        assert _get(server, "/metadata/timestamp.json")[0] == 200
    with pytest.raises(OSError):  # noqa: PT011
        socket.create_connection((server.host, server.port), timeout=2)


def test_wrong_requests_are_refused(repository: Repository, tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="not a release repository"):
        ReleaseServer(tmp_path)
    with pytest.raises(ServerError, match="both"):
        ReleaseServer(repository.path, certificate=tmp_path / "c.pem")
    with ReleaseServer(repository.path) as server, pytest.raises(ServerError, match="cannot bind"):
        ReleaseServer(repository.path, port=server.port)
    (tmp_path / "c.pem").write_text("no certificate")
    with pytest.raises(ServerError, match="unusable"):
        ReleaseServer(repository.path, certificate=tmp_path / "c.pem", key=tmp_path / "c.pem")


def _certificate(folder: Path) -> tuple[Path, Path]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    key = generate_private_key(SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "loopback")])
    now = dt.datetime.now(dt.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / "cert.pem", folder / "key.pem"
    cert.write_bytes(made.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return cert, private


def test_tls(repository: Repository, tmp_path: Path) -> None:
    certificate, key = _certificate(tmp_path)
    with ReleaseServer(repository.path, certificate=certificate, key=key) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        connection = http.client.HTTPSConnection(
            server.host, server.port, context=context, timeout=10
        )
        connection.request("GET", "/metadata/timestamp.json")
        assert connection.getresponse().status == 200
        connection.close()

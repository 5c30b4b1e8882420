"""The HTTP fetcher against servers that misbehave, on loopback."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.errors import ContentMissing, ContentRefused, NetworkError
from prunecast.client.edge.updating.acquire import Download
from prunecast.client.edge.updating.transport import HttpFetcher, LeastRate, TooSlow
from prunecast.compression.release.manifest import FileRef, ReleaseManifest
from prunecast.server.repository import Repository
from prunecast.server.repository.serving import ReleaseServer
from support.authority import self_signed

pytestmark = pytest.mark.engine

Answer = Callable[[socket.socket, str], None]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server that answers each connection with `answer(connection, request)`."""
    listener = socket.create_server(("127.0.0.1", 0))
    closing = threading.Event()

    def loop() -> None:
        while not closing.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                request = b""
                while b"\r\n\r\n" not in request:
                    request += connection.recv(4096)
                with suppress(OSError):  # the client may hang up
                    answer(connection, request.decode().lower())

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/file"
    finally:
        closing.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=5)


def _head(status: str, length: int, extra: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {length}\r\n{extra}\r\n".encode()


DATA = bytes(range(256)) * 40
REF = FileRef(hashlib.sha256(DATA).hexdigest(), len(DATA))


@pytest.mark.parametrize(
    ("begin", "drop"),
    [
        (b"", b"H"),
        (b"HTTP/1.1 200 OK\r\n", b"x-a: b\r\n"),
        (_head("200 OK", 10**6), b"x"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;", b"x"),
    ],
    ids=["status line", "headers", "body", "chunk size", "chunk extension"],
)
def test_slow_retrieval(begin: bytes, drop: bytes) -> None:
    """A server that dribbles is left, wherever in its answer it does so."""

    def trickle(connection: socket.socket, request: str) -> None:
        connection.sendall(begin)
        while True:
            connection.sendall(drop)
            time.sleep(0.01)

    with serving(trickle) as url:
        fetcher = HttpFetcher(patience=0.3, least_rate=10_000, read_timeout=5)
        with pytest.raises(SlowRetrievalError, match="bytes per second came, least is 10000"):
            list(fetcher.open(url).chunks)


def test_the_rate_counts_only_while_waiting_for_the_server() -> None:
    """A receiver that is slow itself, or is told to be, does not blame the server."""
    now = [0.0]
    pace = LeastRate(1000.0, 5.0, 30.0, lambda: now[0])
    for _ in range(100):
        assert pace.receive(lambda: 10) == 10
        now[0] += 60.0  # between two receives

    def slow() -> int:
        now[0] += 6.1
        return 10

    with pytest.raises(TooSlow, match="166 bytes per second"):
        pace.receive(slow)


def test_slow_retrieval_leaves_the_running_release(
    publish: Callable[[int], ReleaseManifest], repository: Repository, config: AgentConfig
) -> None:
    publish(1)
    with (
        ReleaseServer(repository.path) as server,
        Agent(replace(config, url=server.url)) as agent,
    ):
        assert agent.update_once().version == 1

    def trickle(connection: socket.socket, request: str) -> None:
        while True:
            connection.sendall(b"H")
            time.sleep(0.01)

    with serving(trickle) as url:
        fetcher = HttpFetcher(patience=0.2, least_rate=10_000)
        with Agent(replace(config, url=url), fetcher=fetcher) as agent:
            with pytest.raises(NetworkError, match="least is"):
                agent.update_once()
            assert agent.model.version == 1


@pytest.mark.parametrize("kept", [0, 2000, 4000, 7000])
def test_a_file_that_is_truncated_on_the_server_is_named(tmp_path: Path, kept: int) -> None:
    """Whatever part is kept: what is wrong and what to do, not an HTTP status."""
    folder = tmp_path / "repository"
    (folder / "metadata").mkdir(parents=True)
    (folder / "metadata" / "timestamp.json").write_text("{}")
    (folder / "blobs").mkdir()
    (folder / "blobs" / REF.sha256).write_bytes(DATA[:4000])
    if kept:
        (tmp_path / "file.part").write_bytes(DATA[:kept])
    with ReleaseServer(folder) as server:
        url = f"{server.url}blobs/{REF.sha256}"
        with pytest.raises(ContentRefused, match=r"has 4000 of the 10240 bytes.*truncated: copy"):
            Download(HttpFetcher(), url, REF, tmp_path / "file", wait=lambda _: None).run()


def test_a_silent_server_is_left() -> None:
    def silence(connection: socket.socket, request: str) -> None:
        connection.sendall(_head("200 OK", 100) + b"x")
        connection.recv(1)  # until the client gives up

    with serving(silence) as url:
        fetcher = HttpFetcher(read_timeout=0.3)
        with pytest.raises(SlowRetrievalError, match="stopped"):
            list(fetcher.open(url).chunks)


def test_a_broken_connection_resumes_at_the_byte_it_reached(tmp_path: Path) -> None:
    asked: list[str] = []

    def breaking(connection: socket.socket, request: str) -> None:
        wanted = [line for line in request.splitlines() if line.startswith("range:")]
        asked.append(wanted[0] if wanted else "")
        start = int(wanted[0].partition("=")[2].rstrip("-")) if wanted else 0
        length = len(DATA) - start
        where = f"content-range: bytes {start}-{len(DATA) - 1}/{len(DATA)}\r\n"
        status = "206 Partial Content" if wanted else "200 OK"
        connection.sendall(_head(status, length, where if wanted else ""))
        connection.sendall(DATA[start : start + 4000])

    received: list[int] = []
    with serving(breaking) as url:
        Download(
            HttpFetcher(),
            url,
            REF,
            tmp_path / "file",
            on_bytes=received.append,
            wait=lambda _: None,
        ).run()
    assert (tmp_path / "file").read_bytes() == DATA
    assert asked == ["", "range: bytes=4000-", "range: bytes=8000-"]
    assert sum(received) == len(DATA)
    assert not (tmp_path / "file.part").exists()


def test_a_server_that_ignores_ranges_is_read_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(DATA[:3000])

    def whole(connection: socket.socket, request: str) -> None:
        connection.sendall(_head("200 OK", len(DATA)) + DATA)

    with serving(whole) as url:
        Download(HttpFetcher(), url, REF, tmp_path / "file").run()
    assert (tmp_path / "file").read_bytes() == DATA


def test_a_part_longer_than_the_file_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(DATA + b"more")

    def whole(connection: socket.socket, request: str) -> None:
        assert "range:" not in request
        connection.sendall(_head("200 OK", len(DATA)) + DATA)

    with serving(whole) as url:
        Download(HttpFetcher(), url, REF, tmp_path / "file").run()
    assert (tmp_path / "file").read_bytes() == DATA


def test_endless_content_is_cut_at_the_signed_length(tmp_path: Path) -> None:
    def endless(connection: socket.socket, request: str) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65536)

    with serving(endless) as url, pytest.raises(ContentRefused, match="longer than the 10240"):
        Download(HttpFetcher(), url, REF, tmp_path / "file").run()
    assert (tmp_path / "file.part").stat().st_size == 0


@pytest.mark.parametrize(("status", "kind"), [("404 Not Found", ContentMissing)])
def test_a_missing_file_is_not_asked_for_again(
    tmp_path: Path, status: str, kind: type[Exception]
) -> None:
    asked: list[str] = []

    def missing(connection: socket.socket, request: str) -> None:
        asked.append(request)
        connection.sendall(_head(status, 0))

    with serving(missing) as url, pytest.raises(kind):
        Download(HttpFetcher(), url, REF, tmp_path / "file", wait=lambda _: None).run()
    assert len(asked) == 1


def test_an_overloaded_server_is_asked_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def busy(connection: socket.socket, request: str) -> None:
        asked.append(request)
        if len(asked) < 3:
            connection.sendall(_head("503 Service Unavailable", 0))
        else:
            connection.sendall(_head("200 OK", len(DATA)) + DATA)

    with serving(busy) as url:
        Download(HttpFetcher(), url, REF, tmp_path / "file", wait=lambda _: None).run()
    assert len(asked) == 3


def test_another_range_than_asked_for_is_refused() -> None:
    def shifted(connection: socket.socket, request: str) -> None:
        extra = "content-range: bytes 0-9/20\r\n"
        connection.sendall(_head("206 Partial Content", 10, extra) + b"x" * 10)

    with serving(shifted) as url, pytest.raises(DownloadError, match="another range"):
        HttpFetcher().open(url, 10)


def test_no_server_and_http_errors() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(DownloadError, match="no answer"):
        HttpFetcher().open(f"http://127.0.0.1:{port}/file")
    with (
        serving(lambda c, r: c.sendall(_head("403 Forbidden", 0))) as url,
        pytest.raises(DownloadHTTPError) as caught,
    ):
        HttpFetcher().open(url)
    assert caught.value.status_code == 403


def test_headers_are_sent_and_no_compression_is_asked_for() -> None:
    seen: list[str] = []

    def answer(connection: socket.socket, request: str) -> None:
        seen.append(request)
        connection.sendall(_head("200 OK", 0))

    with serving(answer) as url:
        list(HttpFetcher(headers={"authorization": "Bearer t"}).open(url).chunks)
    assert "authorization: bearer t" in seen[0]
    assert "accept-encoding: identity" in seen[0]


def test_an_unusable_tls_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="TLS file"):
        HttpFetcher(ca_file=tmp_path / "absent.pem")


def test_tls_is_verified(
    publish: Callable[[int], ReleaseManifest],
    repository: Repository,
    config: AgentConfig,
    tmp_path: Path,
) -> None:
    publish(1)
    certificate, key = self_signed(tmp_path)
    with ReleaseServer(repository.path, certificate=certificate, key=key) as server:
        config = replace(config, url=server.url)
        with Agent(config) as agent, pytest.raises(NetworkError, match="certificate"):
            agent.update_once()  # the system's authorities do not know this server
        with Agent(config, fetcher=HttpFetcher(ca_file=certificate)) as agent:
            assert agent.update_once().outcome == "updated"


@pytest.mark.parametrize(
    ("status", "said", "pauses"),
    [
        ("429 Too Many Requests", "retry-after: 7\r\n", [7.0]),
        ("503 Service Unavailable", "retry-after: Mon, 23 Nov 2026 06:00:00 GMT\r\n", [0.5]),
        ("503 Service Unavailable", "", [0.5]),
        ("429 Too Many Requests", "retry-after: 9999\r\n", None),
    ],
)
def test_a_server_may_ask_for_a_pause(
    tmp_path: Path, status: str, said: str, pauses: list[float] | None
) -> None:
    """A short one is kept; a long one is for the next check, and is not slept through."""
    answers = iter([_head(status, 0, said), _head("200 OK", len(DATA)) + DATA])

    def answer(connection: socket.socket, request: str) -> None:
        connection.sendall(next(answers))

    waited: list[float] = []
    with serving(answer) as url:
        target = tmp_path / "file"
        if pauses is None:
            with pytest.raises(NetworkError, match="ask again in 9999 s; what has come is kept"):
                Download(HttpFetcher(), url, REF, target, wait=waited.append).run()
        else:
            Download(HttpFetcher(), url, REF, target, wait=waited.append).run()
            assert target.read_bytes() == DATA
    assert waited == (pauses or [])

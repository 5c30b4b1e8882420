"""The connection to a control server that is odd or hard to reach, over TLS on loopback."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from tuf.api.exceptions import DownloadError, SlowRetrievalError

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.control import (
    ControlChannel,
    ControlFetcher,
    Controller,
    ControlSettings,
)
from prunecast.client.edge.errors import ControlProblem
from prunecast.client.edge.updating.proxies import Proxies
from prunecast.common.fleet_protocol import add_servicer, messages
from support.authority import Authority
from support.proxy import running_proxy

SECRET = "s3cret-Hunter2"


class Servicer:
    """Answers as a test wants it to."""

    def __init__(self) -> None:
        self.chunks: Callable[[Any], Iterator[bytes]] = lambda context: iter([b"abc"])
        self.watched = 0

    def Fetch(self, request: Any, context: Any) -> Iterator[Any]:
        at = request.offset
        for data in self.chunks(context):
            yield messages.FetchChunk(offset=at, length=100, data=data)
            at += len(data)

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        self.watched += 1
        while context.is_active():
            yield messages.WatchEvent(keep_alive=messages.KeepAlive())
            time.sleep(0.02)

    def Report(self, request: Any, context: Any) -> Any:
        return messages.ReportReply()


@pytest.fixture
def servicer() -> Servicer:
    return Servicer()


@pytest.fixture
def serve(servicer: Servicer) -> Iterator[Callable[[tuple[Path, Path]], int]]:
    """A function: certificate and key -> the port at which the servicer answers."""
    made = []

    def serve(pair: tuple[Path, Path]) -> int:
        server = grpc.server(ThreadPoolExecutor(4))
        add_servicer(servicer, server)
        both = [(pair[1].read_bytes(), pair[0].read_bytes())]
        port: int = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(both))
        server.start()
        made.append(server)
        return port

    yield serve
    for server in made:
        server.stop(None)


@pytest.fixture
def channel(authority: Authority, tmp_path: Path) -> Iterator[Callable[..., ControlChannel]]:
    made: list[ControlChannel] = []
    (tmp_path / "token").write_text("A" * 43)

    def channel(port: int, environment: dict[str, str] | None = None) -> ControlChannel:
        settings = ControlSettings(
            f"localhost:{port}", authority.ca, tmp_path / "token", first_wait=0.05, most_wait=0.1
        )
        made.append(ControlChannel(settings, proxies=Proxies(environment or {})))
        return made[-1]

    yield channel
    for one in made:
        one.reset()


def _fetch(channel: ControlChannel, **options: float) -> bytes:
    fetcher = ControlFetcher(channel, **options)
    return b"".join(fetcher.open(f"{channel.settings.url}file").chunks)


@pytest.mark.parametrize("piece", [b"", b"x"])
def test_a_server_that_sends_next_to_nothing_is_left(
    servicer: Servicer,
    serve: Callable[..., int],
    channel: Callable[..., ControlChannel],
    authority: Authority,
    piece: bytes,
) -> None:
    def trickle(context: Any) -> Iterator[bytes]:
        while context.is_active():
            yield piece
            time.sleep(0.02)

    servicer.chunks = trickle
    line = channel(serve(authority.server()))
    with pytest.raises(SlowRetrievalError, match="bytes per second came, least is 512"):
        _fetch(line, silence=0.5)


def test_an_agent_does_not_stay_with_a_server_that_sends_nothing(
    servicer: Servicer,
    serve: Callable[..., int],
    channel: Callable[..., ControlChannel],
    authority: Authority,
    repository: Any,
    tmp_path: Path,
) -> None:
    def nothing(context: Any) -> Iterator[bytes]:
        while context.is_active():
            yield b""
            time.sleep(0.02)

    servicer.chunks = nothing
    line = channel(serve(authority.server()))
    config = AgentConfig(tmp_path / "s", line.settings.url, "toy", repository.trusted_root())
    from prunecast.client.edge.errors import NetworkError

    with (
        Agent(config, fetcher=ControlFetcher(line, silence=0.3)) as agent,
        pytest.raises(NetworkError, match="least is 512"),
    ):
        agent.update_once()


def test_signs_of_life_without_a_welcome_earn_no_time(
    servicer: Servicer,
    serve: Callable[..., int],
    channel: Callable[..., ControlChannel],
    authority: Authority,
    repository: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wait_until: Callable[..., None],
) -> None:
    import prunecast.client.edge.control.controller as module

    monkeypatch.setattr(module, "_ANSWER", 0.3)
    line = channel(serve(authority.server()))
    config = AgentConfig(tmp_path / "s", line.settings.url, "toy", repository.trusted_root())
    events: list[bool | ControlProblem] = []
    with (
        Agent(config, fetcher=ControlFetcher(line)) as agent,
        Controller(agent, line, wake=threading.Event(), on_event=events.append),
    ):
        wait_until(lambda: servicer.watched > 1, "it hangs up and asks again")
    assert "it fell silent" in str(events[0])


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY", "grpc_proxy", "ALL_PROXY"])
def test_the_control_server_is_reached_through_the_proxy(
    serve: Callable[..., int],
    channel: Callable[..., ControlChannel],
    authority: Authority,
    variable: str,
) -> None:
    port = serve(authority.server())
    with running_proxy(f"ada:{SECRET}/x") as proxy:
        given = {variable: f"http://ada:{SECRET}%2Fx@{proxy.address}"}
        assert _fetch(channel(port, given)) == b"abc"
        assert proxy.first_lines == [f"CONNECT localhost:{port}"]
        assert _fetch(channel(port, {**given, "no_proxy": "localhost"})) == b"abc"
    assert len(proxy.asked) == 1


def test_all_channels_understand_the_variables_alike(
    serve: Callable[..., int],
    channel: Callable[..., ControlChannel],
    authority: Authority,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """gRPC would read the lower-case ones of the process itself."""
    port = serve(authority.server())
    with running_proxy() as proxy:
        monkeypatch.setenv("https_proxy", f"http://{proxy.address}")
        assert _fetch(channel(port, {"OTHER": "1"})) == b"abc"
    assert proxy.asked == []


def test_causes_are_named_and_no_credentials_shown(
    serve: Callable[..., int], channel: Callable[..., ControlChannel], authority: Authority
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = listener.getsockname()[1]
    said = []
    with running_proxy("ada:other") as proxy:
        port = serve(authority.server())
        for environment, target in (
            ({}, nobody),
            ({"https_proxy": f"http://ada:{SECRET}@127.0.0.1:{nobody}"}, port),
            ({"https_proxy": f"http://ada:{SECRET}@{proxy.address}"}, port),
            ({"https_proxy": f"https://ada:{SECRET}@{proxy.address}"}, port),
            ({"https_proxy": f"socks5://ada:{SECRET}@{proxy.address}"}, port),
        ):
            with pytest.raises(DownloadError) as caught:
                _fetch(channel(target, environment))
            said.append(str(caught.value))
    assert f"127.0.0.1:{nobody}: Failed to connect to remote host: Connection refused" in said[0]
    assert f"through the proxy 127.0.0.1:{nobody} (of https_proxy)" in said[1]
    assert f"the proxy {proxy.address} refuses the credentials" in said[2]
    assert "a proxy that is reached over TLS, which gRPC cannot" in said[3]
    assert "https_proxy names no proxy of HTTP" in said[4]
    assert SECRET not in " ".join(said)


def test_certificates_are_refused_by_cause(
    serve: Callable[..., int],
    channel: Callable[..., ControlChannel],
    authority: Authority,
    tmp_path: Path,
) -> None:
    said = []
    for pair in (Authority(tmp_path / "other").server(), authority.device("elsewhere")):
        with pytest.raises(DownloadError) as caught:
            _fetch(channel(serve(pair)))
        said.append(str(caught.value))
    assert "give that authority's certificate by --control-ca" in said[0]
    assert "its TLS certificate is not for localhost" in said[1]


@pytest.mark.parametrize(
    "address", [f"https://ada:{SECRET}@host:1", f"ada:{SECRET}@host:1", f"host:1/?t={SECRET}"]
)
def test_an_address_with_a_secret_is_not_repeated(address: str, tmp_path: Path) -> None:
    with pytest.raises(ControlProblem, match="--control-token") as caught:
        ControlSettings(address, token_file=tmp_path / "token")
    assert SECRET not in str(caught.value)

"""The network as it is: proxies, redirections, secrets in the wrong place, causes in words."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from tuf.api.exceptions import DownloadError, DownloadHTTPError
from typer.testing import CliRunner

from prunecast.cli.edge import app
from prunecast.cli.edge_options import make_fetcher
from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.config import check_url
from prunecast.client.edge.errors import NetworkError, UrlRefused
from prunecast.client.edge.updating.proxies import Proxies
from prunecast.client.edge.updating.transport import HttpFetcher, bearer, is_exposed
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.server.repository import Repository
from prunecast.server.repository.serving import ReleaseServer
from support.authority import Authority, self_signed
from support.proxy import running_proxy

SECRET = "s3cret-Hunter2"


class Web:
    """A server whose answers are functions of the path, and which keeps the headers it got."""

    def __init__(self, answers: dict[str, tuple[int, str]]) -> None:
        self.seen: list[tuple[str, str | None]] = []
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            table: ClassVar = answers

            def do_GET(self) -> None:
                seen.append((self.path, self.headers.get("authorization")))
                status, location = self.table.get(self.path, (200, ""))
                self.send_response(status)
                if location:
                    self.send_header("location", location)
                self.send_header("content-length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def web() -> Iterator[Callable[..., Web]]:
    made: list[Web] = []

    def web(**answers: tuple[int, str]) -> Web:
        made.append(Web({f"/{path}": answer for path, answer in answers.items()}))
        return made[-1]

    yield web
    for one in made:
        one.server.shutdown()
        one.server.server_close()


@pytest.fixture
def nobody() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _get(url: str, environment: dict[str, str], **options: object) -> bytes:
    fetcher = HttpFetcher(proxies=Proxies(environment), **options)  # type: ignore[arg-type]
    return b"".join(fetcher.open(url).chunks)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"])
def test_http_goes_through_the_proxy(web: Callable[..., Web], variable: str) -> None:
    here = web()
    with running_proxy() as proxy:
        assert _get(f"{here.url}/a", {variable: f"http://{proxy.address}"}) == b"ok"
        assert proxy.first_lines == [f"GET {here.url}/a"]
        assert _get(f"{here.url}/a", {variable: proxy.address, "NO_PROXY": "127.0.0.1"}) == b"ok"
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("variable", ["https_proxy", "HTTPS_PROXY"])
def test_an_agent_updates_through_a_tunnel(
    publish: Callable[[int], ReleaseManifest],
    repository: Repository,
    config: AgentConfig,
    tmp_path: Path,
    variable: str,
) -> None:
    publish(1)
    certificate, key = Authority(tmp_path / "tls").server()
    with (
        running_proxy(f"ada:{SECRET}/x") as proxy,
        ReleaseServer(repository.path, certificate=certificate, key=key) as server,
    ):
        proxies = Proxies({variable: f"http://ada:{SECRET}%2Fx@{proxy.address}"})
        fetcher = HttpFetcher(ca_file=tmp_path / "tls" / "ca.pem", proxies=proxies)
        with Agent(replace(config, url=server.url), fetcher=fetcher) as agent:
            assert agent.update_once().version == 1
        port = server.url.rstrip("/").rpartition(":")[2]
    assert set(proxy.first_lines) == {f"CONNECT 127.0.0.1:{port}"}


def test_the_environment_counts_unless_told_otherwise(
    web: Callable[..., Web], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = web()
    with running_proxy() as proxy:
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert b"".join(HttpFetcher().open(f"{here.url}/a").chunks) == b"ok"
    assert proxy.first_lines == [f"GET {here.url}/a"]


@pytest.mark.parametrize(
    ("no_proxy", "url", "direct"),
    [
        ("example.com", "https://example.com/", True),
        ("example.com", "https://a.example.com/", True),
        (".example.com", "https://a.example.com/", True),
        ("*.example.com", "https://a.example.com/", True),
        ("EXAMPLE.com", "https://Example.COM/", True),
        ("example.com", "https://badexample.com/", False),
        ("other, example.com other2", "https://example.com/", True),
        ("*", "https://example.com/", True),
        ("example.com:8443", "https://example.com:8443/", True),
        ("example.com:8443", "https://example.com/", False),
        ("10.0.0.0/8", "https://10.1.2.3/", True),
        ("10.0.0.0/8", "https://11.1.2.3/", False),
        ("127.0.0.1", "https://127.0.0.1:9/", True),
        ("::1", "https://[::1]:9/", True),
        ("[::1]:9", "https://[::1]:9/", True),
        ("fd00::/8", "https://[fd12::1]/", True),
        ("", "https://example.com/", False),
        (",", "https://example.com/", False),
    ],
)
def test_what_is_reached_directly(no_proxy: str, url: str, direct: bool) -> None:
    proxies = Proxies({"https_proxy": "http://gate:3128", "no_proxy": no_proxy})
    assert (proxies.find(url) is None) is direct


def test_which_variable_counts() -> None:
    both = Proxies({"https_proxy": "a:1", "HTTPS_PROXY": "b:2", "grpc_proxy": "c:3"})
    found = {url: both.find(f"{url}://x/") for url in ("http", "https", "grpcs")}
    shown = {scheme: one and one.address for scheme, one in found.items()}
    assert shown == {"http": None, "https": "a:1", "grpcs": "c:3"}
    cgi = Proxies({"HTTP_PROXY": "http://evil:1", "REQUEST_METHOD": "GET"})
    assert cgi.find("http://x/") is None
    only = Proxies({"https_proxy": "a:1", "no_grpc_proxy": "x", "no_proxy": "y"})
    assert (only.find("grpcs://x/"), only.find("https://y/")) == (None, None)
    assert only.find("https://x/") is not None


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_causes_at_a_proxy_name_it_and_show_no_credentials(
    web: Callable[..., Web], nobody: int, scheme: str
) -> None:
    variable = f"{scheme}_proxy"
    url = f"{scheme}://127.0.0.1:{nobody}/a"
    with pytest.raises(DownloadError) as refused:
        _get(url, {variable: f"http://ada:{SECRET}@127.0.0.1:{nobody}"})
    assert f"refused at the proxy 127.0.0.1:{nobody} (of {variable})" in str(refused.value)
    with running_proxy("ada:other") as proxy, pytest.raises(DownloadError) as denied:
        _get(url, {variable: f"http://ada:{SECRET}@{proxy.address}"})
    assert f"the proxy {proxy.address} refuses the credentials" in str(denied.value)
    assert f"{variable}, as http://USER:PASSWORD@" in str(denied.value)
    with pytest.raises(DownloadError) as odd:
        _get(url, {variable: f"socks5://ada:{SECRET}@gate:1080"})
    assert f"{variable} names no proxy of HTTP" in str(odd.value)
    for error in (refused, denied, odd):
        assert SECRET not in str(error.value) + repr(error.value.__cause__)


def test_a_token_does_not_follow_a_redirection_elsewhere(web: Callable[..., Web]) -> None:
    there = web()
    here = web(
        near=(302, "/file"),
        far=(307, f"{there.url}/file?X-Amz-Signature={SECRET}"),
        loop=(302, "/loop"),
        odd=(302, "file:///etc/passwd"),
    )
    given = {"authorization": "Bearer t", "x-api-key": "k"}
    assert _get(f"{here.url}/near", {}, headers=given) == b"ok"
    assert _get(f"{here.url}/far", {}, headers=given) == b"ok"
    assert here.seen == [("/near", "Bearer t"), ("/file", "Bearer t"), ("/far", "Bearer t")]
    assert there.seen == [(f"/file?X-Amz-Signature={SECRET}", None)]
    with pytest.raises(DownloadError, match="more than 3 times"):
        _get(f"{here.url}/loop", {})
    with pytest.raises(DownloadError, match="no address of HTTP"):
        _get(f"{here.url}/odd", {})


def test_a_redirection_to_nobody_shows_no_query(web: Callable[..., Web], nobody: int) -> None:
    here = web(far=(302, f"http://127.0.0.1:{nobody}/file?token={SECRET}"))
    with pytest.raises(DownloadError, match=r"which is redirected to 127\.0\.0\.1: conn") as caught:
        _get(f"{here.url}/far", {})
    assert SECRET not in str(caught.value)


def test_refused_reads_refused(nobody: int, web: Callable[..., Web], tmp_path: Path) -> None:
    for scheme in ("http", "https"):
        with pytest.raises(DownloadError, match=f"connection refused at 127.0.0.1:{nobody}"):
            _get(f"{scheme}://127.0.0.1:{nobody}/a", {})
    with pytest.raises(DownloadError, match=r"the name nowhere\.invalid cannot be resolved"):
        _get("http://nowhere.invalid/a", {})
    here = web()
    with pytest.raises(DownloadError, match="does not speak TLS: is it http:// there"):
        _get(here.url.replace("http", "https") + "/a", {})


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"https://ada:{SECRET}@host/", "token-file"),
        (f"https://{SECRET}@host/", "token-file"),
        (f"https:ada:{SECRET}@host/", "token-file"),
        (f"//ada:{SECRET}@host/", "token-file"),
        (f"https://host/a?token={SECRET}", "token-file"),
        ("https://host/a?", "token-file"),
        (f"https://host/a#{SECRET}", "token-file"),
        ("ftp://host/", "https://HOST:PORT/PATH/"),
        ("https://", "https://HOST:PORT/PATH/"),
        ("", "https://HOST:PORT/PATH/"),
        ("https://host:99999/", "https://HOST:PORT/PATH/"),
        ("https://ho st/", "https://HOST:PORT/PATH/"),
        ("https://host\\evil/", "https://HOST:PORT/PATH/"),
        ("https://host/a\nb", "https://HOST:PORT/PATH/"),
    ],
)
def test_urls_that_hold_what_must_not_be_shown(
    url: str, says: str, config: AgentConfig, tmp_path: Path
) -> None:
    with pytest.raises(UrlRefused, match=says) as caught:
        check_url(url)
    assert SECRET not in str(caught.value)
    with pytest.raises(UrlRefused):
        replace(config, url=url)
    (tmp_path / "root.json").write_bytes(config.root)
    follow = ["--state", str(config.state), "--name", "toy", "--root", str(tmp_path / "root.json")]
    for command in ("update", "run"):
        done = CliRunner().invoke(app, [command, *follow, "--url", url])
        assert done.exit_code == 2
        assert SECRET not in done.output
        assert "--url" in done.output


@pytest.mark.parametrize(
    "url", ["http://host", "https://host:1/a/b", "http://[::1]:80/", "grpcs://h:1/"]
)
def test_urls_that_are_taken(url: str, config: AgentConfig) -> None:
    assert replace(config, url=url).url == url


@pytest.mark.parametrize("content", [f"{SECRET}\nx-evil: 1", f"{SECRET} {SECRET}", "", "tökén"])
def test_a_token_file_without_a_token(tmp_path: Path, content: str) -> None:
    path = tmp_path / "token"
    path.write_text(content)
    with pytest.raises(NetworkError, match="holds no bearer token") as caught:
        bearer(path)
    assert SECRET not in str(caught.value)
    with pytest.raises(NetworkError, match="cannot read"):
        bearer(tmp_path / "absent")
    path.write_text(f"{SECRET}\n")
    assert bearer(path) == {"authorization": f"Bearer {SECRET}"}


@pytest.mark.parametrize(
    ("url", "exposed"),
    [
        ("http://releases.example/", True),
        ("http://10.0.0.1/", True),
        ("https://releases.example/", False),
        ("http://localhost:80/", False),
        ("http://127.0.0.9/", False),
        ("http://[::1]:8/", False),
        ("grpcs://releases.example:1/", False),
    ],
)
def test_a_token_over_plain_http_warns(
    url: str, exposed: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert is_exposed(url) is exposed
    (tmp_path / "token").write_text(SECRET)
    make_fetcher(url, None, None, None, tmp_path / "token")
    shown = capsys.readouterr().err
    assert ("warning: the token of --token-file goes over plain http" in shown) is exposed
    assert SECRET not in shown


def test_a_refused_token_is_not_shown(web: Callable[..., Web]) -> None:
    here = web(a=(401, ""))
    with pytest.raises(DownloadHTTPError) as caught:
        _get(f"{here.url}/a", {}, headers={"authorization": f"Bearer {SECRET}"})
    assert str(caught.value) == f"{here.url}/a answered 401"


def test_certificates_are_refused_by_cause(
    web: Callable[..., Web], repository: Repository, tmp_path: Path
) -> None:
    known, unknown = Authority(tmp_path / "known"), Authority(tmp_path / "unknown")
    served = {
        "authority": unknown.server(),
        "self-signed": self_signed(tmp_path),
        "name": known.device("elsewhere"),
    }
    said = {}
    for label, (certificate, key) in served.items():
        with ReleaseServer(repository.path, certificate=certificate, key=key) as server:
            with pytest.raises(DownloadError) as caught:
                _get(f"{server.url}metadata/timestamp.json", {}, ca_file=known.ca)
            said[label] = str(caught.value)
    assert "give that authority's certificate by --ca-file" in said["authority"]
    assert "give that authority's certificate by --ca-file" in said["self-signed"]
    assert "its TLS certificate is not for 127.0.0.1" in said["name"]

"""HTTP for the agent: byte ranges, bounded waiting, and errors that tuf understands."""

from __future__ import annotations

import abc
import io
import ipaddress
import re
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urljoin, urlsplit

import urllib3
from tuf.api.exceptions import (
    DownloadError,
    DownloadHTTPError,
    DownloadLengthMismatchError,
)
from tuf.ngclient import FetcherInterface

from prunecast.client.edge.errors import NetworkError
from prunecast.client.edge.updating.pace import LeastRate, TokenBucket, paced_connections
from prunecast.client.edge.updating.problems import (
    TooSlow,
    connection_problem,
    wants_credentials,
)
from prunecast.client.edge.updating.proxies import Proxies, Proxy

__all__ = [
    "AskLater",
    "Fetcher",
    "HttpFetcher",
    "LeastRate",
    "Passing",
    "Stream",
    "TokenBucket",
    "TooSlow",
    "bearer",
    "is_exposed",
]

_CHUNK = 64 * 1024  # bytes
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]{1,8000}=*")  # RFC 6750, section 2.1
_CONNECT = 10.0  # seconds
_REDIRECTIONS = 3
_POOLS: dict[str, type[urllib3.HTTPConnectionPool]] = {
    "http": urllib3.HTTPConnectionPool,
    "https": urllib3.HTTPSConnectionPool,
}


class AskLater(DownloadHTTPError):
    """The server is busy, or this device has used up its quota.

    Attributes:
        seconds: after which the server wants to be asked again; 0 if it did not say.
    """

    def __init__(self, message: str, status_code: int, seconds: float) -> None:
        super().__init__(message, status_code)
        self.seconds = seconds


@dataclass(frozen=True)
class Stream:
    """Part of a remote file: `chunks` begin at byte `start`."""

    start: int
    chunks: Iterator[bytes]


class Fetcher(FetcherInterface):
    """What the agent needs from a network: a file from an offset on.

    tuf's own interface is implemented on top of it, so one subclass serves metadata and payloads,
    and a test can be the network.
    """

    @abc.abstractmethod
    def open(self, url: str, offset: int = 0) -> Stream:
        """Open a remote file.

        Args:
            url: absolute URL.
            offset: first byte wanted; a server may ignore it and start at 0.

        Raises:
            AskLater: the server answered 429 or 503.
            DownloadHTTPError: it answered with another HTTP error.
            DownloadError: no answer, or not in time.
        """

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self.open(url).chunks

    @contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        """What tuf fetches, metadata and manifests, in memory: the disk may be full or read-only.

        Raises:
            DownloadLengthMismatchError: more than `max_length` bytes came.
            DownloadError: see `open`.
        """
        with io.BytesIO() as file:
            for chunk in self.fetch(url):
                if file.tell() + len(chunk) > max_length:
                    raise DownloadLengthMismatchError(
                        f"{url} is longer than the {max_length} bytes that it may have"
                    )
                file.write(chunk)
            file.seek(0)
            yield file


class Passing(Fetcher):
    """Another fetcher whose chunks pass through a function, such as `TokenBucket.slow`."""

    def __init__(
        self, inner: Fetcher, through: Callable[[Iterator[bytes]], Iterator[bytes]]
    ) -> None:
        self._inner, self._through = inner, through

    def open(self, url: str, offset: int = 0) -> Stream:
        """See `Fetcher.open`."""
        stream = self._inner.open(url, offset)
        return Stream(stream.start, self._through(stream.chunks))


class HttpFetcher(Fetcher):
    """HTTP(S) through urllib3.

    Args:
        ca_file: PEM file of the authorities to trust for TLS; default: the system's.
        client_certificate: PEM files of the device's certificate and key.
        headers: sent with every request, for instance an authorization; not to another origin,
            to which a request is redirected.
        read_timeout: seconds without any byte.
        least_rate: bytes per second that an answer, headers included, must average once
            `patience` is over; a server that trickles is as useless as one that is silent. An
            answer of n bytes takes at most ``patience + n / least_rate`` seconds.
        patience: seconds; only time spent waiting for the server counts.
        proxies: through which servers are reached; default: those of the environment.

    Raises:
        NetworkError: a certificate file is unusable.
    """

    def __init__(
        self,
        *,
        ca_file: Path | None = None,
        client_certificate: tuple[Path, Path] | None = None,
        headers: Mapping[str, str] | None = None,
        read_timeout: float = 30.0,
        least_rate: float = 512.0,
        patience: float = 30.0,
        proxies: Proxies | None = None,
    ) -> None:
        try:
            context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
            if client_certificate:
                context.load_cert_chain(*map(str, client_certificate))
        except OSError as error:  # ssl.SSLError is one
            raise NetworkError(f"a TLS file is unusable: {error}") from error
        # identity: a compressed answer would make the byte limits meaningless
        self._plain = {"accept-encoding": "identity"}
        self._given = dict(headers or {})
        self._proxies = Proxies() if proxies is None else proxies
        self._managers: dict[Proxy | None, urllib3.PoolManager] = {}
        self._options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=_CONNECT, read=read_timeout),
            "retries": urllib3.Retry(
                connect=2,
                read=0,
                redirect=0,
                other=0,
                backoff_factor=0.2,
                # it would sleep for as long as a server likes, and nothing could end that
                respect_retry_after_header=False,
            ),
            "ssl_context": context,
        }
        connections = paced_connections(lambda: LeastRate(least_rate, patience, read_timeout))
        self._pools = {
            scheme: type(f"_{pool.__name__}", (pool,), {"ConnectionCls": connection})
            for (scheme, pool), connection in zip(_POOLS.items(), connections, strict=True)
        }

    def open(self, url: str, offset: int = 0) -> Stream:
        """See `Fetcher.open`."""
        response, proxy = self._request(url, {"range": f"bytes={offset}-"} if offset else {})
        if response.status >= 400:
            response.close()
            if response.status == 407 and proxy is not None:
                raise DownloadError(f"no answer from {url}: {wants_credentials(proxy)}")
            raise _refusal(url, response)
        start = 0
        if response.status == 206:
            start = _range_start(response.headers.get("content-range", ""))
            if start != offset:
                response.close()
                raise DownloadError(f"{url} answered with another range than asked for")
        return Stream(start, self._chunks(url, response, proxy))

    def _request(
        self, url: str, wanted: Mapping[str, str]
    ) -> tuple[urllib3.BaseHTTPResponse, Proxy | None]:
        """The answer to a GET, and the proxy through which it comes.

        A redirection to another origin takes no header along that was given for this one.
        """
        headers = {**self._plain, **self._given, **wanted}
        here, said = url, f"no answer from {url}"
        for _ in range(_REDIRECTIONS + 1):
            try:
                proxy = self._proxies.find(here)
                manager = self._manager(proxy)
            except NetworkError as error:
                raise DownloadError(f"{said}: {error}") from error
            try:
                response = manager.request(
                    "GET", here, headers=headers, preload_content=False, redirect=False
                )
            except urllib3.exceptions.HTTPError as error:
                raise connection_problem(said, error, here, proxy, _CONNECT) from error
            location = response.get_redirect_location()
            if not location:
                return response, proxy
            response.close()
            there = urljoin(here, location)
            parts = urlsplit(there)
            if parts.scheme not in _POOLS or not parts.hostname:
                raise DownloadError(f"{url} is redirected to no address of HTTP")
            if _origin(there) != _origin(here):
                headers = {**self._plain, **wanted}
            # a query may hold what gives access there
            said = f"no answer from {url}, which is redirected to {parts.hostname}"
            here = there
        raise DownloadError(f"{url} is redirected more than {_REDIRECTIONS} times")

    def _manager(self, proxy: Proxy | None) -> urllib3.PoolManager:
        if proxy not in self._managers:
            if proxy is None:
                made = urllib3.PoolManager(**self._options)
            else:
                shown = urllib3.make_headers(proxy_basic_auth=proxy.credentials or None)
                made = urllib3.ProxyManager(
                    proxy.url,
                    proxy_headers=shown,
                    proxy_ssl_context=self._options["ssl_context"],
                    **self._options,
                )
            made.pool_classes_by_scheme = self._pools
            self._managers[proxy] = made
        return self._managers[proxy]

    def _chunks(
        self, url: str, response: urllib3.BaseHTTPResponse, proxy: Proxy | None
    ) -> Iterator[bytes]:
        try:
            # read1 returns what has arrived, read would wait for a full chunk
            while chunk := response.read1(_CHUNK):
                yield chunk
        except urllib3.exceptions.HTTPError as error:
            broke = f"connection to {url} broke"
            raise connection_problem(broke, error, url, proxy, _CONNECT) from error
        finally:
            response.close()


def bearer(token_file: Path) -> dict[str, str]:
    """The header that shows the token in a file.

    Raises:
        NetworkError: the file cannot be read, or holds no token; what it holds is not repeated.
    """
    try:
        token = token_file.read_bytes().strip()
    except OSError as error:
        raise NetworkError(f"cannot read {token_file}: {error.strerror or error}") from error
    if not _TOKEN.fullmatch(token):
        raise NetworkError(
            f"{token_file} holds no bearer token: one word of letters, digits and -._~+/="
        )
    return {"authorization": f"Bearer {token.decode('ascii')}"}


def is_exposed(url: str) -> bool:
    """Whether what is sent to a URL can be read on its way: plain HTTP beyond this device."""
    parts = urlsplit(url)
    if parts.scheme != "http":
        return False
    try:
        return not ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname != "localhost"


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _refusal(url: str, response: urllib3.BaseHTTPResponse) -> DownloadHTTPError:
    said = f"{url} answered {response.status}"
    if response.status not in (429, 503):
        return DownloadHTTPError(said, response.status)
    value = response.headers.get("retry-after", "").strip()
    # a date, the other form, would need a clock that is right
    seconds = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    later = f"{said}: ask again in {seconds} s" if seconds else said
    return AskLater(later, response.status, float(seconds))


def _range_start(value: str) -> int:
    unit, _, rest = value.partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else -1

"""HTTP for the agent: byte ranges, bounded waiting, and errors that tuf understands."""

from __future__ import annotations

import abc
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import urllib3
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError
from tuf.ngclient import FetcherInterface

from prunecast.client.edge.errors import NetworkError

__all__ = ["Fetcher", "HttpFetcher", "Stream"]

_CHUNK = 64 * 1024  # bytes


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
            DownloadHTTPError: the server answered with an HTTP error.
            DownloadError: no answer, or not in time.
        """

    def _fetch(self, url: str) -> Iterator[bytes]:
        return self.open(url).chunks


class HttpFetcher(Fetcher):
    """HTTP(S) through urllib3.

    Args:
        ca_file: PEM file of the authorities to trust for TLS; default: the system's.
        client_certificate: PEM files of the device's certificate and key.
        headers: sent with every request, for instance an authorization.
        connect_timeout: seconds.
        read_timeout: seconds without any byte.
        least_rate: bytes per second that a transfer must average once `patience` is over; a
            server that trickles is as useless as one that is silent.
        patience: seconds.
        clock: monotonic seconds, for tests.

    Raises:
        NetworkError: a certificate file is unusable.
    """

    def __init__(
        self,
        *,
        ca_file: Path | None = None,
        client_certificate: tuple[Path, Path] | None = None,
        headers: Mapping[str, str] | None = None,
        connect_timeout: float = 10.0,
        read_timeout: float = 30.0,
        least_rate: float = 512.0,
        patience: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._least_rate, self._patience, self._clock = least_rate, patience, clock
        try:
            context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
            if client_certificate:
                context.load_cert_chain(*map(str, client_certificate))
        except OSError as error:  # ssl.SSLError is one
            raise NetworkError(f"a TLS file is unusable: {error}") from error
        # identity: a compressed answer would make the byte limits meaningless
        self._pool = urllib3.PoolManager(
            headers={"accept-encoding": "identity", **(headers or {})},
            timeout=urllib3.Timeout(connect=connect_timeout, read=read_timeout),
            retries=urllib3.Retry(connect=2, read=0, redirect=3, other=0, backoff_factor=0.2),
            ssl_context=context,
        )

    def open(self, url: str, offset: int = 0) -> Stream:
        """See `Fetcher.open`."""
        headers = {**self._pool.headers, **({"range": f"bytes={offset}-"} if offset else {})}
        try:
            response = self._pool.request("GET", url, headers=headers, preload_content=False)
        except urllib3.exceptions.HTTPError as error:
            reason = getattr(error, "reason", None) or error
            raise DownloadError(f"no answer from {url}: {reason}") from error
        if response.status >= 400:
            response.close()
            raise DownloadHTTPError(f"{url} answered {response.status}", response.status)
        start = 0
        if response.status == 206:
            start = _range_start(response.headers.get("content-range", ""))
            if start != offset:
                response.close()
                raise DownloadError(f"{url} answered with another range than asked for")
        return Stream(start, self._chunks(url, response))

    def _chunks(self, url: str, response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
        begun, received = self._clock(), 0
        try:
            # read1 returns what has arrived; read would wait for a full chunk and let a server
            # that trickles hold the agent for hours
            while chunk := response.read1(_CHUNK):
                received += len(chunk)
                taken = self._clock() - begun
                if taken > self._patience and received < taken * self._least_rate:
                    raise SlowRetrievalError(
                        f"{url} sends {received / taken:.0f} bytes per second, "
                        f"least is {self._least_rate:.0f}"
                    )
                yield chunk
        except urllib3.exceptions.TimeoutError as error:
            raise SlowRetrievalError(f"{url} stopped sending") from error
        except urllib3.exceptions.HTTPError as error:
            raise DownloadError(f"connection to {url} broke: {error}") from error
        finally:
            response.close()


def _range_start(value: str) -> int:
    unit, _, rest = value.partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else -1

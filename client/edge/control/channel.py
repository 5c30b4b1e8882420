"""The connection to the control server: where it is, a channel that is made anew, files over it."""

from __future__ import annotations

import hashlib
import random
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
from tuf.api.exceptions import DownloadError, DownloadHTTPError, SlowRetrievalError

from prunecast.client.edge.errors import ControlProblem, NetworkError
from prunecast.client.edge.updating.problems import TooSlow, certificate_problem, wants_credentials
from prunecast.client.edge.updating.proxies import Proxies, Proxy
from prunecast.client.edge.updating.transport import Fetcher, LeastRate, Stream
from prunecast.common.fleet_protocol import make_stub, messages

__all__ = ["Backoff", "ControlChannel", "ControlFetcher", "ControlSettings", "describe", "watched"]

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_CERTIFICATE = re.compile(r"CERTIFICATE_VERIFY_FAILED:?([^:;)\]]*)")
_TOKEN = re.compile(r"[A-Za-z0-9_-]{43}")


@dataclass(frozen=True)
class ControlSettings:
    """Connection of a device to its fleet; always over TLS.

    Files are read at every connection, so what is renewed is taken without a restart.

    Attributes:
        address: ``HOST:PORT``.
        ca_file: PEM file of the authorities to trust; None: those that gRPC brings along.
        token_file: file with the device's token.
        certificate: PEM files of the device's certificate and key, instead of a token.
        first_wait: seconds that the first wait for a new connection lasts at most.
        most_wait: seconds that any wait lasts at most.
        report_every: seconds after which a device says how it is when nothing has happened.

    Raises:
        ControlProblem: no address, or not exactly one credential; later, a file is unusable.
    """

    address: str
    ca_file: Path | None = None
    token_file: Path | None = None
    certificate: tuple[Path, Path] | None = None
    first_wait: float = 5.0
    most_wait: float = 120.0
    report_every: float = 300.0

    def __post_init__(self) -> None:
        found = _ADDRESS.fullmatch(self.address)
        if not found or not 1 <= int(found[2]) <= 65535:
            if "@" in self.address or "?" in self.address:  # what is in it is not to be shown
                raise ControlProblem(
                    "the control server's address is HOST:PORT alone: a credential is given by "
                    "--control-token, or by --control-certificate and --control-key"
                )
            raise ControlProblem(f"{self.address!r} is no HOST:PORT of a control server")
        if (self.token_file is None) == (self.certificate is None):
            raise ControlProblem(
                "a device shows its fleet either a token or a certificate with its key"
            )

    @property
    def url(self) -> str:
        """What names the release repository when it is reached through the control server."""
        return f"grpcs://{self.address}/"

    def token(self) -> str | None:
        """The device's token; None: it has a certificate."""
        if self.token_file is None:
            return None
        text = self.read(self.token_file).decode("ascii", "replace").strip()
        if not _TOKEN.fullmatch(text):
            raise ControlProblem(
                f"{self.token_file} holds no device token: one channel, as printed by "
                "`prunecast fleet device add`"
            )
        return text

    def fingerprint(self) -> str:
        """Tells one credential from another without holding it: SHA-256 in hex."""
        shown = self.token()
        data = shown.encode() if shown else self.read(self.certificate[0])  # type: ignore[index]
        return hashlib.sha256(b"prunecast credential\0" + data).hexdigest()

    def read(self, path: Path) -> bytes:
        """Content of one of the files."""
        try:
            return path.read_bytes()
        except OSError as error:
            raise ControlProblem(f"cannot read {path}: {error.strerror or error}") from error


_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.enable_retries", 0),  # the agent does that itself
    ("grpc.use_local_subchannel_pool", 1),  # or a new channel would wait as the old one did
]


class ControlChannel:
    """One channel for everything; may be used by several threads.

    Args:
        settings: where the server is, and who this device is.
        proxies: through which it is reached; default: those of the environment.
    """

    def __init__(self, settings: ControlSettings, *, proxies: Proxies | None = None) -> None:
        self.settings = settings
        self._proxies = Proxies() if proxies is None else proxies
        self._lock = threading.Lock()
        self._channel: Any = None
        self._stub: Any = None

    def call(self, method: str, request: Any, timeout: float | None = None) -> Any:
        """Begin a call of a method with the device's credential.

        Raises:
            ControlProblem: a file with a credential is unusable.
        """
        token = self.settings.token()
        metadata = [("authorization", f"Bearer {token}")] if token else []
        begun = getattr(self._connected(), method)
        if method == "Report":
            begun = begun.future  # a call that can be ended
        try:
            return begun(request, metadata=metadata, timeout=timeout)
        except ValueError as error:  # another thread has just closed the channel
            raise ControlProblem("the connection to the control server was dropped") from error

    def reset(self) -> None:
        """Drop the channel: calls in progress end, the next one connects anew."""
        with self._lock:
            channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            channel.close()

    def _connected(self) -> Any:
        with self._lock:
            if self._stub is None:
                self._channel = grpc.secure_channel(
                    self.settings.address, self._credentials(), options=self._options()
                )
                self._stub = make_stub(self._channel)
            return self._stub

    def proxy(self) -> Proxy | None:
        """The proxy that leads to the server; None: it is reached directly.

        Raises:
            ControlProblem: a variable of the environment names none that gRPC can use.
        """
        try:
            found = self._proxies.find(self.settings.url)
        except NetworkError as error:
            raise ControlProblem(str(error)) from error
        if found is not None and found.scheme != "http":
            raise ControlProblem(
                f"{found.variable} names a proxy that is reached over TLS, which gRPC cannot: name "
                "one of http:// in grpc_proxy, or leave the server out in no_grpc_proxy"
            )
        return found

    def _options(self) -> list[tuple[str, Any]]:
        """gRPC reads some of the variables itself; all channels shall understand them alike."""
        proxy = self.proxy()
        if proxy is None:
            return [*_OPTIONS, ("grpc.enable_http_proxy", 0)]
        user, _, password = proxy.credentials.partition(":")
        given = f"{quote(user, '')}:{quote(password, '')}@" if proxy.credentials else ""
        return [*_OPTIONS, ("grpc.http_proxy", f"http://{given}{proxy.address}")]

    def _credentials(self) -> Any:
        settings = self.settings
        authorities = settings.read(settings.ca_file) if settings.ca_file else None
        chain = key = None
        if settings.certificate:
            chain, key = map(settings.read, settings.certificate)
        return grpc.ssl_channel_credentials(authorities, key, chain)


@contextmanager
def watched(call: Any, seconds: float) -> Iterator[Callable[[float], None]]:
    """End a call if it stays silent; the body gets a function that allows it more seconds."""
    timer = threading.Timer(seconds, call.cancel)  # so that there is one to cancel

    def allow(more: float) -> None:
        nonlocal timer
        timer.cancel()
        timer = threading.Timer(more, call.cancel)
        timer.daemon = True
        timer.start()

    allow(seconds)
    try:
        yield allow
    finally:
        timer.cancel()
        call.cancel()


def describe(error: Exception, channel: ControlChannel) -> ControlProblem:
    """A failed call in one sentence that names the remedy as far as one is known."""
    if isinstance(error, ControlProblem):
        return error
    code = error.code() if hasattr(error, "code") else None
    details = (error.details() if hasattr(error, "details") else "") or str(error)
    if code is grpc.StatusCode.CANCELLED:
        details = "it fell silent"
    if code is grpc.StatusCode.UNAVAILABLE:
        details = _connection_problem(details, channel)
    words = " ".join(details.split())[:300]
    name = code.name.lower().replace("_", " ") if code else type(error).__name__
    return ControlProblem(f"the control server ({name}): {words}")


def _connection_problem(details: str, channel: ControlChannel) -> str:
    """The cause out of what gRPC says about a connection that was not made."""
    words = " ".join(details.split())
    host = channel.settings.address.rpartition(":")[0]
    if found := _CERTIFICATE.search(words):
        return certificate_problem(0, found[1].strip(), host, "--control-ca")
    if "Hostname Verification" in words or "is not in peer certificate" in words:
        return certificate_problem(0, "hostname mismatch", host, "--control-ca")
    proxy = channel.proxy()
    if proxy is not None and "response code 407" in words:
        return wants_credentials(proxy)
    through = f"through the proxy {proxy.address} (of {proxy.variable}): " if proxy else ""
    return through + words.rpartition("last error: ")[2]


class Backoff:
    """Waits that grow, each drawn evenly from zero to a bound that doubles.

    Full jitter: after a server's restart its devices come back spread over the bound, not in
    step (Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).

    Args:
        first: bound of the first wait in seconds.
        most: bound of any wait.
        rng: source of the jitter.

    >>> backoff = Backoff(1.0, 4.0, random.Random(1))
    >>> [round(backoff.next(), 2) for _ in range(4)]
    [0.13, 1.69, 3.06, 1.02]
    """

    def __init__(self, first: float, most: float, rng: random.Random) -> None:
        self._first, self._most, self._rng = first, most, rng
        self._bound = first

    def next(self) -> float:
        """Seconds to wait."""
        bound, self._bound = self._bound, min(self._most, self._bound * 2)
        return self._rng.uniform(0, bound)

    def long(self) -> float:
        """Seconds to wait for what time alone does not heal."""
        self._bound = self._most
        return self._rng.uniform(self._most / 2, self._most)

    def reset(self) -> None:
        """It works again."""
        self._bound = self._first


_AS_HTTP = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.FAILED_PRECONDITION: 413,
    grpc.StatusCode.OUT_OF_RANGE: 416,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
}


class ControlFetcher(Fetcher):
    """Gets files below ``grpcs://HOST:PORT/`` by Fetch; trust is TUF's, as over HTTP.

    Args:
        silence: seconds without a chunk after which a transfer is given up.
        least_rate: bytes per second that an answer must average after so many seconds of waiting,
            see `HttpFetcher`.
    """

    def __init__(
        self, channel: ControlChannel, *, silence: float = 30.0, least_rate: float = 512.0
    ) -> None:
        self._channel, self._silence, self._least_rate = channel, silence, least_rate

    def open(self, url: str, offset: int = 0) -> Stream:
        """See `Fetcher.open`."""
        base = self._channel.settings.url
        if not url.startswith(base):
            raise DownloadError(f"{url} is not at the control server {base}")
        chunks = self._chunks(url, url.removeprefix(base), offset)
        first = next(chunks, None)  # an answer, or the reason why there is none
        if first is None:
            raise DownloadError(f"no {url}: the control server sent nothing")
        return Stream(offset, chain([first], chunks))

    def _chunks(self, url: str, path: str, offset: int) -> Iterator[bytes]:
        try:
            request = messages.FetchRequest(path=path, offset=offset)
            call: Any = self._channel.call("Fetch", request)
            at = offset
            pace = LeastRate(self._least_rate, self._silence, self._silence)
            coming = iter(call)
            with watched(call, self._silence) as allow:
                while (chunk := _next(coming, pace)) is not None:
                    pace.check()  # an empty chunk is a sign of life and nothing else
                    if chunk.offset != at:
                        raise DownloadError(f"{url} came with a gap at byte {at}")
                    at += len(chunk.data)
                    # a consumer may take its time; only the server's silence counts
                    allow(3600.0)
                    yield chunk.data
                    allow(self._silence)
        except TooSlow as error:
            raise SlowRetrievalError(f"no {url}: the control server: {error}") from error
        except (grpc.RpcError, ControlProblem) as error:
            problem = f"no {url}: {describe(error, self._channel)}"
            status = _AS_HTTP.get(error.code()) if isinstance(error, grpc.RpcError) else None
            if status is None:
                raise DownloadError(problem) from error
            raise DownloadHTTPError(problem, status) from error


def _next(coming: Iterator[Any], pace: LeastRate) -> Any:
    """The next chunk, whose way here is measured; None at the end."""
    found: list[Any] = []

    def read() -> int:
        found.append(next(coming, None))
        return 0 if found[0] is None else len(found[0].data)

    pace.receive(read)
    return found[0]

"""The distribution server: a repository's files over HTTP(S), with Range, ETag and caching.

The same folder can be served by nginx, a CDN or an object store; nothing here is needed for
trust. Only names that the repository itself makes are served, so neither the lock file nor
anything beside the repository can be reached.
"""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response
from starlette.routing import Route

from prunecast.server.releases.errors import ServerError

__all__ = ["ReleaseServer", "application"]

_SHA = "[0-9a-f]{64}"
_IMMUTABLE = re.compile(
    rf"metadata/[1-9][0-9]{{0,14}}\.(?:root|targets|snapshot)\.json"
    rf"|targets/[a-z0-9][a-z0-9._-]{{0,63}}/[1-9][0-9]{{0,14}}/{_SHA}\.release\.json"
    rf"|blobs/{_SHA}"
)
_FOREVER = "public, max-age=31536000, immutable"
_TIMESTAMP = "metadata/timestamp.json"


def application(folder: Path) -> Starlette:
    """An ASGI application that serves the repository in `folder`."""
    root = Path(folder)

    def respond(request: Request) -> Response:
        name = request.path_params["path"]
        if name == _TIMESTAMP:
            return _timestamp(root / name)
        path = root / name
        if not _IMMUTABLE.fullmatch(name) or ".." in name or not path.is_file():
            return PlainTextResponse("not found\n", 404, {"cache-control": "no-store"})
        # the names are unique for their content, so the name is the entity tag
        tag = f'"{path.name}"'
        headers = {"etag": tag, "cache-control": _FOREVER}
        if tag in (part.strip() for part in request.headers.get("if-none-match", "").split(",")):
            return Response(status_code=304, headers=headers)
        media = "application/json" if name.endswith(".json") else "application/octet-stream"
        return FileResponse(path, headers=headers, media_type=media)

    return Starlette(routes=[Route("/{path:path}", respond, methods=["GET"])])


def _timestamp(path: Path) -> Response:
    # read whole: the file is replaced by rename, and length and content must be of one file
    try:
        data = path.read_bytes()
    except OSError:
        return PlainTextResponse("not found\n", 404)
    headers = {"cache-control": "no-cache"}
    return Response(data, media_type="application/json", headers=headers)


class _Server(uvicorn.Server):
    """uvicorn without its signal handling, which ends the process by the signal once more."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class ReleaseServer:
    """Serves a repository until stopped; usable as a context manager (in a thread).

    Args:
        folder: the repository.
        host: address to bind.
        port: 0 lets the system choose; `port` tells which.
        certificate: PEM file with the TLS certificate chain; plain HTTP without.
        key: PEM file with its private key.

    Raises:
        ServerError: no repository there, the address cannot be bound, or TLS is incomplete.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        certificate: Path | None = None,
        key: Path | None = None,
    ) -> None:
        folder = Path(folder)
        if not (folder / _TIMESTAMP).is_file():
            raise ServerError(f"{folder} is not a release repository: prunecast release init")
        if (certificate is None) != (key is None):
            raise ServerError("TLS needs both a certificate and its key")
        for file in (certificate, key):
            if file is not None and not file.is_file():
                raise ServerError(f"{file} does not exist")
        config = uvicorn.Config(
            application(folder),
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=10,
            ssl_certfile=str(certificate) if certificate else None,
            ssl_keyfile=str(key) if key else None,
        )
        try:
            config.load()
        except OSError as error:  # ssl.SSLError is one
            raise ServerError(f"the certificate or its key is unusable: {error}") from error
        try:
            self._socket = socket.create_server((host, port), backlog=2048)
        except OSError as error:
            raise ServerError(f"cannot bind {host}:{port}: {error.strerror or error}") from error
        self.host, self.port = host, int(self._socket.getsockname()[1])
        self.url = f"{'https' if certificate else 'http'}://{host}:{self.port}/"
        self._server = _Server(config)
        self._thread: threading.Thread | None = None

    def run(self, ready: Callable[[str], None] | None = None) -> None:
        """Serve in this thread until SIGINT, SIGTERM or `stop`; requests in progress finish.

        Args:
            ready: called with the URL; connections are accepted from then on.
        """
        previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                previous[number] = signal.signal(number, self._on_signal)
        try:
            if ready:
                ready(self.url)  # the socket listens: early requests wait in its backlog
            self._server.run(sockets=[self._socket])
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._server.should_exit:  # asked twice: do not wait for slow downloads
            self._server.force_exit = True
        self._server.should_exit = True

    def stop(self) -> None:
        """Finish requests in progress and end `run`; waits for the thread if there is one."""
        self._server.should_exit = True
        if self._thread:
            self._thread.join(timeout=15)
            self._thread = None

    def __enter__(self) -> ReleaseServer:
        self._thread = threading.Thread(target=self.run, name="release server", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

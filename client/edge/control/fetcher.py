"""The release repository through the control server, for devices that reach nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
from tuf.api.exceptions import DownloadError, DownloadHTTPError

from prunecast.client.edge.control.channel import ControlChannel, describe, watched
from prunecast.client.edge.errors import ControlProblem
from prunecast.client.edge.updating.transport import Fetcher, Stream
from prunecast.common.fleet_protocol import messages

__all__ = ["ControlFetcher"]

_SILENCE = 30.0
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
        channel: to the server.
        silence: seconds without a chunk after which a transfer is given up.
    """

    def __init__(self, channel: ControlChannel, *, silence: float = _SILENCE) -> None:
        self._channel, self._silence = channel, silence

    def open(self, url: str, offset: int = 0) -> Stream:
        """See `Fetcher.open`."""
        base = self._channel.settings.url
        if not url.startswith(base):
            raise DownloadError(f"{url} is not at the control server {base}")
        chunks = self._chunks(url, url.removeprefix(base), offset)
        first = next(chunks, None)  # an answer, or the reason why there is none
        if first is None:
            raise DownloadError(f"no {url}: the control server sent nothing")
        return Stream(offset, _joined(first, chunks))

    def _chunks(self, url: str, path: str, offset: int) -> Iterator[bytes]:
        try:
            request = messages.FetchRequest(path=path, offset=offset)
            call: Any = self._channel.call("Fetch", request)
            at = offset
            with watched(call, self._silence) as allow:
                for chunk in call:
                    if chunk.offset != at:
                        raise DownloadError(f"{url} came with a gap at byte {at}")
                    at += len(chunk.data)
                    # a consumer may take its time; only the server's silence counts
                    allow(3600.0)
                    yield chunk.data
                    allow(self._silence)
        except (grpc.RpcError, ControlProblem) as error:
            problem = f"no {url}: {describe(error)}"
            status = _AS_HTTP.get(error.code()) if isinstance(error, grpc.RpcError) else None
            if status is None:
                raise DownloadError(problem) from error
            raise DownloadHTTPError(problem, status) from error


def _joined(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest

"""The connection to the control server: a channel, made anew after every failure."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from prunecast.client.edge.control.settings import ControlSettings
from prunecast.client.edge.errors import ControlProblem
from prunecast.common.fleet_protocol import make_stub

__all__ = ["Line", "describe", "watched"]

_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.enable_retries", 0),  # the agent does that itself
    ("grpc.use_local_subchannel_pool", 1),  # or a new channel would wait as the old one did
]


class Line:
    """One channel for everything; may be used by several threads.

    Args:
        settings: see `ControlSettings`.
    """

    def __init__(self, settings: ControlSettings) -> None:
        self.settings = settings
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
                    self.settings.address, self._credentials(), options=_OPTIONS
                )
                self._stub = make_stub(self._channel)
            return self._stub

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
    timer = threading.Timer(seconds, call.cancel)

    def allow(more: float) -> None:
        nonlocal timer
        timer.cancel()
        timer = threading.Timer(more, call.cancel)
        timer.daemon = True
        timer.start()

    timer.daemon = True
    timer.start()
    try:
        yield allow
    finally:
        timer.cancel()
        call.cancel()


def describe(error: Exception) -> ControlProblem:
    """A failed call in one sentence that names the remedy as far as one is known."""
    if isinstance(error, ControlProblem):
        return error
    code = error.code() if hasattr(error, "code") else None
    details = (error.details() if hasattr(error, "details") else "") or str(error)
    if code is grpc.StatusCode.CANCELLED:
        details = "it fell silent"
    if code is grpc.StatusCode.UNAVAILABLE and "CERTIFICATE_VERIFY_FAILED" in details:
        details = "its TLS certificate is refused: see --control-ca"
    words = " ".join(details.split())[:300]
    name = code.name.lower().replace("_", " ") if code else type(error).__name__
    return ControlProblem(f"the control server ({name}): {words}")

"""Hears what the fleet wants: one Watch after the other."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from prunecast.client.edge.config import AGENT_VERSION
from prunecast.client.edge.control.backoff import Backoff
from prunecast.client.edge.control.line import Line, describe, watched
from prunecast.client.edge.control.store import ControlStore, Directive
from prunecast.client.edge.errors import ControlProblem, StateError
from prunecast.common.fleet_protocol import messages

__all__ = ["Watcher"]

_ANSWER = 30.0
"""Seconds that the server may take for its first message."""
_LONGEST_PAUSE = 3600
"""Seconds between signs of life that a server may ask a device to put up with."""
_STEADY = 60.0
"""Seconds after which a connection counts as good: one that ends sooner is no reason to hurry."""
_HOPELESS = {
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.UNIMPLEMENTED,
}


class Watcher:
    """Keeps a Watch open; `run` is the work of a thread.

    Args:
        line: to the server.
        store: takes what the server says.
        release: name of the release that the agent follows.
        running: gives the version that is active.
        backoff: how long to wait between connections.
        changed: called after a directive that differs from the last one.
        connected: called with True when the server has accepted, with False when it is gone.
        problem: called with what is wrong.
    """

    def __init__(
        self,
        line: Line,
        store: ControlStore,
        *,
        release: str,
        running: Callable[[], int | None],
        backoff: Backoff,
        changed: Callable[[], None],
        connected: Callable[[bool], None],
        problem: Callable[[ControlProblem], None],
    ) -> None:
        self._line, self._store, self._release = line, store, release
        self._running, self._backoff = running, backoff
        self._changed, self._connected, self._problem = changed, connected, problem
        self._stop = threading.Event()
        self._call: Any = None

    def run(self) -> None:
        """Watch until `stop`."""
        while not self._stop.is_set():
            begun = time.monotonic()
            error = self._watch()
            self._connected(False)
            self._line.reset()
            if self._stop.is_set():
                return
            if time.monotonic() - begun >= _STEADY:
                self._backoff.reset()
            code = error.code() if isinstance(error, grpc.RpcError) else None
            waits = self._backoff.long if code in _HOPELESS else self._backoff.next
            self._problem(describe(error))
            self._stop.wait(waits())

    def stop(self) -> None:
        """End `run`."""
        self._stop.set()
        if (call := self._call) is not None:
            call.cancel()

    def _watch(self) -> Exception:
        """One Watch until it ends; why it ended."""
        try:
            fingerprint = self._line.settings.fingerprint()
            request = messages.WatchRequest(
                device=self._store.name_for(fingerprint),
                agent=AGENT_VERSION,
                release=self._release,
                running=self._running(),
            )
            self._call = self._line.call("Watch", request)
            if self._stop.is_set():  # asked to end between the two
                self._call.cancel()
            with watched(self._call, _ANSWER) as allow:
                silence = _ANSWER
                for event in self._call:
                    if event.HasField("welcome"):
                        pause = event.welcome.keep_alive_seconds
                        silence = 3.0 * min(max(1, pause), _LONGEST_PAUSE)
                        self._keep(self._store.welcome, event.welcome.device, fingerprint)
                        self._connected(True)
                    elif event.HasField("directive") and self._keep(
                        self._store.accept, _directive(event.directive)
                    ):
                        self._changed()
                    allow(silence)
            return ControlProblem("the control server ended the connection")
        except Exception as error:  # whatever it is, the device must not lose its fleet
            return error
        finally:
            self._call = None

    def _keep(self, keep: Callable[..., bool | None], *said: Any) -> bool:
        try:
            return bool(keep(*said))
        except StateError as error:
            self._problem(ControlProblem(f"what the fleet said is not kept: {error}"))
            return True


def _directive(said: Any) -> Directive:
    version = said.version if said.HasField("version") else None
    return Directive(said.serial, said.release, version, said.downgrade, said.rollout)

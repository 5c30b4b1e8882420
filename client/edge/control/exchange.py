"""The two threads beside an agent: one hears directives, the other brings reports."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from prunecast.client.edge.config import AGENT_VERSION
from prunecast.client.edge.control.channel import Backoff, ControlChannel, describe, watched
from prunecast.client.edge.control.store import ControlStore, StoredDirective, StoredReport
from prunecast.client.edge.errors import ControlProblem, StateError
from prunecast.common.fleet_protocol import messages

__all__ = ["DirectiveWatcher", "ReportSender"]

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


class DirectiveWatcher:
    """Keeps a Watch open; `run` is the work of a thread.

    Args:
        channel: to the server.
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
        channel: ControlChannel,
        store: ControlStore,
        *,
        release: str,
        running: Callable[[], int | None],
        backoff: Backoff,
        changed: Callable[[], None],
        connected: Callable[[bool], None],
        problem: Callable[[ControlProblem], None],
    ) -> None:
        self._channel, self._store, self._release = channel, store, release
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
            self._channel.reset()
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
            fingerprint = self._channel.settings.fingerprint()
            request = messages.WatchRequest(
                device=self._store.name_for(fingerprint),
                agent=AGENT_VERSION,
                release=self._release,
                running=self._running(),
            )
            self._call = self._channel.call("Watch", request)
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


def _directive(said: Any) -> StoredDirective:
    version = said.version if said.HasField("version") else None
    return StoredDirective(said.serial, said.release, version, said.downgrade, said.rollout)


_TIMEOUT = 30.0
_NEVER = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED}
"""The server will never take this report."""
_OUTCOMES = {
    "succeeded": messages.OUTCOME_SUCCEEDED,
    "self-test failed": messages.OUTCOME_SELFTEST_FAILED,
    "rolled back": messages.OUTCOME_ROLLED_BACK,
    "crash loop": messages.OUTCOME_CRASH_LOOP,
}


class ReportSender:
    """Sends what the store holds while there is a connection; `run` is the work of a thread.

    Args:
        channel: to the server.
        store: holds the reports.
        backoff: how long to wait after a failure.
        problem: called with what is wrong.
    """

    def __init__(
        self,
        channel: ControlChannel,
        store: ControlStore,
        *,
        backoff: Backoff,
        problem: Callable[[ControlProblem], None],
    ) -> None:
        self._channel, self._store, self._backoff, self._problem = channel, store, backoff, problem
        self._stopped, self._online = threading.Event(), threading.Event()
        self._bell = threading.Event()

    def run(self) -> None:
        """Send until `stop`."""
        while not self._stopped.is_set():
            self._bell.clear()
            report = self._store.first() if self._online.is_set() else None
            if report is None:
                self._bell.wait()
                continue
            try:
                waits = self._send(report)
            except StateError as error:
                self._problem(ControlProblem(f"a report is not crossed off: {error}"))
                waits = self._backoff.next()
            except Exception as error:  # whatever it is, the device must go on reporting
                if self._online.is_set():  # else the watcher has said why
                    self._problem(describe(error))
                waits = self._wait_after(error)
            if waits:
                self._stopped.wait(waits)

    def online(self, now: bool) -> None:
        """There is a connection, or there is none."""
        (self._online.set if now else self._online.clear)()
        self.wake()

    def wake(self) -> None:
        """There may be a new report."""
        self._bell.set()

    def stop(self) -> None:
        """End `run`; what was not sent is sent by the next process."""
        self._stopped.set()
        self._bell.set()

    def _send(self, report: StoredReport) -> float:
        call = self._channel.call("Report", _request(report), timeout=_TIMEOUT)
        try:
            call.result()
        except grpc.RpcError as error:
            if error.code() not in _NEVER:
                raise
            self._problem(describe(error))
        self._store.done(report.id)
        self._backoff.reset()
        return 0.0

    def _wait_after(self, error: Exception) -> float:
        waits = self._backoff.next()
        if isinstance(error, grpc.RpcError):
            said = dict(error.trailing_metadata() or ()).get("retry-after", "")
            if str(said).isdigit():
                return max(waits, min(float(said), 3600.0))
        return waits


def _request(report: StoredReport) -> Any:
    made = messages.ReportRequest(
        id=report.id,
        device=report.device,
        agent=report.agent,
        running=report.running,
        error=report.error,
        figures=report.figures,
        made=report.made,
    )
    if report.answer is not None:
        given = report.answer
        made.answer.serial, made.answer.version = given.serial, given.version
        made.answer.detail = given.detail
        made.answer.outcome = _OUTCOMES.get(given.outcome, messages.OUTCOME_UNSPECIFIED)
    return made

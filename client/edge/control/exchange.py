"""What goes on beside an agent: one thread hears directives, another one brings reports."""

from __future__ import annotations

import random
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

__all__ = ["Exchange"]

_ANSWER = 30.0
"""Seconds that the server may take for its first message, or to take a report."""
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
_NEVER = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED}
"""The server will never take this report."""
_OUTCOMES = {
    "succeeded": messages.OUTCOME_SUCCEEDED,
    "self-test failed": messages.OUTCOME_SELFTEST_FAILED,
    "rolled back": messages.OUTCOME_ROLLED_BACK,
    "crash loop": messages.OUTCOME_CRASH_LOOP,
}


class Exchange:
    """Keeps a Watch open, and while there is one sends the reports that the store holds.

    Args:
        channel: to the server.
        store: takes what the server says and holds the reports.
        release: name of the release that the agent follows.
        running: gives the version that is active.
        changed: called after a directive that differs from the last one.
        on_event: called with True when connected, and with every new problem.
        rng: source of the jitter.
    """

    def __init__(
        self,
        channel: ControlChannel,
        store: ControlStore,
        *,
        release: str,
        running: Callable[[], int | None],
        changed: Callable[[], None],
        on_event: Callable[[bool | ControlProblem], None],
        rng: random.Random,
    ) -> None:
        self._channel, self._store, self._release = channel, store, release
        self._running, self._changed, self._on_event = running, changed, on_event
        first, most = channel.settings.first_wait, channel.settings.most_wait
        self._resend, self._reconnect = Backoff(first, most, rng), Backoff(first, most, rng)
        self._stopped, self._online = threading.Event(), threading.Event()
        self._bell = threading.Event()  # for the sender
        self._call: Any = None
        self._known: bool | str | None = None
        self._threads = [
            threading.Thread(target=work, name=f"control {name}", daemon=True)
            for name, work in (("watcher", self._keep_watching), ("sender", self._keep_sending))
        ]

    def start(self) -> None:
        """Begin both."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both; what was not sent is sent by the next process."""
        self._stopped.set()
        self._bell.set()
        if (call := self._call) is not None:
            call.cancel()
        self._channel.reset()
        for thread in self._threads:
            thread.join(10)

    def wake(self) -> None:
        """There may be a new report."""
        self._bell.set()

    def tell(self, problem: ControlProblem) -> None:
        """Tell what is wrong, unless it is what was told last."""
        if str(problem) != self._known:
            self._known = str(problem)
            self._on_event(problem)

    def _keep_watching(self) -> None:
        while not self._stopped.is_set():
            begun = time.monotonic()
            error = self._watch()
            self._online.clear()
            self._channel.reset()
            if self._stopped.is_set():
                return
            if time.monotonic() - begun >= _STEADY:
                self._reconnect.reset()
            code = error.code() if isinstance(error, grpc.RpcError) else None
            waits = self._reconnect.long if code in _HOPELESS else self._reconnect.next
            self.tell(describe(error))
            self._stopped.wait(waits())

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
            if self._stopped.is_set():  # asked to end between the two
                self._call.cancel()
            with watched(self._call, _ANSWER) as allow:
                silence = _ANSWER
                for event in self._call:
                    if event.HasField("welcome"):
                        pause = event.welcome.keep_alive_seconds
                        silence = 3.0 * min(max(1, pause), _LONGEST_PAUSE)
                        self._keep(self._store.welcome, event.welcome.device, fingerprint)
                        self._connected()
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
            self.tell(ControlProblem(f"what the fleet said is not kept: {error}"))
            return True

    def _connected(self) -> None:
        self._online.set()
        self._bell.set()
        if self._known is not True:
            self._known = True
            self._on_event(True)

    def _keep_sending(self) -> None:
        while not self._stopped.is_set():
            self._bell.clear()
            report = self._store.first() if self._online.is_set() else None
            if report is None:
                self._bell.wait()
                continue
            try:
                self._send(report)
                continue
            except StateError as error:
                self.tell(ControlProblem(f"a report is not crossed off: {error}"))
                waits = self._resend.next()
            except Exception as error:  # whatever it is, the device must go on reporting
                if self._online.is_set():  # else the watcher has said why
                    self.tell(describe(error))
                waits = max(self._resend.next(), _asked_to_wait(error))
            self._stopped.wait(waits)

    def _send(self, report: StoredReport) -> None:
        call = self._channel.call("Report", _request(report), timeout=_ANSWER)
        try:
            call.result()
        except grpc.RpcError as error:
            if error.code() not in _NEVER:
                raise
            self.tell(describe(error))
        self._store.done(report.id)
        self._resend.reset()


def _asked_to_wait(error: Exception) -> float:
    """Seconds that the server wants to be left alone, an hour at most."""
    trailing = error.trailing_metadata() if isinstance(error, grpc.RpcError) else None
    said = str(dict(trailing or ()).get("retry-after", ""))
    return min(float(said), 3600.0) if said.isdigit() else 0.0


def _directive(said: Any) -> StoredDirective:
    version = said.version if said.HasField("version") else None
    return StoredDirective(said.serial, said.release, version, said.downgrade, said.rollout)


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

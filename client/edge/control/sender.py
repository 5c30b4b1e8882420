"""Brings reports to the fleet, one after the other, each until it has arrived."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc

from prunecast.client.edge.control.backoff import Backoff
from prunecast.client.edge.control.line import Line, describe
from prunecast.client.edge.control.store import ControlStore, Report
from prunecast.client.edge.errors import ControlProblem, StateError
from prunecast.common.fleet_protocol import messages

__all__ = ["Sender"]

_TIMEOUT = 30.0
_NEVER = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.PERMISSION_DENIED}
"""The server will never take this report."""
_OUTCOMES = {
    "succeeded": messages.OUTCOME_SUCCEEDED,
    "self-test failed": messages.OUTCOME_SELFTEST_FAILED,
    "rolled back": messages.OUTCOME_ROLLED_BACK,
    "crash loop": messages.OUTCOME_CRASH_LOOP,
}


class Sender:
    """Sends what the store holds while there is a connection; `run` is the work of a thread.

    Args:
        line: to the server.
        store: holds the reports.
        backoff: how long to wait after a failure.
        problem: called with what is wrong.
    """

    def __init__(
        self,
        line: Line,
        store: ControlStore,
        *,
        backoff: Backoff,
        problem: Callable[[ControlProblem], None],
    ) -> None:
        self._line, self._store, self._backoff, self._problem = line, store, backoff, problem
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

    def _send(self, report: Report) -> float:
        call = self._line.call("Report", _request(report), timeout=_TIMEOUT)
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


def _request(report: Report) -> Any:
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

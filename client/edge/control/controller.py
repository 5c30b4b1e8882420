"""An agent under the control of a fleet: directives in, reports out, answers to both."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable
from typing import Any, Self

import grpc

from prunecast.client.edge.agent import Agent
from prunecast.client.edge.config import AGENT_VERSION, Order, UpdateResult
from prunecast.client.edge.control.channel import Backoff, ControlChannel, describe, watched
from prunecast.client.edge.control.store import (
    ControlStore,
    StoredAnswer,
    StoredDirective,
    StoredReport,
)
from prunecast.client.edge.errors import ControlProblem, EdgeError, StateError
from prunecast.client.edge.state import StateFolder
from prunecast.client.edge.telemetry import TelemetrySnapshot
from prunecast.common.fleet_protocol import messages
from prunecast.compression.release.runtime import REFUSED

__all__ = ["Controller", "fleet_figures"]

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
    "activated": messages.OUTCOME_ACTIVATED,
    "confirmed": messages.OUTCOME_CONFIRMED,
    "self-test failed": messages.OUTCOME_SELFTEST_FAILED,
    "rolled back": messages.OUTCOME_ROLLED_BACK,
    "crash loop": messages.OUTCOME_CRASH_LOOP,
}


class Controller:
    """Hears directives and sends reports beside an agent that runs; a context manager.

    The agent asks `order` before every check and tells `note` what the check did; that a release is
    confirmed it tells by itself::

        with Controller(agent, channel, wake=wake) as controller:
            agent.run(300, stop=stop, wake=wake, order=controller.order, on_result=controller.note)

    Without a server the last directive stays in force, across restarts too. Before the first one
    the agent keeps what it has.

    One thread keeps a Watch open; while there is one, another sends the reports that the store
    holds.

    Args:
        agent: holds the state folder's lock.
        channel: to the server.
        wake: set when there is another directive.
        on_event: called with True when connected, and with every new problem.
        rng: source of the jitter; default seeded from the operating system.
    """

    def __init__(
        self,
        agent: Agent,
        channel: ControlChannel,
        *,
        wake: threading.Event,
        on_event: Callable[[bool | ControlProblem], None] = lambda event: None,
        rng: random.Random | None = None,
    ) -> None:
        self._agent, self._channel = agent, channel
        self._wake, self._on_event = wake, on_event
        self.store = ControlStore(StateFolder(agent.config.state))
        self._said: tuple[str, int | None] | None = None
        self._said_at = time.monotonic()
        limits = (channel.settings.first_wait, channel.settings.most_wait, rng or random.Random())
        self._resend, self._reconnect = Backoff(*limits), Backoff(*limits)
        self._stopped, self._online = threading.Event(), threading.Event()
        self._bell = threading.Event()  # for the sender
        agent.on_confirmed = self._note_confirmed
        self._call: Any = None
        self._known: bool | str | None = None
        self._threads = [
            threading.Thread(target=work, name=f"control {name}", daemon=True)
            for name, work in (("watcher", self._keep_watching), ("sender", self._keep_sending))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; reports that wait are kept for the next process."""
        self._stopped.set()
        self._bell.set()
        if (call := self._call) is not None:
            call.cancel()
        self._channel.reset()
        for thread in self._threads:
            thread.join(10)

    def order(self) -> Order:
        """What the agent shall run now."""
        said = self._directive()
        return Order() if said is None else Order(said.version, said.downgrade)

    def note(self, result: UpdateResult | EdgeError) -> None:
        """Queue what a check for updates has to say to the fleet."""
        problem = str(result)[:500] if isinstance(result, EdgeError) else ""
        running = self._agent.model.version
        answer = self._answer(result)
        now = time.monotonic()
        old = now - self._said_at >= self._channel.settings.report_every
        if answer is None and not old and (problem, running) == self._said:
            return
        self._queue(answer, problem)

    def _note_confirmed(self) -> None:
        """Queue the answer that was provisional until now."""
        answer = self._answer(None)
        if answer is not None:
            self._queue(answer, self._said[0] if self._said else "")

    def _queue(self, answer: StoredAnswer | None, problem: str) -> None:
        running = self._agent.model.version
        self._said, self._said_at = (problem, running), time.monotonic()
        try:
            figures = fleet_figures(self._agent.telemetry.snapshot())
            made = time.time()
            self.store.queue(StoredReport(AGENT_VERSION, running, answer, problem, figures, made))
        except StateError as error:
            self._tell(ControlProblem(f"a report is not kept: {error}"))
        self._bell.set()

    def _answer(self, result: UpdateResult | EdgeError | None) -> StoredAnswer | None:
        """What has become of the directive, if that was not said yet.

        It follows from what is on disk, so a crash at any moment loses nothing.
        """
        said = self._directive()
        if said is None or said.version is None:
            return None
        answer = None
        if self._agent.model.version == said.version:
            difference = result.difference if isinstance(result, UpdateResult) else None
            detail = "" if difference is None else f"largest difference {difference:.3g}"
            outcome = "confirmed" if self._agent.confirmed else "activated"
            answer = StoredAnswer(said.serial, said.version, outcome, detail)
        elif (failure := self._agent.failure(said.version)) is not None:
            answer = StoredAnswer(said.serial, said.version, failure.kind, failure.reason)
        return answer if answer and self.store.is_due(answer) else None

    def _directive(self) -> StoredDirective | None:
        """The last directive if it names a version of the agent's own release.

        Numbers of another release say nothing about this one's.
        """
        said = self.store.directive
        mine = said and said.version is not None and said.release == self._agent.config.name
        return said if mine else None

    def _tell(self, problem: ControlProblem) -> None:
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
            self._tell(describe(error, self._channel))
            self._stopped.wait(waits())

    def _watch(self) -> Exception:
        """One Watch until it ends; why it ended."""
        try:
            fingerprint = self._channel.settings.fingerprint()
            request = messages.WatchRequest(
                device=self.store.name_for(fingerprint),
                agent=AGENT_VERSION,
                release=self._agent.config.name,
                running=self._agent.model.version,
            )
            self._call = self._channel.call("Watch", request)
            if self._stopped.is_set():  # asked to end between the two
                self._call.cancel()
            with watched(self._call, _ANSWER) as allow:
                silence: float | None = None  # nothing but a welcome earns more time
                for event in self._call:
                    if event.HasField("welcome"):
                        pause = event.welcome.keep_alive_seconds
                        silence = 3.0 * min(max(1, pause), _LONGEST_PAUSE)
                        self._keep(self.store.welcome, event.welcome.device, fingerprint)
                        self._connected()
                    elif event.HasField("directive") and self._keep(
                        self.store.accept, _directive(event.directive)
                    ):
                        self._wake.set()
                    if silence is not None:
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
            self._tell(ControlProblem(f"what the fleet said is not kept: {error}"))
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
            report = self.store.first() if self._online.is_set() else None
            if report is None:
                self._bell.wait()
                continue
            try:
                self._send(report)
                continue
            except StateError as error:
                self._tell(ControlProblem(f"a report is not crossed off: {error}"))
                waits = self._resend.next()
            except Exception as error:  # whatever it is, the device must go on reporting
                if self._online.is_set():  # else the watcher has said why
                    self._tell(describe(error, self._channel))
                waits = max(self._resend.next(), _asked_to_wait(error))
            self._stopped.wait(waits)

    def _send(self, report: StoredReport) -> None:
        call = self._channel.call("Report", _request(report), timeout=_ANSWER)
        try:
            call.result()
        except grpc.RpcError as error:
            if error.code() not in _NEVER:
                raise
            self._tell(describe(error, self._channel))
        self.store.done(report.id)
        self._resend.reset()


def fleet_figures(found: TelemetrySnapshot) -> dict[str, float]:
    """Figures of the agent and of the release that is active; only finite ones."""
    made: dict[str, float | None] = {
        "starts": found.starts,
        "uptime_seconds": found.uptime_seconds,
        "resident_bytes": found.resident_bytes,
    }
    for release in found.releases:
        if release.version == found.active:
            made |= {
                "inferences_answered": release.answered,
                "inferences_refused": release.refused,
                "inferences_failed": release.failed,
                "served_seconds": release.served_seconds,
                "selftest_difference": release.difference,
                "settings_refused": list(release.settings.values()).count(REFUSED) or None,
                "latency_p50_seconds": release.latency(0.5),
                "latency_p99_seconds": release.latency(0.99),
            }
    return {k: float(v) for k, v in made.items() if v is not None and math.isfinite(v)}


def _asked_to_wait(error: Exception) -> float:
    """Seconds that the server wants to be left alone, an hour at most."""
    trailing = error.trailing_metadata() if isinstance(error, grpc.RpcError) else None
    said = str(dict(trailing or ()).get("retry-after", ""))
    return min(float(said), 3600.0) if said.isdigit() else 0.0


def _directive(said: Any) -> StoredDirective:
    version = said.version if said.HasField("version") else None
    return StoredDirective(said.serial, said.release, version, said.downgrade, said.rollout)


def _request(report: StoredReport) -> Any:
    answer = None
    if given := report.answer:
        outcome = _OUTCOMES.get(given.outcome, messages.OUTCOME_UNSPECIFIED)
        answer = messages.Answer(**{**vars(given), "outcome": outcome})
    return messages.ReportRequest(**{**vars(report), "answer": answer})

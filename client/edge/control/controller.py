"""Puts an agent under the control of a fleet."""

from __future__ import annotations

import math
import random
import secrets
import threading
import time
from collections.abc import Callable
from typing import Self

from prunecast.client.edge.agent import Agent
from prunecast.client.edge.config import AGENT_VERSION, Order, UpdateResult
from prunecast.client.edge.control.channel import Backoff, ControlChannel
from prunecast.client.edge.control.exchange import DirectiveWatcher, ReportSender
from prunecast.client.edge.control.store import ControlStore, StoredAnswer, StoredDirective
from prunecast.client.edge.errors import ControlProblem, EdgeError, StateError
from prunecast.client.edge.state import StateFolder
from prunecast.client.edge.telemetry import TelemetrySnapshot

__all__ = ["Controller", "fleet_figures"]


class Controller:
    """Hears directives and sends reports beside an agent that runs; a context manager.

    The agent asks `order` before every check and tells `note` what the check did::

        with Controller(agent, channel, wake=wake) as controller:
            agent.run(300, stop=stop, wake=wake, order=controller.order, on_result=controller.note)

    Without a server the last directive stays in force, across restarts too. Before the first one
    the agent keeps what it has.

    Args:
        agent: holds the state folder's lock.
        channel: to the server.
        wake: set when there is another directive.
        on_event: called with True when connected, False when not, and with every new problem.
        rng: source of the jitter; default seeded from the operating system.
        make_id: makes identifiers of reports.
    """

    def __init__(
        self,
        agent: Agent,
        channel: ControlChannel,
        *,
        wake: threading.Event,
        on_event: Callable[[bool | ControlProblem], None] = lambda event: None,
        rng: random.Random | None = None,
        make_id: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self._agent, self._channel, self._on_event = agent, channel, on_event
        self._settings, draw = channel.settings, rng or random.Random()
        self.store = ControlStore(StateFolder(agent.config.state), make_id)
        self._said: tuple[str, int | None] | None = None
        self._said_at = time.monotonic()
        self._known: bool | str | None = None
        waits = [Backoff(self._settings.first_wait, self._settings.most_wait, draw) for _ in "ab"]
        self._sender = ReportSender(channel, self.store, backoff=waits[0], problem=self._tell)
        self._watcher = DirectiveWatcher(
            channel,
            self.store,
            release=agent.config.name,
            running=lambda: agent.model.version,
            backoff=waits[1],
            changed=wake.set,
            connected=self._connected,
            problem=self._tell,
        )
        self._threads = [
            threading.Thread(target=work.run, name=f"control {name}", daemon=True)
            for name, work in (("watcher", self._watcher), ("sender", self._sender))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; reports that wait are kept for the next process."""
        self._watcher.stop()
        self._sender.stop()
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
        old = now - self._said_at >= self._settings.report_every
        if answer is None and not old and (problem, running) == self._said:
            return
        self._said, self._said_at = (problem, running), now
        try:
            self.store.report(
                AGENT_VERSION,
                running,
                answer=answer,
                error=problem,
                figures=fleet_figures(self._agent.telemetry.snapshot()),
                made=time.time(),
            )
        except StateError as error:
            self._tell(ControlProblem(f"a report is not kept: {error}"))
        self._sender.wake()

    def _answer(self, result: UpdateResult | EdgeError) -> StoredAnswer | None:
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
            answer = StoredAnswer(said.serial, said.version, "succeeded", detail)
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

    def _connected(self, now: bool) -> None:
        self._sender.online(now)
        if now and self._known is not True:
            self._known = True
            self._on_event(True)

    def _tell(self, problem: ControlProblem) -> None:
        if str(problem) != self._known:  # the same again is no news
            self._known = str(problem)
            self._on_event(problem)


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
                "latency_p50_seconds": release.latency(0.5),
                "latency_p99_seconds": release.latency(0.99),
            }
    return {k: float(v) for k, v in made.items() if v is not None and math.isfinite(v)}

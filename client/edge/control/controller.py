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
from prunecast.client.edge.control.channel import ControlChannel
from prunecast.client.edge.control.exchange import Exchange
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
        on_event: called with True when connected, and with every new problem.
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
        self._agent, self._settings = agent, channel.settings
        self.store = ControlStore(StateFolder(agent.config.state), make_id)
        self._said: tuple[str, int | None] | None = None
        self._said_at = time.monotonic()
        self._exchange = Exchange(
            channel,
            self.store,
            release=agent.config.name,
            running=lambda: agent.model.version,
            changed=wake.set,
            on_event=on_event,
            rng=rng or random.Random(),
        )

    def __enter__(self) -> Self:
        self._exchange.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; reports that wait are kept for the next process."""
        self._exchange.stop()

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
            self._exchange.tell(ControlProblem(f"a report is not kept: {error}"))
        self._exchange.wake()

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

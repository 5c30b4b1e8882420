"""A control server on loopback, and agents under it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.config import UpdateResult
from prunecast.client.edge.control import (
    ControlChannel,
    ControlFetcher,
    Controller,
    ControlSettings,
)
from prunecast.client.edge.errors import ControlProblem, EdgeError
from prunecast.server.control import ControlServer
from prunecast.server.fleet.model import Device
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import Repository
from support.authority import Authority
from support.control import authority, database, fleet, repository, server

__all__ = ["authority", "database", "fleet", "repository", "server"]


class Station:
    """A device: its state folder, its token, and agents that live one after the other.

    Args:
        folder: for everything.
        address: of the control server.
    """

    def __init__(
        self, name: str, folder: Path, address: str, authority: Authority, root: bytes, token: str
    ) -> None:
        self.name, self.token_file = name, folder / "token"
        self.token_file.write_text(token + "\n")
        self.settings = ControlSettings(
            address, authority.ca, self.token_file, first_wait=0.1, most_wait=0.3
        )
        self.config = AgentConfig(
            folder / "state", self.settings.url, "toy", root, threads=1, confirm_after=0.0
        )
        self.events: list[bool | ControlProblem] = []
        self.results: list[UpdateResult | EdgeError] = []
        self._running: tuple[threading.Thread, Callable[[], None]] | None = None

    def move(self, address: str, ca: Path | None) -> None:
        """Look for the server somewhere else from now on."""
        self.settings = replace(self.settings, address=address, ca_file=ca)
        self.config = replace(self.config, url=self.settings.url)

    def start(self, interval: float = 600.0) -> None:
        """A life of the agent begins."""
        stop, wake = threading.Event(), threading.Event()
        line = ControlChannel(self.settings)
        self.agent = Agent(self.config, fetcher=ControlFetcher(line), wait=lambda _: None)
        self.controller = Controller(
            self.agent, line, wake=wake, on_event=self.events.append, rng=random.Random(7)
        )

        def live() -> None:
            with self.agent, self.controller as controller:

                def note(result: UpdateResult | EdgeError) -> None:
                    self.results.append(result)
                    controller.note(result)

                self.agent.run(
                    interval, stop=stop, wake=wake, order=controller.order, on_result=note
                )

        def end() -> None:
            stop.set()
            wake.set()

        thread = threading.Thread(target=live, daemon=True)
        thread.start()
        self._running = thread, end

    def end(self) -> None:
        """The life ends."""
        if self._running:
            thread, end = self._running
            end()
            thread.join(30)
            assert not thread.is_alive()
            self._running = None

    @property
    def version(self) -> int | None:
        return self.agent.model.version


def until(condition: Callable[[], object], what: str, seconds: float = 30.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


@pytest.fixture
def wait_until() -> Callable[..., None]:
    return until


@pytest.fixture
def device(fleet: FleetService) -> Callable[[str], Device]:
    return fleet.device


@pytest.fixture
def enrol(
    fleet: FleetService,
    server: ControlServer,
    authority: Authority,
    repository: Repository,
    tmp_path: Path,
) -> Iterator[Callable[[str], Station]]:
    """A function: name -> a device that is enrolled, in its own folder."""
    made: list[Station] = []

    def enrol(name: str) -> Station:
        folder = tmp_path / name
        folder.mkdir()
        token = fleet.enrol(name, "lab", now=time.time(), actor="ada")
        root = repository.trusted_root()
        made.append(Station(name, folder, server.address, authority, root, token))
        return made[-1]

    yield enrol
    for station in made:
        station.end()

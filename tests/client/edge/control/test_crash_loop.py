"""A release that brings its process down, in processes under a fleet's server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.server.fleet.audit import AuditKind
from prunecast.server.fleet.events import Abort, AddGroup, MoveDevice, StartRollout
from prunecast.server.fleet.model import SOAK_SECONDS, Device, Release, RolloutPolicy, Status
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import Repository
from support.authority import Authority

pytestmark = pytest.mark.engine

Enrol = Callable[[str], Any]
Look = Callable[[str], Device]
Until = Callable[..., None]


@pytest.fixture
def launch(authority: Authority, repository: Repository) -> Iterator[Callable[..., Any]]:
    """A function: device -> a process of `prunecast edge run` on its state folder."""
    made: list[subprocess.Popen[bytes]] = []

    def launch(station: Any, confirm_after: float) -> subprocess.Popen[bytes]:
        root = repository.path / "metadata" / "1.root.json"
        command = [
            *(sys.executable, "-m", "prunecast.cli", "edge", "run"),
            *("--state", station.config.state, "--name", "toy", "--root", root, "--threads", 1),
            *("--control", station.settings.address, "--control-ca", authority.ca),
            *("--control-token", station.token_file, "--confirm-after", confirm_after, "--json"),
        ]
        with open(station.token_file.with_name("log"), "ab") as log:
            made.append(subprocess.Popen([*map(str, command)], stdout=log, stderr=log))
        return made[-1]

    yield launch
    for process in made:
        if process.poll() is None:
            process.kill()
        process.wait(30)


def in_group(fleet: FleetService, enrol: Enrol, name: str) -> Any:
    """A device in a group of its own, whose stable release is 1."""
    fleet.operate(AddGroup(at=time.time(), group=name, release="toy", stable=1))
    station = enrol(name)
    fleet.operate(MoveDevice(at=time.time(), device=name, group=name))
    return station


def checks(station: Any) -> list[dict[str, Any]]:
    """What the processes of a device have said about checks for updates."""
    log = station.token_file.with_name("log").read_text()
    found = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    return [line for line in found if "version" in line]


def start(fleet: FleetService, name: str, soak: float) -> None:
    event = StartRollout(
        at=time.time(),
        rollout=f"r-{name}",
        release=Release("toy", 2),
        groups=(name,),
        stages=(100,),
        policy=RolloutPolicy(soak=soak),
    )
    fleet.operate(event)


@pytest.mark.parametrize("soak", [0.0, SOAK_SECONDS])
def test_a_crash_loop_is_seen_before_its_rollout_completes(
    enrol: Enrol,
    device: Look,
    fleet: FleetService,
    wait_until: Until,
    launch: Callable[..., Any],
    soak: float,
) -> None:
    name = f"loop{soak:.0f}"
    station = in_group(fleet, enrol, name)
    process = launch(station, 0.0)
    wait_until(lambda: device(name).told.outcome == "confirmed", "1 is confirmed", 60)
    start(fleet, name, soak)
    process.terminate()
    assert process.wait(30) == 0
    rollout = f"r-{name}"
    for life in range(12):
        seen = len(checks(station))
        process = launch(station, 600.0)
        if life == 0:
            wait_until(lambda: device(name).told.outcome == "activated", "2 is active", 60)
        wait_until(lambda seen=seen: len(checks(station)) > seen, "it has looked once", 60)
        if life and checks(station)[-1]["version"] == 1:
            break  # it has gone back
        assert fleet.rollout(rollout).status is Status.RUNNING
        os.kill(process.pid, signal.SIGKILL)
        process.wait(30)
    wait_until(lambda: device(name).failures, "it says so", 60)
    shown = CliRunner().invoke(app, ["edge", "status", "--state", str(station.config.state)]).output
    assert "release  toy 1\n" in shown
    assert "failed   2: crash loop: release 2: not confirmed after" in shown
    assert "fleet    told toy " in shown
    failed = device(name).failures[2]
    assert failed.outcome == "crash loop"
    assert "not confirmed after" in failed.detail
    shown = fleet.rollout(rollout)
    assert (shown.status, shown.tally.failed, shown.completed) == (Status.PAUSED, 1, None)
    wait_until(lambda: device(name).running == 1, "the device is back on 1", 60)
    kinds = [entry.kind for entry in fleet.audit(subject=name)]
    assert kinds.count(AuditKind.RELEASE_FAILED) == 1


def test_a_failure_after_completion_reopens_the_rollout(
    enrol: Enrol, device: Look, fleet: FleetService, wait_until: Until
) -> None:
    station = in_group(fleet, enrol, "late")
    station.start()
    wait_until(lambda: device("late").told.outcome == "confirmed", "1 is confirmed")
    start(fleet, "late", 0.0)
    wait_until(lambda: fleet.rollout("r-late").status is Status.COMPLETED, "2 is confirmed")
    assert device("late").told.outcome == "confirmed"
    station.agent.roll_back("worse recall")  # as the program around it may decide
    station.controller.note(station.results[-1])
    wait_until(lambda: fleet.rollout("r-late").status is Status.PAUSED, "it is reopened")
    assert fleet.rollout("r-late").reason == (
        "failures after it had completed: 0 confirmed, 1 failed, 0 silent of 1, the last one on "
        "late"
    )
    assert str(device("late").failures[2]) == "rolled back: worse recall"
    assert fleet.operate(Abort(at=time.time(), rollout="r-late")) == ()
    wait_until(lambda: device("late").told.version == 1, "it is told the stable one")
    station.end()


def test_what_is_active_is_provisional_until_it_has_served(
    enrol: Enrol, device: Look, fleet: FleetService, wait_until: Until
) -> None:
    station = in_group(fleet, enrol, "slow")
    station.config = replace(station.config, confirm_after=600.0)
    station.start()
    wait_until(lambda: device("slow").told.outcome == "activated", "1 is active")
    status = ["edge", "status", "--state", str(station.config.state)]
    shown = CliRunner().invoke(app, status).output
    assert "not confirmed yet" in shown
    assert "fleet    told toy 1, answered activated" in shown
    station.agent.confirm()  # as 600 seconds of service would
    wait_until(lambda: device("slow").told.outcome == "confirmed", "it says so by itself")
    assert "not confirmed yet" not in CliRunner().invoke(app, status).output
    station.end()

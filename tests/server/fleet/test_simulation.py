"""Five hundred devices: a good release, a bad one, and silence."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from prunecast.server.fleet.events import AddGroup, StartRollout
from prunecast.server.fleet.model import Outcome, Release, RolloutPolicy, Status
from prunecast.server.fleet.reports import DeviceState
from prunecast.server.fleet.service import FleetService
from support.fleet import releases, report

COUNT = 500
STAGES = (5.0, 25.0, 100.0)
POLICY = RolloutPolicy(
    max_error_rate=0.1,
    max_silent_rate=0.3,
    min_reports=10,
    report_deadline=600,
    timeout=7200,
    roll_back_on_error=True,
)


class SimulatedDevice:
    """Does what an agent does: runs what it is told if it passes, and reports once."""

    def __init__(self, token: str, *, silent: bool) -> None:
        self.token, self.silent, self.running = token, silent, 1
        self.failed: set[int] = set()
        self.installed: list[int] = []

    def poll(self, service: FleetService, now: float, broken: set[int]) -> None:
        directive = service.poll(self.token, DeviceState(self.running, "0.1.0"), now)
        release = directive.release
        if release is None or release.version in (self.running, *self.failed):
            return
        outcome = Outcome.CONFIRMED
        if release.version in broken:
            outcome = Outcome.SELFTEST_FAILED
            self.failed.add(release.version)
        else:
            self.running = release.version
            self.installed.append(release.version)
        if not self.silent:
            report(
                service,
                self.token,
                serial=directive.serial,
                version=release.version,
                outcome=outcome,
                now=now,
            )


class World:
    """A service and its devices; every round each device polls once, in an arbitrary order."""

    def __init__(self, service: FleetService) -> None:
        self.service, self.now, self.rng = service, 0.0, random.Random(7)
        service.operate(AddGroup(at=0, group="field", release="digits", stable=1))
        self.devices = [
            SimulatedDevice(
                service.enrol(f"device-{i}", "field", now=0, actor="ada"),
                silent=i % 10 == 3,
            )
            for i in range(COUNT)
        ]

    def start(self, version: int) -> None:
        event = StartRollout(
            at=self.now,
            rollout=f"r{version}",
            release=Release("digits", version),
            groups=("field",),
            stages=STAGES,
            policy=POLICY,
        )
        self.service.operate(event)

    def round(self, broken: set[int], version: int) -> list[tuple[int, int]]:
        """300 s later; returns (stage, devices told so far) after the round, checked."""
        self.now += 300
        self.rng.shuffle(self.devices)
        for device in self.devices:
            device.poll(self.service, self.now, broken)
        rollout = self.service.rollout(f"r{version}")
        devices = self.service.devices(rollout=rollout.id)
        told = sum(d.part is not None and d.part.told_at is not None for d in devices)
        assert told == rollout.told <= math.ceil(STAGES[rollout.stage] / 100 * COUNT)
        return [(rollout.stage, told)]

    def running(self, version: int) -> int:
        return sum(d.running == version for d in self.devices)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with FleetService.create(f"sqlite:///{tmp_path / 'fleet.db'}", releases) as service:
        yield World(service)


def test_a_good_release_reaches_everybody_though_a_tenth_is_silent(world: World) -> None:
    world.start(2)
    history = []
    for _ in range(10):
        history += world.round(set(), 2)
        if world.service.rollout("r2").status is not Status.RUNNING:
            break
    rollout = world.service.rollout("r2")
    assert rollout.status is Status.COMPLETED, history
    assert {(0, 25), (1, 125), (2, 500)} <= set(history)
    assert world.running(2) == COUNT
    assert rollout.tally.silent + rollout.tally.confirmed == rollout.expected == 375


def test_a_release_that_fails_its_self_test_stops_at_the_canary(world: World) -> None:
    world.start(3)
    for _ in range(4):
        world.round({3}, 3)
    rollout = world.service.rollout("r3")
    assert rollout.status is Status.ABORTED
    assert rollout.stage == 0
    assert rollout.told <= 25
    assert rollout.reason.startswith("error rate: 0 confirmed")
    assert world.running(1) == COUNT
    assert all(d.told.version == 1 for d in world.service.devices())


def test_a_release_that_crashes_later_is_rolled_back_everywhere(world: World) -> None:
    """It passes its self-test, is installed by canaries, and then brings them down."""
    world.start(4)
    world.round(set(), 4)
    canaries = [d for d in world.devices if d.running == 4]
    assert len(canaries) == 25
    for device in canaries[:3]:
        held = world.service.poll(device.token, DeviceState(4), world.now)
        device.silent = False
        report(
            world.service,
            device.token,
            serial=held.serial,
            version=4,
            outcome=Outcome.CRASH_LOOP,
            now=world.now,
        )
    assert world.service.rollout("r4").status is Status.ABORTED
    world.round(set(), 4)
    assert world.running(1) == COUNT
    assert {tuple(d.installed) for d in canaries} == {(4, 1)}

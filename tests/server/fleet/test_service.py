"""The service on real databases: SQLite and PostgreSQL."""

from __future__ import annotations

import random
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from sqlalchemy import select

from prunecast.server.fleet.audit import AuditKind, audit_text
from prunecast.server.fleet.database import Database
from prunecast.server.fleet.errors import (
    AlreadyExists,
    DatabaseError,
    DatabaseMissing,
    FleetError,
    NotFound,
    RolloutOverlap,
    TokenRefused,
    Unusable,
)
from prunecast.server.fleet.events import (
    Abort,
    AddDevice,
    AddGroup,
    MoveDevice,
    Pause,
    PinDevice,
    PinGroup,
    Poll,
    Promote,
    ReportOutcome,
    Resume,
    RevokeDevice,
    StartRollout,
    Tick,
)
from prunecast.server.fleet.machine import apply
from prunecast.server.fleet.model import (
    Failure,
    Fleet,
    Outcome,
    Release,
    RolloutPolicy,
    Status,
    Tally,
)
from prunecast.server.fleet.reports import DeviceState
from prunecast.server.fleet.service import FleetService
from prunecast.server.fleet.tables import TokenRow
from support.fleet import RELEASES, open_service, poll_all, report, tallied


def fill(service: FleetService, count: int, group: str = "lab") -> dict[str, str]:
    service.operate(AddGroup(at=0, group=group, release="digits", stable=1))
    return {
        f"{group}{i}": service.enrol(f"{group}{i}", group, now=0, actor="ada") for i in range(count)
    }


def start(version: int = 2, *groups: str, at: float = 0, **more) -> StartRollout:
    return StartRollout(
        at=at,
        actor="ada",
        rollout=f"r{version}",
        release=Release("digits", version),
        groups=groups or ("lab",),
        **more,
    )


def test_a_device_is_enrolled_polls_reports_and_is_revoked(service: FleetService) -> None:
    token = fill(service, 1)["lab0"]
    directive = service.poll(token, DeviceState(None, "0.1.0"), 5.0)
    assert (directive.release, directive.serial) == (Release("digits", 1), 1)
    answer = {"serial": 1, "version": 1, "outcome": Outcome.CONFIRMED, "now": 6.0}
    assert report(service, token, **answer)
    assert not report(service, token, **answer)
    (device,) = service.devices("lab")
    assert (device.last_seen, device.agent, device.told.outcome) == (6.0, "0.1.0", "confirmed")
    renewed = service.renew_token("lab0", now=7, actor="ada")
    for wrong in (token, "", "x" * 10_000, "\0"):
        with pytest.raises(TokenRefused, match="prunecast fleet device add"):
            service.poll(wrong, DeviceState(), 8.0)
    assert service.poll(renewed, DeviceState(1), 8.0) == directive
    service.operate(RevokeDevice(at=9, device="lab0"))
    with pytest.raises(TokenRefused):
        report(service, renewed, **answer)
    with pytest.raises(NotFound, match="enrol a new one"):
        service.renew_token("lab0", now=9, actor="ada")
    with pytest.raises(AlreadyExists, match="there is, or was, a device lab0"):
        service.enrol("lab0", "lab", now=9, actor="ada")


def test_no_token_is_stored(service: FleetService) -> None:
    token = fill(service, 1)["lab0"]
    with service._database.transaction() as session:
        (row,) = session.scalars(select(TokenRow))
        assert token not in (row.hash, row.device)
        assert len(row.hash) == 64


def test_what_a_device_says_is_bounded(service: FleetService) -> None:
    token = fill(service, 1)["lab0"]
    for wrong in ((0, ""), (-1, ""), (10**20, ""), (1, "x" * 65), (1, "a\0b")):
        with pytest.raises(Unusable):
            DeviceState(*wrong)
    directive = service.poll(token, DeviceState(10**15 - 1), 1.0)
    assert directive.downgrade
    answer = {"outcome": Outcome.CRASH_LOOP, "now": 2.0}
    assert not report(service, token, serial=2**80, version=2**80, **answer)
    assert report(service, token, serial=1, version=1, detail="\0\n" + "y" * 9999, **answer)
    (entry,) = service.audit(subject="lab0", limit=1)
    assert (entry.actor, entry.kind) == ("device:lab0", AuditKind.RELEASE_FAILED)
    assert audit_text(entry).startswith("digits 1: crash loop: yyy")


def test_a_refused_operation_leaves_no_trace(service: FleetService) -> None:
    fill(service, 3)
    service.operate(start(2))
    before = (service.rollouts(), service.devices(), service.audit())
    with pytest.raises(RolloutOverlap):
        service.operate(start(3))
    with pytest.raises(AlreadyExists):
        service.operate(start(2))
    with pytest.raises(NotFound):
        service.operate(Abort(at=1, rollout="r9"))
    with pytest.raises(NotFound):
        service.enrol("x", "attic", now=1, actor="ada")
    with pytest.raises(NotFound):
        service.operate(PinDevice(at=1, device="ghost", version=1))
    assert (service.rollouts(), service.devices(), service.audit()) == before


def test_a_database_outlives_its_process(service: FleetService, url: str) -> None:
    tokens = fill(service, 40)
    service.operate(start(2))
    told = [n for n, t in tokens.items() if service.poll(t, DeviceState(1), 1).rollout]
    with open_service(url) as other:
        assert other.rollouts() == service.rollouts()
        again = [n for n, t in tokens.items() if other.poll(t, DeviceState(1), 2).rollout]
    assert again == told
    assert len(told) == 2


def test_a_database_without_a_fleet(url: str) -> None:
    with pytest.raises(DatabaseMissing, match="prunecast fleet init"):
        open_service(url)


def test_urls_are_checked(tmp_path: Path) -> None:
    for wrong in ("fleet.db", "mysql://x/y", "sqlite+nope:///x"):
        with pytest.raises((Unusable, DatabaseMissing)):
            Database(wrong)
    for driver in ("sqlite+nope", "postgresql+nope", "mysql"):
        with pytest.raises(Unusable, match=f"{re.escape(driver)} is not supported"):
            Database.create(f"{driver}:///x", {})
    (tmp_path / "text.db").write_text("no database" * 100)
    with pytest.raises(DatabaseError, match="not a database"):
        Database(f"sqlite:///{tmp_path / 'text.db'}")
    pytest.importorskip("psycopg")
    with pytest.raises(DatabaseError) as raised:
        Database(f"postgresql://u:secret@/x?host={tmp_path}")
    assert "secret" not in str(raised.value)


def test_devices_and_entries_come_in_pages(service: FleetService) -> None:
    tokens = fill(service, 25)
    assert service.device_counts() == {"lab": 25}
    service.operate(RevokeDevice(at=1, device="lab7"))
    assert service.device_counts() == {"lab": 24}
    names, after = [], None
    while page := service.devices("lab", after=after, limit=10):
        assert len(page) <= 10
        names += [device.id for device in page]
        after = names[-1]
    assert names == sorted(tokens)
    assert service.device("lab7").revoked
    with pytest.raises(NotFound, match="no device named 'lab70'"):
        service.device("lab70")
    service.operate(start(2))
    revoked = {"lab7"}
    assert {d.id for d in service.devices(rollout="r2")} == set(tokens) - revoked
    assert [d.id for d in service.devices(rollout="r2", limit=2)] == ["lab0", "lab1"]
    entries, number = [], 0
    while log := service.audit(after=number, limit=10):
        entries += log
        number = log[-1].number
    assert entries == service.audit(limit=1000)
    assert [e.number for e in entries] == sorted({e.number for e in entries})
    assert service.audit(limit=3) == entries[-3:]
    assert service.audit(subject="r2", after=0)[0].kind is AuditKind.ROLLOUT_STARTED


def test_the_database_decides_as_the_state_alone(service: FleetService) -> None:
    """A part of the fleet is loaded for each event; decisions are those of the whole."""
    rng, whole, at, tokens = random.Random(5), Fleet(frozenset(RELEASES)), 0.0, {}
    policy = RolloutPolicy(min_reports=2, report_deadline=40, timeout=300, max_silent_rate=0.6)
    counted = {"refused": 0, "done": 0}

    def both(event) -> None:
        nonlocal whole
        decision = _attempt(apply, whole, event)
        if isinstance(decision, FleetError):
            counted["refused"] += 1
            refusal = _attempt(_play, service, event, tokens)
            assert (type(refusal), str(refusal)) == (type(decision), str(decision))
            return
        counted["done"] += 1
        made = _play(service, event, tokens)
        if isinstance(event, Poll):
            assert (made,) == decision.directives
        if isinstance(event, ReportOutcome):
            assert made == decision.accepted
        whole = decision.fleet

    for group in ("a", "b"):
        both(AddGroup(at=0, group=group, release="digits", stable=1))
    for i in range(24):
        both(AddDevice(at=0, device=f"d{i}", group="ab"[i % 2]))
    for number in range(500):
        at += rng.choice([0, 0, 1, 10])
        device, group = f"d{rng.randrange(28)}", rng.choice("ab")
        last = f"r{max((int(n[1:]) for n in whole.rollouts), default=0)}"
        held = whole.devices.get(device)
        common = {"at": at, "actor": "ada"}
        polls = [Poll(at=at, device=device, running=1)] if held and not held.revoked else []
        reports = [
            ReportOutcome(
                at=at,
                device=device,
                serial=held.told.serial - (rng.random() < 0.1),
                version=held.told.version,
                outcome=rng.choice([Outcome.CONFIRMED] * 6 + [Outcome.ROLLED_BACK]),
            )
            for _ in polls
            if held.told.version is not None
        ]
        operator = [
            AddDevice(**common, device=device, group=group),
            MoveDevice(**common, device=device, group=group),
            RevokeDevice(**common, device="d1"),
            PinDevice(**common, device=device, version=rng.choice([None, 3])),
            PinGroup(**common, group=group, version=rng.choice([None, None, None, 2])),
            start(2 + number % 4, *rng.choice([["a"], ["b"], ["a", "b"]]), at=at, policy=policy),
            Promote(**common, rollout=last),
            Pause(**common, rollout=last),
            Resume(**common, rollout=last),
        ]
        event = rng.choice(rng.choice([polls or operator, polls + reports or operator, operator]))
        if isinstance(event, StartRollout):
            event = replace(event, rollout=f"r{number}")
        both(Tick(at=at))
        both(event)
        if number % 25 == 0:
            assert {d.id: d for d in service.devices()} == dict(whole.devices)
            assert {r.id: r for r in service.rollouts()} == dict(whole.rollouts)
            groups = {g.id: g for g, _ in service.groups()}
            assert groups == dict(whole.groups)
            assert [s for _, s in service.groups()] == [
                whole.stable(whole.groups[g]) for g in sorted(whole.groups)
            ]
    assert min(counted.values()) > 50


def _attempt(call, *arguments):
    try:
        return call(*arguments)
    except FleetError as error:
        return error


def _play(service: FleetService, event, tokens: dict[str, str]):
    match event:
        case AddDevice():
            token = service.enrol(event.device, event.group, now=event.at, actor=event.actor)
            tokens[event.device] = token
            return None
        case Poll():
            state = DeviceState(event.running, event.agent)
            return service.poll(tokens[event.device], state, event.at)
        case ReportOutcome():
            return report(
                service,
                tokens[event.device],
                serial=event.serial,
                version=event.version,
                outcome=event.outcome,
                now=event.at,
            )
        case Tick():
            return service.tick(event.at)
    return service.operate(event)


def test_a_rollout_is_reopened_by_a_device_that_fails_late(service: FleetService) -> None:
    tokens = fill(service, 2)
    policy = RolloutPolicy(soak=0)
    service.operate(start(2, stages=(100.0,), policy=policy))

    def say(name: str, outcome: Outcome, now: float, detail: str = "") -> bool:
        told = service.device(name).told
        answer = {"serial": told.serial, "version": 2, "outcome": outcome, "detail": detail}
        return report(service, tokens[name], **answer, now=now)

    for name, token in tokens.items():
        service.poll(token, DeviceState(1), 1)
        assert say(name, Outcome.ACTIVATED, 2)
    assert service.rollout("r2").status is Status.RUNNING
    for name in tokens:
        assert say(name, Outcome.CONFIRMED, 62)
    assert (service.rollout("r2").status, service.rollout("r2").completed) == (
        Status.COMPLETED,
        62,
    )
    assert say("lab1", Outcome.CRASH_LOOP, 90, "it died three times")
    rollout = service.rollout("r2")
    assert (rollout.status, rollout.tally) == (Status.PAUSED, Tally(1, 1))
    failed = Failure(Outcome.CRASH_LOOP, "it died three times", 90)
    assert service.device("lab1").failures == {2: failed}
    (entry,) = service.audit(subject="r2", limit=1)
    assert (entry.kind, entry.fields["cause"]) == (AuditKind.ROLLOUT_PAUSED, "late_failures")
    service.operate(Abort(at=91, rollout="r2"))
    assert service.poll(tokens["lab0"], DeviceState(2), 92).release == Release("digits", 1)


def test_what_failed_before_is_said_to_whoever_chooses_it(service: FleetService) -> None:
    token = fill(service, 1)["lab0"]
    service.operate(PinDevice(at=1, device="lab0", version=2))
    directive = service.poll(token, DeviceState(1), 2)
    answer = {"serial": directive.serial, "version": 2, "outcome": Outcome.CRASH_LOOP}
    assert report(service, token, **answer, detail="killed", now=3)
    said = (
        "digits 2 failed before on 1 devices, which do not try it again: lab0 (crash loop: killed)",
    )
    assert service.operate(PinDevice(at=4, device="lab0", version=2)) == said
    assert service.operate(PinDevice(at=5, device="lab0", version=None)) == ()
    fill(service, 1, "field")
    assert service.operate(start(2, "field")) == said
    assert service.operate(start(3)) == ()
    service.operate(Abort(at=6, rollout="r3"))
    assert service.operate(PinGroup(at=7, group="lab", version=2)) == said
    event = AddGroup(at=8, group="attic", release="digits", stable=2)
    assert service.operate(event) == said


def test_an_abort_names_devices_on_which_the_stable_release_failed(service: FleetService) -> None:
    tokens = fill(service, 2)
    directive = service.poll(tokens["lab0"], DeviceState(None), 1)
    answer = {"serial": directive.serial, "version": 1, "outcome": Outcome.SELFTEST_FAILED}
    assert report(service, tokens["lab0"], **answer, detail="off by 9", now=2)
    service.operate(start(2, at=3, stages=(100.0,)))
    for token in tokens.values():
        assert service.poll(token, DeviceState(None), 4).release == Release("digits", 2)
    said = (
        "digits 1 failed before on 1 devices, which stay on what they run: "
        "lab0 (self-test failed: off by 9)",
    )
    assert service.operate(Abort(at=5, rollout="r2")) == said
    assert service.poll(tokens["lab0"], DeviceState(2), 6).release is None
    assert service.poll(tokens["lab1"], DeviceState(2), 6).release == Release("digits", 1)


@pytest.mark.engine
@pytest.mark.parametrize("fail", [False, True])
def test_processes_at_once_tell_nobody_too_many(
    service: FleetService, url: str, fail: bool
) -> None:
    tokens = fill(service, 60) | fill(service, 60, "field")
    policy = RolloutPolicy(min_reports=4, automatic=False)
    service.operate(start(2, "lab", "field", stages=(10.0, 100.0), policy=policy))
    shuffled = random.Random(1)
    orders = [dict(shuffled.sample(list(tokens.items()), len(tokens))) for _ in range(3)]
    with ProcessPoolExecutor(3, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(poll_all, url, order, 2, 1.0, fail) for order in orders]
        told = set().union(*(run.result(timeout=600) for run in runs))
    rollout = service.rollout("r2")
    counted = tallied(service, "r2")
    assert all(a == b for a, b in counted.values()), counted
    if fail:
        assert rollout.status is Status.PAUSED
        # one failure is too many; each process may have told one before it was known
        assert 1 <= len(told) == rollout.tally.failed <= 3
    else:
        assert len(told) == rollout.told == rollout.tally.confirmed == 12

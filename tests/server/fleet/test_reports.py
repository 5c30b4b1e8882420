"""What devices show and say: credentials, reports by id, health, and what changes in the log."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from prunecast.server.fleet.audit import AuditKind
from prunecast.server.fleet.errors import NotFound, TokenRefused, Unusable
from prunecast.server.fleet.events import AddGroup, RevokeDevice, StartRollout
from prunecast.server.fleet.model import Outcome, Release, RolloutPolicy
from prunecast.server.fleet.reports import (
    Certified,
    DeviceReport,
    DeviceState,
    DirectiveAnswer,
    Health,
    Identity,
    Receipt,
)
from prunecast.server.fleet.service import FleetService
from prunecast.server.fleet.tables import ReceiptRow
from support.fleet import open_service

FAILED = DirectiveAnswer(2, 2, Outcome.SELFTEST_FAILED, "off by\n0.5")


@pytest.fixture
def token(service: FleetService) -> str:
    """Of a device that runs 1 and was told 2 by a rollout."""
    service.operate(AddGroup(at=0, group="lab", release="digits", stable=1))
    token = service.enrol("cam", "lab", now=0, actor="ada")
    service.poll(token, DeviceState(1), 1)
    service.operate(
        StartRollout(
            at=2,
            rollout="r2",
            release=Release("digits", 2),
            groups=("lab",),
            policy=RolloutPolicy(max_error_rate=1.0),
            stages=(50, 100),
        )
    )
    assert service.poll(token, DeviceState(1), 3).serial == 2
    return token


def test_a_credential_stands_for_a_device_until_it_is_revoked(
    service: FleetService, token: str
) -> None:
    cam = Identity("cam", "digits")
    assert service.identify(token) == service.identify(Certified("cam")) == cam
    assert service.poll(Certified("cam"), DeviceState(1), 4).serial == 2
    renewed = service.renew_token("cam", now=5, actor="ada")
    assert service.identify(renewed) == cam
    service.operate(RevokeDevice(at=6, device="cam"))
    for credential in (token, renewed, "", Certified("cam"), Certified("other"), Certified("")):
        with pytest.raises(TokenRefused):
            service.identify(credential)
        with pytest.raises(TokenRefused):
            service.poll(credential, None, 7)
        with pytest.raises(TokenRefused):
            service.receive(credential, DeviceReport(), 7)


def test_a_report_counts_once_however_often_it_comes(service: FleetService, token: str) -> None:
    report = DeviceReport("a" * 32, DeviceState(1, "0.1.0"), FAILED, Health("disk full"))
    assert service.receive(token, report, 4) == Receipt(counted=True, replayed=False)
    with open_service(service._database._engine.url.render_as_string(False)) as other:
        assert other.receive(token, report, 5) == Receipt(counted=False, replayed=True)
    again = DeviceReport("b" * 32, DeviceState(1), FAILED)
    assert service.receive(token, again, 6) == Receipt(counted=False, replayed=False)
    assert [e.kind for e in service.audit()].count(AuditKind.RELEASE_FAILED) == 1
    # a replay changes nothing, whatever else it claims
    changed = DeviceReport("a" * 32, DeviceState(7), None, Health("all is well"))
    assert service.receive(token, changed, 7).replayed
    assert service.devices()[0].running == 1
    health = service.health("cam")
    assert health == (Health("disk full"), 4)


def test_ids_are_per_device_and_the_last_ones_are_kept(service: FleetService, token: str) -> None:
    other = service.enrol("cam2", "lab", now=4, actor="ada")
    first = DeviceReport("first000")
    assert not service.receive(token, first, 5).replayed
    assert not service.receive(other, first, 5).replayed
    with service._database.transaction() as session:
        rows = [ReceiptRow(device="cam", report=f"id{n:06}", at=6.0) for n in range(255)]
        session.add_all(rows)
    assert service.receive(token, first, 7).replayed
    service.receive(token, DeviceReport("onemore0"), 8)
    assert not service.receive(token, first, 9).replayed
    with service._database.transaction() as session:
        mine = select(func.count()).where(ReceiptRow.device == "cam")
        assert session.scalar(mine) == 256


def test_health_is_the_last_one_and_bounded(service: FleetService, token: str) -> None:
    assert service.health("cam") is None
    figures = {"latency_ms": 1.5, "bad": float("nan")}
    report = DeviceReport("health01", None, None, Health("x\0" * 400, figures, made=3.0))
    service.receive(token, report, 4)
    held, at = service.health("cam") or (Health(), 0.0)
    assert (held.figures, held.made, at) == ({"latency_ms": 1.5}, 3.0, 4)
    assert len(held.error) == 500
    assert held.error.isprintable()
    with pytest.raises(NotFound):
        service.health("nobody")
    for wrong in ({"": 1.0}, {"a b": 1.0}, {f"f{i}": 1.0 for i in range(65)}):
        with pytest.raises(Unusable):
            Health(figures=wrong)
    for wrong_id in ("", "short", "x" * 65, "a/b/c/d/e/f"):
        with pytest.raises(Unusable):
            DeviceReport(wrong_id)


def test_a_state_in_a_report_is_what_the_device_runs(service: FleetService, token: str) -> None:
    answer = DirectiveAnswer(2, 2, Outcome.CONFIRMED)
    assert service.receive(token, DeviceReport("up000001", DeviceState(2, "1"), answer), 4).counted
    assert service.devices()[0].running == 2
    assert not service.poll(token, None, 5).downgrade
    assert service.devices()[0].running == 2  # a poll that says nothing forgets nothing


def test_what_has_changed_is_found_in_the_log(service: FleetService, token: str) -> None:
    (newest,) = service.audit(limit=1)
    assert newest.number > 0
    assert service.audit(after=newest.number) == []
    service.renew_token("cam", now=4, actor="ada")
    (entry,) = service.audit(after=newest.number)
    assert entry.number > newest.number
    assert (entry.kind, entry.subject) == (AuditKind.TOKEN_RENEWED, "cam")

"""Operators by token: whom the audit log names, and who may change the fleet."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from prunecast.server.fleet.audit import AuditKind
from prunecast.server.fleet.errors import AlreadyExists, NotFound, TokenRefused, Unusable
from prunecast.server.fleet.events import AddGroup, PinDevice
from prunecast.server.fleet.service import FleetService
from support.fleet import releases


def test_with_operators_every_change_needs_a_token_and_the_log_names_its_owner(
    url: str, service: FleetService
) -> None:
    service.operate(AddGroup(at=0, actor="user:bob", group="lab", release="digits", stable=1))
    token = service.operators.add("ada", now=1, actor="user:bob")
    changes: list[Callable[[FleetService], object]] = [
        lambda s: s.enrol("cam", "lab", now=2, actor="operator:ada"),
        lambda s: s.operate(PinDevice(at=3, actor="operator:ada", device="cam", version=1)),
        lambda s: s.renew_token("cam", now=4, actor="operator:ada"),
        lambda s: s.operators.add("eve", now=5, actor="operator:ada"),
        lambda s: s.operators.remove("ada", now=6, actor="operator:ada"),
    ]
    with FleetService(url, releases, operator="A" * 43) as forged:
        for change in changes:
            with pytest.raises(TokenRefused, match="this fleet has operators"):
                change(service)
            with pytest.raises(TokenRefused, match="the operator's token is unknown"):
                change(forged)
    with FleetService(url, releases, operator=token) as ada:
        for change in changes[:-1]:
            change(ada)
        entries = ada.audit(after=0)
    assert [(e.kind, e.actor) for e in entries] == [
        (AuditKind.GROUP_ADDED, "user:bob"),
        (AuditKind.OPERATOR_ADDED, "user:bob"),
        (AuditKind.DEVICE_ADDED, "operator:ada"),
        (AuditKind.DEVICE_PINNED, "operator:ada"),
        (AuditKind.TOKEN_RENEWED, "operator:ada"),
        (AuditKind.OPERATOR_ADDED, "operator:ada"),
    ]
    assert token not in repr(service.settings())


def test_operators_come_and_go(url: str, service: FleetService) -> None:
    token = service.operators.add("ada", now=0, actor="user:bob")
    with FleetService(url, releases, operator=token) as ada:
        with pytest.raises(AlreadyExists, match="remove it first"):
            ada.operators.add("ada", now=0, actor="")
        with pytest.raises(Unusable, match="operator name"):
            ada.operators.add("a\nb", now=0, actor="")
        with pytest.raises(NotFound, match="operator list"):
            ada.operators.remove("eve", now=0, actor="")
        assert ada.operators.names() == ["ada"]
        ada.operators.remove("ada", now=0, actor="")
        assert ada.operators.names() == []
        assert ada.operators.acting("user:bob") == "user:bob"

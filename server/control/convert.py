"""Messages of the protocol to values of the fleet and back."""

from __future__ import annotations

from typing import Any

from prunecast.common.fleet_protocol import messages
from prunecast.server.fleet import (
    Answer,
    DeviceReport,
    DeviceState,
    Directive,
    Health,
    Outcome,
    Unusable,
)

__all__ = ["device_report", "device_state", "directive_event"]

_OUTCOMES = {
    messages.OUTCOME_SUCCEEDED: Outcome.SUCCEEDED,
    messages.OUTCOME_SELFTEST_FAILED: Outcome.SELFTEST_FAILED,
    messages.OUTCOME_ROLLED_BACK: Outcome.ROLLED_BACK,
    messages.OUTCOME_CRASH_LOOP: Outcome.CRASH_LOOP,
}


def device_state(request: messages.WatchRequest | messages.ReportRequest) -> DeviceState:
    """What a device says that it runs.

    Raises:
        Unusable: out of bounds.
    """
    running = request.running if request.HasField("running") else None
    return DeviceState(running, request.agent)


def device_report(request: messages.ReportRequest) -> DeviceReport:
    """A report.

    Raises:
        Unusable: no identifier, an unknown outcome, or out of bounds.
    """
    answer = None
    if request.HasField("answer"):
        given = request.answer
        if given.outcome not in _OUTCOMES:
            raise Unusable(f"outcome {given.outcome} is unknown: update the fleet's server")
        outcome = _OUTCOMES[given.outcome]
        answer = Answer(given.serial, given.version, outcome, given.detail)
    health = Health(request.error, dict(request.figures), request.made)
    return DeviceReport(request.id, device_state(request), answer, health)


def directive_event(directive: Directive) -> Any:
    """A directive as an event of a watch."""
    made = messages.Directive(
        serial=directive.serial, downgrade=directive.downgrade, rollout=directive.rollout or ""
    )
    if directive.release is not None:
        made.release, made.version = directive.release.name, directive.release.version
    return messages.WatchEvent(directive=made)

"""When a rollout goes on, pauses, or ends: rates, deadlines and timeouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from prunecast.server.fleet.audit import AuditKind, Cause, reason_text
from prunecast.server.fleet.model import Progress, Rollout, Status
from prunecast.server.fleet.step import Step

__all__ = ["advance", "evaluate", "expire", "wait_again"]


def expire(step: Step) -> None:
    """Count devices as silent that were told and did not report within the deadline.

    Looks at the devices in the state; a caller that loads part of a fleet loads all overdue ones.
    """
    for device in list(step.fleet.devices.values()):
        found = step.active_part(device)
        if found is None:
            continue
        rollout, part = found
        if part.progress is Progress.TOLD and part.told_at is not None:
            overdue = step.at - part.told_at >= rollout.policy.report_deadline
            if overdue:
                step.settle(device, Progress.SILENT)
                step.log(AuditKind.DEVICE_SILENT, device.id, actor="fleet", rollout=rollout.id)


def evaluate(step: Step) -> None:
    """Decide every running rollout in the state by its tally and the time."""
    for name in list(step.fleet.rollouts):
        _evaluate(step, step.fleet.rollouts[name])


def wait_again(step: Step, rollout: Rollout) -> Rollout:
    """Give silent devices a new deadline, so that a resumed stage does not go on without them.

    Looks at the devices in the state; a caller that loads part of a fleet loads all silent ones.
    """
    for device in list(step.fleet.devices.values()):
        found = step.active_part(device)
        if found and found[0].id == rollout.id and found[1].progress is Progress.SILENT:
            part = replace(found[1], progress=Progress.TOLD, told_at=step.at)
            step.put(replace(device, part=part))
            rollout = replace(rollout, settled=rollout.settled - 1)
    return rollout


def advance(step: Step, rollout: Rollout, reason: Mapping[str, Any], *, actor: str = "") -> None:
    """The next stage, or the end of the last one.

    Args:
        step: the working copy.
        rollout: which.
        reason: see `reason_text`.
        actor: who did it; empty: the event's actor.
    """
    if rollout.stage + 1 == len(rollout.stages):
        step.end(rollout, Status.COMPLETED, reason_text(reason))
        step.log(AuditKind.ROLLOUT_COMPLETED, rollout.id, actor=actor, **reason)
    else:
        step.begin_window(rollout, stage=rollout.stage + 1)
        percent = rollout.stages[rollout.stage + 1]
        step.log(AuditKind.ROLLOUT_PROMOTED, rollout.id, actor=actor, percent=percent, **reason)


def _evaluate(step: Step, rollout: Rollout) -> None:
    if rollout.status is not Status.RUNNING:
        return
    policy, tally = rollout.policy, rollout.tally
    # a stage that expects fewer devices than min_reports is decided by all of them
    least = max(0, min(policy.min_reports, rollout.expected))
    figures = {**asdict(tally), "expected": rollout.expected}
    if tally.failed > policy.max_error_rate * max(tally.reports, least):
        status = Status.ABORTED if policy.roll_back_on_error else Status.PAUSED
        _stop(step, rollout, status, {"cause": Cause.ERROR_RATE, **figures})
        return
    if tally.silent > policy.max_silent_rate * max(tally.settled, least):
        _stop(step, rollout, Status.PAUSED, {"cause": Cause.SILENCE, **figures})
        return
    elapsed = max(0.0, step.at - rollout.since)  # the clocks of two servers may differ
    complete = tally.settled >= rollout.expected and elapsed >= policy.soak
    if not complete and elapsed < policy.timeout:
        return
    if tally.reports < least:
        reason = {"cause": Cause.TOO_FEW_REPORTS, "needed": least, **figures}
        _stop(step, rollout, Status.PAUSED, reason)
    elif policy.automatic:
        advance(step, rollout, {"cause": Cause.SETTLED, **figures}, actor="fleet")


def _stop(step: Step, rollout: Rollout, status: Status, reason: Mapping[str, Any]) -> None:
    step.end(rollout, status, reason_text(reason))
    kind = AuditKind.ROLLOUT_PAUSED if status is Status.PAUSED else AuditKind.ROLLOUT_ABORTED
    step.log(kind, rollout.id, actor="fleet", **reason)

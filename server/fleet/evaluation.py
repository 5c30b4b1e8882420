"""When a rollout goes on, pauses or ends: rates, deadlines, timeouts and late failures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from prunecast.server.fleet.audit import AuditKind, Cause, no_way_back_text, reason_text
from prunecast.server.fleet.events import ReportOutcome
from prunecast.server.fleet.model import SOAK_SECONDS, Fleet, Progress, Rollout, Status
from prunecast.server.fleet.step import Step
from prunecast.server.fleet.uses import way_back

__all__ = [
    "abort",
    "advance",
    "count_late_failures",
    "evaluate",
    "expire",
    "no_way_back",
    "wait_again",
]


def expire(step: Step) -> None:
    """Count devices as silent that were told and gave no final answer within the deadline.

    One that said that it is active gets the time to confirm in addition.

    Looks at the devices in the state; a caller that loads part of a fleet loads all overdue ones.
    """
    for device in list(step.fleet.devices.values()):
        found = step.active_part(device)
        if found is None:
            continue
        rollout, part = found
        if part.told_at is not None and not part.progress.settled:
            confirms = part.progress is Progress.ACTIVATED
            wait = rollout.policy.report_deadline + (SOAK_SECONDS if confirms else 0.0)
            if step.at - part.told_at >= wait:
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
    windows = tuple(replace(window, silent=0) for window in rollout.windows)
    return replace(rollout, windows=windows, tally=replace(rollout.tally, silent=0))


def advance(step: Step, rollout: Rollout, reason: Mapping[str, Any], *, actor: str = "") -> None:
    """The next stage, or the end of the last one.

    Args:
        step: the working copy.
        rollout: which.
        reason: see `reason_text`.
        actor: who did it; empty: the event's actor, an operator who accepts what has failed.
    """
    accept = not actor
    if rollout.stage + 1 == len(rollout.stages):
        if accept:
            rollout = step.begin_window(rollout, stage=rollout.stage, accept=True)
        step.end(rollout, Status.COMPLETED, reason_text(reason))
        step.log(AuditKind.ROLLOUT_COMPLETED, rollout.id, actor=actor, **reason)
    else:
        step.begin_window(rollout, stage=rollout.stage + 1, accept=accept)
        percent = rollout.stages[rollout.stage + 1]
        step.log(AuditKind.ROLLOUT_PROMOTED, rollout.id, actor=actor, percent=percent, **reason)


def abort(step: Step, rollout: Rollout, reason: Mapping[str, Any], *, actor: str = "") -> None:
    """End a rollout: whoever was told its release is told the stable one again.

    Where there is none to go back to, the reason, the audit log and a warning say so.

    Args:
        step: the working copy, with all groups of the rollout.
        rollout: which.
        reason: see `reason_text`.
        actor: who did it; empty: the event's actor.
    """
    name, lost = rollout.release.name, no_way_back(step.fleet, rollout)
    if lost:
        reason = {**reason, "release": name, "no_way_back": lost}
        where = "; ".join(no_way_back_text(name, group, was) for group, was in lost.items())
        step.warnings.append(
            f"nothing is rolled back there, devices keep what they run: {where}. Publish the model "
            f"that they shall run as a new version of {name}, and roll that out"
        )
    step.end(rollout, Status.ABORTED, reason_text(reason))
    step.log(AuditKind.ROLLOUT_ABORTED, rollout.id, actor=actor, **reason)


def no_way_back(fleet: Fleet, rollout: Rollout) -> dict[str, int | None]:
    """Groups whose devices cannot go back from a rollout, with their stable version.

    None where nobody was told.
    """
    if not rollout.told:
        return {}
    found = {name: way_back(fleet, fleet.group(name)) for name in rollout.groups}
    return {name: stable for name, (stable, there) in found.items() if not there}


def _evaluate(step: Step, rollout: Rollout) -> None:
    if rollout.status is not Status.RUNNING:
        return
    if rollout.release not in step.fleet.releases:
        named = {"release": rollout.release.name, "version": rollout.release.version}
        _stop(step, rollout, Status.PAUSED, {"cause": Cause.RETIRED, **named})
        return
    if count_late_failures(step, rollout):
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


def count_late_failures(step: Step, rollout: Rollout) -> bool:
    """Stop a rollout for what failed after it had been counted as confirmed; whether it was.

    Looks at the windows before the present one, and at all of them in a rollout that is completed:
    that is reopened, at its last stage, paused or (by its policy) aborted.
    """
    done = rollout.status is Status.COMPLETED
    for window in (*rollout.windows, rollout.tally) if done else rollout.windows:
        if window.failed > rollout.policy.max_error_rate * window.reports:
            device = step.event.device if isinstance(step.event, ReportOutcome) else "–"
            named = {"device": device, "completed": done, "expected": window.settled}
            status = Status.ABORTED if rollout.policy.roll_back_on_error else Status.PAUSED
            _stop(step, rollout, status, {"cause": Cause.LATE_FAILURES, **asdict(window), **named})
            return True
    return False


def _stop(step: Step, rollout: Rollout, status: Status, reason: Mapping[str, Any]) -> None:
    if status is Status.ABORTED:
        abort(step, rollout, reason, actor="fleet")
        return
    step.end(rollout, status, reason_text(reason))
    step.log(AuditKind.ROLLOUT_PAUSED, rollout.id, actor="fleet", **reason)

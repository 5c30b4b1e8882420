"""When a rollout goes on, pauses, or ends: rates, deadlines and timeouts."""

from __future__ import annotations

from dataclasses import replace

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
                step.log("device silent", device.id, f"rollout {rollout.id}", actor="fleet")


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


def advance(step: Step, rollout: Rollout, why: str, *, actor: str = "") -> None:
    """The next stage, or the end of the last one."""
    if rollout.stage + 1 == len(rollout.stages):
        step.end(rollout, Status.COMPLETED, why)
        step.log("rollout completed", rollout.id, why, actor=actor)
    else:
        step.begin_window(rollout, stage=rollout.stage + 1)
        percent = rollout.stages[rollout.stage + 1]
        step.log("rollout promoted", rollout.id, f"to {percent:g} %: {why}", actor=actor)


def _evaluate(step: Step, rollout: Rollout) -> None:
    if rollout.status is not Status.RUNNING:
        return
    policy, tally = rollout.policy, rollout.tally
    # a stage that expects fewer devices than min_reports is decided by all of them
    least = max(0, min(policy.min_reports, rollout.expected))
    figures = (
        f"{tally.succeeded} succeeded, {tally.failed} failed, {tally.silent} silent "
        f"of {rollout.expected}"
    )
    if tally.failed > policy.max_error_rate * max(tally.reports, least):
        if policy.roll_back_on_error:
            _stop(step, rollout, Status.ABORTED, f"error rate: {figures}")
        else:
            _stop(step, rollout, Status.PAUSED, f"error rate: {figures}")
        return
    if tally.silent > policy.max_silent_rate * max(tally.settled, least):
        _stop(step, rollout, Status.PAUSED, f"silence: {figures}")
        return
    elapsed = max(0.0, step.at - rollout.since)  # the clocks of two servers may differ
    complete = tally.settled >= rollout.expected and elapsed >= policy.soak
    if not complete and elapsed < policy.timeout:
        return
    if tally.reports < least:
        _stop(step, rollout, Status.PAUSED, f"too few reports, {least} are needed: {figures}")
    elif policy.automatic:
        advance(step, rollout, figures, actor="fleet")


def _stop(step: Step, rollout: Rollout, status: Status, reason: str) -> None:
    step.end(rollout, status, reason)
    step.log(f"rollout {status}", rollout.id, reason, actor="fleet")

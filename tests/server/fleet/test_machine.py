"""The state machine, case by case."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from prunecast.client.edge import AgentConfig
from prunecast.common.fleet_protocol import CONFIRM_SECONDS
from prunecast.server.fleet.audit import audit_text
from prunecast.server.fleet.errors import (
    AlreadyExists,
    NotFound,
    NotPossible,
    ReleaseUnknown,
    RolloutOverlap,
    Unusable,
)
from prunecast.server.fleet.events import (
    Abort,
    AddDevice,
    AddGroup,
    AnyEvent,
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
    SOAK_SECONDS,
    Fleet,
    Outcome,
    Progress,
    Release,
    RolloutPolicy,
    Status,
    Tally,
)
from prunecast.server.fleet.step import Decision

RELEASES = frozenset(Release(name, v) for name in ("digits", "faces") for v in range(1, 6))
POLICY = RolloutPolicy(
    max_error_rate=0.2,
    max_silent_rate=0.5,
    min_reports=2,
    report_deadline=100,
    soak=0,
    timeout=1000,
)


class Play:
    """A fleet, and what happened to it."""

    def __init__(self, devices: int = 20, policy: RolloutPolicy = POLICY) -> None:
        self.fleet, self.policy, self.at = Fleet(RELEASES), policy, 0.0
        self.log: list[str] = []
        self.do(AddGroup(at=0, group="lab", release="digits", stable=1))
        for i in range(devices):
            self.do(AddDevice(at=0, device=f"d{i}", group="lab"))

    def do(self, event: AnyEvent) -> Decision:
        decision = apply(self.fleet, event)
        self.fleet = decision.fleet
        self.log += [f"{a.kind.words} {a.subject}: {audit_text(a)}" for a in decision.audit]
        return decision

    def start(self, version: int = 2, stages=(10.0, 50.0, 100.0), **policy) -> None:
        self.do(
            StartRollout(
                at=self.at,
                rollout=f"r{version}",
                release=Release("digits", version),
                groups=("lab",),
                stages=stages,
                policy=replace(self.policy, **policy),
            )
        )

    def poll(self, device: str, running: int | None = 1):
        (directive,) = self.do(Poll(at=self.at, device=device, running=running)).directives
        return directive

    def report(self, device: str, outcome: Outcome = Outcome.CONFIRMED) -> bool:
        told = self.fleet.devices[device].told
        assert told.version is not None
        event = ReportOutcome(
            at=self.at,
            device=device,
            serial=told.serial,
            version=told.version,
            outcome=outcome,
        )
        return self.do(event).accepted

    def tick(self, at: float) -> None:
        self.at = at
        self.do(Tick(at=at))

    def told(self, version: int = 2) -> list[str]:
        """Poll everybody; who shall run the version."""
        release = Release("digits", version)
        names = [n for n, d in self.fleet.devices.items() if not d.revoked]
        return [n for n in names if self.poll(n).release == release]

    @property
    def rollout(self):
        return self.fleet.rollouts["r2"]


def test_stages_reach_their_share_and_the_release_becomes_stable() -> None:
    play = Play()
    play.start()
    reached = []
    for _ in range(3):
        told = play.told()
        reached.append(len(told))
        for name in told:
            if play.fleet.devices[name].told.outcome is None:
                play.report(name)
    assert reached == [2, 10, 20]
    assert play.rollout.status is Status.COMPLETED
    assert play.fleet.stable(play.fleet.group("lab")) == 2
    serials = [d.told.serial for d in play.fleet.devices.values()]
    assert max(serials) == 2  # stable 1, then 2; completion tells nobody anything new
    assert play.told() == list(play.fleet.devices)


def test_errors_pause_and_nobody_new_is_told() -> None:
    play = Play()
    play.start()
    canaries = play.told()
    play.report(canaries[0], Outcome.SELFTEST_FAILED)
    assert play.rollout.status is Status.PAUSED
    assert play.rollout.reason == "error rate: 0 confirmed, 1 failed, 0 silent of 2"
    play.report(canaries[1])
    assert play.told() == [canaries[1]]
    assert play.poll(canaries[0], running=1).release == Release("digits", 1)
    assert any(line.startswith("rollout paused r2: error rate") for line in play.log)


def test_errors_can_roll_back_by_themselves() -> None:
    play = Play()
    play.start(roll_back_on_error=True)
    canaries = play.told()
    play.report(canaries[0])
    play.report(canaries[1], Outcome.CRASH_LOOP)
    assert play.rollout.status is Status.ABORTED
    directive = play.poll(canaries[0], running=2)
    assert (directive.release, directive.downgrade) == (Release("digits", 1), True)
    assert play.told() == []


def test_a_late_failure_of_a_canary_counts_in_the_stage_under_way() -> None:
    play = Play()
    play.start(max_error_rate=0.0)
    canaries = play.told()
    for name in canaries:
        play.report(name)
    assert play.rollout.stage == 1
    assert play.report(canaries[0], Outcome.ROLLED_BACK)
    assert play.rollout.status is Status.PAUSED


def test_what_is_activated_is_provisional_until_it_is_confirmed() -> None:
    play = Play()
    play.start(max_error_rate=0.0)
    first, second = play.told()
    assert play.report(first, Outcome.ACTIVATED)
    assert not play.report(first, Outcome.ACTIVATED)
    assert play.report(second)
    assert (play.rollout.stage, play.rollout.tally) == (0, Tally(confirmed=1))
    assert play.fleet.devices[first].part.progress is Progress.ACTIVATED
    assert play.report(first)
    assert play.rollout.stage == 1
    assert not play.report(first, Outcome.ACTIVATED)
    assert play.fleet.devices[first].told.outcome is Outcome.CONFIRMED


def test_a_crash_loop_stops_a_stage_that_does_not_soak() -> None:
    play = Play()
    play.start(soak=0)
    canaries = play.told()
    for name in canaries:
        play.report(name, Outcome.ACTIVATED)
    assert (play.rollout.status, play.rollout.stage) == (Status.RUNNING, 0)
    play.report(canaries[0], Outcome.CRASH_LOOP)
    assert (play.rollout.status, play.rollout.stage) == (Status.PAUSED, 0)
    assert play.rollout.reason == "error rate: 0 confirmed, 1 failed, 0 silent of 2"
    assert play.fleet.devices[canaries[0]].failures[2].outcome is Outcome.CRASH_LOOP


def test_a_stage_lasts_by_default_until_a_crash_loop_can_show() -> None:
    assert RolloutPolicy().soak == SOAK_SECONDS > CONFIRM_SECONDS
    assert AgentConfig.confirm_after == CONFIRM_SECONDS


def test_a_device_that_is_activated_and_then_says_nothing_is_silent() -> None:
    play = Play()
    play.start()
    for name in play.told():
        play.report(name, Outcome.ACTIVATED)
    play.tick(100 + SOAK_SECONDS - 1)  # the deadline, and time to confirm
    assert play.rollout.tally.silent == 0
    play.tick(100 + SOAK_SECONDS)
    assert play.rollout.tally.silent == 2
    assert play.rollout.status is Status.PAUSED


def test_a_late_failure_reopens_the_count_of_its_own_stage() -> None:
    play = Play(devices=40)
    play.start(stages=(10.0, 100.0), max_error_rate=0.3)
    canaries = play.told()
    assert len(canaries) == 4
    for name in canaries:
        play.report(name)
    rest = [name for name in play.told() if name not in canaries]
    for name in rest[:30]:
        play.report(name)
    play.report(canaries[0], Outcome.CRASH_LOOP)
    assert (play.rollout.status, play.rollout.windows) == (Status.RUNNING, (Tally(3, 1),))
    assert play.rollout.tally == Tally(30)
    play.report(canaries[1], Outcome.CRASH_LOOP)  # 2 of 4, although they are 2 of 34 told
    assert play.rollout.status is Status.PAUSED
    assert play.rollout.reason == (
        "failures in an earlier stage: 2 confirmed, 2 failed, 0 silent of 4, the last one on "
        + canaries[1]
    )
    play.do(Resume(at=0, rollout="r2"))
    assert play.rollout.status is Status.RUNNING  # the operator accepts them
    play.report(canaries[2], Outcome.CRASH_LOOP)
    assert play.rollout.status is Status.PAUSED  # but no further one


def completed(**policy: Any) -> tuple[Play, list[str]]:
    play = Play(devices=4)
    play.start(stages=(100.0,), max_error_rate=0.3, **policy)
    told = play.told()
    for name in told:
        play.report(name)
    assert (play.rollout.status, play.rollout.completed) == (Status.COMPLETED, 0)
    assert play.told() == told  # as the stable release
    return play, told


def test_late_failures_reopen_a_rollout_that_is_completed() -> None:
    play, (first, second, third, fourth) = completed()
    serial = play.fleet.devices[third].told.serial
    play.at = 5000.0
    play.report(first, Outcome.CRASH_LOOP)
    assert (play.rollout.status, play.rollout.tally) == (Status.COMPLETED, Tally(3, 1))
    assert play.poll(first).release is None  # it has gone back by itself, and keeps that
    play.report(second, Outcome.ROLLED_BACK)
    assert play.rollout.status is Status.PAUSED
    assert play.rollout.reason == (
        "failures after it had completed: 2 confirmed, 2 failed, 0 silent of 4, the last one on "
        + second
    )
    # those on which it works keep it and are told nothing new; whoever comes now waits
    assert sorted(play.told()) == sorted([third, fourth])
    assert play.fleet.devices[third].told.serial == serial
    play.do(AddDevice(at=play.at, device="new", group="lab"))
    assert play.poll("new").release == Release("digits", 1)
    assert play.poll(first).release == Release("digits", 1)
    with pytest.raises(RolloutOverlap, match="fleet abort r2"):
        play.start(3)
    play.do(Abort(at=play.at, rollout="r2"))
    assert len(play.told(1)) == 5
    assert play.poll(third, running=2).downgrade


def test_a_reopened_rollout_waits_for_no_group_that_has_another_one_since() -> None:
    play = Play(devices=4)
    play.do(AddGroup(at=0, group="field", release="digits", stable=1))
    for i in range(4):
        play.do(AddDevice(at=0, device=f"f{i}", group="field"))
    wide = StartRollout(
        at=0, rollout="wide", release=Release("digits", 2), groups=("field", "lab"),
        stages=(100.0,), policy=replace(POLICY, automatic=False),
    )  # fmt: skip
    play.do(wide)
    play.told()
    play.report("d0")
    play.do(Promote(at=0, rollout="wide"))
    assert play.fleet.rollouts["wide"].status is Status.COMPLETED
    play.do(replace(wide, rollout="next", release=Release("digits", 3), groups=("lab",)))
    for i in range(4):
        play.report(f"f{i}", Outcome.CRASH_LOOP)
    reopened = play.fleet.rollouts["wide"]
    assert (reopened.status, reopened.tally) == (Status.PAUSED, Tally(0, 4))
    # the four of the field, and the one that had confirmed before its group went on
    assert (reopened.cohorts, reopened.settled) == ((5,), 5)
    assert play.fleet.rollouts["next"].status is Status.RUNNING


def test_an_operator_may_accept_what_failed_late() -> None:
    play, (first, second, *_) = completed()
    for name in (first, second):
        play.report(name, Outcome.CRASH_LOOP)
    play.do(Promote(at=10, rollout="r2"))
    assert (play.rollout.status, play.rollout.completed) == (Status.COMPLETED, 10)
    assert play.fleet.stable(play.fleet.group("lab")) == 2


def test_late_failures_roll_back_by_themselves_where_the_policy_says_so() -> None:
    play, (first, second, third, _) = completed(roll_back_on_error=True)
    for name in (first, second):
        play.report(name, Outcome.CRASH_LOOP)
    assert play.rollout.status is Status.ABORTED
    assert play.poll(third, running=2).release == Release("digits", 1)


def test_a_device_that_was_away_until_completion_counts_late() -> None:
    play = Play(devices=4)
    play.start(stages=(100.0,), max_error_rate=0.3, min_reports=1)
    names = list(play.fleet.devices)
    for name in names[:2]:
        play.poll(name)
        play.report(name)
    play.tick(1000)
    assert play.rollout.status is Status.COMPLETED
    for name in names[2:]:
        assert play.poll(name).release == Release("digits", 2)
        play.report(name, Outcome.ACTIVATED)
    play.report(names[2], Outcome.CRASH_LOOP)
    assert play.rollout.status is Status.PAUSED
    assert play.rollout.tally == Tally(2, 1)
    assert play.poll(names[3]).release == Release("digits", 2)  # it keeps what it was told


def test_an_abort_without_a_way_back_says_so() -> None:
    play = Play()
    play.start(roll_back_on_error=True)
    play.fleet = replace(play.fleet, releases=play.fleet.releases - {Release("digits", 1)})
    canary = play.told()[0]
    play.report(canary, Outcome.CRASH_LOOP)
    lost = "group lab cannot go back: digits 1, its stable release, is retired"
    assert play.rollout.status is Status.ABORTED
    assert play.rollout.reason.endswith(lost)
    assert play.log[-1].endswith(lost)
    # without anybody told there is nothing to go back from
    play.start(3)
    assert play.do(Abort(at=1, rollout="r3")).warnings == ()


def test_a_rollout_whose_release_is_retired_pauses() -> None:
    play = Play()
    play.start()
    play.told()
    play.fleet = replace(play.fleet, releases=play.fleet.releases - {Release("digits", 2)})
    play.tick(1)
    assert play.rollout.status is Status.PAUSED
    assert play.rollout.reason == "digits 2 is retired, so it is told to nobody"
    for event in (Promote(at=2, rollout="r2"), Resume(at=2, rollout="r2")):
        with pytest.raises(ReleaseUnknown, match="no live release digits 2"):
            play.do(event)


def test_silence_pauses_and_late_reports_correct_the_count() -> None:
    play = Play()
    play.start()
    canaries = play.told()
    play.tick(99)
    assert play.rollout.tally.silent == 0
    play.tick(100)
    assert play.rollout.status is Status.PAUSED
    assert play.rollout.reason.startswith("silence: 0 confirmed, 0 failed, 2 silent")
    assert play.report(canaries[0])
    assert (play.rollout.tally.silent, play.rollout.tally.confirmed) == (1, 1)


def test_some_silence_does_not_hang() -> None:
    play = Play()
    play.start(stages=(50.0, 100.0))
    told = play.told()
    for name in told[:8]:
        play.report(name)
    assert play.rollout.stage == 0
    play.tick(100)
    assert play.rollout.stage == 1
    assert len(play.told()) == 20


def test_devices_that_are_offline_do_not_hang() -> None:
    play = Play()
    play.start(stages=(50.0, 100.0))
    canaries = [n for n, d in play.fleet.devices.items() if d.part and d.part.stage == 0]
    for name in canaries[:2]:
        play.poll(name)
        play.report(name)
    play.tick(999)
    assert play.rollout.stage == 0
    play.tick(1000)
    assert play.rollout.stage == 1
    play.tick(2000)
    assert play.rollout.status is Status.PAUSED
    assert play.rollout.reason.startswith("too few reports, 2 are needed: 0 confirmed")


def test_a_manual_rollout_waits_for_the_operator() -> None:
    play = Play()
    play.start(automatic=False)
    for name in play.told():
        play.report(name)
    play.tick(5000)
    assert (play.rollout.stage, play.rollout.status) == (0, Status.RUNNING)
    play.do(Promote(at=play.at, rollout="r2", actor="ada"))
    assert play.rollout.stage == 1
    assert len(play.told()) == 10


def test_a_stage_soaks() -> None:
    play = Play()
    play.start(soak=500)
    for name in play.told():
        play.report(name)
    play.tick(499)
    assert play.rollout.stage == 0
    play.tick(500)
    assert play.rollout.stage == 1


def test_pause_resume_promote_abort() -> None:
    play = Play()
    play.start()
    first = play.told()
    play.do(Pause(at=1, rollout="r2", reason="lunch"))
    assert play.told() == first
    with pytest.raises(NotPossible, match="paused already: lunch"):
        play.do(Pause(at=1, rollout="r2"))
    play.do(Promote(at=2, rollout="r2"))
    assert (play.rollout.status, play.rollout.stage) == (Status.RUNNING, 1)
    with pytest.raises(NotPossible, match="running already"):
        play.do(Resume(at=2, rollout="r2"))
    assert len(play.told()) == 10
    play.do(Abort(at=3, rollout="r2"))
    assert play.told() == []
    assert len(play.told(1)) == 20
    for event in (Promote(at=4, rollout="r2"), Resume(at=4, rollout="r2")):
        with pytest.raises(NotPossible, match="aborted, which is final"):
            play.do(event)


def test_resuming_accepts_the_failures_so_far() -> None:
    play = Play(devices=40)
    play.start()
    canaries = play.told()
    play.report(canaries[0], Outcome.SELFTEST_FAILED)
    assert play.rollout.status is Status.PAUSED
    play.do(Resume(at=1, rollout="r2"))
    for name in canaries[1:]:
        play.report(name)
    assert play.rollout.stage == 1


def test_resuming_waits_again_for_the_silent() -> None:
    play = Play()
    play.start()
    first, second = play.told()
    play.tick(100)
    assert play.rollout.status is Status.PAUSED
    play.do(Resume(at=100, rollout="r2"))
    play.tick(150)
    assert (play.rollout.status, play.rollout.stage) == (Status.RUNNING, 0)
    assert (play.rollout.expected, play.rollout.settled) == (2, 0)
    play.report(first)
    play.tick(200)
    assert play.rollout.reason.startswith("too few reports, 2 are needed: 1 confirmed, 0 failed, 1")
    play.do(Resume(at=200, rollout="r2"))
    play.report(second)
    assert play.rollout.stage == 1


def test_a_device_is_not_told_again_what_failed_on_it() -> None:
    play = Play()
    play.start(max_error_rate=1.0)
    bad = play.told()[0]
    play.report(bad, Outcome.SELFTEST_FAILED)
    play.do(Promote(at=1, rollout="r2"))
    play.do(Promote(at=1, rollout="r2"))
    play.do(Promote(at=1, rollout="r2"))
    assert play.rollout.status is Status.COMPLETED
    assert play.poll(bad).release is None
    assert len(play.told()) == 19


def test_reports_that_answer_nothing_change_nothing() -> None:
    play = Play()
    play.start()
    canary = play.told()[0]
    told = play.fleet.devices[canary].told
    before = play.fleet
    foreign = [
        ReportOutcome(at=1, device="ghost", serial=1, version=2, outcome=Outcome.CRASH_LOOP),
        ReportOutcome(
            at=1, device=canary, serial=told.serial + 1, version=2, outcome=Outcome.CRASH_LOOP
        ),
        ReportOutcome(
            at=1, device=canary, serial=told.serial - 1, version=1, outcome=Outcome.CRASH_LOOP
        ),
        ReportOutcome(
            at=1, device=canary, serial=told.serial, version=3, outcome=Outcome.CRASH_LOOP
        ),
    ]
    for event in foreign:
        decision = play.do(event)
        assert not decision.accepted
        assert decision.fleet == before
    assert play.report(canary)
    assert not play.report(canary)
    assert play.report(canary, Outcome.CRASH_LOOP)
    assert not play.report(canary)
    assert not play.report(canary, Outcome.CRASH_LOOP)


def test_pins_come_first() -> None:
    play = Play()
    play.do(PinDevice(at=0, device="d3", version=4))
    play.start(stages=(100.0,))
    assert len(play.told()) == 19
    assert play.poll("d3").release == Release("digits", 4)
    play.do(PinDevice(at=0, device="d3", version=None))
    assert play.poll("d3").release == Release("digits", 2)
    with pytest.raises(NotPossible, match="not pinned"):
        play.do(PinDevice(at=0, device="d3", version=None))
    with pytest.raises(RolloutOverlap, match="pin single devices"):
        play.do(PinGroup(at=0, group="lab", version=1))
    with pytest.raises(ReleaseUnknown, match=r"no live release digits 9 \(live: 1, 2, 3, 4, 5\)"):
        play.do(PinDevice(at=0, device="d3", version=9))


def test_a_pinned_group_takes_no_rollout() -> None:
    play = Play()
    play.do(PinGroup(at=0, group="lab", version=5))
    assert len(play.told(5)) == 20
    with pytest.raises(NotPossible, match="fleet unpin --group lab"):
        play.start()
    play.do(PinGroup(at=0, group="lab", version=None))
    downgraded = play.poll("d0", running=5)
    assert (downgraded.release, downgraded.downgrade) == (Release("digits", 1), True)


def test_late_joiners_wait_for_the_last_stage() -> None:
    play = Play()
    play.start()
    play.do(AddDevice(at=0, device="late", group="lab"))
    assert play.poll("late", running=None).release == Release("digits", 1)
    play.do(Promote(at=0, rollout="r2"))
    assert play.poll("late").release == Release("digits", 1)
    play.do(Promote(at=0, rollout="r2"))
    assert play.poll("late").release == Release("digits", 2)
    assert play.rollout.expected == 21
    play.do(AddDevice(at=0, device="later", group="lab"))
    assert play.rollout.expected == 22
    play.do(RevokeDevice(at=0, device="later"))
    assert play.rollout.expected == 21
    with pytest.raises(NotPossible, match="revoked, which is final"):
        play.do(PinDevice(at=0, device="later", version=1))
    with pytest.raises(NotPossible, match="revoked"):
        play.poll("later")


def test_moving_leaves_one_rollout_for_another() -> None:
    play = Play()
    play.do(AddGroup(at=0, group="field", release="digits", stable=3))
    play.do(AddGroup(at=0, group="doors", release="faces"))
    play.start()
    canary = play.told()[0]
    play.do(MoveDevice(at=0, device=canary, group="field"))
    assert play.rollout.expected == 1
    assert play.poll(canary, running=2).release == Release("digits", 3)
    assert not play.fleet.devices[canary].part
    with pytest.raises(NotPossible, match="under another name"):
        play.do(MoveDevice(at=0, device=canary, group="doors"))


def test_two_rollouts_on_overlapping_groups_are_refused() -> None:
    play = Play()
    play.do(AddGroup(at=0, group="field", release="digits", stable=1))
    play.start()
    overlapping = StartRollout(
        at=0, rollout="r3", release=Release("digits", 3), groups=("field", "lab")
    )
    with pytest.raises(RolloutOverlap, match=r"r2 \(digits 2\) is running in group lab: .*abort"):
        play.do(overlapping)
    play.do(replace(overlapping, groups=("field",)))
    play.do(Abort(at=0, rollout="r3"))
    play.do(Abort(at=0, rollout="r2"))
    play.do(replace(overlapping, rollout="r4"))


def test_what_cannot_start() -> None:
    play = Play()
    with pytest.raises(ReleaseUnknown, match="no live release digits 7"):
        play.start(7)
    with pytest.raises(NotPossible, match="digits 1 is in force in group lab already"):
        play.start(1)
    event = StartRollout(at=0, rollout="r", release=Release("faces", 1), groups=("lab",))
    with pytest.raises(ReleaseUnknown, match="group lab follows 'digits', not 'faces'"):
        play.do(event)
    with pytest.raises(NotFound, match="no group named 'attic'"):
        play.do(replace(event, groups=("attic",)))
    with pytest.raises(NotPossible, match="at least one group"):
        play.do(replace(event, groups=()))
    for stages in ((), (5.0,), (50.0, 5.0, 100.0), (0.0, 100.0), (5.0, 100.0, 120.0)):
        with pytest.raises(Unusable, match="must rise and end at 100"):
            play.start(stages=stages)
    play.start()
    play.do(Abort(at=0, rollout="r2"))
    with pytest.raises(AlreadyExists, match="choose another name"):
        play.start()
    for wrong in ({"max_error_rate": 2}, {"min_reports": 0}, {"soak": 9999}):
        with pytest.raises(Unusable):
            replace(POLICY, **wrong)


def test_a_release_that_was_retired_is_told_to_nobody() -> None:
    play = Play()
    play.start(stages=(100.0,))
    play.fleet = replace(play.fleet, releases=play.fleet.releases - {Release("digits", 2)})
    assert play.told() == []
    play.fleet = replace(play.fleet, releases=frozenset())
    assert play.poll("d0").release is None


def test_the_first_release_has_nothing_to_go_back_to() -> None:
    play = Play(devices=0)
    play.do(AddGroup(at=0, group="new", release="digits"))
    play.do(AddDevice(at=0, device="n", group="new"))
    play.do(StartRollout(at=0, rollout="r", release=Release("digits", 1), groups=("new",)))
    assert play.poll("n", running=None).release == Release("digits", 1)
    play.do(Abort(at=0, rollout="r"))
    assert play.poll("n", running=1).release is None


def test_a_report_counts_for_a_rollout_of_what_a_device_had_before() -> None:
    play = Play(devices=1)
    play.do(PinDevice(at=0, device="d0", version=2))
    play.poll("d0")
    play.report("d0")
    play.do(PinDevice(at=0, device="d0", version=None))
    play.start(stages=(100.0,))
    play.poll("d0", running=2)
    assert play.fleet.devices["d0"].part.progress is Progress.TOLD
    assert play.report("d0")
    assert play.rollout.status is Status.COMPLETED

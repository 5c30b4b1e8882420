"""Properties of the state machine under arbitrary sequences of events."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from prunecast.server.fleet.errors import FleetError
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
from prunecast.server.fleet.model import Fleet, Outcome, Progress, Release, RolloutPolicy, Status
from prunecast.server.fleet.step import assign, cohort_size

GROUPS = ("a", "b")
RELEASES = frozenset(Release("digits", v) for v in range(1, 6))
STAGES = ((5.0, 25.0, 100.0), (100.0,), (10.0, 100.0), (1.0, 2.0, 50.0, 100.0))
devices_ = st.integers(0, 39).map("d{}".format)
groups_ = st.sampled_from(GROUPS)
versions_ = st.integers(1, 6)
policies_ = st.builds(
    RolloutPolicy,
    max_error_rate=st.sampled_from([1.0, 0.1, 0.0]),
    max_silent_rate=st.sampled_from([1.0, 0.3, 0.0]),
    min_reports=st.integers(1, 8),
    report_deadline=st.just(50.0),
    soak=st.sampled_from([0.0, 30.0]),
    timeout=st.just(200.0),
    automatic=st.booleans(),
    roll_back_on_error=st.booleans(),
)


@given(st.integers(0, 300), st.sampled_from(STAGES), st.text("rst", max_size=3))
def test_stages_hold_their_share_rounded_up(count: int, stages, rollout: str) -> None:
    names = [f"d{i}" for i in range(count)]
    stage_of = assign(rollout, names, stages)
    assert stage_of == assign(rollout, reversed(names), stages)
    for stage, percent in enumerate(stages):
        reached = sum(s <= stage for s in stage_of.values())
        assert reached == cohort_size(percent, count) == math.ceil(percent * count / 100)


def test_another_rollout_has_other_canaries() -> None:
    names = [f"d{i}" for i in range(1000)]
    first, second = (
        {n for n, stage in assign(r, names, (5, 100)).items() if stage == 0} for r in ("r1", "r2")
    )
    assert len(first & second) < 15  # 2.5 of 50 by chance


class FleetMachine(RuleBasedStateMachine):
    """Operators, devices and time, in any order."""

    directives = Bundle("directives")
    reports = Bundle("reports")

    @initialize(
        count=st.integers(0, 40) | st.just(40),
        stable=st.none() | st.integers(1, 5),
        policy=policies_,
        stages=st.sampled_from(STAGES),
    )
    def enrol(self, count: int, stable: int | None, policy: RolloutPolicy, stages) -> None:
        self.fleet, self.at, self.started = Fleet(RELEASES), 0.0, 0
        self.ever: dict[str, set[str]] = {}  # rollout -> everybody who was ever a member
        self.left: set[str] = set()  # rollouts that a settled device has left
        self.told: dict[str, set[str]] = {}  # rollout -> everybody who was ever told
        for group in GROUPS:
            self.do(AddGroup(at=0, group=group, release="digits", stable=stable))
        for i in range(count):
            self.do(AddDevice(at=0, device=f"d{i}", group=GROUPS[i % 2]))
        self.start(2, set(GROUPS), stages, policy)

    def do(self, event: AnyEvent):
        before = self.fleet
        if isinstance(event, MoveDevice | RevokeDevice | PinDevice):
            # the event itself first notices who is silent by now
            held = apply(before, Tick(at=event.at)).fleet.devices.get(event.device)
            if held and held.part and held.part.progress.settled:
                self.left.add(held.part.rollout)
        if isinstance(event, StartRollout):
            parts = [d.part for d in before.devices.values() if d.group in event.groups]
            gone = {p.rollout for p in parts if p is not None and p.progress.settled}
        else:
            gone = set()
        try:
            decision = apply(before, event)
        except FleetError:
            assert self.fleet == before
            return None
        assert decision == apply(before, event)
        self.left |= gone
        self.fleet = decision.fleet
        for device in self.fleet.devices.values():
            current = self.fleet.current(self.fleet.group(device.group))
            if current and device.part and device.part.rollout == current.id:
                self.ever.setdefault(current.id, set()).add(device.id)
        return decision

    @rule(
        kind=st.sampled_from([AddDevice, MoveDevice, RevokeDevice, PinDevice]),
        device=devices_,
        group=groups_,
        version=st.sampled_from([None, 2, 6]),
    )
    def chore(self, kind, device: str, group: str, version: int | None) -> None:
        """One rule, so that chores are not most of what happens."""
        more = {AddDevice: {"group": group}, MoveDevice: {"group": group}}
        more[PinDevice] = {"version": version}
        self.do(kind(at=self.at, device=device, **more.get(kind, {})))

    @rule(group=groups_, version=st.sampled_from([None, None, None, 1, 6]))
    def pin_group(self, group: str, version: int | None) -> None:
        self.do(PinGroup(at=self.at, group=group, version=version))

    @rule(
        version=versions_,
        groups=st.sets(groups_, min_size=1),
        stages=st.sampled_from(STAGES),
        policy=policies_,
    )
    def start(self, version: int, groups: set[str], stages, policy: RolloutPolicy) -> None:
        self.started += 1
        busy = any(self.fleet.current(self.fleet.group(g)) for g in groups)
        done = self.do(
            StartRollout(
                at=self.at,
                rollout=f"r{self.started}",
                release=Release("digits", version),
                groups=tuple(groups),
                stages=stages,
                policy=policy,
            )
        )
        assert not (busy and done), "two rollouts at once in one group"
        if done:
            self.poll_everybody()

    @precondition(lambda self: self.started)
    @rule(kind=st.sampled_from([Promote, Pause, Pause, Resume, Abort]), data=st.data())
    def steer(self, kind, data) -> None:
        number = data.draw(st.integers(max(1, self.started - 1), self.started))
        self.do(kind(at=self.at, rollout=f"r{number}"))

    @rule(seconds=st.sampled_from([1.0, 20.0, 60.0, 250.0]), tick=st.booleans())
    def wait(self, seconds: float, tick: bool) -> None:
        self.at += seconds
        if tick:
            self.do(Tick(at=self.at))

    def poll_one(self, device: str):
        held = self.fleet.devices.get(device)
        if held is None or held.revoked:
            return None
        decision = self.do(Poll(at=self.at, device=device, running=held.running))
        (directive,) = decision.directives
        assert directive.release is None or directive.release in self.fleet.releases
        if directive.rollout:
            told = self.told.setdefault(directive.rollout, set())
            rollout = self.fleet.rollouts[directive.rollout]
            if device not in told:
                assert rollout.status is Status.RUNNING, "told somebody new when not running"
                assert rollout.release == directive.release
                told.add(device)
                share = rollout.stages[rollout.stage] / 100
                assert len(told) <= math.ceil(share * len(self.ever[rollout.id]))
        return directive

    @rule(target=directives, device=devices_)
    def poll(self, device: str):
        return self.poll_one(device)

    @rule()
    def poll_everybody(self) -> None:
        for device in list(self.fleet.devices):
            self.poll_one(device)

    @rule(outcome=st.sampled_from([Outcome.CONFIRMED, *Outcome]), share=st.integers(1, 4))
    def report_from_some(self, outcome: Outcome, share: int) -> None:
        for i, device in enumerate(list(self.fleet.devices.values())):
            if i % share == 0 and device.told.version is not None:
                self.do(_report(self.at, device, outcome))

    @rule(target=reports, directive=directives, outcome=st.sampled_from(Outcome))
    def report(self, directive, outcome: Outcome):
        """About any directive ever given, so most are out of date."""
        if directive is None or directive.release is None:
            return None
        device = self.fleet.devices[directive.device]
        current = device.told.serial == directive.serial and not device.revoked
        event = ReportOutcome(
            at=self.at,
            device=device.id,
            serial=directive.serial,
            version=directive.release.version,
            outcome=outcome,
        )
        self.do(Tick(at=self.at))  # time passes by itself, not by the report
        before = self.fleet
        decision = self.do(event)
        if not current:
            assert not decision.accepted
        if not decision.accepted:
            assert self.fleet == self.settle_time(before)
        return event

    @rule(event=reports)
    def replay(self, event) -> None:
        if event is not None:
            self.do(Tick(at=self.at))
            before = self.fleet
            decision = self.do(replace(event, at=self.at))
            assert not decision.accepted
            assert self.fleet == self.settle_time(before)

    def settle_time(self, fleet: Fleet) -> Fleet:
        """What time alone makes of a state: two looks at the clock, as a report takes."""
        tick = Tick(at=self.at)
        return apply(apply(fleet, tick).fleet, tick).fleet

    @invariant()
    def silence_never_hangs(self) -> None:
        """Time alone ends every stage that needs no operator."""
        fleet = getattr(self, "fleet", None)
        if fleet is None:
            return
        for rollout in fleet.rollouts.values():
            if rollout.status is Status.RUNNING and rollout.policy.automatic:
                tick = Tick(at=max(self.at, rollout.since) + rollout.policy.timeout)
                later = apply(fleet, tick).fleet.rollouts[rollout.id]
                assert (later.status, later.stage) != (rollout.status, rollout.stage)

    @invariant()
    def counts_agree_with_devices(self) -> None:
        fleet = getattr(self, "fleet", None)
        if fleet is None:
            return
        for rollout in fleet.rollouts.values():
            if not rollout.status.active:
                continue
            parts = [
                d.part
                for d in fleet.devices.values()
                if d.part and d.part.rollout == rollout.id and d.group in rollout.groups
            ]
            waiting = Counter(p.stage for p in parts if not p.progress.settled)
            settled = Counter(
                p.progress for p in parts if p.progress.settled and p.epoch == rollout.epoch
            )
            tally = rollout.tally
            # devices that left after they settled stay counted
            counted = (tally.confirmed, tally.failed, tally.silent)
            found = tuple(
                settled[p] for p in (Progress.CONFIRMED, Progress.FAILED, Progress.SILENT)
            )
            assert all(a <= b for a, b in zip(found, counted, strict=True))
            assert rollout.id in self.left or found == counted
            assert min(tally.confirmed, tally.failed, tally.silent) >= 0
            for epoch, window in enumerate(rollout.windows, 1):
                early = Counter(p.progress for p in parts if p.epoch == epoch)
                # an operator's resumption or promotion accepts what has failed so far
                assert early[Progress.CONFIRMED] <= window.confirmed
                assert min(window.confirmed, window.failed, window.silent) >= 0
                if rollout.id not in self.left:
                    assert early[Progress.CONFIRMED] == window.confirmed
                    assert early[Progress.SILENT] == window.silent
                    assert window.failed <= early[Progress.FAILED]
            assert len(rollout.windows) == rollout.epoch - 1
            assert sum(rollout.cohorts) - rollout.settled == sum(waiting.values())
            due = sum(n for stage, n in waiting.items() if stage <= rollout.stage)
            assert rollout.expected - tally.settled <= due


def _report(at: float, device, outcome: Outcome) -> ReportOutcome:
    return ReportOutcome(
        at=at,
        device=device.id,
        serial=device.told.serial,
        version=device.told.version,
        outcome=outcome,
    )


TestFleetMachine = FleetMachine.TestCase
TestFleetMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

"""What an agent remembers of releases: which runs, which was before, which were given up and why.

All of it is immutable; every change makes a new state, which `StateFolder` writes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from prunecast.client.edge.starts import BAD_ENDS, WEIGHTS, Begun, EndKind, how_it_ended

__all__ = ["SLOTS", "Failure", "FailureKind", "SlotRecord", "State"]

SlotName = Literal["a", "b"]
FailureKind = Literal["self-test failed", "rolled back", "crash loop"]

SLOTS: tuple[SlotName, ...] = ("a", "b")
_LOOP: FailureKind = "crash loop"
_REMEMBERED = 32
_REMEMBERED_ENDS = 5
_ALMOST = 0.05  # thirds of a start do not add up to whole ones


@dataclass(frozen=True)
class Failure:
    """Why a release was given up on this device."""

    kind: FailureKind
    reason: str


@dataclass(frozen=True)
class SlotRecord:
    """A slot that `state.json` refers to.

    Attributes:
        slot: ``a`` or ``b``.
        version: of the release in it.
        manifest: hex digest of its `release.json`.
        confirmed: whether it has proved itself in service.
        starts: how many starts it has to answer for while unconfirmed, by how they ended.
        served: seconds of service, over all starts, that count towards its confirmation.
        ends: how the latest starts with it ended, the last one at the end.
        optimised: seal of the model that was optimised for this CPU; None without one.
        passed: with which agent, onnxruntime and CPU its trial was passed, as a digest.
    """

    slot: SlotName
    version: int
    manifest: str
    confirmed: bool = False
    starts: float = 0.0
    served: float = 0.0
    ends: tuple[EndKind, ...] = ()
    optimised: str | None = None
    passed: str | None = None

    def ended(self, kind: EndKind, *, starts: float = 0.0, served: float = 0.0) -> SlotRecord:
        """Another start has ended, for which it has to answer so much."""
        ends = (*self.ends, kind)[-_REMEMBERED_ENDS:]
        if self.confirmed:
            return replace(self, ends=ends)
        starts, served = round(self.starts + starts, 2), round(self.served + served, 1)
        return replace(self, ends=ends, starts=starts, served=served)

    def loops(self, most_starts: int) -> bool:
        """Whether it has to answer for a crash loop."""
        return self.starts >= most_starts - _ALMOST


@dataclass(frozen=True)
class State:
    """Content of `state.json`; immutable, every change makes a new one.

    Attributes:
        name: of the release this folder follows.
        active: what runs.
        previous: what to go back to.
        rejected: manifests that must not be tried again, with the reason.
        tries: manifests whose self-test ended with the process, with how often: a release that
            kills the process during its self-test must not do so forever.
        failures: why releases were rejected, by version.
    """

    name: str
    active: SlotRecord | None = None
    previous: SlotRecord | None = None
    rejected: dict[str, str] = field(default_factory=dict)
    tries: dict[str, float] = field(default_factory=dict)
    failures: dict[int, Failure] = field(default_factory=dict)

    def settle(
        self, found: Begun | None, now: Begun, most_starts: int, steady_after: float
    ) -> State:
        """What the process before this one was ended by is put down to whom it belongs to.

        A release answers for how its starts end, unless what it took the place of ended in the
        same way: then going back would not help, and that is how this device is used. If a
        release that was gone back to ends like that again and again, the ones that were given up
        for their ends may be tried again.

        Args:
            found: the note of the process before this one; None: it has ended by itself.
            now: the note of this process.
            most_starts: that make a crash loop.
            steady_after: seconds of service after which an end speaks against nobody.
        """
        active = self.active
        if found is None:
            return self
        if found.trying:  # after any time of service
            kind = how_it_ended(replace(found, served=0.0), now, steady_after)
            # what has just passed elsewhere seldom ends the process here
            return self.tried(found.trying, WEIGHTS[kind] / (3 if found.passed else 1))
        if active is None or found.work == "install":
            return self
        kind = how_it_ended(found, now, steady_after)
        most = min(most_starts, _REMEMBERED_ENDS)
        usual = self.previous is not None and self.previous.ends.count(kind) >= most
        if usual:
            active = active.ended(kind, served=found.served)
        else:
            active = active.ended(kind, starts=WEIGHTS[kind])
        settled = replace(self, active=active)
        last = active.ends[-most:]
        if active.confirmed and len(last) == most and set(last) <= set(BAD_ENDS):
            return settled.forgive()
        return settled

    def end(self, served: float) -> State:
        """The process ends by itself, which speaks against nobody; its service counts."""
        if self.active is None or (self.active.confirmed and not self.active.ends):
            return self  # nothing that anybody would want to know
        return replace(self, active=self.active.ended("stopped", served=served))

    def forgive(self) -> State:
        """Forget that releases were given up for a crash loop: others end like that, too."""
        loops = {v: failed.reason for v, failed in self.failures.items() if failed.kind == _LOOP}
        failures = {v: failed for v, failed in self.failures.items() if v not in loops}
        rejected = {m: why for m, why in self.rejected.items() if why not in loops.values()}
        return replace(self, failures=failures, rejected=rejected)

    def free_slot(self) -> tuple[SlotName, State]:
        """The slot to rebuild, and the state to write before touching it.

        The last confirmed release is never given up: when the active one is unconfirmed and a
        previous one exists, the previous one becomes active on disk and the unconfirmed slot is
        rebuilt.
        """
        active, previous = self.active, self.previous
        if active and previous and not active.confirmed:
            return active.slot, replace(self, active=previous, previous=None)
        used = active.slot if active else None
        return next(s for s in SLOTS if s != used), replace(self, previous=None)

    def activate(self, record: SlotRecord) -> State:
        """`record` becomes active; what ran before becomes previous."""
        tries = {k: v for k, v in self.tries.items() if k != record.manifest}
        return replace(self, active=record, previous=self.active, tries=tries)

    def exchange(self) -> State:
        """The previous release becomes active and the active one previous; both stay good.

        What comes back counts as confirmed: it served before, and if its slot were rebuilt as an
        unconfirmed one, a crash would bring back the release that it takes the place of.
        """
        if self.previous is None:
            return self
        active = replace(self.previous, confirmed=True, starts=0.0)
        return replace(self, active=active, previous=self.active)

    def go_back(self, reason: str, kind: FailureKind) -> State:
        """The previous release becomes active; the active one is rejected."""
        if self.active is None:
            return self
        failed = self.reject(self.active.manifest, self.active.version, reason, kind)
        # how it ends from now on tells whether going back has helped
        active = replace(self.previous, ends=()) if self.previous else None
        return replace(failed, active=active, previous=None)

    def lose_active(self) -> State:
        """The active slot is unfit through no fault of its release, which may be fetched again."""
        return replace(self, active=self.previous, previous=None)

    def reject(self, manifest: str, version: int, reason: str, kind: FailureKind) -> State:
        """Never try `manifest` again."""
        kept = list({**self.rejected, manifest: reason[:500]}.items())[-_REMEMBERED:]
        tries = {k: v for k, v in self.tries.items() if k != manifest}
        failure = Failure(kind, reason[:500])
        failures = list({**self.failures, version: failure}.items())[-_REMEMBERED:]
        return replace(self, rejected=dict(kept), tries=tries, failures=dict(failures))

    def tried(self, manifest: str, starts: float) -> State:
        """The self-test of `manifest` has ended the process, which counts for so many starts."""
        tries = round(self.tries.get(manifest, 0) + starts, 2)
        return replace(self, tries={manifest: tries} if tries else {})

    def gives_up(self, manifest: str, most: int) -> bool:
        """Whether the self-test of `manifest` has ended the process too often."""
        return self.tries.get(manifest, 0) >= most - _ALMOST

    def confirm(self) -> State:
        """The active release has proved itself."""
        if self.active is None or self.active.confirmed:
            return self
        return replace(self, active=replace(self.active, confirmed=True, starts=0.0, served=0.0))

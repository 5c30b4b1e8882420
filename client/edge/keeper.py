"""What an agent keeps on its disk, as far as the disk takes it: the state, a note, the status.

A disk that is full, read-only or broken must not end what works without it. So whatever may be lost
is kept in memory all the same, and is told once; only what must be durable before something else
happens raises.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from prunecast.client.edge.config import AgentConfig, UpdateResult
from prunecast.client.edge.errors import EdgeError, StateDamaged, StateError
from prunecast.client.edge.records import State
from prunecast.client.edge.starts import Begun
from prunecast.client.edge.state import StateFolder, record_check
from prunecast.compression.release import ReleaseError

__all__ = ["Keeper"]

_QUARTERS = 4  # notes of the service of a release on its way to be confirmed


class Keeper:
    """Keeps the state of one agent, which holds the lock of the state folder.

    Args:
        config: of the agent.
        folder: its state folder.
        on_warning: called with what is wrong and does not keep the agent from its work.
        on_confirmed: called when the active release has proved itself.

    Attributes:
        state: what the agent goes by; on the disk as well, unless that was refused.
        begun: what `start.json` says of this process; None: nothing.
        serves_since: monotonic seconds since when `Agent.run` has served the active release.
    """

    def __init__(
        self,
        config: AgentConfig,
        folder: StateFolder,
        on_warning: Callable[[str], None],
        on_confirmed: Callable[[], None],
    ) -> None:
        self.state = State(config.name)
        self.begun: Begun | None = None
        self.serves_since: float | None = None
        self.tell, self._on_confirmed = on_warning, on_confirmed
        self._config, self._folder = config, folder
        self._saved: State | None = None  # what is on the disk; None: nothing that counts
        self._told: set[str] = set()
        self._warning: str | None = None

    def read(self) -> None:
        """Take the state from the disk, or from what the slots tell when that is damaged.

        Raises:
            StateError: it is of a newer agent, or of another release.
        """
        name = self._config.name
        try:
            self._folder.tidy()
        except StateError as error:
            self.warn(str(error))
        try:
            self.state = self._saved = self._folder.read() or State(name)
        except StateDamaged as error:
            self._recover(error)
        if self.state.name != name:
            raise StateError(
                f"{self._folder.path} follows release {self.state.name!r}, not {name!r}: use "
                "another state folder"
            )

    def _recover(self, error: StateDamaged) -> None:
        from prunecast.client.edge.recovery import (
            recover_state,  # rarely needed, and it is not small
        )

        found = recover_state(self._folder, self._config.name, self._config.root)
        told = f"{error}; no slot holds a release that was signed: it is fetched again"
        if found is not None and found.active is not None:
            told = f"{error}; release {found.active.version} is recovered from its slot"
        told += ", and which releases were given up is forgotten"
        self.tell(told)
        self.keep(found or State(self._config.name))
        self.record(None, Counter(), told)

    def settle(self, now: Begun) -> None:
        """Put down what the process before this one was ended by to whom it belongs."""
        rejected, config = self.state.rejected, self._config
        found = self._folder.read_note()
        self.keep(self.state.settle(found, now, config.most_starts, config.confirm_after))
        if self.state.rejected != rejected:
            self.tell(
                "a release that was given up for a crash loop may be tried again: the one before "
                "it ends in the same way"
            )

    def begin_service(self) -> None:
        """Another release is served from now on."""
        if self.serves_since is not None:
            self.serves_since = time.monotonic()
        self.note(Begun.now("serve"))

    def note_service(self, version: int | None, *, ending: bool = False) -> float:
        """Note how long the active release has served, and confirm it when that is enough.

        Only while there is a `serves_since`: who has a loop of their own says themselves what is
        good enough.

        Args:
            version: that is served.
            ending: the note is written with the state of a clean end, which follows.

        Returns:
            Seconds until there is something to note again.
        """
        active, begun, enough = self.state.active, self.begun, self._config.confirm_after
        if self.serves_since is None or begun is None or active is None:
            return enough
        if active.version != version:
            return enough
        served, noted = time.monotonic() - self.serves_since, begun.served
        begun = replace(begun, served=round(served, 1))
        if not active.confirmed and active.served + served >= enough:
            self.confirm()
            self.note(begun)
            return enough
        due = enough if active.confirmed else noted + enough / _QUARTERS
        if ending:
            self.begun = begun
        elif noted < enough and served >= due:
            self.note(begun)
            return max(0.01, enough / _QUARTERS)
        left = due - served if noted < enough else enough
        return max(0.01, left if active.confirmed else min(left, enough - active.served - served))

    def confirm(self) -> None:
        """The active release has proved itself."""
        self.keep(self.state.confirm())
        self._on_confirmed()

    def end(self) -> None:
        """The process ends by itself."""
        if self.begun is not None:
            self.keep(self.state.end(self.begun.served))
            self.note(None)

    def keep(self, state: State) -> bool:
        """Go on with a state that may as well be lost; whether the disk has taken it."""
        try:
            self.write(state)
        except StateError as error:
            self.state = state
            self.warn(f"the state is not kept: {error}")
            return False
        return True

    def write(self, state: State) -> None:
        """Go on with a state once it is durable; a StateError when the disk refuses."""
        if state != self._saved:
            self._folder.write(state)
            self._saved = state
        self.state = state

    def note(self, begun: Begun | None) -> bool:
        """Note what would speak against a release; whether the disk has taken it."""
        self.begun = begun
        try:
            self._folder.write_note(begun)
        except StateError as error:
            self.warn(f"how this process ends cannot be noted: {error}")
            return False
        return True

    @contextmanager
    def noted(self, note: Begun) -> Iterator[None]:
        """While the block runs, the end of the process does not speak against what is served.

        Raises:
            StateError: the disk refuses the note of a self-test, which may end the process.
        """
        resting = self.begun
        steady = resting is not None and resting.served >= self._config.confirm_after
        if steady and not note.trying:
            yield  # it does not any more
            return
        if note.trying:
            self._folder.write_note(note)
            self.begun = note
        else:
            self.note(note)
        try:
            yield
        except (EdgeError, ReleaseError):
            self.note(resting)
            raise
        self.note(resting)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """While the block runs, a release runs in another process, and can end only that one."""
        with self.noted(Begun.now("install")):
            yield
        if self.begun is not None and self.begun.trying:
            self.note(replace(self.begun, passed=True))

    def record(
        self, result: UpdateResult | None, counted: Counter[str], problem: str | None
    ) -> None:
        """Keep for the status what happened, see `record_check`."""
        warning, self._warning = self._warning, None
        try:
            record_check(self._folder, result, counted, problem, warning)
        except StateError as error:
            self.warn(f"the status is not kept: {error}")

    def warn(self, told: str, *, status: bool = False) -> None:
        """Say once what would be said again and again.

        Args:
            told: what is wrong.
            status: whether the status of this check shall show it.
        """
        if status:
            self._warning = told
        if told not in self._told:
            self._told.add(told)
            self.tell(told)

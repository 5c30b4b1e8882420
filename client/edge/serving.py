"""What an agent serves: a release out of a slot, and what else when that is not fit.

At a start the active release is loaded; one that is not proven and does not start is given up for
the one before it. What a disk or too little memory did speaks against no release.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prunecast.client.edge.config import AgentConfig
from prunecast.client.edge.errors import EdgeError, MemoryShort, NetworkError, StateError
from prunecast.client.edge.keeper import Keeper
from prunecast.client.edge.model import EdgeModel
from prunecast.client.edge.records import FailureKind, SlotRecord, State
from prunecast.client.edge.slots.slot import (
    LoadedRelease,
    forget_slot,
    open_optimised,
    open_slot,
    verify_slot,
)
from prunecast.client.edge.starts import Begun
from prunecast.client.edge.state import StateFolder
from prunecast.client.edge.telemetry import Telemetry
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.manifest import ReleaseManifest

__all__ = ["Serving"]


class Serving:
    """Loads releases out of slots and puts them into the model that is asked.

    Args:
        config: of the agent.
        folder: its state folder.
        kept: what it keeps there.
        model: that serves.
        telemetry: is told what is served and what was rejected.
        step: called with the name of every step before it begins.
        wait: raises when the agent is asked to end.
    """

    def __init__(
        self,
        config: AgentConfig,
        folder: StateFolder,
        kept: Keeper,
        *,
        model: EdgeModel,
        telemetry: Telemetry,
        step: Callable[[str], None],
        wait: Callable[[float], None],
    ) -> None:
        self._config, self._folder, self._kept = config, folder, kept
        self._model, self._telemetry = model, telemetry
        self._step, self._wait = step, wait

    def start(self) -> None:
        """Load the active release, or the previous one when the active one is not fit."""
        config, now = self._config, Begun.now("load")
        self._kept.settle(now)
        while (active := self._kept.state.active) is not None:
            problem: str | None = None
            proven = active.confirmed or self._kept.state.previous is None
            if not proven and active.loops(config.most_starts):
                ends = ", ".join(active.ends)
                starts = f"not confirmed after {config.most_starts} starts or more (ended: {ends})"
                self._go_back(f"release {active.version}: {starts}", "crash loop")
                continue
            noted = self._kept.note(now)
            try:
                if not (proven or noted):
                    raise StateError("a crash loop could not be noticed")
                loaded = self.load(active)
                seal = loaded.seal or active.optimised
                marked = replace(active, optimised=seal, passed=loaded.passed)
                self._kept.keep(replace(self._kept.state, active=marked))
                self.serve(loaded)
                return
            except ReleaseError as error:
                problem = f"release {active.version}: {error}"
                self._telemetry.rejected(active.version, str(error))
                if not proven:
                    self._go_back(problem, "rolled back")
                    continue
            except NetworkError:
                raise  # the agent was asked to end, which says nothing about the release
            except MemoryShort as error:
                if not self._serve_previous(f"release {active.version}: {error}"):
                    raise
                return
            except EdgeError as error:
                problem = f"release {active.version}: {error}"
                if not noted and self._serve_previous(problem):
                    return
            # a damaged disk, or too little memory: the release itself may be fetched again
            self._step("drop slot")
            self._kept.keep(self._kept.state.lose_active())
            self._kept.record(None, Counter(), problem)
        self._kept.note(None)

    def _serve_previous(self, problem: str) -> bool:
        """Serve the release before the active one until the next start; whether there is one."""
        previous = self._kept.state.previous
        if previous is None:
            return False
        try:
            loaded = self.load(previous)
        except NetworkError:
            raise
        except (EdgeError, ReleaseError):
            return False
        self.serve(loaded)
        self._kept.note(None)
        told = f"{problem}; release {previous.version} is served until the next start"
        self._kept.tell(told)
        self._kept.record(None, Counter(), told)
        return True

    def _go_back(self, reason: str, kind: FailureKind) -> None:
        self._step("go back")
        given_up = self._kept.state.active
        self._kept.keep(self._kept.state.go_back(reason, kind))
        self._kept.tell(f"{reason}; the agent goes back to the release before it")
        if given_up is not None:
            forget_slot(self._folder.slot(given_up.slot))

    def activate(self, state: State, loaded: LoadedRelease) -> None:
        """Serve a release from now on, which `state` says; a StateError when the disk refuses."""
        self._step("activate")
        self._kept.write(state)
        self._step("swap")
        self.serve(loaded)

    def serve(self, loaded: LoadedRelease) -> None:
        """Answer with a release from now on, whatever the state says."""
        self._model.swap(loaded)
        self._kept.begin_service()
        settings = loaded.session.settings
        self._telemetry.activated(loaded.manifest.version, loaded.difference, settings)

    def load(self, record: SlotRecord) -> LoadedRelease:
        """Load what a slot holds, once every file is found to be what was signed.

        Raises:
            ReleaseError, EdgeError: it cannot be served.
        """
        slot = self._folder.slot(record.slot)
        manifest = verify_slot(slot, record.manifest)
        if self._config.optimise:
            quick = open_optimised(slot, manifest, record.optimised, **self._how())
            if quick is not None:
                return quick
        return self.open(slot, manifest, record.passed)

    def open(
        self, slot: Path, manifest: ReleaseManifest, passed: str | None = None
    ) -> LoadedRelease:
        """Load a slot whose files have been verified; tried first unless it has `passed` here.

        Raises:
            ReleaseError, EdgeError: it cannot be served.
        """
        return open_slot(
            *(slot, manifest),
            optimise=self._config.optimise,
            passed=passed,
            elsewhere=self._kept.trial,
            **self._how(),
        )

    def _how(self) -> dict[str, Any]:
        config = self._config
        poll = partial(self._wait, 0.0)  # raises when the agent is asked to end
        return {"threads": config.threads, "bounds": config.bounds, "poll": poll}

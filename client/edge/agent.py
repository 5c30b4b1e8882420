"""The agent on a device: notice, download, verify, activate, go back."""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Self

from prunecast.client.edge.config import AgentConfig, Order, UpdateResult, candidates
from prunecast.client.edge.errors import EdgeError, NetworkError, NoRelease, StateError
from prunecast.client.edge.model import EdgeModel
from prunecast.client.edge.slots.slot import (
    LoadedRelease,
    build_slot,
    clear_slot,
    open_optimised,
    open_slot,
    verify_slot,
)
from prunecast.client.edge.state import (
    Failure,
    FailureKind,
    SlotRecord,
    State,
    StateFolder,
    read_status,
    record_check,
)
from prunecast.client.edge.telemetry import Telemetry
from prunecast.client.edge.updating.acquire import Acquirer
from prunecast.client.edge.updating.transport import Fetcher, HttpFetcher
from prunecast.client.edge.updating.trust import TrustedListing
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.manifest import ReleaseManifest, check_release_name

__all__ = ["Agent"]

_TRIES = 3
_SAVE_EVERY = 900.0  # seconds between writes of telemetry: flash wears out


class Agent:
    """Follows one release on one device; a context manager.

    Args:
        config: see `AgentConfig`.
        fetcher: the network; default `HttpFetcher` with its defaults.
        on_step: called with the name of every step before it begins.
        wait: sleeps for so many seconds between attempts to download.
        now: local time, for the quiet hours.

    Raises:
        AgentBusy: another agent works on the same state folder.
        StateError: the state folder is unusable or follows another release.
        ManifestError: the release name is not usable.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        fetcher: Fetcher | None = None,
        on_step: Callable[[str], None] = lambda step: None,
        wait: Callable[[float], None] = time.sleep,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        check_release_name(config.name)
        self.config = config
        self._fetcher = fetcher or HttpFetcher()
        self._step, self._wait, self._now = on_step, wait, now
        self._folder = StateFolder(config.state)
        self._resources = ExitStack()
        self._resources.enter_context(self._folder.locked())
        self.telemetry = Telemetry(config.state)
        self.model = EdgeModel(observe=self.telemetry.observe)
        self._resources.enter_context(self.telemetry.saving(_SAVE_EVERY))
        try:
            self._folder.tidy()
            self._state = self._folder.read() or State(config.name)
            if self._state.name != config.name:
                raise StateError(
                    f"{config.state} follows release {self._state.name!r}, not {config.name!r}: "
                    "use another state folder"
                )
            self._start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the state folder; the model can still be used."""
        self._resources.close()

    def update_once(
        self, order: Order | None = None, *, superseded: Callable[[], bool] = lambda: False
    ) -> UpdateResult:
        """Check for a newer release, or the ordered one, and activate it if it passes every check.

        Args:
            order: what to run, whether higher or lower; None: the highest version, never a lower
                one.
            superseded: asked during downloads and before activation whether another order has
                come; what has been downloaded is then kept.

        Raises:
            OrderRefused: the order names no live release, or goes down without saying so.
            TrustError: the repository's metadata is refused.
            NoRelease: nothing is active and the repository has only releases of other names.
            ContentRefused: a file is not the one that was signed.
            NetworkError: the repository cannot be reached; downloads resume next time.
            AgentTooOld: the release needs a newer agent.
            StateError: the disk refuses.
                In all of these cases the active release stays as it was.
        """
        begun, counted = time.monotonic(), Counter[str]()
        try:
            result = self._update(counted, order, superseded)
        except EdgeError as error:
            record_check(self._folder, None, counted, str(error))
            raise
        result = replace(result, downloaded=dict(counted), seconds=time.monotonic() - begun)
        problem = result.reason if result.outcome == "rejected" else None
        record_check(self._folder, result, counted, problem)
        return result

    def run(
        self,
        interval: float,
        *,
        stop: threading.Event,
        jitter: float = 0.2,
        rng: random.Random | None = None,
        on_result: Callable[[UpdateResult | EdgeError], None] = lambda result: None,
        order: Callable[[], Order | None] = lambda: None,
        wake: threading.Event | None = None,
    ) -> None:
        """Check again and again until `stop` is set; problems are reported, never raised.

        Args:
            interval: seconds between checks.
            stop: ends the loop, at once while it waits.
            jitter: each wait is ``interval`` times a number drawn from ``1 ± jitter``, so that a
                fleet does not ask at the same moment.
            rng: source of the jitter; default seeded from the operating system.
            on_result: called after every check.
            order: asked before every check what to run; see `update_once`.
            wake: set when there is another order, to check at once; whoever sets `stop` sets it
                as well.
        """
        draw, bell = rng or random.Random(), wake or stop
        active_since = time.monotonic()
        wanted: Order | None = None

        def superseded() -> bool:
            return order() != wanted

        while not stop.is_set():
            if wake:
                wake.clear()  # before asking: what changes from now on wakes again
                if stop.is_set():  # its wake may be the one that was cleared
                    return
            wanted = order()
            try:
                outcome: UpdateResult | EdgeError = self.update_once(wanted, superseded=superseded)
            except EdgeError as error:
                outcome = error
            if isinstance(outcome, UpdateResult) and outcome.outcome == "updated":
                active_since = time.monotonic()
            on_result(outcome)
            wakes = time.monotonic() + interval * draw.uniform(1 - jitter, 1 + jitter)
            due = active_since + self.config.confirm_after
            active = self._state.active
            if active and not active.confirmed and due < wakes:
                if bell.wait(max(0.0, due - time.monotonic())):
                    continue
                self.confirm()
            bell.wait(max(0.0, wakes - time.monotonic()))

    def confirm(self) -> None:
        """The active release has proved itself: the agent will not go back from it by itself."""
        confirmed = self._state.confirm()
        if confirmed is not self._state:
            self._write(confirmed)

    def roll_back(self, reason: str) -> int | None:
        """Go back to the previous release and never try the active one again.

        Args:
            reason: recorded in the status, for instance which health figure got worse.

        Returns:
            The version that is active now.

        Raises:
            StateError: there is no previous release, or it is not intact.
        """
        if self._state.active is None or self._state.previous is None:
            raise StateError("there is no previous release to go back to")
        loaded = self._load(self._state.previous)
        self._step("roll back")
        self._write(self._state.go_back(reason, "rolled back").confirm())
        self._serve(loaded)
        return self.model.version

    def failure(self, version: int) -> Failure | None:
        """Why a release was given up on this device; None if it was not."""
        return self._state.failures.get(version)

    def status(self) -> dict[str, Any]:
        """What the agent runs and what its last check did; plain JSON values."""
        return read_status(self.config.state)

    def _start(self) -> None:
        """Load the active release, or the previous one when the active one is not fit."""
        while (active := self._state.active) is not None:
            problem: str | None = None
            proven = active.confirmed or self._state.previous is None
            if not proven and active.starts >= self.config.most_starts:
                starts = f"not confirmed after {active.starts} starts"
                self._go_back(f"release {active.version}: {starts}", "crash loop")
                continue
            if not proven:
                started = replace(active, starts=active.starts + 1)
                self._write(replace(self._state, active=started))
            try:
                loaded = self._load(active)
                seal, record = loaded.seal or active.optimised, self._state.active or active
                marked = replace(record, optimised=seal, passed=loaded.passed)
                self._write(replace(self._state, active=marked))
                self._serve(loaded)
                return
            except ReleaseError as error:
                self.telemetry.rejected(active.version, str(error))
                problem = f"release {active.version}: {error}"
                if not proven:
                    self._go_back(problem, "rolled back")
                    continue
            except NetworkError:
                raise  # the agent was asked to end, which says nothing about the release
            except EdgeError as error:
                problem = f"release {active.version}: {error}"
            # a damaged disk, or too little memory: the release itself may be fetched again
            self._step("drop slot")
            self._write(self._state.lose_active())
            record_check(self._folder, None, Counter(), problem)

    def _go_back(self, reason: str, kind: FailureKind) -> None:
        self._step("go back")
        self._write(self._state.go_back(reason, kind))

    def _activate(self, state: State, loaded: LoadedRelease) -> None:
        self._step("activate")
        self._write(state)
        self._step("swap")
        self._serve(loaded)

    def _serve(self, loaded: LoadedRelease) -> None:
        self.model.swap(loaded)
        self.telemetry.activated(loaded.manifest.version, loaded.difference)

    def _load(self, record: SlotRecord) -> LoadedRelease:
        slot = self._folder.slot(record.slot)
        manifest = verify_slot(slot, record.manifest)
        if self.config.optimise:
            quick = open_optimised(slot, manifest, record.optimised, **self._how())
            if quick is not None:
                return quick
        return self._open(slot, manifest, record.passed)

    def _open(
        self, slot: Path, manifest: ReleaseManifest, passed: str | None = None
    ) -> LoadedRelease:
        return open_slot(
            slot, manifest, optimise=self.config.optimise, passed=passed, **self._how()
        )

    def _how(self) -> dict[str, Any]:
        config = self.config
        poll = partial(self._wait, 0.0)  # raises when the agent is asked to end
        return {"threads": config.threads, "bounds": config.bounds, "poll": poll}

    def _update(
        self, counted: Counter[str], order: Order | None, superseded: Callable[[], bool]
    ) -> UpdateResult:
        self._step("refresh metadata")

        folder, config = self._folder, self.config
        listing = TrustedListing(
            config.url,
            folder.metadata,
            config.root,
            self._fetcher,
            lambda size: counted.update(metadata=size),
        )
        held = self._state.active.version if self._state.active else 0
        path = folder.downloads / "release.json"
        versions = listing.versions(config.name)
        if not versions and not held and (others := listing.names()):
            raise NoRelease(
                f"{config.url} lists no release named {config.name!r}; it has: {', '.join(others)}"
            )
        for version in candidates(order, versions, held):
            digest = listing.digest(config.name, version)
            if digest not in self._state.rejected:
                if order and (kept := self._exchange(version, digest)):
                    return kept
                if waits := self.config.waits(version, self._now()):
                    return UpdateResult("current", self.model.version, reason=waits)
                self._step("download manifest")
                manifest = listing.manifest(config.name, version, path)
                return self._install(manifest, digest, path, counted, superseded)
            if order:
                reason = f"what is ordered was rejected: {self._state.rejected[digest]}"
                return UpdateResult("current", self.model.version, reason=reason)
        nothing = None if versions or held else "the repository has no release yet"
        if order and order.version is None and not held:
            nothing = "nothing is ordered yet"
        return UpdateResult("current", self.model.version, reason=nothing)

    def _exchange(self, version: int, digest: str) -> UpdateResult | None:
        """Go back to the release in the other slot without a download; None if it is not there."""
        before, previous = self.model.version, self._state.previous
        if previous is None or (previous.version, previous.manifest) != (version, digest):
            return None
        try:
            loaded = self._load(previous)
        except NetworkError:
            raise
        except (EdgeError, ReleaseError):
            return None  # the repository has it, too
        self._activate(self._state.exchange(), loaded)
        reason = "it was in the other slot"
        return UpdateResult("updated", version, before, reason=reason, difference=loaded.difference)

    def _install(
        self,
        manifest: ReleaseManifest,
        digest: str,
        path: Path,
        counted: Counter[str],
        superseded: Callable[[], bool],
    ) -> UpdateResult:
        before = self.model.version
        if self._state.tries.get(digest, 0) >= _TRIES:
            return self._reject(manifest, digest, f"the self-test never ended in {_TRIES} tries")

        def check_order() -> None:
            if superseded():
                raise NetworkError(
                    f"release {manifest.version} is no longer ordered; what has come is kept"
                )

        def count(kind: str, size: int) -> None:
            counted.update({kind: size})
            check_order()
            if waits := self.config.waits(manifest.version, self._now()):
                raise NetworkError(f"{waits}; what has come is kept")

        active = self._state.active.slot if self._state.active else None
        acquirer = Acquirer(
            *(self.config, self._folder, active, self._fetcher),
            step=self._step, count=count, wait=self._wait,
        )  # fmt: skip
        files, (model, payload, reason) = acquirer.acquire(manifest)
        check_order()
        self._step("free slot")
        slot, prepared = self._state.free_slot()
        self._write(prepared)
        folder = self._folder.slot(slot)
        clear_slot(folder)
        self._step("build slot")
        build_slot(folder, path.read_bytes(), files, model)
        self._step("verify slot")
        verify_slot(folder, digest)
        self._step("self-test")
        self._write(self._state.tried(digest))
        try:
            loaded = self._open(folder, manifest)
        except ReleaseError as error:
            return self._reject(manifest, digest, str(error))
        record = SlotRecord(
            slot, manifest.version, digest, optimised=loaded.seal, passed=loaded.passed
        )
        self._activate(self._state.activate(record), loaded)
        self._step("clean up")
        shutil.rmtree(self._folder.downloads, ignore_errors=True)
        now, difference = manifest.version, loaded.difference
        return UpdateResult("updated", now, before, payload, reason=reason, difference=difference)

    def _reject(self, manifest: ReleaseManifest, digest: str, reason: str) -> UpdateResult:
        self._step("reject")
        self.telemetry.rejected(manifest.version, reason)
        reason = f"release {manifest.version}: {reason}"
        rejected = self._state.reject(digest, manifest.version, reason, "self-test failed")
        self._write(rejected)
        shutil.rmtree(self._folder.downloads, ignore_errors=True)
        return UpdateResult("rejected", self.model.version, reason=reason)

    def _write(self, state: State) -> None:
        if state != self._state:
            self._folder.write(state)
            self._state = state

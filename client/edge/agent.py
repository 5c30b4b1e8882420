"""The agent on a device: notice, download, verify, activate, go back."""

from __future__ import annotations

import logging
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
from typing import Any, Self, TypeGuard

from prunecast.client.edge.config import AgentConfig, Order, UpdateResult, candidates
from prunecast.client.edge.errors import (
    EdgeError,
    NetworkError,
    NoRelease,
    StateError,
)
from prunecast.client.edge.keeper import Keeper
from prunecast.client.edge.model import EdgeModel
from prunecast.client.edge.records import Failure, SlotRecord
from prunecast.client.edge.serving import Serving
from prunecast.client.edge.slots.slot import (
    build_slot,
    clear_slot,
    forget_slot,
    verify_slot,
)
from prunecast.client.edge.starts import Begun
from prunecast.client.edge.state import StateFolder, read_status
from prunecast.client.edge.telemetry import Telemetry
from prunecast.client.edge.updating.acquire import Acquirer
from prunecast.client.edge.updating.transport import Fetcher, HttpFetcher
from prunecast.client.edge.updating.trust import TrustedListing
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.manifest import ReleaseManifest, check_release_name

__all__ = ["Agent"]

_TRIES = 3
_SAVE_EVERY = 900.0  # seconds between writes of telemetry: flash wears out
_NO_CRASH = (EdgeError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit)
"""What may end the agent and speaks against no release."""

_log = logging.getLogger(__name__)


class Agent:
    """Follows one release on one device; a context manager.

    Attributes:
        on_confirmed: called when the active release has proved itself, in the thread of `run`.

    Args:
        config: see `AgentConfig`.
        fetcher: the network; default `HttpFetcher` with its defaults.
        on_step: called with the name of every step before it begins.
        wait: sleeps for so many seconds between attempts to download.
        now: local time, for the quiet hours.
        on_warning: called with what is wrong and does not keep the agent from its work; by
            default it is logged.

    Leaving it by an exception that is not about files, the network or the repository counts as a
    crash of the release that runs.

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
        on_warning: Callable[[str], None] = _log.warning,
    ) -> None:
        check_release_name(config.name)
        self.config = config
        self._crashed = False
        self._fetcher = fetcher or HttpFetcher()
        self._step, self._wait, self._now = on_step, wait, now
        self._folder = StateFolder(config.state)
        self._kept = Keeper(config, self._folder, on_warning, lambda: self.on_confirmed())
        self._resources = ExitStack()
        self._resources.enter_context(self._folder.locked())
        self.telemetry = Telemetry(config.state)
        self.model = EdgeModel(observe=self.telemetry.observe)
        self.on_confirmed: Callable[[], None] = lambda: None
        self._resources.enter_context(self.telemetry.saving(_SAVE_EVERY))
        self._serving = Serving(
            *(config, self._folder, self._kept),
            model=self.model, telemetry=self.telemetry, step=on_step, wait=wait,
        )  # fmt: skip
        try:
            self._kept.read()
            self._serving.start()
            if (refuses := self._folder.refuses) is not None:
                if self.model.version is None:
                    raise StateError(refuses)
                self._kept.tell(
                    f"{refuses}; release {self.model.version} is served, and nothing is updated, "
                    "confirmed or counted before it can be written"
                )
        except BaseException as error:
            self._crashed = not isinstance(error, _NO_CRASH)
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._crashed = self._crashed or not (kind is None or issubclass(kind, _NO_CRASH))
        self.close()

    def close(self) -> None:
        """End by itself and release the state folder; the model can still be used."""
        if not self._crashed:
            self._kept.note_service(self.model.version, ending=True)
            self._kept.end()
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
        self._crashed = False  # whatever it was, the program goes on
        try:
            result = self._update(counted, order, superseded)
        except EdgeError as error:
            self._kept.record(None, counted, str(error))
            raise
        except BaseException as error:
            self._crashed = not isinstance(error, _NO_CRASH)
            raise
        result = replace(result, downloaded=dict(counted), seconds=time.monotonic() - begun)
        problem = result.reason if result.outcome == "rejected" else None
        self._kept.record(result, counted, problem)
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
        self._kept.serves_since = time.monotonic()
        wanted: Order | None = None

        def superseded() -> bool:
            return order() != wanted

        while not stop.is_set():
            if wake:
                wake.clear()  # before asking: what changes from now on wakes again
                if stop.is_set():  # its wake may be the one that was cleared
                    break
            wanted = order()
            try:
                outcome: UpdateResult | EdgeError = self.update_once(wanted, superseded=superseded)
            except EdgeError as error:
                outcome = error
            on_result(outcome)
            wakes = time.monotonic() + interval * draw.uniform(1 - jitter, 1 + jitter)
            while (left := wakes - time.monotonic()) > 0:
                if bell.wait(min(left, self._kept.note_service(self.model.version))):
                    break
        self._kept.note_service(self.model.version, ending=True)
        self._kept.serves_since = None

    def _serves(self, record: SlotRecord | None) -> TypeGuard[SlotRecord]:
        return record is not None and record.version == self.model.version

    def confirm(self) -> None:
        """The active release has proved itself: the agent will not go back from it by itself."""
        if self._serves(active := self._kept.state.active) and not active.confirmed:
            self._kept.confirm()

    @property
    def confirmed(self) -> bool:
        """Whether the release that is served has proved itself."""
        active = self._kept.state.active
        return self._serves(active) and active.confirmed

    def roll_back(self, reason: str) -> int | None:
        """Go back to the previous release and never try the active one again.

        Args:
            reason: recorded in the status, for instance which health figure got worse.

        Returns:
            The version that is active now.

        Raises:
            StateError: there is no previous release, or it is not intact.
        """
        if self._kept.state.active is None or self._kept.state.previous is None:
            raise StateError("there is no previous release to go back to")
        loaded = self._serving.load(self._kept.state.previous)
        self._step("roll back")
        given_up = self._kept.state.active
        self._kept.write(self._kept.state.go_back(reason, "rolled back").confirm())
        forget_slot(self._folder.slot(given_up.slot))
        self._serving.serve(loaded)
        return self.model.version

    def failure(self, version: int) -> Failure | None:
        """Why a release was given up on this device; None if it was not."""
        return self._kept.state.failures.get(version)

    def status(self) -> dict[str, Any]:
        """What the agent runs and what its last check did; plain JSON values."""
        return read_status(self.config.state)

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
            partial(self._kept.warn, status=True),
        )
        held = self._kept.state.active.version if self._kept.state.active else 0
        path = folder.downloads / "release.json"
        versions = listing.versions(config.name)
        if not versions and not held and (others := listing.names()):
            raise NoRelease(
                f"{config.url} lists no release named {config.name!r}; it has: {', '.join(others)}"
            )
        for version in candidates(order, versions, held):
            digest = listing.digest(config.name, version)
            if digest not in self._kept.state.rejected:
                if order and (kept := self._exchange(version, digest)):
                    return kept
                if waits := self.config.waits(version, self._now()):
                    return UpdateResult("current", self.model.version, reason=waits)
                self._step("download manifest")
                manifest = listing.manifest(config.name, version, path)
                return self._install(manifest, digest, path, counted, superseded)
            if order:
                reason = f"what is ordered was rejected: {self._kept.state.rejected[digest]}"
                return UpdateResult("current", self.model.version, reason=reason)
        nothing = None if versions or held else "the repository has no release yet"
        if order and order.version is None and not held:
            nothing = "nothing is ordered yet"
        return UpdateResult("current", self.model.version, reason=nothing)

    def _exchange(self, version: int, digest: str) -> UpdateResult | None:
        """Go back to the release in the other slot without a download; None if it is not there."""
        before, previous = self.model.version, self._kept.state.previous
        if previous is None or (previous.version, previous.manifest) != (version, digest):
            return None
        try:
            loaded = self._serving.load(previous)
        except NetworkError:
            raise
        except (EdgeError, ReleaseError):
            return None  # the repository has it, too
        self._serving.activate(self._kept.state.exchange(), loaded)
        reason = "it was in the other slot"
        return UpdateResult(
            *("updated", version, before),
            reason=reason, difference=loaded.difference, settings=loaded.session.settings,
        )  # fmt: skip

    def _install(
        self,
        manifest: ReleaseManifest,
        digest: str,
        path: Path,
        counted: Counter[str],
        superseded: Callable[[], bool],
    ) -> UpdateResult:
        before = self.model.version
        if self._kept.state.gives_up(digest, _TRIES):
            return self._reject(manifest, digest, f"the self-test never ended in {_TRIES} tries")

        def check_order() -> None:
            if superseded():
                raise NetworkError(
                    f"release {manifest.version} is no longer ordered; what has come is kept"
                )

        def count(kind: str, size: int) -> None:
            counted.update({kind: size})
            self._kept.note_service(self.model.version)
            check_order()
            if waits := self.config.waits(manifest.version, self._now()):
                raise NetworkError(f"{waits}; what has come is kept")

        active = self._kept.state.active.slot if self._kept.state.active else None
        acquirer = Acquirer(
            *(self.config, self._folder, active, self._fetcher),
            step=self._step, count=count, wait=self._wait,
        )  # fmt: skip
        with self._kept.noted(Begun.now("install")):
            files, (model, payload, reason) = acquirer.acquire(manifest)
            check_order()
            self._step("free slot")
            slot, prepared = self._kept.state.free_slot()
            self._kept.write(prepared)
            folder = self._folder.slot(slot)
            clear_slot(folder)
            self._step("build slot")
            build_slot(folder, path.read_bytes(), files, model)
            self._step("verify slot")
            verify_slot(folder, digest)
            self._step("self-test")
        try:
            with self._kept.noted(replace(Begun.now("install"), trying=digest)):
                loaded = self._serving.open(folder, manifest)
        except ReleaseError as error:
            forget_slot(folder)
            return self._reject(manifest, digest, str(error))
        record = SlotRecord(
            slot, manifest.version, digest, optimised=loaded.seal, passed=loaded.passed
        )
        self._serving.activate(self._kept.state.activate(record), loaded)
        self._step("clean up")
        shutil.rmtree(self._folder.downloads, ignore_errors=True)
        return UpdateResult(
            *("updated", manifest.version, before, payload),
            reason=reason, difference=loaded.difference, settings=loaded.session.settings,
        )  # fmt: skip

    def _reject(self, manifest: ReleaseManifest, digest: str, reason: str) -> UpdateResult:
        self._step("reject")
        self.telemetry.rejected(manifest.version, reason)
        reason = f"release {manifest.version}: {reason}"
        rejected = self._kept.state.reject(digest, manifest.version, reason, "self-test failed")
        self._kept.write(rejected)
        shutil.rmtree(self._folder.downloads, ignore_errors=True)
        return UpdateResult("rejected", self.model.version, reason=reason)

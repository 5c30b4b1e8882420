"""Inference on whatever release is active, without downtime while it changes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunecast.client.edge.config import Bounds, memory_bytes
from prunecast.client.edge.errors import (
    EdgeError,
    NoModel,
    StateDamaged,
    StateError,
    VersionNotActive,
)
from prunecast.client.edge.records import State
from prunecast.client.edge.slots.slot import LoadedRelease, open_optimised, open_slot, verify_slot
from prunecast.client.edge.state import StateFolder
from prunecast.client.edge.telemetry import InferenceOutcome
from prunecast.compression.release import InputRefused, ReleaseError
from prunecast.compression.release.manifest import ReleaseManifest

__all__ = ["EdgeModel", "Inference", "Observer", "open_model"]

Observer = Callable[[int, InferenceOutcome, float], None]
"""Hears of every inference: the release, how it ended, and after how many seconds. It must be quick
and must not raise. ``refused``: the input did not fit; ``failed``: the model failed."""


@dataclass(frozen=True)
class Inference:
    """Outputs by name, and the release that computed all of them."""

    outputs: dict[str, NDArray[np.generic]]
    version: int


class EdgeModel:
    """The active release; the object stays, what it runs changes by one assignment.

    `run` may be called from several threads. A call that is in progress while a new release is
    activated finishes on the session it began with, so no call ever mixes two versions.
    """

    def __init__(
        self, loaded: LoadedRelease | None = None, *, observe: Observer | None = None
    ) -> None:
        self._loaded, self._observe = loaded, observe

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Outputs by name for inputs by name; dtypes and shapes as in `manifest`.

        Raises:
            NoModel: no release is active yet.
            InputRefused: an input does not fit.
            RuntimeFailure: the model failed.
        """
        return self.infer(inputs).outputs

    def infer(
        self,
        inputs: Mapping[str, NDArray[np.generic]],
        *,
        version: int | None = None,
        seconds: float = math.inf,
    ) -> Inference:
        """Like `run`, and says which release computed the outputs.

        Args:
            inputs: arrays by name.
            version: the release that must compute them; None takes whichever is active.
            seconds: after which the inference is broken off.

        Raises:
            OutOfTime: it took longer than `seconds`.
            OutOfMemory: it needs more memory than the release may take.
            VersionNotActive: another release than `version` is active.
        """
        loaded = self.current(version)
        active = loaded.manifest.version
        begun = time.perf_counter()
        outcome: InferenceOutcome = "failed"
        try:
            outputs = loaded.session.run(inputs, seconds=seconds)
            outcome = "answered"
        except InputRefused:
            outcome = "refused"
            raise
        finally:
            if self._observe is not None:
                self._observe(active, outcome, time.perf_counter() - begun)
        return Inference(outputs, active)

    @property
    def manifest(self) -> ReleaseManifest:
        """Manifest of the active release.

        Raises:
            NoModel: no release is active yet.
        """
        return self.current().manifest

    @property
    def version(self) -> int | None:
        """Number of the active release; None when there is none."""
        loaded = self._loaded
        return loaded.manifest.version if loaded else None

    def swap(self, loaded: LoadedRelease | None) -> None:
        """Serve another release from now on; called by the agent."""
        self._loaded = loaded

    def current(self, version: int | None = None) -> LoadedRelease:
        """The active release: manifest and session that belong together.

        Raises:
            NoModel: no release is active yet.
            VersionNotActive: another release than `version` is active.
        """
        loaded = self._loaded
        if loaded is None:
            raise NoModel("no release is active yet: run an update first")
        if version not in (None, active := loaded.manifest.version):
            raise VersionNotActive(f"release {version} is not active: release {active} is")
        return loaded


def open_model(
    state: Path | str, *, threads: int | None = None, bounds: Bounds | None = None
) -> EdgeModel:
    """The active release of a state folder, verified and self-tested, without any network.

    Safe while an agent updates the same folder. The model does not follow later updates.

    Args:
        state: the agent's folder.
        threads: of the session.
        bounds: what the release may cost; None: inferences may take all memory.

    Raises:
        NoModel: no release is active there.
        StateError: neither the active release nor the one before it is intact.
    """
    bounds = bounds or Bounds(inference_bytes=memory_bytes())
    folder = StateFolder(state)
    problem: Exception | None = None
    for _ in range(3):  # an agent may activate and rebuild a slot while it is being read
        found = _read(folder)
        records = [r for r in (found.active, found.previous) if r] if found else []
        if not records:
            raise NoModel(f"no release is active in {folder.path}: run an update first")
        for record in records:
            slot = folder.slot(record.slot)
            try:
                manifest = verify_slot(slot, record.manifest)
                quick = open_optimised(
                    *(slot, manifest, record.optimised),
                    threads=threads, mark=False, bounds=bounds,
                )  # fmt: skip
                return EdgeModel(
                    quick
                    or open_slot(
                        slot, manifest, threads=threads, bounds=bounds, passed=record.passed
                    )
                )
            except (EdgeError, ReleaseError) as error:
                problem = error
    raise StateError(f"no intact release in {folder.path}: {problem}; run an update")


def _read(folder: StateFolder) -> State | None:
    try:
        return folder.read()
    except StateDamaged:
        from prunecast.client.edge.recovery import recover_state

        return recover_state(folder)

"""Inference on whatever release is active, without downtime while it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prunecast.client.edge.errors import EdgeError, NoModel, StateError
from prunecast.client.edge.slot import LoadedRelease, open_slot, verify_slot
from prunecast.client.edge.store import StateFolder
from prunecast.compression.onnx import OnnxError, ReleaseManifest

__all__ = ["EdgeModel", "Inference", "open_model"]


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

    def __init__(self, loaded: LoadedRelease | None = None) -> None:
        self._loaded = loaded

    def run(self, inputs: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        """Outputs by name for inputs by name; dtypes and shapes as in `manifest`.

        Raises:
            NoModel: no release is active yet.
            RuntimeFailure: an input does not fit.
        """
        return self.infer(inputs).outputs

    def infer(self, inputs: Mapping[str, NDArray[np.generic]]) -> Inference:
        """Like `run`, and says which release computed the outputs."""
        loaded = self._current()
        return Inference(loaded.session.run(inputs), loaded.manifest.version)

    @property
    def manifest(self) -> ReleaseManifest:
        """Manifest of the active release.

        Raises:
            NoModel: no release is active yet.
        """
        return self._current().manifest

    @property
    def version(self) -> int | None:
        """Number of the active release; None when there is none."""
        loaded = self._loaded
        return loaded.manifest.version if loaded else None

    def swap(self, loaded: LoadedRelease | None) -> None:
        """Serve another release from now on; called by the agent."""
        self._loaded = loaded

    def _current(self) -> LoadedRelease:
        loaded = self._loaded
        if loaded is None:
            raise NoModel("no release is active yet: run an update first")
        return loaded


def open_model(state: Path | str, *, threads: int | None = None) -> EdgeModel:
    """The active release of a state folder, verified and self-tested, without any network.

    Safe while an agent updates the same folder. The model does not follow later updates.

    Raises:
        NoModel: no release is active there.
        StateError: neither the active release nor the one before it is intact.
    """
    folder = StateFolder(state)
    problem: Exception | None = None
    for _ in range(3):  # an agent may activate and rebuild a slot while it is being read
        found = folder.read()
        records = [r for r in (found.active, found.previous) if r] if found else []
        if not records:
            raise NoModel(f"no release is active in {folder.path}: run an update first")
        for record in records:
            slot = folder.slot(record.slot)
            try:
                manifest = verify_slot(slot, record.manifest)
                return EdgeModel(open_slot(slot, manifest, threads=threads))
            except (EdgeError, OnnxError) as error:
                problem = error
    raise StateError(f"no intact release in {folder.path}: {problem}; run an update")

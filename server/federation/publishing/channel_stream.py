"""The channels of one stream's model: tried, removed, and told to the nodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from logging import INFO
from typing import Any

from numpy.typing import NDArray

from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.plan import PlanError, PruningPlan
from prunecast.compression.pruning.structure.channels import ChannelChooser, ChannelPlan
from prunecast.compression.versions import PublishedModel
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.masks.pruner import Pruner
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.publishing.version_stream import VersionStream

__all__ = ["ChannelStream"]

_ALL = ChannelPlan({})
_NEAR = 1e-6  # relative: what rounding makes of a share


class ChannelStream(VersionStream):
    """A stream whose model has fewer channels in time, or zeros in their place on trial.

    `Publisher` tells its arguments and attributes.
    """

    def __init__(self, policy: Policy, stream: bytes, plan: PruningPlan | None) -> None:
        super().__init__(policy, stream)
        self.pruner = Pruner(policy, plan)
        self.channels: ChannelPlan | None = None
        self.choose: ChannelChooser | None = None
        self.tried: dict[float, ChannelPlan] = {}
        # what the last version has zeros of, and its master
        self._trial: tuple[ChannelPlan, Mapping[str, NDArray[Any]]] | None = None
        self._removals: list[ChannelPlan] = []
        self._unaware: set[bytes] = set()  # of the history, what nodes hold with more channels

    def remove(self, plan: ChannelPlan) -> None:
        """Go on without the channels that a plan removes of the latest version.

        Whatever is kept of earlier versions goes on with the part that remains, so that payloads
        build on what nodes hold: they narrow it by the same plan. Masters that are handed over
        with all of the channels are narrowed, too.

        Raises:
            PlanError: the plan is of another model; nothing was changed.
        """
        shapes = (
            {} if self._latest is None else {n: t.shape for n, t in self._latest.tensors.items()}
        )
        channels = plan if self.channels is None else self.channels.then(plan)
        latest = None if self._latest is None else plan.narrow(self._latest)
        history = self.history.narrowed(plan)
        self.pruner.remove(plan, shapes)  # the last that may raise
        self.channels, self._latest, self.history = channels, latest, history
        self._removals.append(plan)
        self.tried.clear()
        self._trial = None
        self._unaware |= set(self.history)

    def _keep(self, model: PublishedModel) -> PublishedModel:
        super()._keep(model)
        self._unaware.intersection_update(self.history)
        return model

    def narrowed(self, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
        """Arrays of the model without the channels that have gone since they were of it."""
        for plan in self._removals:
            if plan.fits({name: array.shape for name, array in arrays.items()}):
                arrays = plan.arrays(arrays)
        return arrays

    def unknown_channels(self, version: Version, held: bytes | None) -> bytes | None:
        """The plan of channels as it travels, for a node that does not know it; else None.

        Args:
            version: that the node is sent.
            held: short digest of the version the node says it holds; None for none.
        """
        if self.slices is not None:
            if held in self._bases(version) or (held is None and version.plan is None):
                return None
            # of a node whose class was another, all channels may be what is new to it
            return (version.plan or _ALL).coded
        if self.channels is None or (held in self.history and held not in self._unaware):
            return None
        return self.channels.coded

    @property
    def settled(self) -> ChannelPlan | None:
        """The channels that automatic pruning has found to be dispensable, and that are there."""
        search = self.pruner.search
        if search is None or not search.is_settled("channels"):
            return None
        found = self.tried.get(self._part())
        return found if found is not None and found.kept else None

    def _part(self) -> float:
        """Of the channels that are there, those that the search leaves."""
        there = 1.0 if self.channels is None else self.channels.share
        part = self.pruner.channels / there
        return part if part < 1 - _NEAR else 1.0

    def _without_tried(
        self, model: PublishedModel, master: Mapping[str, NDArray[Any]]
    ) -> PublishedModel:
        """A model in which the channels that are tried are zero; the master keeps them."""
        part, self._trial = self._part(), None
        # what is gone back to is what held
        self.tried = {share: plan for share, plan in self.tried.items() if share >= part}
        if part == 1:
            return model
        if part not in self.tried:
            assert self.choose is not None
            try:
                plan = self.choose(master, self.pruner.channels, self.channels)
            except PlanError as error:  # a layer has too few of them: as many go as before
                log(INFO, "No further channels are tried: %s.", error)
                plan = self.tried[min(self.tried)] if self.tried else _ALL
            self.tried[part] = replace(plan, share=part)
        self._trial = self.tried[part], master
        return self.tried[part].zeroed(model)

    def _restored(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Arrays in which channels on trial are as they were: of them nodes saw zeros."""
        restored = dict(arrays)
        plan, before = self._trial or (_ALL, {})
        for name in plan.kept.keys() & arrays.keys() & before.keys():
            last, array = before[name], arrays[name]
            if last.shape == array.shape:
                places = plan.places(name, array.shape)
                restored[name] = last.astype(array.dtype)
                restored[name][places] = array[places]
        return restored

"""The channels of one stream's model: tried, removed, and told to the nodes."""

from __future__ import annotations

from collections.abc import Mapping
from logging import INFO
from typing import Any

from numpy.typing import NDArray

from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.plan import PlanError, PruningPlan, Shares
from prunecast.compression.pruning.structure.channels import ChannelChooser, ChannelPlan
from prunecast.compression.versions import PublishedModel
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.masks.pruner import Pruner
from prunecast.server.federation.publishing.version import Version
from prunecast.server.federation.publishing.version_stream import VersionStream
from prunecast.server.federation.shrinking.choosing import chosen

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
        self.tried: dict[Shares, ChannelPlan] = {}
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
        """What automatic pruning has found to be dispensable, and what is there."""
        search, parts = self.pruner.search, self._parts()
        going = [kind for kind in Shares._fields if getattr(parts, kind) < 1]
        if search is None or not all(map(search.is_settled, going)):
            return None
        found = self.tried.get(parts)
        return None if found is None or _is_empty(found) else found

    @property
    def _there(self) -> Shares:
        return Shares() if self.channels is None else self.channels.shares

    def _wanted(self) -> Shares:
        """What the search leaves of the channels, heads and layers that are there."""
        parts = [left / there for left, there in zip(self.pruner.left, self._there, strict=True)]
        return Shares(*(part if part < 1 - _NEAR else 1.0 for part in parts))

    def _parts(self) -> Shares:
        """The same, but for what no plan could be made for: nothing of that goes.

        One knob is turned at a time, and the next once what the last one found has gone: so it is
        less than 1 of one kind at most.
        """
        search, wanted = self.pruner.search, self._wanted()
        assert search is not None or min(wanted) == 1
        none = {
            kind: 1.0
            for kind, part in zip(Shares._fields, wanted, strict=True)
            if search is not None and search.is_settled(kind)
            and _is_empty(self.tried.get(Shares()._replace(**{kind: part})))
        }  # fmt: skip
        return wanted._replace(**none)

    def _without_tried(
        self, model: PublishedModel, master: Mapping[str, NDArray[Any]]
    ) -> PublishedModel:
        """A model in which what is tried is zero; the master keeps it."""
        parts, self._trial = self._parts(), None
        # what is gone back to is what held
        least = self._wanted()
        self.tried = {
            held: plan
            for held, plan in self.tried.items()
            if all(a >= b for a, b in zip(held, least, strict=True))
        }
        if min(parts) == 1:
            return model
        if parts not in self.tried:
            assert self.choose is not None
            there, left = self._there, self.pruner.left
            wanted = Shares(
                *(b if p < 1 else a for a, b, p in zip(there, left, parts, strict=True))
            )
            try:
                plan = chosen(self.choose, master, wanted, self.channels)
            except PlanError as error:  # a layer has too few of them: as many go as before
                log(INFO, "No more are tried: %s.", error)
                kind = parts.index(min(parts))
                before = [held for held in self.tried if held[kind] < 1]
                plan = self.tried[min(before, key=min)] if before else _ALL
            self.tried[parts] = plan.of_shares(parts)
        self._trial = self.tried[parts], master
        return self.tried[parts].zeroed(model)

    def _restored(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Arrays in which what is on trial is as it was: of it nodes saw zeros."""
        restored = dict(arrays)
        plan, before = self._trial or (_ALL, {})
        for name in arrays.keys() & before.keys():
            last, array = before[name], arrays[name]
            if last.shape == array.shape and (name in plan.kept or plan.loses(name)):
                restored[name] = last.astype(array.dtype)
                if name in plan.kept:
                    places = plan.places(name, array.shape)
                    restored[name][places] = array[places]
        return restored


def _is_empty(plan: ChannelPlan | None) -> bool:
    """Whether a plan was made, of which nothing goes."""
    return plan is not None and not (plan.kept or plan.gone)

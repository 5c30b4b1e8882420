"""A published version, and the payloads that bring it to nodes."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flwr.app import ArrayRecord
from numpy.typing import NDArray

from prunecast.compression.flower.internals import Measured
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import Kind, PublishedModel, Seed, UpdateReader

__all__ = ["EncodedPayload", "Version"]


@dataclass(frozen=True)
class EncodedPayload:
    """One payload, in one record for every node that needs it, so that Flower uploads it once."""

    kind: Kind
    record: ArrayRecord

    @property
    def data(self) -> bytes:
        """The payload itself."""
        return next(iter(self.record.values())).data

    @cached_property
    def measured(self) -> Measured:
        """The record, measured once for all nodes."""
        return Measured(self.record)


@dataclass
class Version:
    """A published model, the master weights it was published from, the seed it was drawn from.

    Attributes:
        width: the class of nodes that it is the slice of; "" for all of the model.
        plan: which channels this leaves; None for all.
        whole: master weights of all of the model.
        slices: of this version, by class.
        densely: the model as plain Flower sends it, once a node needs it so.
    """

    model: PublishedModel
    master: Mapping[str, NDArray[Any]]
    seed: Seed | None = None
    payloads: dict[bytes | None, EncodedPayload] = field(default_factory=dict)
    width: str = ""
    plan: ChannelPlan | None = None
    whole: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    slices: dict[str, Version] = field(default_factory=dict)
    densely: ArrayRecord | None = None
    _reader: weakref.ref[UpdateReader] | None = field(default=None, init=False, repr=False)

    def reader(self, stream: bytes) -> UpdateReader:
        """Reads updates that were trained from it: the same object as long as one of them lives."""
        reader = self._reader() if self._reader is not None else None
        if reader is None:
            reader = UpdateReader(self.model, stream=stream)
            self._reader = weakref.ref(reader)
        return reader

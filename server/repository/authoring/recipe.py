"""What releases are made from: one recipe for people, for running federations and simulations.

The architecture is a graph, a torch module or an ``.onnx`` file; the weights are a published model
or a dense checkpoint, or lie in that file; samples and inputs say what is measured and tested. A
recipe holds whatever stays the same from release to release.

============== ===================================================== ==========================
variant        the device computes                                   its weights
============== ===================================================== ==========================
``fp32``       in floats                                             float32 in `weights.bin`
``int8``       in floats, the same values                            the published integers
``int8-qdq``   convolutions and linear layers in integers            the published integers
``structured`` ``int8`` on fewer channels, heads or layers           the published integers
============== ===================================================== ==========================

A variant is a release of its own name: a device follows one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prunecast.common.files import cache_folder
from prunecast.common.npz import NpzArchive
from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.onnx.lattice import STEPS, Steps
from prunecast.compression.pruning.plan import Shares
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.release.runtime import open_session
from prunecast.compression.release.selftest import Arrays
from prunecast.compression.versions import LatticeTensor, PublishedModel
from prunecast.server.repository.authoring.build import ReleaseContents
from prunecast.server.repository.authoring.gains import gains_of
from prunecast.server.repository.authoring.modules import Architecture, export_module, plan_of
from prunecast.server.repository.authoring.sources import GraphFile, from_arrays, from_onnx
from prunecast.server.repository.authoring.variants import (
    Samples,
    make_variant,
    reference_outputs,
    run_samples,
    split_samples,
)
from prunecast.server.repository.errors import RecipeError
from prunecast.server.repository.reading import RepositoryReader
from prunecast.server.repository.repository import PublishedRelease, Repository

__all__ = ["VARIANTS", "NewestRelease", "ReleaseRecipe", "read_recipe"]

T = TypeVar("T")

VARIANTS = ("fp32", "int8", "int8-qdq", "structured")
_SELFTEST = 4  # samples, where no inputs are given
_HALF = 0.5  # of the channels, where a structured variant does not say


@dataclass(frozen=True)
class NewestRelease:
    """What devices that follow a name hold: the next release keeps to it where that saves bytes.

    Attributes:
        repository: where it is published.
        name: of the releases; there need not be one yet.
    """

    repository: RepositoryReader
    name: str

    @cached_property
    def manifest(self) -> ReleaseManifest | None:
        """Of the newest live release."""
        live = [entry for entry in self.repository.releases() if entry.name == self.name]
        return self.repository.show(self.name, live[-1].version) if live else None

    @cached_property
    def model(self) -> PublishedModel | None:
        """Its weights."""
        return self.repository.model(self.manifest) if self.manifest else None

    @cached_property
    def graph(self) -> bytes | None:
        """Its `model.onnx`."""
        return self.repository.blob(self.manifest.files["model.onnx"]) if self.manifest else None


@dataclass(frozen=True, kw_only=True)
class ReleaseRecipe:
    """How releases are made, apart from their weights.

    Attributes:
        graph: the architecture; give this, `module` or `onnx`. One that lies in a file is read and
            run in a process of its own.
        module: makes a torch module, which is exported.
        onnx: an ``.onnx`` file with its weights.
        selftest: a few real inputs by name, or one array where there is one input; by default the
            first `samples`, for an ``.onnx`` file drawn ones.
        samples: real inputs that activations and the distance from float32 are measured on.
        variant: one of `VARIANTS`; ``lattice`` is what ``int8`` was called.
        channels: share of the channels that remain of a module, with any variant.
        heads: share of the heads of every attention layer that remain; likewise.
        layers: share of the residual layers that remain, those of the greatest effect on `samples`,
            or else on `selftest`; likewise.
        removed: channels, heads and layers of the module that are gone already, as the weights were
            trained without them.
        bits: 2 to 16, puts dense weights on a lattice; None leaves them as they are.
        steps: how its steps are chosen, see `prunecast.compression.onnx.lattice`.
        most_difference: of an ``.onnx`` file's outputs, relative; more is refused.
        seed: of drawn inputs.
        licence: SPDX expression of the weights.
        cache: folder of exported graphs; None for the user's own.
        max_bytes: of memory that reading and running a graph's or ``.onnx`` file may take; None for
            1 GiB, or 64 times what is read if that is more.
        max_seconds: that making its release may take; None for 40, and one for every megabyte.
        measure: count and time it beside the whole model, which takes seconds; see `gains_of`.

    Raises:
        RecipeError: names the field that is missing or does not go with the others.
    """

    graph: ExportedGraph | GraphFile | None = None
    module: Callable[[], object] | None = None
    onnx: Path | None = None
    selftest: Arrays | NDArray[np.generic] | None = None
    samples: Samples | None = None
    variant: str = "int8"
    channels: float | None = None
    heads: float | None = None
    layers: float | None = None
    removed: ChannelPlan | None = None
    bits: int | None = None
    steps: Steps = "held"
    most_difference: float | None = None
    seed: int = 0
    licence: str | None = None
    cache: Path | None = None
    max_bytes: int | None = None
    max_seconds: float | None = None
    measure: bool = False

    def __post_init__(self) -> None:
        if self.variant not in (*VARIANTS, "lattice"):
            raise RecipeError("variant", f"must be {', '.join(VARIANTS)}, not {self.variant!r}")
        if self.steps not in STEPS:
            raise RecipeError("steps", f"must be {', '.join(STEPS)}, not {self.steps!r}")
        if sum(part is not None for part in (self.graph, self.module, self.onnx)) != 1:
            raise RecipeError("module", "give either a module or a graph, or an .onnx file")
        if self.onnx is None and self.selftest is None and self.samples is None:
            raise RecipeError("selftest", "a release needs inputs for its self-test, or samples")
        if self.module is None and self.removed is not None:
            raise RecipeError(
                "module",
                "is needed, since the weights were trained without some of its channels: a graph "
                "or an .onnx file has them all",
            )
        if self.module is None and self.shares is not None:
            part = next((n for n in Shares._fields if getattr(self, n) is not None), "channels")
            if self.onnx is not None:
                raise RecipeError(part, "are removed from a torch module: give that")
            has = self._shares_of_graph
            if has is None:
                raise RecipeError(part, f"the graph has all {part}: give the module")
            if self.shares != has:
                raise RecipeError(part, f"the graph has {has.text()}")

    @property
    def shares(self) -> Shares | None:
        """What remains of channels, heads and layers; None for all, or for what the graph has."""
        given = self.channels, self.heads, self.layers
        if all(part is None for part in given):
            return Shares(channels=_HALF) if self.variant == "structured" else None
        return Shares(*(1.0 if part is None else part for part in given))

    @property
    def _shares_of_graph(self) -> Shares | None:
        if isinstance(self.graph, GraphFile):
            return self.graph.shares
        return self._plan.shares if self._plan is not None else None

    @cached_property
    def _plan(self) -> ChannelPlan | None:
        return plan_of(self.graph.skeleton) if isinstance(self.graph, ExportedGraph) else None

    def _made(self) -> object:
        """The module, without the channels that are gone already."""
        assert self.module is not None
        made = self.module()
        if self.removed is None:
            return made
        from prunecast.compression.pruning.structure.narrowing import fit_module

        return fit_module(made, self.removed)  # type: ignore[arg-type]

    def prepared(self) -> ReleaseRecipe:
        """The same recipe with its module exported, where every release has the same graph.

        Raises:
            RecipeError, ExportError: it cannot be exported.
        """
        if self.module is None or self.shares is not None:
            return self
        made = export_module(self._made, None, self._named_inputs(), cache=self._cache)
        return replace(self, module=None, removed=None, graph=made.graph)

    def make(
        self,
        model: PublishedModel | None = None,
        metrics: Mapping[str, float] | None = None,
        *,
        newest: NewestRelease | None = None,
    ) -> ReleaseContents:
        """Everything that is released but payloads: takes seconds to minutes, publishes nothing.

        Args:
            model: the weights; None where an ``.onnx`` file holds them.
            metrics: measured on the model.
            newest: what devices hold.

        Raises:
            RecipeError: weights are missing, or on a lattice already when `bits` is given.
            RepositoryError, ReleaseError, PlanError: the parts do not fit together.
        """
        if model is None and self.onnx is None:
            raise RecipeError("model", "is missing: a graph or a module has no weights")
        wanted = self.bits is not None or self.variant == "int8-qdq" or self.onnx is not None
        held = newest.model if newest is not None and wanted else None
        if self.onnx is not None or isinstance(self.graph, GraphFile):
            from prunecast.server.repository.authoring.foreign import make_bounded

            made = make_bounded(self, model, held)
        else:
            narrow = self.module is not None and self.shares is not None
            made = self.make_here(model, held, newest.graph if newest and narrow else None)
        return replace(made, metrics={**made.metrics, **(metrics or {})}, licence=self.licence)

    def make_here(
        self,
        model: PublishedModel | None,
        held: PublishedModel | None,
        held_graph: bytes | None = None,
    ) -> ReleaseContents:
        """What `make` does, in this process, whatever files it reads.

        Args:
            model: the weights; None where an ``.onnx`` file holds them.
            held: the newest live version of the same release.
            held_graph: its `model.onnx`, where channels, heads or layers of a module go.
        """
        if self.onnx is not None:
            return self._from_file(self.onnx, held)
        assert model is not None
        loaded = self
        if isinstance(self.graph, GraphFile):
            loaded = replace(self, graph=self.graph.load())
        return loaded._from_model(model, held, held_graph)

    def release(
        self,
        repository: Repository,
        name: str,
        model: PublishedModel | None = None,
        metrics: Mapping[str, float] | None = None,
        *,
        at_least: int = 1,
    ) -> PublishedRelease:
        """Make a release and publish it as the next one of `name`.

        Raises:
            RepositoryError, ReleaseError, PlanError, VersionsError: nothing was published.
        """
        contents = self.make(model, metrics, newest=NewestRelease(repository, name))
        return repository.publish(name, contents, at_least=at_least)

    def _from_model(
        self, model: PublishedModel, held: PublishedModel | None, held_graph: bytes | None
    ) -> ReleaseContents:
        found = self._architecture(model, held_graph)
        weights, reference = found.weights, found.reference
        if reference is None and self.samples is not None:
            reference = reference_outputs(found.graph, weights.arrays(), self.samples)
        if self.bits is not None:
            if any(isinstance(t, LatticeTensor) for t in model.tensors.values()):
                raise RecipeError("bits", "the model is on a lattice already")
            dense, counter = weights.arrays(), model.counter
            weights = from_arrays(
                dense, bits=self.bits, steps=self.steps, held=held, counter=counter
            )
        selftest = self._named_inputs() if self.selftest is None else self.selftest
        contents = ReleaseContents(
            weights, found.graph, selftest, notes=found.notes, exported=found.graph
        )
        kind = {"structured": "int8", "lattice": "int8"}.get(self.variant, self.variant)
        made = make_variant(contents, kind, self.samples, reference=reference, held=held)
        made = self._measured(made, weights, found.whole)
        if not found.narrow:
            return made
        return replace(
            made, kind="structured int8-qdq" if made.kind == "int8-qdq" else "structured"
        )

    def _measured(
        self,
        made: ReleaseContents,
        weights: PublishedModel,
        whole: tuple[ExportedGraph, PublishedModel] | None = None,
    ) -> ReleaseContents:
        if not self.measure:
            return made
        return replace(made, gains=gains_of(made, self.samples, weights=weights, whole=whole))

    def _architecture(self, model: PublishedModel, held: bytes | None) -> Architecture:
        if self.module is not None:
            return export_module(
                self._made,
                model,
                self._named_inputs(),
                cache=self._cache,
                shares=self.shares,
                held=plan_of(held) if held else None,
                samples=self.samples.inputs if self.samples else None,
                whole=self.measure,
            )
        assert isinstance(self.graph, ExportedGraph)
        plan = self._plan
        if plan is None:
            return Architecture(self.graph, model)
        notes = (
            f"{plan.shares.text()} remain, as the graph says",
            "numerics compare with what remains in float32: give the module to compare with all",
        )
        return Architecture(self.graph, plan.narrow(model), narrow=True, notes=notes)

    def _from_file(self, path: Path, held: PublishedModel | None) -> ReleaseContents:
        inputs = None
        if self.selftest is not None or self.samples is not None:
            inputs = self._named_inputs()
        made = from_onnx(
            path,
            bits=self.bits,
            steps=self.steps,
            variant="fp32" if self.variant == "fp32" else "lattice",
            held=held,
            inputs=inputs,
            seed=self.seed,
            most_difference=self.most_difference,
            max_bytes=self.max_bytes,
        )
        kind = "int8-qdq" if self.variant == "int8-qdq" else made.kind
        weights = made.model
        if self.samples is None and kind != "int8-qdq":
            return self._measured(made, weights)
        reference = None
        if self.samples is not None:  # what the file refers to has been checked
            reference = run_samples(open_session(path), self.samples)
        made = make_variant(made, kind, self.samples, reference=reference, held=held)
        return self._measured(made, weights)

    @property
    def _cache(self) -> Path:
        return self.cache or cache_folder("graphs")

    def _named_inputs(self) -> Arrays:
        if isinstance(self.selftest, Mapping):
            return self.selftest
        if self.selftest is not None:
            return {"input": self.selftest}  # as a module's only input is named
        assert self.samples is not None
        return {name: values[:_SELFTEST] for name, values in self.samples.inputs.items()}


def read_recipe(
    *,
    graph: Path | None = None,
    selftest: Path | None = None,
    calibration: Path | None = None,
    removed: Path | None = None,
    max_bytes: int | None = None,
    **options: Any,
) -> ReleaseRecipe:
    """A recipe whose parts lie in files.

    Args:
        graph: that `save_graph` wrote.
        selftest: ``.npz``, one array per input.
        calibration: ``.npz`` with samples, one array per input, and ``labels`` where known.
        removed: that `ChannelPlan.save` wrote.
        max_bytes: most bytes that the arrays of a file may take, see
            `prunecast.common.bounds.byte_limit`; and so for the graph or the ``.onnx`` file.
        options: the other fields of `ReleaseRecipe`.

    Raises:
        RecipeError: names the file that cannot be used, or the field that does not go with others.
    """

    from prunecast.server.repository.authoring.foreign import look_at_graph

    def arrays(file: Path) -> Arrays:
        return NpzArchive(file, max_bytes=max_bytes).read_all()

    return ReleaseRecipe(
        graph=_read("graph", graph, lambda file: look_at_graph(file, max_bytes)),
        selftest=_read("selftest", selftest, arrays),
        samples=_read("calibration", calibration, lambda file: split_samples(arrays(file))),
        removed=_read("model", removed, ChannelPlan.load),
        max_bytes=max_bytes,
        **options,
    )


def _read(option: str, path: Path | None, read: Callable[[Path], T]) -> T | None:
    try:
        return None if path is None else read(path)
    except RecipeError:
        raise
    except OSError as error:
        reason = f"cannot read {error.filename}: {error.strerror or error}"
        raise RecipeError(option, reason) from error
    except ValueError as error:
        raise RecipeError(option, str(error)) from error

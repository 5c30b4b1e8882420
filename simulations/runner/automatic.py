"""Releases that a scenario's arm makes while it trains, and the repository they go into."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunecast.common.references import load_callable
from prunecast.compression.onnx import ExportedGraph
from prunecast.server.federation import AutomaticReleases, ReleaseRule
from prunecast.server.federation.release_config import repository_releaser
from prunecast.server.repository import KeyRing, Repository
from prunecast.simulations.runner.prepared import PreparedRun, held_out
from prunecast.simulations.scenarios import ReleaseSpec

__all__ = ["automatic_releases", "export_factory", "repository_of", "rule_of"]


def rule_of(spec: ReleaseSpec) -> ReleaseRule | None:
    """The rule of a scenario's ``[release]``; None where nothing is released during the run.

    Raises:
        ReleaseRuleError: a value outside its range.
    """
    wanted = spec.reach is not None or spec.improve is not None
    if not (spec.every or wanted):
        return None
    return ReleaseRule(
        every=spec.every,
        metric=spec.metric if wanted else "",
        reach=spec.reach,
        improve=spec.improve,
        lower_is_better=spec.metric == "loss",
    )


def automatic_releases(prepared: PreparedRun, arm: str) -> AutomaticReleases | None:
    """Prepare repository and graph for the arm that releases; None for every other arm."""
    spec = prepared.scenario.release
    rule = rule_of(spec) if spec is not None and arm == prepared.scenario.released_arm() else None
    if spec is None or rule is None:
        return None
    inputs, _ = held_out(prepared)
    graph = export_factory(prepared.scenario.model.factory, inputs[:2])
    tests = inputs[: spec.selftest_images]
    return AutomaticReleases(
        rule, repository_releaser(repository_of(prepared), spec.name, graph, tests)
    )


def repository_of(prepared: PreparedRun) -> Repository:
    """The run's own repository, with keys beside it; made by the first call."""
    path, keys = prepared.folder / "repository", prepared.folder / "keys"
    if path.is_dir():
        return Repository(path, KeyRing(keys))
    return Repository.create(path, KeyRing.create(keys))


def export_factory(factory: str, examples: NDArray[np.float32]) -> ExportedGraph:
    """Export what a scenario's model factory makes."""
    import torch

    from prunecast.compression.onnx.export import export_graph

    return export_graph(load_callable(factory)(), (torch.from_numpy(examples),))

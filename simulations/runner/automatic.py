"""Releases that a scenario's arm makes while it trains, and the repository they go into."""

from __future__ import annotations

from prunecast.common.references import load_callable
from prunecast.server.federation import AutomaticReleases, ReleaseRule
from prunecast.server.federation.releasing import recipe_releaser
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.authoring import ReleaseRecipe
from prunecast.simulations.data import Examples
from prunecast.simulations.runner.prepared import PreparedRun
from prunecast.simulations.scenarios import ReleaseSpec
from prunecast.simulations.tasks import Task

__all__ = ["automatic_releases", "release_recipe", "repository_of", "rule_of"]


def rule_of(spec: ReleaseSpec, task: Task) -> ReleaseRule | None:
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
        lower_is_better=spec.metric == "loss" or task.lower_is_better,
    )


def automatic_releases(prepared: PreparedRun, arm: str) -> AutomaticReleases | None:
    """Prepare repository and graph for the arm that releases; None for every other arm."""
    scenario = prepared.scenario
    spec = scenario.release
    if spec is None or arm != scenario.released_arm():
        return None
    rule = rule_of(spec, scenario.task)
    if rule is None:
        return None
    recipe = release_recipe(prepared).prepared()
    return AutomaticReleases(rule, recipe_releaser(recipe, repository_of(prepared), spec.name))


def release_recipe(prepared: PreparedRun) -> ReleaseRecipe:
    """How a scenario's releases are made, during the run and after it."""
    spec = prepared.scenario.release
    assert spec is not None
    inputs = Examples.load(prepared.held_out).take(slice(spec.selftest_images)).inputs
    return ReleaseRecipe(
        module=load_callable(prepared.scenario.model.factory),
        # the graph of a single input calls it "input", whatever the data do
        selftest=dict(inputs) if len(inputs) > 1 else next(iter(inputs.values())),
        cache=prepared.work / "graphs",
    )


def repository_of(prepared: PreparedRun) -> Repository:
    """The run's own repository, with keys beside it; made by the first call."""
    path, keys = prepared.folder / "repository", prepared.folder / "keys"
    if path.is_dir():
        return Repository(path, KeyRing(keys))
    return Repository.create(path, KeyRing.create(keys))

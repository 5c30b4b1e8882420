"""Releases that come by themselves while a federation trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.common.references import typed
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import PublishedModel
from prunecast.server.federation.errors import ReleaseRuleError

if TYPE_CHECKING:
    from torch import nn

    from prunecast.server.repository import Repository
    from prunecast.server.repository.authoring import ReleaseRecipe

__all__ = [
    "AutomaticReleases",
    "RecipeReleaser",
    "ReleaseRule",
    "ReleaseWatch",
    "Released",
    "Releaser",
    "releases_from_config",
]


@dataclass(frozen=True)
class ReleaseRule:
    """When to release. `every` and `metric` may both be given: either is enough.

    Attributes:
        every: release after every so many rounds; 0 for never.
        metric: name of an evaluation metric; empty for none.
        reach: release when the metric gets as good as this. Once in a run, unless `improve` is
            given; then it is the least a release must have.
        improve: release when the metric is better by this than in the last release.
        lower_is_better: for a loss or an error.

    Raises:
        ReleaseRuleError: never releases, or a value outside its range; names the key.

    Examples:
        >>> watch = ReleaseWatch(ReleaseRule(metric="accuracy", reach=0.8, improve=0.02))
        >>> [watch.due(n, {"accuracy": a}) for n, a in enumerate((0.1, 0.79, 0.81), start=1)]
        [None, None, 'accuracy 0.81 reached 0.8']
        >>> watch.released({"accuracy": 0.81})
        >>> watch.due(4, {"accuracy": 0.82}), watch.due(5, {"accuracy": 0.84})
        (None, 'accuracy 0.84 is better by 0.03 than in the last release')
    """

    every: int = 0
    metric: str = ""
    reach: float | None = None
    improve: float | None = None
    lower_is_better: bool = False

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ReleaseRuleError(
                f"release.every = {self.every} is below 0: give a number of rounds, or 0"
            )
        if self.reach is not None and not math.isfinite(self.reach):
            raise ReleaseRuleError(f"release.reach = {self.reach} is not finite: give a number")
        if self.improve is not None and not (math.isfinite(self.improve) and self.improve > 0):
            raise ReleaseRuleError(
                f"release.improve = {self.improve} is not above 0: give the least gain, such as "
                "0.01; for a metric that falls, add release.lower-is-better = true"
            )
        wants = self.reach is not None or self.improve is not None
        if wants and not self.metric:
            raise ReleaseRuleError(
                "release.reach and release.improve need a metric: set release.metric"
            )
        if self.metric and not wants:
            raise ReleaseRuleError(
                f"release.metric = {self.metric!r} says what to watch, not when to release: set "
                "release.reach or release.improve"
            )
        if not (self.every or self.metric):
            raise ReleaseRuleError(
                "nothing would be released: set release.every, or release.metric with "
                "release.reach or release.improve"
            )


class ReleaseWatch:
    """Applies a rule from round to round.

    Args:
        rule: when to release.
        held: the metric's value in the newest release, if there is one that states it. Then
            `improve` is measured from it, so that a new run does not publish a worse model.
    """

    def __init__(self, rule: ReleaseRule, held: float | None = None) -> None:
        self.rule, self._held = rule, held
        self._reached = False

    def due(self, server_round: int, metrics: Mapping[str, float]) -> str | None:
        """Why the model of this round is to be released, or None.

        Args:
            server_round: 1 for the first; the initial model (0) is never released.
            metrics: measured on the model of this round; NaN releases nothing.
        """
        rule = self.rule
        if server_round < 1:
            return None
        if rule.every and server_round % rule.every == 0:
            return f"round {server_round}, one of every {rule.every}"
        value = metrics.get(rule.metric, math.nan) if rule.metric else math.nan
        if not math.isfinite(value):
            return None
        sign = -1.0 if rule.lower_is_better else 1.0
        if rule.reach is not None and sign * (value - rule.reach) < 0:
            return None
        if rule.improve is None:
            return None if self._reached else f"{rule.metric} {value:.6g} reached {rule.reach:.6g}"
        if self._held is None:
            least = f" reached {rule.reach:.6g}" if rule.reach is not None else ", the first"
            return f"{rule.metric} {value:.6g}{least}"
        gain = sign * (value - self._held)
        # a gain of exactly the threshold counts, whatever binary fractions make of it
        if gain >= rule.improve or math.isclose(gain, rule.improve, rel_tol=1e-9):
            return f"{rule.metric} {value:.6g} is better by {gain:.3g} than in the last release"
        return None

    def released(self, metrics: Mapping[str, float]) -> None:
        """Note that a model with these metrics was released, for whatever reason."""
        value = metrics.get(self.rule.metric, math.nan)
        if not math.isfinite(value):
            return
        self._held = value
        sign = -1.0 if self.rule.lower_is_better else 1.0
        if self.rule.reach is not None and sign * (value - self.rule.reach) >= 0:
            self._reached = True


Releaser = Callable[[PublishedModel, Mapping[str, float]], int]
"""Publishes a model with its metrics and returns the number of the release.

Raises ValueError where it could not be published; nothing was, then.
"""


@dataclass(frozen=True)
class RecipeReleaser:
    """Makes every release by one recipe and publishes it into a repository on this machine.

    Attributes:
        recipe: how releases are made.
        repository: where they are published.
        name: of the releases.

    Raises:
        RepositoryError: the keys at hand cannot publish this name.
        RecipeError, ExportError: the module cannot be exported.
    """

    recipe: ReleaseRecipe
    repository: Repository
    name: str

    def __post_init__(self) -> None:
        self.repository.check_publishable(self.name)
        self._prepared  # noqa: B018  # what cannot be exported shows before anything is trained

    @cached_property
    def _prepared(self) -> ReleaseRecipe:
        return self.recipe.prepared()

    def __call__(self, model: PublishedModel, metrics: Mapping[str, float]) -> int:
        """Publish a model with its metrics; the number of the release."""
        published = self._prepared.release(self.repository, self.name, model, metrics)
        for version, why in published.kept.items():
            log(WARNING, "Release %d stays live outside the window: %s", version, why)
        return published.version

    def narrow(self, removed: ChannelPlan) -> RecipeReleaser:
        """The same for models without the channels that a plan removes of the module.

        Raises:
            RecipeError: the recipe has no module.
            ExportError: it cannot be exported without them.
        """
        if removed is self.recipe.removed:
            return self
        return replace(self, recipe=replace(self.recipe, removed=removed))


@dataclass(frozen=True)
class Released:
    """A release that a run made.

    Attributes:
        round: of the run.
        version: of the release.
        reason: why it was due.
        metrics: of the model, as published.
    """

    round: int
    version: int
    reason: str
    metrics: Mapping[str, float]


@dataclass
class AutomaticReleases:
    """Releases the published model of a run when a rule says so.

    ::

        releases = AutomaticReleases(ReleaseRule(metric="accuracy", improve=0.01), releaser)
        Run(grid, strategy, evaluate_fn=evaluate_fn, releases=releases).start(arrays, num_rounds=30)

    A release that fails (a full disk, a repository that another process changes) is logged and
    tried again after the next round; it never ends the training.

    Args:
        rule: when to release.
        releaser: what publishes.
        held: the metric's value in the newest release, if there is one.

    Attributes:
        made: the releases of this run.
    """

    rule: ReleaseRule
    releaser: Releaser
    held: float | None = None
    made: list[Released] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._watch = ReleaseWatch(self.rule, self.held)
        self._owed: str | None = None
        self._digest = b""
        self._removed: ChannelPlan | None = None  # that the releaser is not told of yet

    def check_narrow(self) -> None:
        """See that models of fewer channels can be released.

        Raises:
            ReleaseRuleError: releases are made of a graph, which has them all.
        """
        if isinstance(self.releaser, RecipeReleaser) and self.releaser.recipe.module is None:
            raise ReleaseRuleError(
                "channels will be removed, and the graph of the releases has them all: leave out "
                "release.graph, so that the model is exported"
            )

    def narrow(self, removed: ChannelPlan) -> None:
        """Go on with models without the channels that a plan removes of the module.

        A releaser of one's own that has a method `narrow` gives the one to go on with; without, it
        is given narrower models. It is asked when a release is due, so that what fails is tried
        again as a release is.
        """
        self._removed = removed

    def after_round(
        self, server_round: int, metrics: Mapping[str, float], model: Callable[[], PublishedModel]
    ) -> Released | None:
        """Decide about a round, and publish if it is due.

        Args:
            server_round: 0 for the initial model.
            metrics: measured on the model.
            model: called only if it is to be released.

        Raises:
            ReleaseRuleError: the first round's metrics do not hold the one to watch.
        """
        wanted = self.rule.metric
        if server_round == 1 and wanted and metrics and wanted not in metrics:
            raise ReleaseRuleError(
                f"release.metric = {wanted!r} is not measured: choose one of "
                f"{', '.join(sorted(metrics))}"
            )
        reason = self._watch.due(server_round, metrics) or self._owed
        if reason is None:
            return None
        published = model()
        if published.digest == self._digest:
            return None  # nothing has changed since the last release
        self._owed = reason
        try:
            if self._removed is not None and (narrow := getattr(self.releaser, "narrow", None)):
                self.releaser = narrow(self._removed)
            self._removed = None
            version = self.releaser(published, metrics)
        except (ValueError, OSError) as error:
            log(WARNING, "No release after round %d, trying again: %s", server_round, error)
            return None
        self._owed, self._digest = None, published.digest
        self._watch.released(metrics)
        self.made.append(Released(server_round, version, reason, dict(metrics)))
        log(INFO, "Release %d after round %d: %s", version, server_round, reason)
        return self.made[-1]


_PREFIX = "release."
_TYPES: dict[str, type] = {
    **dict.fromkeys(("repository", "keys", "name", "selftest", "graph", "graph-cache"), str),
    **dict.fromkeys(("variant", "calibration", "licence", "metric"), str),
    **dict.fromkeys(("window", "every"), int),
    **dict.fromkeys(("channels", "heads", "layers", "reach", "improve"), float),
    "lower-is-better": bool,
}


def releases_from_config(
    config: Mapping[str, Any],
    model: Callable[[], nn.Module],
    removed: ChannelPlan | None = None,
) -> AutomaticReleases | None:
    """Read ``release.*`` keys of the run config; None where there is no ``release.repository``.

    Everything that can be found out before training is: keys, repository, name, inputs, graph.

    Args:
        config: Flower's run config.
        model: makes the module, to export it if no graph is given.
        removed: channels of the module that are gone already; None for none.

    Raises:
        ReleaseRuleError: a key is unknown, missing or unusable; names it and the remedy.
    """
    given: dict[str, Any] = {}
    for name, value in config.items():
        key = name.removeprefix(_PREFIX)
        if key == name:
            continue
        if key not in _TYPES:
            known = ", ".join(_PREFIX + key for key in _TYPES)
            raise ReleaseRuleError(f"unknown run config key {name}: choose one of {known}")
        # a key that the app declares cannot be left out in Flower: "" stands for absence
        if value not in ("", None):
            given[key] = typed(name, value, _TYPES[key], ReleaseRuleError)
    if "repository" not in given:
        if given.keys() - {"every", "window", "variant", "lower-is-better"} or given.get("every"):
            raise ReleaseRuleError(
                f"release.{min(given)} is set, but no repository: set release.repository, made by "
                "`prunecast release init` or `prunecast release keys`"
            )
        return None
    for key in ("keys", "name"):
        if key not in given:
            raise ReleaseRuleError(f"release.{key} is missing: releases need it")
    rule = ReleaseRule(
        every=given.get("every", 0),
        metric=given.get("metric", ""),
        reach=given.get("reach"),
        improve=given.get("improve"),
        lower_is_better=given.get("lower-is-better", False),
    )
    return _open(given, rule, model, removed)


def _open(
    given: Mapping[str, Any],
    rule: ReleaseRule,
    model: Callable[[], nn.Module],
    removed: ChannelPlan | None,
) -> AutomaticReleases:
    from prunecast.compression.release import ReleaseError
    from prunecast.server.repository import KeyRing, RecipeError, Repository, RepositoryError
    from prunecast.server.repository.authoring import NewestRelease, read_recipe

    def path(key: str) -> Path | None:
        return Path(given[key]) if key in given else None

    option = "repository"
    try:
        folders = [part.strip() for part in given["keys"].split(",") if part.strip()]
        ring = KeyRing(*folders)
        repository = Repository(Path(given["repository"]), ring, window=given.get("window", 16))
        repository.check_publishable(given["name"])
        recipe = read_recipe(
            graph=path("graph"),
            module=None if "graph" in given else model,
            selftest=path("selftest"),
            calibration=path("calibration"),
            variant=given.get("variant", "int8"),
            channels=given.get("channels"),
            heads=given.get("heads"),
            layers=given.get("layers"),
            licence=given.get("licence"),
            cache=path("graph-cache"),
        )
        measured = recipe.shares is not None or recipe.variant == "int8-qdq"
        if measured and recipe.samples is None:
            raise RecipeError(
                "calibration", "is missing: nothing else says how far such a variant is off"
            )
        if recipe.module is not None:  # else `check_narrow` says that there must be one
            recipe = replace(recipe, removed=removed)
        option = "graph"
        releaser = RecipeReleaser(recipe, repository, given["name"])
        option = "repository"
        newest = NewestRelease(repository, given["name"]).manifest
    except (RepositoryError, ReleaseError, OSError) as error:
        wrong, reason = option, str(error)
        if isinstance(error, RecipeError):
            wrong = "graph" if error.option == "module" else error.option  # it stands for one
            reason = error.message
        raise ReleaseRuleError(f"{_PREFIX}{wrong} = {given.get(wrong, '')!r}: {reason}") from error
    held = newest.metrics.get(rule.metric) if newest else None
    return AutomaticReleases(rule, releaser, held)

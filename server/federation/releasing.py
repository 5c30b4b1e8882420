"""Releases that come by themselves while a federation trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from logging import INFO, WARNING
from typing import TYPE_CHECKING, Any, Protocol

from prunecast.compression.flower.internals import log
from prunecast.compression.versions import PublishedModel
from prunecast.server.federation.errors import ReleaseRuleError
from prunecast.server.federation.release_rule import ReleaseRule, ReleaseWatch

if TYPE_CHECKING:
    from prunecast.server.repository import Repository
    from prunecast.server.repository.authoring import ReleaseRecipe

__all__ = [
    "AutomaticReleases",
    "Released",
    "Releaser",
    "finite_numbers",
    "recipe_releaser",
]


class Releaser(Protocol):
    """Publishes a model as the next release; `recipe_releaser` makes one."""

    def __call__(self, model: PublishedModel, metrics: Mapping[str, float]) -> int:
        """Publish and return the number of the release.

        Raises:
            ValueError: it could not be published; nothing was.
        """


def recipe_releaser(recipe: ReleaseRecipe, repository: Repository, name: str) -> Releaser:
    """Makes every release by one recipe and publishes it into a repository on this machine.

    Raises:
        RepositoryError: the keys at hand cannot publish this name.
    """
    repository.check_publishable(name)

    def release(model: PublishedModel, metrics: Mapping[str, float]) -> int:
        return recipe.release(repository, name, model, metrics).version

    return release


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
            version = self.releaser(published, metrics)
        except (ValueError, OSError) as error:
            log(WARNING, "No release after round %d, trying again: %s", server_round, error)
            return None
        self._owed, self._digest = None, published.digest
        self._watch.released(metrics)
        self.made.append(Released(server_round, version, reason, dict(metrics)))
        log(INFO, "Release %d after round %d: %s", version, server_round, reason)
        return self.made[-1]


def finite_numbers(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics that are finite numbers; lists and NaN are left out."""
    found = {}
    for name, value in (metrics or {}).items():
        if isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found

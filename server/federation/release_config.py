"""Automatic releases by Flower's run config; docs/releases.md lists the keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.common.references import typed
from prunecast.server.federation.errors import ReleaseRuleError
from prunecast.server.federation.releasing import AutomaticReleases, ReleaseRule, recipe_releaser

if TYPE_CHECKING:
    from torch import nn

__all__ = ["releases_from_config"]

_PREFIX = "release."
_TYPES: dict[str, type] = {
    **dict.fromkeys(("repository", "keys", "name", "selftest", "graph", "graph-cache"), str),
    **dict.fromkeys(("variant", "calibration", "licence", "metric"), str),
    **dict.fromkeys(("window", "every"), int),
    **dict.fromkeys(("channels", "reach", "improve"), float),
    "lower-is-better": bool,
}


def releases_from_config(
    config: Mapping[str, Any], model: Callable[[], nn.Module]
) -> AutomaticReleases | None:
    """Read ``release.*`` keys of the run config; None where there is no ``release.repository``.

    Everything that can be found out before training is: keys, repository, name, inputs, graph.

    Args:
        config: Flower's run config.
        model: makes the module, to export it if no graph is given.

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
    return _open(given, rule, model)


def _open(
    given: Mapping[str, Any], rule: ReleaseRule, model: Callable[[], nn.Module]
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
            licence=given.get("licence"),
            cache=path("graph-cache"),
        )
        measured = recipe.share is not None or recipe.variant == "int8-qdq"
        if measured and recipe.samples is None:
            raise RecipeError(
                "calibration", "is missing: nothing else says how far such a variant is off"
            )
        option = "graph"
        recipe = recipe.prepared()
        option = "repository"
        newest = NewestRelease(repository, given["name"]).manifest
    except (RepositoryError, ReleaseError, OSError) as error:
        wrong, reason = option, str(error)
        if isinstance(error, RecipeError):
            wrong = "graph" if error.option == "module" else error.option  # it stands for one
            reason = error.message
        raise ReleaseRuleError(f"{_PREFIX}{wrong} = {given.get(wrong, '')!r}: {reason}") from error
    held = newest.metrics.get(rule.metric) if newest else None
    return AutomaticReleases(rule, recipe_releaser(recipe, repository, given["name"]), held)

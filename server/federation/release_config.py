"""Automatic releases by Flower's run config.

===========================  =======================================================================
``release.repository``       "" (no releases) or the folder of a release repository
``release.keys``             folders with its online keys, separated by commas
``release.name``             of the release
``release.selftest``         ``.npz`` with a few real inputs, one array per input of the model
``release.graph``            "" (the model is exported, some seconds) or a graph that was exported
``release.graph-cache``      "" (in the user's cache) or a folder that keeps exported graphs
``release.variant``          "int8" (the published integers), "fp32", "int8-qdq" or "structured"
``release.calibration``      "" or ``.npz`` with real samples, and labels where they are known: the
                             last two variants need it, and every release then states how far it is
                             from the published model in float32
``release.channels``         share of the channels that remain, with any variant
``release.window``           16: how many releases stay live
``release.licence``          "" or the SPDX expression of the weights
``release.every``            0: release after every so many rounds
``release.metric``           "": name of a metric of the evaluation, on the server or on clients
``release.reach``            release when the metric gets as good as this
``release.improve``          release when the metric is better by this than in the last release
``release.lower-is-better``  false; true for a loss
===========================  =======================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    given = {k.removeprefix(_PREFIX): v for k, v in config.items() if k.startswith(_PREFIX)}
    for key, value in given.items():
        given[key] = _typed(key, value)
    # a key that the app declares cannot be left out in Flower: "" stands for absence
    given = {key: value for key, value in given.items() if value not in ("", None)}
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


def _typed(key: str, value: Any) -> Any:
    if key not in _TYPES:
        known = ", ".join(_PREFIX + name for name in _TYPES)
        raise ReleaseRuleError(f"unknown run config key release.{key}: choose one of {known}")
    wanted = _TYPES[key]
    if wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if type(value) is not wanted and not (wanted is float and value == ""):
        raise ReleaseRuleError(
            f"release.{key} = {value!r} in the run config is no {wanted.__name__}: correct it"
        )
    return value

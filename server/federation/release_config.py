"""Automatic releases by Flower's run config.

===========================  =======================================================================
``release.repository``       "" (no releases) or the folder of a release repository
``release.keys``             folders with its online keys, separated by commas
``release.name``             of the release
``release.selftest``         ``.npz`` with a few real inputs, one array per input of the model
``release.graph``            "" (the model is exported, some seconds) or a graph that was exported
``release.variant``          "int8" (the published integers) or "fp32"
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
from prunecast.server.federation.release_rule import ReleaseRule
from prunecast.server.federation.releasing import AutomaticReleases, Releaser

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from prunecast.compression.onnx import ExportedGraph, Variant
    from prunecast.compression.release.selftest import Arrays
    from prunecast.compression.versions import PublishedModel
    from prunecast.server.repository import Repository

__all__ = ["releases_from_config", "repository_releaser"]

_PREFIX = "release."
_VARIANTS: Mapping[str, Variant] = {"int8": "lattice", "fp32": "fp32"}
_TYPES: dict[str, type] = {
    **dict.fromkeys(("repository", "keys", "name", "selftest", "graph", "metric"), str),
    **dict.fromkeys(("variant", "licence"), str),
    **dict.fromkeys(("window", "every"), int),
    **dict.fromkeys(("reach", "improve"), float),
    "lower-is-better": bool,
}


def repository_releaser(
    repository: Repository,
    name: str,
    graph: ExportedGraph,
    selftest_inputs: Arrays | NDArray[np.generic],
    *,
    variant: str = "int8",
    licence: str | None = None,
) -> Releaser:
    """Publishes into a repository on this machine, under one name.

    Raises:
        RepositoryError: the keys at hand cannot publish this name.
        ReleaseRuleError: an unknown variant.
    """
    if variant not in _VARIANTS:
        raise ReleaseRuleError(
            f"release.variant = {variant!r} is unknown here: choose one of {', '.join(_VARIANTS)}"
        )
    repository.check_publishable(name)

    def publish(model: PublishedModel, metrics: Mapping[str, float]) -> int:
        made = repository.publish(
            name,
            model,
            graph,
            selftest_inputs=selftest_inputs,
            metrics=metrics,
            variant=_VARIANTS[variant],
            licence=licence,
        )
        return made.version

    return publish


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
    for key in ("keys", "name", "selftest"):
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
    from prunecast.compression.onnx import load_graph
    from prunecast.compression.release import ReleaseError, unpack_arrays
    from prunecast.server.repository import KeyRing, ReleaseNotFound, Repository, RepositoryError

    key = "release.repository"
    try:
        folders = [part.strip() for part in given["keys"].split(",") if part.strip()]
        ring = KeyRing(*folders)
        repository = Repository(Path(given["repository"]), ring, window=given.get("window", 16))
        repository.check_publishable(given["name"])
        key = "release.selftest"
        inputs = unpack_arrays(Path(given["selftest"]).read_bytes())
        key = "release.graph"
        graph = load_graph(Path(given["graph"])) if "graph" in given else _export(model, inputs)
        key = "release.repository"
        releaser = repository_releaser(
            repository,
            given["name"],
            graph,
            inputs,
            variant=given.get("variant", "int8"),
            licence=given.get("licence"),
        )
        try:
            held = repository.show(given["name"]).metrics.get(rule.metric)
        except ReleaseNotFound:
            held = None
    except (RepositoryError, ReleaseError, OSError) as error:
        raise ReleaseRuleError(
            f"{key} = {given.get(key.removeprefix(_PREFIX), '')!r}: {error}"
        ) from error
    return AutomaticReleases(rule, releaser, held)


def _export(model: Callable[[], nn.Module], inputs: Mapping[str, Any]) -> ExportedGraph:
    import torch

    from prunecast.compression.onnx.export import export_graph

    examples = tuple(torch.from_numpy(values.copy()) for values in inputs.values())
    with torch.random.fork_rng(devices=[]):
        module = model()
    return export_graph(module, examples, input_names=list(inputs))


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

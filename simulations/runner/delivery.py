"""From the federation to the device: release, serve, patch, prepared, compare every image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunecast.compression.onnx.graph import ExportedGraph
from prunecast.compression.pruning.structure.channels import ChannelPlan, channels_beside
from prunecast.compression.versions import PublishedModel, RawTensor, load_model
from prunecast.server.federation import AutomaticReleases, ReleaseRule
from prunecast.server.federation.releasing import RecipeReleaser
from prunecast.server.repository import KeyRing, PublishedRelease, Repository
from prunecast.server.repository.authoring import NewestRelease, ReleaseRecipe, Samples
from prunecast.server.repository.authoring.gains import gains_of
from prunecast.server.repository.serving import ReleaseServer
from prunecast.simulations.data import Examples
from prunecast.simulations.runner import DeviceMismatch, SimulationError
from prunecast.simulations.runner.prepared import PreparedRun
from prunecast.simulations.scenarios import ReleaseSpec
from prunecast.simulations.tasks import Task

__all__ = ["automatic_releases", "deliver", "rule_of"]

_STEPS = ("before", "after"), ("downloads", "patches itself to")
_SAMPLES = 64  # that activations are measured on, for the figures of int8
_DEVICE = "prunecast.simulations.runner.device"


@dataclass(frozen=True)
class _Published:
    """A model as the federation left it, and what the server measured with it."""

    model: PublishedModel
    removed: ChannelPlan | None
    outputs: NDArray[Any]
    score: float


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
    scenario, spec = prepared.scenario, prepared.scenario.release
    if spec is None or arm != scenario.released_arm():
        return None
    if (rule := rule_of(spec, scenario.task)) is None:
        return None
    releaser = RecipeReleaser(_recipe(prepared), _repository(prepared), spec.name)
    return AutomaticReleases(rule, releaser)


def _recipe(prepared: PreparedRun) -> ReleaseRecipe:
    """How a scenario's releases are made, during the run and after it."""
    spec = prepared.scenario.release
    assert spec is not None
    inputs = Examples.load(prepared.held_out).take(slice(spec.selftest_images))
    return ReleaseRecipe(
        module=prepared.scenario.model.network(),
        selftest=_named(inputs),
        cache=prepared.work / "graphs",
    )


def _named(examples: Examples) -> dict[str, NDArray[Any]]:
    """Inputs by the graph's names; it calls a single one "input", whatever the data do."""
    inputs = dict(examples.inputs)
    return inputs if len(inputs) > 1 else {"input": next(iter(inputs.values()))}


def _whole(recipe: ReleaseRecipe, prepared: PreparedRun) -> tuple[ExportedGraph, PublishedModel]:
    """The network with all of its channels, and some weights of it."""
    graph = recipe.prepared().graph
    assert isinstance(graph, ExportedGraph)
    state = prepared.scenario.model.network()().state_dict()
    return graph, PublishedModel({n: RawTensor(t.numpy()) for n, t in state.items()})


def _repository(prepared: PreparedRun) -> Repository:
    """The run's own repository, with keys beside it; made by the first call."""
    path, keys = prepared.folder / "repository", prepared.folder / "keys"
    if path.is_dir():
        return Repository(path, KeyRing(keys))
    return Repository.create(path, KeyRing.create(keys))


def deliver(
    prepared: PreparedRun, on_step: Callable[[str], None] = lambda step: None
) -> dict[str, Any]:
    """Release the last two published models and let a device fetch them.

    The device downloads the first as a keyframe and goes on to the second by a patch; the
    repository, its keys and the device's state stay in the run's folder.

    Args:
        prepared: a finished run whose scenario has a release.
        on_step: told what happens.

    Returns:
        The ``release`` part of ``result.json``.

    Raises:
        DeviceMismatch: an example is answered otherwise than on the server, or the device
            process imported a training framework.
        SimulationError: fewer than two models were published, or the device failed.
    """
    scenario = prepared.scenario
    spec, arm, task = scenario.release, scenario.released_arm(), scenario.task
    if spec is None or arm is None:
        raise SimulationError("the scenario has no [release]: add one")
    held_out = Examples.load(prepared.held_out)
    versions = [_published(prepared.work / f"{arm}-{place}") for place in (1, 2)]
    if versions[0].model.digest == versions[1].model.digest:
        raise SimulationError("the last round changed nothing: train for more rounds")
    on_step("exporting the network to ONNX")
    # channels go before the last round, so that both versions have the same
    wide = _recipe(prepared)
    recipe = replace(wide, removed=versions[1].removed).prepared()
    repository = _repository(prepared)  # automatic releases may be there already
    root = prepared.folder / "root.json"
    root.write_bytes(repository.trusted_root())

    made: list[PublishedRelease] = []
    reports: list[dict[str, Any]] = []
    with ReleaseServer(repository.path) as server:
        for version, when, does in zip(versions, *_STEPS, strict=True):
            on_step(f"signing the release {when} the last round")
            metrics = {task.metric: version.score}
            newest = NewestRelease(repository, spec.name)
            contents = recipe.make(version.model, metrics, newest=newest)
            release = repository.publish(spec.name, contents)
            on_step(f"the device {does} release {release.version}")
            report = _update(prepared, server.url, spec.name)
            _compare(prepared, release.version, version, report, patched=bool(made))
            made.append(release)
            reports.append(report)
    first, second = made
    on_step("counting and timing what the device runs")
    samples = Samples(_named(held_out.take(slice(_SAMPLES))))
    last, found = versions[1], _answers(prepared, second.version)
    whole = None if last.removed is None else _whole(wide, prepared)
    gains = gains_of(contents, samples, weights=last.model, whole=whole)
    return {
        "name": spec.name,
        "arm": arm,
        "onnx_bytes": second.onnx_bytes,
        "weights_bytes": second.manifest.weights.length,
        "keyframe_bytes": second.manifest.keyframe.length,
        "patch_bytes": reports[1]["downloaded"]["patch"],
        "first_keyframe_bytes": first.manifest.keyframe.length,
        f"published_{task.metric}": last.score,
        f"device_{task.metric}": task.score(found, held_out.targets),
        "examples": len(held_out),
        "identical_examples": len(held_out) - len(task.different(last.outputs, found)),
        "downloads": [
            {
                "version": report["version"],
                "payload": report["payload"],
                "bytes": report["downloaded"],
                "seconds": round(report["seconds"], 3),
            }
            for report in reports
        ],
        "gains": gains,
        "selftest_difference": reports[1]["difference"],
        "foreign_modules": reports[1]["imported"],
    }


def _published(path: Path) -> _Published:
    if not path.with_suffix(".model").is_file():
        raise SimulationError("two published models are needed: train for at least one round")
    with np.load(path.with_suffix(".npz")) as file:
        outputs, score = file["outputs"], float(file["score"])
    beside = channels_beside(path)
    removed = ChannelPlan.load(beside) if beside.is_file() else None
    return _Published(load_model(path.with_suffix(".model")), removed, outputs, score)


def _answers(prepared: PreparedRun, version: int) -> NDArray[Any]:
    with np.load(prepared.work / f"device-{version}.npz") as file:
        return np.asarray(file["outputs"])


def _compare(
    prepared: PreparedRun,
    number: int,
    version: _Published,
    report: dict[str, Any],
    *,
    patched: bool,
) -> None:
    if report["version"] != number or report["outcome"] != "updated":
        raise SimulationError(f"the device did not take release {number}: {report['reason']}")
    if patched and report["payload"] != "patch":
        raise SimulationError(f"release {number} came without a patch: {report['reason']}")
    if report["imported"]:
        raise DeviceMismatch(f"the device process imported {', '.join(report['imported'])}")
    found, task = _answers(prepared, number), prepared.scenario.task
    different = task.different(version.outputs, found)
    if len(different):
        raise DeviceMismatch(
            f"release {number}: {len(different)} of {len(found)} examples are {task.verb} "
            f"otherwise than on the server, first example {different[0]}: the device does not run "
            "what the federation measured"
        )


def _update(prepared: PreparedRun, url: str, name: str) -> dict[str, Any]:
    """Start the device, let it update itself and answer all examples; what it reports."""
    log = prepared.folder / "device.log"
    paths = os.pathsep.join(part for part in sys.path if part)
    with log.open("a") as errors:
        done = subprocess.run(
            [sys.executable, "-m", _DEVICE, str(prepared.folder), url, name],
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": paths},
        )
    if done.returncode:
        raise SimulationError(f"the edge agent's process ended: see {log}")
    report: dict[str, Any] = json.loads(done.stdout)
    return report

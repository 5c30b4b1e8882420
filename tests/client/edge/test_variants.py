"""An agent follows releases that compute in integers; it needs no code of its own for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from prunecast.client.edge import Agent, AgentConfig
from prunecast.compression.onnx.compare import draw_inputs
from prunecast.compression.release.runtime import computes_in_integers, open_session
from prunecast.server.repository import Repository, verify_repository
from prunecast.server.repository.authoring import ReleaseRecipe, Samples
from prunecast.server.repository.authoring.sources import from_onnx
from support import foreign
from support.convolutional import (
    convolutional,
    convolutional_graph,
    convolutional_images,
)
from support.network import Network

IMAGES = convolutional_images()
LABELS = np.arange(len(IMAGES)) % 5


def test_an_agent_goes_from_one_quantised_release_to_the_next_by_patch(
    start: Callable[..., Agent], repository: Repository, config: AgentConfig, network: Network
) -> None:
    samples = Samples({"image": IMAGES.astype(np.float64)}, LABELS)
    recipe = ReleaseRecipe(graph=convolutional_graph(), samples=samples, variant="int8-qdq")
    manifests, agent = [], start()
    for number in (1, 2):
        published = recipe.release(repository, "toy", convolutional(number))
        manifests.append(published.manifest)
        result = agent.update_once()
        assert (result.outcome, result.version) == ("updated", number)
        assert result.payload == ("keyframe", "patch")[number - 1]
        manifest = agent.model.manifest
        assert manifest.kind == "int8-qdq"
        assert manifest.numerics["samples"] == len(IMAGES)
        assert 0 < manifest.numerics["relative_difference"] < 0.05
        assert abs(manifest.numerics["accuracy"] - manifest.numerics["reference_accuracy"]) < 0.05
    # the second one brought weights and expected outputs: graph, layout and inputs are the same
    assert result.downloaded["files"] == manifests[1].files["expected.npz"].length
    assert result.downloaded["patch"] == manifests[1].patches[0].file.length
    assert result.downloaded["patch"] < 0.7 * manifests[1].keyframe.length
    assert result.difference is not None
    assert result.difference <= manifests[1].tolerance.atol
    slot = config.state / "slots" / agent.status()["active"]["slot"]
    assert computes_in_integers(slot / "model.onnx")
    assert [v.version for v in verify_repository(repository, repository.trusted_root())] == [1, 2]


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_other_variants_compute_the_published_values(kind: str) -> None:
    graph, samples = convolutional_graph(), Samples({"image": IMAGES})
    made = ReleaseRecipe(graph=graph, samples=samples, variant=kind).make(convolutional(1))
    assert made.variant == ("lattice" if kind == "int8" else "fp32")
    assert made.numerics["max_difference"] < 1e-6
    assert "accuracy" not in made.numerics


@pytest.mark.parametrize("kind", foreign.WEIGHTLESS)
def test_an_agent_runs_models_without_tensors_of_weights(
    kind: str,
    start: Callable[..., Agent],
    repository: Repository,
    config: AgentConfig,
    tmp_path: Path,
) -> None:
    path = foreign.save(foreign.WEIGHTLESS[kind](), tmp_path / "m.onnx")
    repository.publish("toy", from_onnx(path))
    agent = start()
    result = agent.update_once()
    assert (result.outcome, result.version, result.difference) == ("updated", 1, 0.0)
    session = open_session(path)
    inputs = draw_inputs(session, 7)
    wanted, found = session.run(inputs), agent.model.run(inputs)
    assert {n: a.tolist() for n, a in found.items()} == {n: a.tolist() for n, a in wanted.items()}
    agent.close()
    assert start().model.manifest.version == 1  # opened from its slot, and tested again

"""Variants of a release from the command line: what is exported, stated, held and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.onnx.export import export_cached
from prunecast.compression.release.runtime import open_session
from prunecast.compression.versions import LatticeTensor
from prunecast.server.repository import KeyRing, Repository, RepositoryError, verify_repository
from prunecast.server.repository.authoring.modules import plan_of
from prunecast.server.repository.authoring.variants import split_samples
from support import narrowable

IMAGES = np.random.default_rng(9).random((40, 1, 6, 6))  # float64, as many files hold


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for number in (1, 2):
        arrays = {name: tensor.numpy() for name, tensor in narrowable.weights(number).items()}
        np.savez(tmp_path / f"{number}.npz", **arrays)
    np.savez(tmp_path / "samples.npz", x=IMAGES, labels=np.arange(40) % 3)
    np.savez(tmp_path / "inputs.npz", x=IMAGES[:2])
    return tmp_path


def _run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="prunecast")
    assert done.exit_code == code, done.output
    return done.output


def _create(
    repository: Repository, keys: KeyRing, files: Path, cache: Path, number: int, *more: object
) -> dict[str, Any]:
    said = _run(
        *("release", "create", repository.path, "toy", "--keys", keys.folders[0], "--json"),
        *("--model", files / f"{number}.npz", "--module", "support.narrowable:make"),
        *("--graph-cache", cache, *more),
    )
    found: dict[str, Any] = json.loads(said)
    return found


def _steps(repository: Repository, version: int) -> dict[str, float]:
    model = repository.model(repository.show("toy", version))
    return {n: t.step for n, t in model.tensors.items() if isinstance(t, LatticeTensor)}


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (("--variant", "int8", "--bits", 8), "int8"),
        (("--variant", "int8-qdq"), "int8-qdq"),
        (("--variant", "int8-qdq", "--channels", 0.5, "--bits", 8), "structured int8-qdq"),
    ],
)
def test_every_variant_is_released_twice_and_says_how_far_it_is(
    repository: Repository, keys: KeyRing, files: Path, cache: Path, options: tuple[object, ...],
    kind: str,
) -> None:  # fmt: skip
    calibration = (*options, "--calibration", files / "samples.npz")
    kept = ("--save-graph", files / "kept.onnx")
    first = _create(repository, keys, files, cache, 1, *calibration, *kept)
    start = ("release", "create", repository.path, "toy", "--keys", keys.folders[0], "--json")
    ready = ("--model", files / "2.npz", "--graph", files / "kept.onnx")  # needs no torch
    if "structured" in kind:
        second = _create(repository, keys, files, cache, 2, *calibration)
        again = json.loads(_run(*start, *ready, *calibration))
        assert again["kind"] == kind
        assert repository.show("toy", 3).model_digest == repository.show("toy", 2).model_digest
        repository.retire("toy", 3)
    else:
        second = json.loads(_run(*start, *ready, *calibration))
    assert (first["kind"], second["version"]) == (kind, 2)
    assert second["patch_bytes"]["1"] < second["keyframe_bytes"]
    manifests = [repository.show("toy", v) for v in (1, 2)]
    graphs = [m.files["model.onnx"] for m in manifests]
    assert graphs[0] == graphs[1]  # exported once, so it is not downloaded again
    assert _steps(repository, 1) == _steps(repository, 2)
    shown = json.loads(_run("release", "show", repository.path, "toy"))
    numerics = shown["numerics"]
    assert shown["kind"] == kind
    assert numerics["samples"] == 40
    assert 0 < numerics["relative_difference"] < (0.02 if kind == "int8" else 0.05)
    assert {"accuracy", "reference_accuracy", "classes_changed"} <= set(numerics)
    assert 0 <= numerics["export_difference"] < 1e-4
    # no more digits than are the same with any number of threads
    assert numerics["export_difference"] in {0.0, *(float(f"1e-{n}") for n in range(5, 13))}
    if "structured" in kind:
        assert any("as in the newest release" in note for note in second["notes"])
        plan = plan_of(repository.blob(graphs[1]))
        assert plan is not None
        remaining = plan.kept["conv.weight"][0]
        assert remaining is not None
        assert np.flatnonzero(remaining).tolist() == [1, 3, 5, 7]
    assert len(verify_repository(repository, repository.trusted_root())) == 2


def test_float64_inputs_are_cast_and_the_batch_stays_free(
    repository: Repository, keys: KeyRing, files: Path, cache: Path, tmp_path: Path
) -> None:
    more = ("--selftest", files / "inputs.npz", "--export", tmp_path / "m.onnx")
    made = _create(repository, keys, files, cache, 1, *more)
    assert made["kind"] == "fp32"  # without --bits nothing is on a lattice
    session = open_session(tmp_path / "m.onnx")
    assert session.inputs[0].dtype == "float32"
    batch = IMAGES[:7].astype(np.float32)
    assert session.run({"x": batch})["output"].shape == (7, 3)
    module = narrowable.make()
    module.load_state_dict(narrowable.weights(1))
    wanted = module.eval()(torch.from_numpy(batch)).detach().numpy()
    assert np.abs(session.run({"x": batch})["output"] - wanted).max() < 1e-5


def test_a_kept_graph_is_used_only_while_it_computes_what_the_module_does(cache: Path) -> None:
    example = (torch.rand(2, 1, 6, 6),)
    module = narrowable.make().eval()
    export_cached(module, example, ["x"], cache)  # kept by an earlier test, if one ran
    graph, found = export_cached(module, example, ["x"], cache)
    assert found
    assert graph.max_difference < 1e-5
    other = narrowable.Narrowable(factor=2.0).eval()
    graph, found = export_cached(other, example, ["x"], cache)
    assert not found
    assert export_cached(other, example, ["x"], cache)[1]


def test_what_cannot_be_made_is_explained(
    repository: Repository, keys: KeyRing, files: Path, cache: Path
) -> None:
    start = ("release", "create", repository.path, "toy", "--keys", keys.folders[0])
    model = ("--model", files / "1.npz", "--module", "support.narrowable:make")
    inputs = ("--selftest", files / "inputs.npz", "--graph-cache", cache)
    assert "must be fp32, int8" in _run(*start, *model, *inputs, "--variant", "int4", code=2)
    said = _run(*start, *model, *inputs, "--variant", "int8-qdq", code=1)
    assert "int8-qdq measures activations" in said
    said = _run(*start, *model, *inputs, "--variant", "structured", "--channels", 1, code=1)
    assert "lies between 0 and 1" in said
    np.savez(files / "odd.npz", **{"conv.weight": np.zeros((8, 2, 3, 3), np.float32)})
    odd = ("--model", files / "odd.npz", "--module", "support.narrowable:make")
    assert "does not fit Narrowable" in _run(*start, *odd, *inputs, code=1)
    with pytest.raises(RepositoryError, match="one integer a sample"):
        split_samples({"x": IMAGES, "labels": np.zeros(40)})
    with pytest.raises(RepositoryError, match="39 labels"):
        split_samples({"x": IMAGES, "labels": np.zeros(39, np.int64)})
    assert not repository.releases()

"""One recipe for people, running federations and simulations; nobody waits while it is made."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.onnx.graph import ExportedGraph, save_graph
from prunecast.compression.release.selftest import pack_arrays
from prunecast.compression.versions import PublishedModel, save_model
from prunecast.server.repository import (
    KeyRing,
    RecipeError,
    Repository,
    RepositoryError,
    verify_repository,
)
from prunecast.server.repository import reading as module
from prunecast.server.repository.authoring import (
    NewestRelease,
    ReleaseRecipe,
    Samples,
    build,
    read_recipe,
)
from prunecast.server.repository.authoring.sources import from_arrays
from support import narrowable
from support.classifier import classifier, classifier_graph, classifier_inputs
from support.releases import publish_model

Model = Callable[[int], PublishedModel]
IMAGES = np.random.default_rng(9).random((40, 1, 6, 6)).astype(np.float32)
SAMPLES = Samples({"x": IMAGES}, np.arange(40) % 3)


def published(number: int) -> PublishedModel:
    """What a federation would have published of `support.narrowable`."""
    arrays = {name: tensor.numpy() for name, tensor in narrowable.weights(number).items()}
    return from_arrays(arrays, bits=8, counter=number)


@pytest.mark.parametrize(
    ("options", "option", "message"),
    [
        ({"variant": "int4"}, "variant", "must be fp32, int8, int8-qdq, structured"),
        ({"steps": "best"}, "steps", "must be held, range, error"),
        ({"graph": None}, "module", "either a module or a graph"),
        ({"module": narrowable.make}, "module", "either a module or a graph"),
        ({"selftest": None}, "selftest", "needs inputs"),
        ({"graph": None, "onnx": Path("m.onnx"), "channels": 0.5}, "channels", "torch module"),
        ({"channels": 0.5}, "channels", "the graph has all channels"),
        ({"variant": "structured"}, "channels", "the graph has all channels"),
    ],
)
def test_a_recipe_that_cannot_work_names_its_field(
    options: dict[str, Any], option: str, message: str
) -> None:
    given = {"graph": classifier_graph(), "selftest": classifier_inputs(), **options}
    with pytest.raises(RecipeError, match=message) as failed:
        ReleaseRecipe(**given)
    assert failed.value.option == option


def test_weights_that_do_not_go_with_a_recipe_name_their_field(tmp_path: Path) -> None:
    recipe = ReleaseRecipe(graph=classifier_graph(), selftest=classifier_inputs())
    wrong: list[tuple[ReleaseRecipe, PublishedModel | None, str]] = [
        (recipe, None, "model"),
        (replace(recipe, bits=8), classifier(1), "bits"),
        (replace(recipe, graph=None, module=dict), classifier(1), "module"),
    ]
    for made, model, option in wrong:
        with pytest.raises(RecipeError) as failed:
            made.make(model)
        assert failed.value.option == option
    (tmp_path / "damaged").write_bytes(b"PK")
    for option in ("graph", "selftest", "calibration"):
        for name in ("damaged", "missing"):
            with pytest.raises(RecipeError) as failed:
                read_recipe(**{option: tmp_path / name})
            assert failed.value.option == option


@pytest.mark.parametrize("variant", ["fp32", "int8", "int8-qdq", "structured"])
def test_the_command_makes_what_the_recipe_makes(
    repository: Repository, keys: KeyRing, tmp_path: Path, variant: str
) -> None:
    cache = tmp_path / "graphs"
    recipe = ReleaseRecipe(
        module=narrowable.make, samples=SAMPLES, variant=variant, licence="MIT", cache=cache
    )
    made = [recipe.release(repository, "a", published(n), {"f1": 0.5}).manifest for n in (1, 2)]
    np.savez(tmp_path / "samples.npz", x=IMAGES, labels=SAMPLES.labels)
    for number in (1, 2):
        save_model(published(number), tmp_path / "held.model")
        arguments = [
            *("release", "create", repository.path, "b", "--keys", keys.folders[0], "--json"),
            *("--model", tmp_path / "held.model", "--module", "support.narrowable:make"),
            *("--graph-cache", cache, "--calibration", tmp_path / "samples.npz"),
            *("--variant", variant, "--licence", "MIT", "--metric", "f1=0.5"),
        ]
        done = CliRunner().invoke(app, list(map(str, arguments)), prog_name="prunecast")
        assert done.exit_code == 0, done.output
        assert json.loads(done.output)["kind"] == variant
        shown = repository.show("b", number)
        wanted = made[number - 1]
        assert [p.base_version for p in wanted.patches] == [1][: number - 1]
        same = replace(shown, name="a", created=wanted.created)
        # the stream of the payloads is the name
        assert replace(same, keyframe=wanted.keyframe, patches=wanted.patches) == wanted
        assert shown.model_digest == made[number - 1].model_digest
        assert shown.numerics["samples"] == 40
    assert len(verify_repository(repository, repository.trusted_root())) == 4


def test_a_prepared_recipe_exports_once_and_leaves_the_random_state(tmp_path: Path) -> None:
    made = []

    def factory() -> narrowable.Narrowable:
        made.append(1)
        return narrowable.make()

    recipe = ReleaseRecipe(module=factory, samples=SAMPLES, cache=tmp_path)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    ready = recipe.prepared()
    assert torch.equal(torch.get_rng_state(), before)
    first, second = ready.make(published(1)), ready.make(published(2))
    assert len(made) == 1
    assert first.graph == second.graph == ready.graph
    assert replace(recipe, variant="structured").prepared().module is factory


def test_the_newest_release_is_read_only_where_it_saves_bytes(repository: Repository) -> None:
    recipe = ReleaseRecipe(graph=classifier_graph(), selftest=classifier_inputs())
    newest = NewestRelease(repository, "toy")
    assert (newest.manifest, newest.model, newest.graph) == (None, None, None)
    recipe.release(repository, "toy", classifier(1))
    newest = NewestRelease(repository, "toy")
    recipe.make(classifier(2), newest=newest)
    assert "model" not in vars(newest)
    assert newest.model is not None
    assert newest.model.digest == classifier(1).digest
    assert newest.manifest is not None
    assert newest.graph == repository.blob(newest.manifest.files["model.onnx"])


# while a release is made


def _command(repository: Repository, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prunecast.cli", "release", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("step", ["open_session", "encode_keyframe", "encode_delta"])
def test_another_process_reads_and_publishes_while_one_builds(
    repository: Repository,
    keys: KeyRing,
    graph: ExportedGraph,
    model: Model,
    images: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    publish_model(repository, "toy", model(1), graph, selftest_inputs=images)
    save_graph(graph, tmp_path / "g.onnx")
    save_model(model(3), tmp_path / "three.model")
    (tmp_path / "x.npz").write_bytes(pack_arrays({"input": images}))
    real, listed, created = getattr(build, step), [], []

    def meanwhile(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(build, step, real)
        listed.append(json.loads(_command(repository, "list", repository.path)))
        given = ("--graph", tmp_path / "g.onnx", "--selftest", tmp_path / "x.npz")
        weights = ("--model", tmp_path / "three.model", "--keys", keys.folders[0])
        created.append(
            json.loads(_command(repository, "create", repository.path, "toy", *weights, *given))
        )
        return real(*arguments, **options)

    monkeypatch.setattr(build, step, meanwhile)
    made = publish_model(repository, "toy", model(2), graph, selftest_inputs=images)
    assert [r["version"] for r in listed[0]["releases"]] == [1]
    assert (created[0]["version"], made.version) == (2, 3)
    assert sorted(made.patch_bytes) == [1, 2]  # the other's release is a base, too
    assert repository.show("toy", 2).model_digest == model(3).digest.hex()
    verified = verify_repository(repository, repository.trusted_root())
    assert [(v.version, v.patches) for v in verified] == [(1, 0), (2, 1), (3, 2)]


def test_a_release_that_was_retired_meanwhile_is_no_base(
    repository: Repository,
    graph: ExportedGraph,
    model: Model,
    images: np.ndarray,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in (1, 2):
        publish_model(repository, "toy", model(number), graph, selftest_inputs=images)
    real = build.BuiltRelease.add_patch

    def retiring(self: build.BuiltRelease, base: PublishedModel) -> None:
        real(self, base)
        if base.digest == model(2).digest:
            repository.retire("toy", 2)

    monkeypatch.setattr(build.BuiltRelease, "add_patch", retiring)
    made = publish_model(repository, "toy", model(3), graph, selftest_inputs=images)
    assert (made.version, list(made.patch_bytes)) == (3, [1])
    blobs = {path.name for path in (repository.path / "blobs").iterdir()}
    kept = [repository.show("toy", n) for n in (1, 3)]
    assert {ref.sha256 for m in kept for ref in m.references().values()} <= blobs
    assert len(verify_repository(repository, repository.trusted_root())) == 2


def test_a_writer_waits_a_little_for_another_one(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = module.lock_file(repository.path / ".lock")
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            other.close()

    monkeypatch.setattr(module.time, "sleep", sleep)
    repository.renew()
    assert len(waited) == 3


def test_nothing_is_built_where_it_could_not_be_published(
    repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BuiltRelease", lambda *arguments: pytest.fail("was built"))
    reader = Repository(repository.path, None)
    recipe = ReleaseRecipe(graph=classifier_graph(), selftest=classifier_inputs())
    with pytest.raises(RepositoryError, match="name the folder that holds the keys"):
        recipe.release(reader, "toy", classifier(1))

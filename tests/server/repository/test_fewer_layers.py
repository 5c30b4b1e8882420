"""Releases without some heads of attention, or without whole layers, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.pruning.structure.channels import channels_beside
from prunecast.compression.pruning.structure.narrowing import choose_channels, fit_module
from prunecast.compression.release.runtime import open_session
from prunecast.compression.versions import save_model
from prunecast.server.repository import KeyRing, RecipeError, Repository
from prunecast.server.repository.authoring import ReleaseRecipe
from prunecast.server.repository.authoring.modules import plan_of
from prunecast.server.repository.authoring.sources import from_arrays
from support import attentive

INPUTS = np.random.default_rng(9).normal(size=(40, 6, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for number in (1, 2):
        arrays = {name: tensor.numpy() for name, tensor in attentive.weights(number).items()}
        np.savez(tmp_path / f"{number}.npz", **arrays)
    np.savez(tmp_path / "samples.npz", src=INPUTS, labels=np.arange(40) % 3)
    return tmp_path


def _run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="prunecast")
    assert done.exit_code == code, done.output
    return done.output


@pytest.fixture
def create(repository: Repository, keys: KeyRing, files: Path, cache: Path) -> Any:
    def run(number: int, *more: object, code: int = 0, keyed: bool = True) -> Any:
        said = _run(
            *("release", "create", repository.path, "toy", "--json", "--graph-cache", cache),
            *("--model", files / f"{number}.npz", "--module", "support.attentive:make"),
            *("--calibration", files / "samples.npz", "--bits", 8),
            *(("--keys", keys.folders[0]) if keyed else ()),
            *more,
            code=code,
        )
        return said if code else json.loads(said)

    return run


@pytest.mark.parametrize(
    ("options", "said", "part"),
    [
        (("--heads", 0.5), "50% of the heads", 0.78),
        (("--layers", 0.5), "50% of the layers", 0.6),
        (
            ("--layers", 0.5, "--heads", 0.5, "--channels", 0.5, "--variant", "int8-qdq"),
            "50% of the channels and 50% of the heads and 50% of the layers",
            0.3,
        ),
    ],
)
def test_what_goes_is_stated_before_the_release_is_made_and_is_the_same_in_the_next(
    repository: Repository, files: Path, create: Any, options: tuple[object, ...], said: str,
    part: float,
) -> None:  # fmt: skip
    would = create(1, *options, "--dry-run", keyed=False)
    assert not repository.releases()
    before, after = would["gains"]["before"], would["gains"]["after"]
    assert would["gains"]["structured"]
    assert after["parameters"] < part * before["parameters"] + 100
    assert after["macs"] < before["macs"]
    assert after["onnx_bytes"] < before["onnx_bytes"]
    for figures in (before, after):
        assert figures["fp32"]["ms"] > 0
        assert figures["int8"]["ms"] > 0
    assert f"{said} remain, chosen by these weights" in would["notes"]

    first = create(1, *options)
    assert {**would, "gains": None, "published": True} == {**first, "gains": None}
    second = create(2, *options)
    assert f"{said} remain, as in the newest release" in second["notes"]
    assert second["patch_bytes"]["1"] < second["keyframe_bytes"] < would["onnx_bytes"]
    graphs = [repository.show("toy", v).files["model.onnx"] for v in (1, 2)]
    assert graphs[0] == graphs[1]
    plan = plan_of(repository.blob(graphs[0]))
    assert plan is not None
    if "--heads" in options:
        assert all(mask.tolist() == [False, True] * 2 for mask in plan.heads.values())
        assert len(plan.heads) == (2 if "--layers" in options else 4)
    if "--layers" in options:
        assert plan.gone == ("layers.1", "layers.2")


def test_the_release_computes_what_torch_does_with_the_same_plan(
    files: Path, create: Any, repository: Repository
) -> None:
    options = ("--layers", 0.75, "--heads", 0.5, "--variant", "fp32")
    create(1, *options, "--export", files / "small.onnx")
    manifest = repository.show("toy", 1)
    plan = plan_of(repository.blob(manifest.files["model.onnx"]))
    assert plan is not None
    narrow = fit_module(attentive.make(), plan).eval()
    state = repository.model(manifest).arrays()
    narrow.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in state.items()})
    with torch.no_grad():
        wanted = narrow(torch.from_numpy(INPUTS)).numpy()
    found = open_session(files / "small.onnx").run({"src": INPUTS})
    assert np.abs(next(iter(found.values())) - wanted).max() < 1e-5


def test_a_graph_of_fewer_is_enough_for_the_next_release(files: Path, create: Any) -> None:
    first = create(1, "--heads", 0.5, "--save-graph", files / "kept.onnx")
    ready = ("--heads", 0.5, "--variant", "int8")
    said = _run(
        *("release", "create", files / "repository", "toy", "--dry-run", "--json", *ready),
        *("--model", files / "1.npz", "--graph", files / "kept.onnx", "--bits", 8),
        *("--calibration", files / "samples.npz"),
    )
    again = json.loads(said)
    assert again["kind"] == first["kind"] == "structured"
    assert again["weights_bytes"] == first["weights_bytes"]
    assert "50% of the heads remain, as the graph says" in again["notes"]
    wrong = _run(
        *("release", "create", files / "repository", "toy", "--dry-run", "--layers", 0.5),
        *("--model", files / "1.npz", "--graph", files / "kept.onnx"),
        *("--calibration", files / "samples.npz"),
        code=2,
    )
    assert "--layers" in wrong
    assert "the graph has 50% of the heads" in wrong


def test_more_goes_of_a_model_that_was_trained_without_some(files: Path, create: Any) -> None:
    module = attentive.make()
    module.load_state_dict(attentive.weights(1))
    example = (torch.from_numpy(INPUTS[:4]),)
    plan = choose_channels(module, example, 1, layers=0.75)
    left = plan.arrays({n: t.numpy() for n, t in module.state_dict().items()})
    save_model(from_arrays(left, bits=8), files / "trained.model")
    plan.save(channels_beside(files / "trained.model"))
    recipe = ReleaseRecipe(
        module=attentive.make, selftest={"src": INPUTS[:3]}, removed=plan, heads=0.5, layers=0.67,
        cache=files / "graphs", measure=True,
    )  # fmt: skip
    made = recipe.make(from_arrays(left, bits=8))
    heads = plan_of(made.graph.skeleton)
    assert heads is not None
    assert len(heads.gone) == 1  # of the three that were left
    assert {mask.size for mask in heads.heads.values()} == {4}
    assert made.gains["before"]["parameters"] > made.gains["after"]["parameters"]


def test_what_cannot_go_is_refused_by_name(
    repository: Repository, files: Path, create: Any, tmp_path: Path
) -> None:
    assert "leaves none of the 4 heads" in create(1, "--heads", 0.1, code=1)
    assert "leaves none of the 4 residual layers" in create(1, "--layers", 0.1, code=1)
    assert "the share of heads that remain lies between 0 and 1" in create(1, "--heads", 0, code=1)
    assert "lies between 0 and 1" in create(1, "--layers", 1, code=1)
    plain = ("--module", "support.narrowable:make")
    images = tmp_path / "images.npz"
    np.savez(images, x=np.zeros((2, 1, 6, 6), np.float32))
    from support import narrowable

    np.savez(files / "3.npz", **{n: t.numpy() for n, t in narrowable.weights(1).items()})
    more = (*plain, "--calibration", images)
    assert "no attention whose heads go" in create(3, *more, "--heads", 0.5, code=1)
    assert "no residual layer that could go" in create(3, *more, "--layers", 0.5, code=1)
    assert not repository.releases()

    file = tmp_path / "m.onnx"
    node = helper.make_node("Relu", ["x"], ["y"])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", values[:1], values[1:])), file)
    for field in ("heads", "layers"):
        with pytest.raises(RecipeError, match="from a torch module") as refused:
            ReleaseRecipe(onnx=file, **{field: 0.5})
        assert refused.value.option == field

"""Graphs and releases of strangers run in a process of their own, with bounds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.onnx.graph import ExportedGraph, load_graph, save_graph
from prunecast.compression.onnx.lift import lift_model
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.runtime import Signature
from prunecast.compression.release.selftest import Tolerance
from prunecast.compression.versions import PublishedModel, RawTensor
from prunecast.server.repository import (
    KeyRing,
    RecipeError,
    Repository,
    RepositoryError,
    VerificationFailed,
    verify_repository,
)
from prunecast.server.repository.apart import run_apart
from prunecast.server.repository.authoring import ReleaseContents, ReleaseRecipe, read_recipe
from prunecast.server.repository.authoring.build import BuiltRelease, RecordedModel
from prunecast.server.repository.authoring.sources import GraphFile
from support import endless, foreign
from support.classifier import classifier, classifier_graph, classifier_inputs
from support.measured import largest_child


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds the functions of this file under its plain name."""
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


def execute(code: str) -> None:
    exec(code, {})


def run(code: str, **bounds: float) -> None:
    name = __name__.rpartition(".")[2]
    run_apart(f"{name}:execute", {"code": code}, what="running it", size=0, **bounds)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("x = bytearray(8 << 30)", r"running it takes more memory than .* MB.*--max-bytes"),
        ("sum(range(10**15))", r"running it takes too long.*--max-seconds"),
        ("import os; os.abort()", "running it ended with SIGABRT.*--max-bytes"),
        ("import os; os.kill(os.getpid(), 9)", "killed by the system.*--max-bytes"),
        ("raise ValueError('std::bad_alloc')", "takes more memory.*--max-bytes"),
        ("raise KeyError('x')", "running it failed: KeyError: 'x'"),
        ("import os; os._exit(3)", "running it failed: NoAnswer: its process ended with 3"),
    ],
)
def test_how_a_process_ends_is_told_with_the_remedy(code: str, words: str) -> None:
    with pytest.raises(RepositoryError, match=words):
        run(code, max_bytes=64 << 20, max_seconds=4.0)


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("release import RuntimeFailure as E", ReleaseError, "^text: more$"),
        ("pruning.plan import PlanError as E", ValueError, "^text: more$"),
    ],
)
def test_errors_of_ours_arrive_as_they_are(code: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        run(f"from prunecast.compression.{code}\nraise E('text: more')")
    assert type(caught.value).__name__ in code
    raised = (
        "from prunecast.server.repository import RecipeError\nraise RecipeError('bits', 'a: b')"
    )
    with pytest.raises(RecipeError) as wrong:
        run(raised)
    assert (wrong.value.option, wrong.value.message) == ("bits", "a: b")


# graphs in files


def _without_weights(proto: onnx.ModelProto, folder: Path) -> tuple[ExportedGraph, PublishedModel]:
    lifted = lift_model(foreign.save(proto, folder / "whole.onnx"))
    weights = {name: RawTensor(values) for name, values in lifted.arrays.items()}
    return lifted.graph, PublishedModel(weights)


@pytest.mark.parametrize(
    ("make", "option", "limit"),
    [
        (endless.endless, "--max-seconds", {"max_seconds": 4.0}),
        (endless.folding, "--max-seconds", {"max_seconds": 4.0}),
        (lambda: endless.hungry(2**33), "--max-bytes", {"max_bytes": 1 << 27}),
        (lambda: endless.hungry(2**40), "--max-bytes", {"max_bytes": 1 << 27}),
    ],
    ids=["endless", "folding", "hungry", "hungrier"],
)
@pytest.mark.parametrize("measured", [False, True])
def test_a_hostile_graph_ends_its_own_process(
    make: Callable[[], onnx.ModelProto],
    option: str,
    limit: dict[str, float],
    measured: bool,
    tmp_path: Path,
) -> None:
    graph, model = _without_weights(make(), tmp_path)
    save_graph(graph, tmp_path / "g.onnx")
    np.savez(tmp_path / "x.npz", **endless.INPUTS)
    given = {"calibration": tmp_path / "x.npz"} if measured else {"selftest": tmp_path / "x.npz"}
    recipe = read_recipe(graph=tmp_path / "g.onnx", **given, **limit)

    def refused() -> None:
        with pytest.raises(ReleaseError, match=rf"a release of .*g\.onnx takes .*\({option}\)"):
            recipe.make(model)

    assert largest_child(refused) < 1 << 21


def test_the_command_ends_a_hostile_graph(
    repository: Repository, keys: KeyRing, tmp_path: Path
) -> None:
    graph, model = _without_weights(endless.endless(), tmp_path)
    save_graph(graph, tmp_path / "g.onnx")
    np.savez(tmp_path / "x.npz", **endless.INPUTS)
    np.savez(tmp_path / "w.npz", **model.arrays())
    arguments = ["release", "create", str(repository.path), "toy", "--keys", str(keys.folders[0])]
    arguments += ["--graph", str(tmp_path / "g.onnx"), "--model", str(tmp_path / "w.npz")]
    arguments += ["--selftest", str(tmp_path / "x.npz"), "--max-seconds", "4"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "takes too long and was ended; allow more if you trust it (--max-seconds)" in done.output
    assert repository.releases() == []


def test_a_graph_in_a_file_makes_the_same_as_the_graph(tmp_path: Path) -> None:
    save_graph(classifier_graph(), tmp_path / "g.onnx")
    recipe = ReleaseRecipe(graph=classifier_graph(), selftest=classifier_inputs())
    here = recipe.make(classifier(1))
    made = replace(recipe, graph=GraphFile(tmp_path / "g.onnx")).make(classifier(1))
    assert made.recorded is not None
    assert (made.model.digest, made.kind, made.notes) == (here.model.digest, here.kind, here.notes)
    assert made.graph == here.graph
    assert BuiltRelease(made, "toy").starts_from(here.model.digest.hex())


def test_a_graph_that_reads_other_files_is_refused(tmp_path: Path) -> None:
    """Whoever runs it would read them."""
    path = tmp_path / "g.onnx"
    save_graph(classifier_graph(), path)
    proto = onnx.ModelProto.FromString(path.read_bytes())
    secret = proto.graph.initializer.add(name="s", data_type=TensorProto.UINT8, dims=[8])
    secret.data_location = TensorProto.EXTERNAL
    secret.external_data.add(key="location", value="../../etc/passwd")
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(RecipeError, match="refers to other files"):
        read_recipe(graph=path, selftest=None)
    recipe = ReleaseRecipe(graph=GraphFile(path), selftest=classifier_inputs())
    with pytest.raises(RecipeError, match="refers to other files"):
        recipe.make(classifier(1))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match="no regular file"):
        read_recipe(graph=tmp_path / "pipe")
    save_graph(load_graph_without(path), path)
    assert read_recipe(graph=path, selftest=_inputs(tmp_path)).graph == GraphFile(path)


def load_graph_without(path: Path) -> ExportedGraph:
    """The graph of a file without what reads other files."""
    graph = load_graph(path)
    proto = onnx.ModelProto.FromString(graph.skeleton)
    del proto.graph.initializer[-1]
    return replace(graph, skeleton=proto.SerializeToString(deterministic=True))


def _inputs(folder: Path) -> Path:
    np.savez(folder / "x.npz", input=classifier_inputs())
    return folder / "x.npz"


# releases that are verified


def _publish(repository: Repository, proto: onnx.ModelProto, folder: Path) -> None:
    """A release of a model that nobody has run, signed all the same."""
    graph, model = _without_weights(proto, folder)
    recorded = RecordedModel(
        endless.INPUTS,
        {"y": endless.INPUTS["x"]},
        Tolerance(1e-5),
        (Signature("x", "float32", ("n", 4)),),
        (Signature("y", "float32", ("n", 4)),),
    )
    contents = ReleaseContents(model, graph, endless.INPUTS, "fp32", recorded=recorded)
    repository.publish("toy", contents)


@pytest.mark.parametrize(
    ("make", "limit", "words"),
    [
        (endless.endless, {"max_seconds": 4.0}, r"takes too long.*\(--max-seconds\)"),
        (endless.folding, {"max_seconds": 4.0}, r"takes too long.*\(--max-seconds\)"),
        (lambda: endless.hungry(2**33), {"max_bytes": 1 << 27}, r"more memory.*\(--max-bytes\)"),
        (endless.outer, {}, "self-test|differ"),
    ],
    ids=["endless", "folding", "hungry", "wrong"],
)
def test_a_hostile_release_does_not_verify(
    make: Callable[[], onnx.ModelProto],
    limit: dict[str, float],
    words: str,
    repository: Repository,
    tmp_path: Path,
) -> None:
    _publish(repository, make(), tmp_path)

    def refused() -> None:
        with pytest.raises(VerificationFailed, match=f"release toy 1: .*{words}"):
            verify_repository(repository, repository.trusted_root(), **limit)  # type: ignore[arg-type]

    assert largest_child(refused) < 1 << 21


def test_the_command_ends_a_hostile_release(repository: Repository, tmp_path: Path) -> None:
    _publish(repository, endless.endless(), tmp_path)
    (tmp_path / "root.json").write_bytes(repository.trusted_root())
    arguments = ["release", "verify", str(repository.path), "--root", str(tmp_path / "root.json")]
    done = CliRunner().invoke(app, [*arguments, "--max-seconds", "4"])
    assert done.exit_code == 1
    assert "release toy 1: the self-test of toy 1 takes too long" in done.output

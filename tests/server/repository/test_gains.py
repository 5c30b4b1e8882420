"""What a release is to a device beside the whole model, said before it is published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.onnx.counting import count_graph
from prunecast.compression.release.selftest import pack_arrays
from prunecast.compression.release.timing import joules_so_far, median_seconds
from prunecast.compression.versions import LatticeTensor, PublishedModel, save_model
from prunecast.server.repository import KeyRing, Repository
from prunecast.server.repository.authoring import NewestRelease, ReleaseRecipe, Samples
from prunecast.server.repository.authoring.gains import gain_notes, gain_rows, rehearse
from prunecast.server.repository.authoring.sources import from_arrays
from support import narrowable

IMAGES = np.random.default_rng(9).random((40, 1, 6, 6)).astype(np.float32)
SAMPLES = Samples({"x": IMAGES}, np.arange(40) % 3)


def pruned(number: int = 1) -> PublishedModel:
    """Two thirds of the largest matrix are zero."""
    arrays = {name: tensor.numpy() for name, tensor in narrowable.weights(number).items()}
    dense = from_arrays(arrays, bits=8, counter=number)
    tensors = dict(dense.tensors)
    name = max(tensors, key=lambda n: tensors[n].dense().size if n in tensors else 0)
    held = tensors[name]
    assert isinstance(held, LatticeTensor)
    q = np.where(np.arange(held.q.size).reshape(held.q.shape) % 3 == 0, held.q, 0)
    return PublishedModel({**tensors, name: LatticeTensor(q, held.step, True)}, number)


def made(tmp_path: Path, **options: Any) -> dict[str, Any]:
    recipe = ReleaseRecipe(
        module=narrowable.make, samples=SAMPLES, cache=tmp_path, measure=True, **options
    )
    return dict(recipe.make(pruned()).gains)


def test_zeros_are_said_to_save_bytes_alone(tmp_path: Path) -> None:
    gains = made(tmp_path, variant="int8")
    before, after = gains["before"], gains["after"]
    assert not gains["structured"]
    assert before["macs"] == after["macs"] == before["effective_macs"] > after["effective_macs"]
    assert before["parameters"] == after["parameters"] == before["nonzero"] > after["nonzero"]
    assert before["fp32"]["ms"] == after["fp32"]["ms"] > 0  # the same operations
    assert gains["compression_ratio"] == before["parameters"] / after["nonzero"]
    assert gains["efficiency"] == pytest.approx(1 - after["nonzero"] / before["parameters"])
    assert gains["int8"] == "int8-qdq"  # there are samples to measure activations on
    told = " ".join(gain_notes(gains))
    assert "zeros lie among other weights: they save bytes alone, no operations and no" in told
    assert after["int8"]["estimated_joules"] < after["fp32"]["estimated_joules"]


def test_fewer_channels_save_operations_too(tmp_path: Path) -> None:
    gains = made(tmp_path, variant="structured")
    before, after = gains["before"], gains["after"]
    assert gains["structured"]
    assert before["parameters"] > after["parameters"]
    assert before["macs"] == before["effective_macs"] > after["macs"] >= after["effective_macs"]
    assert before["parameters"] == before["nonzero"]
    assert before["onnx_bytes"] > after["onnx_bytes"]
    header, rows = gain_rows(gains, 500, {"3": 100})
    assert header == ["to a device", "before", "after", "gain"]
    table = {row[0]: row[1:] for row in rows}
    size = before["onnx_bytes"]
    assert table["bytes, the whole model"][:2] == [f"{size:,}", "500"]
    assert table["bytes, patch from 3"][1] == "100"
    assert table["operations (MACs)"][:2] == [f"{before['macs']:,}", f"{after['macs']:,}"]
    assert {"milliseconds, fp32", "milliseconds, int8-qdq", "≈ microjoules, fp32"} <= table.keys()


def test_without_integers_there_are_no_figures_of_them(tmp_path: Path) -> None:
    arrays = {name: tensor.numpy() for name, tensor in narrowable.weights(1).items()}
    recipe = ReleaseRecipe(
        module=narrowable.make, selftest=IMAGES[:2], cache=tmp_path, variant="fp32", measure=True
    )
    gains = recipe.make(from_arrays(arrays)).gains
    assert gains["after"]["int8"] is None
    assert gains["int8"] == "int8"
    assert not any("int8" in row[0] for row in gain_rows(gains, 1, {})[1])


def test_nothing_is_measured_unless_it_is_asked_for(tmp_path: Path) -> None:
    recipe = ReleaseRecipe(module=narrowable.make, samples=SAMPLES, cache=tmp_path)
    assert recipe.make(pruned()).gains == {}


def test_a_rehearsal_has_the_figures_of_the_release_and_writes_nothing(tmp_path: Path) -> None:
    keys = KeyRing.create(tmp_path / "keys")
    repository = Repository.create(tmp_path / "repository", keys)
    recipe = ReleaseRecipe(module=narrowable.make, samples=SAMPLES, cache=tmp_path / "graphs")
    recipe.release(repository, "digits", pruned(1))
    files = sorted(repository.path.rglob("*"))
    contents = recipe.make(pruned(2), newest=NewestRelease(repository, "digits"))
    would = rehearse(repository, "digits", contents)
    assert sorted(repository.path.rglob("*")) == files
    done = repository.publish("digits", contents)
    assert (would.version, would.onnx_bytes) == (done.version, done.onnx_bytes)
    assert would.patch_bytes == done.patch_bytes
    assert would.manifest.keyframe == done.manifest.keyframe


def test_the_command_states_it_and_publishes_nothing_when_it_is_dry(tmp_path: Path) -> None:
    Repository.create(tmp_path / "repository", KeyRing.create(tmp_path / "keys"))
    save_model(pruned(), tmp_path / "a.model")
    (tmp_path / "calibration.npz").write_bytes(pack_arrays({"x": IMAGES}))
    given = ["release", "create", str(tmp_path / "repository"), "digits"]
    given += ["--model", str(tmp_path / "a.model"), "--module", "support.narrowable:make"]
    given += ["--calibration", str(tmp_path / "calibration.npz"), "--variant", "structured"]
    given += ["--graph-cache", str(tmp_path / "graphs")]
    run = CliRunner().invoke(app, given)
    assert run.exit_code == 2
    assert "--dry-run" in run.output

    run = CliRunner().invoke(app, [*given, "--dry-run"])
    assert run.exit_code == 0, run.output
    assert "digits 1 would be the next release: nothing is published" in run.output
    assert "operations (MACs)" in run.output
    assert "zeros lie among other weights: they save bytes alone" in run.output
    assert not Repository(tmp_path / "repository", KeyRing(tmp_path / "keys")).releases()

    run = CliRunner().invoke(app, [*given, "--keys", str(tmp_path / "keys"), "--json"])
    assert run.exit_code == 0, run.output
    document = json.loads(run.stdout)
    assert document["published"] is True
    assert document["gains"]["before"]["macs"] > document["gains"]["after"]["macs"]
    reader = Repository(tmp_path / "repository", KeyRing(tmp_path / "keys"))
    assert [entry.version for entry in reader.releases()] == [1]


def _file(path: Path) -> Path:
    """An ``.onnx`` file: one convolution, an einsum, and a matrix."""
    rng = np.random.default_rng(1)
    weights = {
        "kernel": rng.random((4, 1, 3, 3), np.float32),
        "square": rng.random((4, 4), np.float32),
        "matrix": rng.random((64, 3), np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "kernel"], ["a"]),
        helper.make_node("Einsum", ["a", "square"], ["b"], equation="ncij,cd->ndij"),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "matrix"], ["y"]),
    ]
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", floats, ["n", 1, 6, 6])],
        [helper.make_tensor_value_info("y", floats, ["n", 3])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    opset = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
    return path


def test_a_file_of_another_origin_is_measured_where_it_is_taken_apart(tmp_path: Path) -> None:
    recipe = ReleaseRecipe(onnx=_file(tmp_path / "a.onnx"), bits=8, measure=True)
    contents = recipe.make()
    gains = contents.gains
    assert gains["after"]["macs"] == 16 * 36 + 16 * 16 + 192
    assert gains["after"]["int8"]["ms"] > 0
    assert contents.exported is not None
    example = {"x": IMAGES[:3]}
    counted = count_graph(contents.exported, contents.model, example)
    assert sorted(counted.uses.values()) == [1, 16, 16]


def test_rapl_is_read_where_it_is(tmp_path: Path) -> None:
    assert joules_so_far(tmp_path) is None
    for zone, energy in (("intel-rapl:0", "2500000"), ("intel-rapl:1", "500000")):
        (tmp_path / zone).mkdir()
        (tmp_path / zone / "energy_uj").write_text(energy + "\n")
    (tmp_path / "intel-rapl:0:0").mkdir()
    (tmp_path / "intel-rapl:0:0" / "energy_uj").write_text("99")  # a core's: part of the package
    assert joules_so_far(tmp_path) == 3.0
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert joules_so_far(tmp_path) is None


def test_a_call_is_timed_by_its_median() -> None:
    calls: list[int] = []
    seconds, _ = median_seconds(lambda: calls.append(1))
    assert 0 < seconds < 1
    assert 14 <= len(calls) <= 205  # some to warm up, nine at least

"""Releases from existing ``.onnx`` files, as far as a device that runs them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.onnx import ForeignModel, NumericsError
from prunecast.compression.onnx.compare import draw_inputs
from prunecast.compression.onnx.lift import lift_model
from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.runtime import open_session
from prunecast.compression.release.selftest import unpack_arrays
from prunecast.server.repository import KeyRing, Repository, RepositoryError, verify_repository
from prunecast.server.repository.authoring import (
    ReleaseRecipe,
    Samples,
    export_release,
)
from prunecast.server.repository.authoring.build import BuiltRelease
from prunecast.server.repository.authoring.sources import from_onnx
from support import foreign
from support.measured import largest_child


@pytest.mark.parametrize("bits", [None, 8, 12])
@pytest.mark.parametrize("kind", foreign.KINDS)
def test_every_kind_becomes_a_release_that_verifies(
    kind: str, bits: int | None, repository: Repository, tmp_path: Path
) -> None:
    path = foreign.save(foreign.KINDS[kind](), tmp_path / "m.onnx", external=True)
    made = from_onnx(path, bits=bits)
    assert made.metrics["onnx_relative_difference"] <= (0.0 if bits is None else 0.2)
    published = repository.publish("toy", made)
    verified = verify_repository(repository, repository.trusted_root())
    assert [v.version for v in verified] == [1]
    manifest = published.manifest
    assert manifest.metrics == made.metrics
    original = open_session(path, threads=1)
    assert (manifest.inputs, manifest.outputs) == (original.inputs, original.outputs)
    export_release(repository, manifest, tmp_path / "single.onnx")
    single = open_session(tmp_path / "single.onnx", threads=1)
    inputs = unpack_arrays(repository.blob(manifest.files["selftest.npz"]))
    wanted, got = original.run(inputs), single.run(inputs)
    for name, values in wanted.items():
        assert np.abs(values - got[name]).max() <= made.metrics["onnx_max_difference"] + 1e-6
    onnx.checker.check_model(str(tmp_path / "single.onnx"))


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("kind", foreign.WEIGHTLESS)
def test_models_without_tensors_of_weights_are_released_exactly(
    kind: str, bits: int | None, repository: Repository, tmp_path: Path
) -> None:
    path = foreign.save(foreign.WEIGHTLESS[kind](), tmp_path / "m.onnx")
    made = from_onnx(path, bits=bits)
    assert made.metrics["onnx_max_difference"] == made.metrics["onnx_relative_difference"] == 0.0
    assert [n for n in made.notes if n.startswith("no tensor holds weights")]
    manifest = repository.publish("toy", made).manifest
    assert manifest.weights.length == 0
    assert [v.version for v in verify_repository(repository, repository.trusted_root())] == [1]
    export_release(repository, manifest, tmp_path / "single.onnx")
    original, single = open_session(path), open_session(tmp_path / "single.onnx")
    inputs = unpack_arrays(repository.blob(manifest.files["selftest.npz"]))
    wanted, got = original.run(inputs), single.run(inputs)
    for name, values in wanted.items():
        assert values.tolist() == got[name].tolist()


def test_a_model_of_texts_is_released_with_the_texts_it_was_given(
    repository: Repository, tmp_path: Path
) -> None:
    path = foreign.save(foreign.texts(), tmp_path / "m.onnx")
    words = np.array(["2", "straße", "unknown to it"])
    made = from_onnx(path, inputs={"word": words})
    manifest = repository.publish("toy", made).manifest
    assert [(s.dtype, s.shape) for s in (*manifest.inputs, *manifest.outputs)] == [
        ("str", (3,)), ("int64", (3,)), ("str", (3,)),
    ]  # fmt: skip
    held = unpack_arrays(repository.blob(manifest.files["selftest.npz"]))
    expected = unpack_arrays(repository.blob(manifest.files["expected.npz"]))
    assert held["word"].tolist() == words.tolist()
    assert expected["code"].tolist() == [20, 30, -1]
    assert expected["name"].tolist() == ["", "road", "none of them"]


@pytest.mark.parametrize(
    ("opset", "bits", "variant", "note"),
    [
        (9, 8, "fp32", "opset 9 has no DequantizeLinear"),
        (10, 8, "lattice", None),
        (13, 8, "lattice", None),
        (17, 12, "fp32", "opset 17 cannot dequantise 16 bits"),
        (21, 12, "lattice", None),
    ],
)
def test_the_opset_decides_what_the_device_holds(
    opset: int, bits: int, variant: str, note: str | None, tmp_path: Path
) -> None:
    path = foreign.save(foreign.plain(opset), tmp_path / "m.onnx")
    made = from_onnx(path, bits=bits)
    assert made.variant == variant
    found = [n for n in made.notes if n.startswith("opset")]
    assert [n[: len(note)] for n in found] == [note] if note else found == []


def test_a_free_batch_stays_free(repository: Repository, tmp_path: Path) -> None:
    made = from_onnx(foreign.save(foreign.plain(), tmp_path / "m.onnx"), bits=8)
    published = repository.publish("toy", made)
    assert published.manifest.inputs[0].shape == ("batch", 24)
    export_release(repository, published.manifest, tmp_path / "s.onnx")
    session = open_session(tmp_path / "s.onnx")
    assert session.run({"x": foreign.weight(9, 24)})["y"].shape == (9, 5)


def test_the_next_version_travels_as_a_small_patch(repository: Repository, tmp_path: Path) -> None:
    proto = foreign.plain()
    proto.graph.initializer[0].CopyFrom(foreign.tensor(foreign.weight(24, 24), "w"))
    first = from_onnx(foreign.save(proto, tmp_path / "a.onnx"), bits=8)
    repository.publish("toy", first)
    moved = foreign.weight(24, 24) + np.float32(1e-4)
    proto.graph.initializer[0].CopyFrom(foreign.tensor(moved, "w"))
    second = from_onnx(foreign.save(proto, tmp_path / "b.onnx"), bits=8, held=first.model)
    made = repository.publish("toy", second)
    assert made.patch_bytes[1] < made.manifest.keyframe.length / 2
    files = [repository.show("toy", v).files["model.onnx"] for v in (1, 2)]
    assert files[0] == files[1]


def test_too_coarse_a_lattice_is_refused_on_request(tmp_path: Path) -> None:
    path = foreign.save(foreign.plain(), tmp_path / "m.onnx")
    from_onnx(path, bits=8, most_difference=0.1)
    with pytest.raises(NumericsError, match="at 3 bits the outputs differ by"):
        from_onnx(path, bits=3, most_difference=0.1)


def test_a_model_that_draws_random_numbers_is_refused(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("RandomNormalLike", ["x"], ["noise"]),
        helper.make_node("Add", ["x", "noise"], ["z"]),
        helper.make_node("MatMul", ["z", "w"], ["y"]),
    ]
    held = [foreign.tensor(foreign.weight(16, 16), "w")]
    ends = [foreign.value("x", "n", 16)], [foreign.value("y", "n", 16)]
    path = foreign.save(foreign.model(nodes, *ends, held), tmp_path / "m.onnx")
    with pytest.raises(ForeignModel, match="random numbers"):
        from_onnx(path)


def test_inputs_are_drawn_for_what_the_model_takes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["e"]),
        helper.make_node("Where", ["mask", "e", "nothing"], ["y"]),
    ]
    held = [foreign.tensor(foreign.weight(3, 8), "table"), foreign.tensor(np.float32(0), "nothing")]
    inputs = [
        foreign.value("tokens", "batch", "length", kind=TensorProto.INT64),
        foreign.value("mask", "batch", "length", 1, kind=TensorProto.BOOL),
    ]
    proto = foreign.model(nodes, inputs, [foreign.value("y", "batch", "length", 8)], held)
    session = open_session(foreign.save(proto, tmp_path / "m.onnx"))
    drawn = draw_inputs(session, 0)
    assert {n: (a.dtype.name, a.shape) for n, a in drawn.items()} == {
        "tokens": ("int64", (2, 16)),
        "mask": ("bool", (2, 16, 1)),
    }
    again = draw_inputs(session, 0)
    assert all(np.array_equal(drawn[n], again[n]) for n in drawn)
    assert not np.array_equal(drawn["mask"], draw_inputs(session, 1)["mask"])


# the command


def _run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], prog_name="prunecast")
    assert done.exit_code == code, done.output
    return done.output


def test_the_command_publishes_a_file_and_its_successor(
    repository: Repository, keys: KeyRing, tmp_path: Path
) -> None:
    path = foreign.save(foreign.plain(), tmp_path / "m.onnx", external=True)
    common = ("--keys", keys.folders[0], "--from", path, "--bits", 8, "--json")
    made = json.loads(
        _run("release", "create", repository.path, "toy", *common, "--export", tmp_path / "s.onnx")
    )
    assert made["variant"] == "lattice"
    assert made["exported_bytes"] == (tmp_path / "s.onnx").stat().st_size
    assert 0 < made["onnx_relative_difference"] < 0.1
    proto = foreign.plain()
    proto.graph.initializer[1].CopyFrom(foreign.tensor(foreign.weight(24, seed=5), "b"))
    foreign.save(proto, path)
    np.savez(tmp_path / "x.npz", x=foreign.weight(3, 24))
    real = ("--selftest", tmp_path / "x.npz")
    made = json.loads(_run("release", "create", repository.path, "toy", *common, *real))
    assert made["version"] == 2
    assert made["patch_bytes"]["1"] < made["keyframe_bytes"]
    assert not [n for n in made["notes"] if "drawn" in n]
    shown = _run("release", "show", repository.path, "toy", "1", "--export", tmp_path / "t.onnx")
    assert json.loads(shown)["metrics"]["onnx_max_difference"] > 0
    assert (tmp_path / "s.onnx").read_bytes() == (tmp_path / "t.onnx").read_bytes()


def test_the_command_says_what_changed_and_refuses_what_it_must(
    repository: Repository, keys: KeyRing, tmp_path: Path
) -> None:
    path = foreign.save(foreign.plain(), tmp_path / "m.onnx")
    start = ("release", "create", repository.path, "toy", "--keys", keys.folders[0])
    said = _run(*start, "--from", path, "--bits", 8)
    assert "outputs differ from the original by at most" in said
    assert "drawn inputs (seed 0)" in said
    assert "--from has graph and weights" in _run(*start, "--from", path, "--model", path, code=2)
    assert "--model and --selftest" in _run(*start, code=2)
    assert "--steps" in _run(*start, "--from", path, "--steps", "best", code=2)
    (tmp_path / "w.bin").write_bytes(bytes(24 * 24 * 4))
    proto = foreign.plain()
    held = proto.graph.initializer[0]
    held.ClearField("raw_data")
    held.data_location = TensorProto.EXTERNAL
    held.external_data.add(key="location", value="../w.bin")
    (tmp_path / "model").mkdir()
    hostile = foreign.save(proto, tmp_path / "model" / "m.onnx")
    assert "only relative paths below the model's folder" in _run(*start, "--from", hostile, code=1)
    assert [e.version for e in repository.releases()] == [1]


@pytest.mark.parametrize(
    ("variant", "kind"), [("int8", "int8"), ("int8-qdq", "int8-qdq"), ("fp32", "fp32")]
)
def test_a_file_with_samples_states_its_distance_from_the_original(
    repository: Repository, tmp_path: Path, variant: str, kind: str
) -> None:
    path = foreign.save(foreign.plain(), tmp_path / "m.onnx", external=True)
    samples = Samples({"x": foreign.weight(40, 24)})
    recipe = ReleaseRecipe(onnx=path, bits=8, samples=samples, variant=variant)
    manifest = recipe.release(repository, "toy").manifest
    assert manifest.kind == kind
    assert manifest.metrics["onnx_max_difference"] > 0
    assert manifest.numerics["samples"] == 40
    assert 0 < manifest.numerics["relative_difference"] < 0.1
    tested = unpack_arrays(repository.blob(manifest.files["selftest.npz"]))
    assert np.array_equal(tested["x"], samples.inputs["x"][:4])
    assert len(verify_repository(repository, repository.trusted_root())) == 1


# files that ask for more than they are


@pytest.mark.parametrize("bomb", foreign.BOMBS)
def test_a_small_file_that_asks_for_gigabytes_is_refused(bomb: str, tmp_path: Path) -> None:
    """In a process of its own, which ends instead of this one."""
    path = foreign.save(foreign.BOMBS[bomb](), tmp_path / "m.onnx")
    assert path.stat().st_size < 5000

    def refused() -> None:
        with pytest.raises(
            ForeignModel, match=r"m\.onnx .*takes more memory than .* MB.*--max-bytes"
        ):
            ReleaseRecipe(onnx=path, max_bytes=1 << 27).make()

    assert largest_child(refused) < 1 << 21


def test_a_model_that_never_ends_is_ended(
    repository: Repository, keys: KeyRing, tmp_path: Path
) -> None:
    path = foreign.save(foreign.endless(), tmp_path / "m.onnx")
    start = ("release", "create", repository.path, "toy", "--keys", keys.folders[0])
    said = _run(*start, "--from", path, "--max-seconds", 4, code=1)
    assert "takes too long and was ended; allow more if you trust it (--max-seconds)" in said
    assert repository.releases() == []


def _sparse(tmp_path: Path) -> Path:
    proto = foreign.plain()
    one, place = foreign.tensor(foreign.weight(1), "s"), foreign.tensor(np.array([0]), "")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(one, place, [1 << 33]))
    return foreign.save(proto, tmp_path / "m.onnx")


def _hole(tmp_path: Path) -> Path:
    """Terabytes of external data that are a hole in a file."""
    proto = foreign.plain()
    huge = proto.graph.initializer.add(name="huge", data_type=TensorProto.FLOAT, dims=[1 << 33])
    huge.data_location = TensorProto.EXTERNAL
    huge.external_data.add(key="location", value="huge.bin")
    (tmp_path / "huge.bin").write_bytes(b"")
    os.truncate(tmp_path / "huge.bin", 1 << 35)
    return foreign.save(proto, tmp_path / "m.onnx")


def _overlapping(tmp_path: Path) -> Path:
    """A thousand tensors that are the same megabyte of a file."""
    proto = foreign.plain()
    for i in range(1000):
        same = proto.graph.initializer.add(
            name=f"w{i}", data_type=TensorProto.FLOAT, dims=[1 << 18]
        )
        same.data_location = TensorProto.EXTERNAL
        same.external_data.add(key="location", value="same.bin")
    (tmp_path / "same.bin").write_bytes(bytes(1 << 20))
    return foreign.save(proto, tmp_path / "m.onnx")


@pytest.mark.parametrize("make", [_sparse, _hole, _overlapping])
def test_what_tensors_state_is_added_up_first(make: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ForeignModel, match=r"its tensors take more than .* bytes.*--max-bytes"):
        lift_model(make(tmp_path), max_bytes=1 << 29)


def test_what_its_process_says_arrives(tmp_path: Path) -> None:
    path = foreign.save(foreign.plain(), tmp_path / "m.onnx")
    with pytest.raises(NumericsError, match="use more bits, or none"):
        ReleaseRecipe(onnx=path, bits=3, most_difference=0.1).make()
    with pytest.raises(RepositoryError, match=r"inputs \['x'\].*numpy\.savez\(file, x=\.\.\.\)"):
        ReleaseRecipe(onnx=path, selftest={"other": foreign.weight(3, 24)}).make()
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ForeignModel, match="not a readable"):
        ReleaseRecipe(onnx=path).make()
    with pytest.raises(ForeignModel, match="No such file"):
        ReleaseRecipe(onnx=tmp_path / "none.onnx").make()


def test_a_process_of_its_own_makes_the_same(tmp_path: Path) -> None:
    path = foreign.save(foreign.plain(), tmp_path / "m.onnx", external=True)
    held = from_onnx(path, bits=8).model
    bounded, here = ReleaseRecipe(onnx=path, bits=8).make(), from_onnx(path, bits=8)
    assert bounded.model.digest == here.model.digest == held.digest
    assert bounded.graph == here.graph
    assert bounded.metrics == here.metrics
    assert {n: a.tobytes() for n, a in bounded.inputs.items()} == {
        n: a.tobytes() for n, a in here.inputs.items()
    }
    built = BuiltRelease(bounded, "toy").finish(1, datetime.now(UTC), [])
    again = BuiltRelease(here, "toy").finish(1, datetime.now(UTC), [])
    assert built[1] == again[1]


def test_a_model_in_a_cache_of_links_is_read(tmp_path: Path, repository: Repository) -> None:
    """As huggingface_hub lays it out: files in snapshots are links to blobs."""
    (tmp_path / "plain").mkdir()
    foreign.save(foreign.plain(), tmp_path / "plain" / "model.onnx")
    onnx.save(
        foreign.plain(), tmp_path / "plain" / "model.onnx", save_as_external_data=True,
        location="model.onnx_data", size_threshold=100,
    )  # fmt: skip
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx_data"):
        blob = blobs / hashlib.sha256(name.encode()).hexdigest()
        blob.write_bytes((tmp_path / "plain" / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    found, wanted = lift_model(snapshot / "model.onnx"), lift_model(tmp_path / "plain/model.onnx")
    assert {n: a.tobytes() for n, a in found.arrays.items()} == {
        n: a.tobytes() for n, a in wanted.arrays.items()
    }
    ReleaseRecipe(onnx=snapshot / "model.onnx").release(repository, "toy")
    assert len(verify_repository(repository, repository.trusted_root())) == 1
    # a model that is no link itself leads nowhere by links
    (snapshot / "model.onnx").unlink()
    (snapshot / "model.onnx").write_bytes((tmp_path / "plain" / "model.onnx").read_bytes())
    with pytest.raises(ForeignModel, match=r"symbolic link.*out of the model's folder"):
        lift_model(snapshot / "model.onnx")


def test_outputs_that_are_no_tensors_say_how_to_export(tmp_path: Path) -> None:
    """As skl2onnx makes them unless it is told otherwise."""
    nodes = [
        helper.make_node(
            "LinearClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml",
            classlabels_ints=[0, 1, 2], coefficients=[0.1] * 12, intercepts=[0.0, 0.1, 0.2],
        ),
        helper.make_node(
            "ZipMap", ["scores"], ["probability"], domain="ai.onnx.ml",
            classlabels_int64s=[0, 1, 2],
        ),
    ]  # fmt: skip
    last = onnx.ValueInfoProto(name="probability")
    kind = last.type.sequence_type.elem_type.map_type
    kind.key_type, kind.value_type.tensor_type.elem_type = TensorProto.INT64, TensorProto.FLOAT
    label = foreign.value("label", "n", kind=TensorProto.INT64)
    proto = foreign.model(nodes, [foreign.value("x", "n", 4)], [label, last], [])
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    with pytest.raises(RuntimeFailure, match=r"'probability' is a seq\(map.*'zipmap': False"):
        ReleaseRecipe(onnx=foreign.save(proto, tmp_path / "m.onnx")).make()


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda m: setattr(m.opset_import[0], "version", 90), "export it with a lower opset"),
        (lambda m: setattr(m, "ir_version", 90), "save it with a lower ir_version"),
        (lambda m: setattr(m.graph.node[0], "op_type", "Foo"), "devices have ONNX's own operators"),
    ],
    ids=["opset", "ir", "operator"],
)
def test_what_the_runtime_refuses_says_what_to_do(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], remedy: str
) -> None:
    proto = foreign.plain()
    change(proto)
    onnx.save(proto, tmp_path / "m.onnx")
    with pytest.raises(RuntimeFailure, match=remedy):
        from_onnx(tmp_path / "m.onnx")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx")
    with pytest.raises(ForeignModel, match="no regular file"):
        ReleaseRecipe(onnx=tmp_path / "m.onnx").make()

"""Weights are found wherever they are, and the graph computes the same with them outside."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from prunecast.compression.onnx import ForeignModel
from prunecast.compression.onnx.bind import bind_weights
from prunecast.compression.onnx.compare import differ, draw_inputs, record
from prunecast.compression.onnx.lift import lift_model
from prunecast.compression.release import ReleaseError
from prunecast.compression.release.runtime import open_session
from prunecast.compression.versions import PublishedModel, RawTensor
from support import foreign

WEIGHTS = {
    "plain": {"w", "b", "head"},
    "constants": {"w", "b", "gain"},
    "branches": {
        *("outer", "zero", "choose.then_branch/w", "choose.else_branch/w"),
        *("z.then_branch/o1", "z.else_branch/o2"),
    },
    "loop": {"turn.body/w", "turn.body/u.then_branch/k", "turn.body/u.else_branch/k"},
    "scan": {"start", "end.body/w"},
    "function": {"w__1"},
    "sparse": {"w"},
}


def _same(path: Path, folder: Path, seeds: int = 3) -> None:
    """The lifted model gives the original's outputs, bit for bit, on several inputs."""
    lifted = lift_model(path)
    model = PublishedModel({n: RawTensor(a) for n, a in lifted.arrays.items()})
    bound = bind_weights(lifted.graph, model, folder, variant="fp32")
    original, rebuilt = open_session(path, threads=1), open_session(bound.model, threads=1)
    assert (original.inputs, original.outputs) == (rebuilt.inputs, rebuilt.outputs)
    for seed in range(seeds):
        inputs = draw_inputs(original, seed)
        wanted, got = record(original, inputs), rebuilt.run(inputs)
        assert {n: a.tobytes() for n, a in wanted.items()} == {
            n: a.tobytes() for n, a in got.items()
        }


@pytest.mark.parametrize("external", [False, True], ids=["inside", "beside"])
@pytest.mark.parametrize("kind", foreign.KINDS)
def test_weights_are_found_and_the_outputs_stay(kind: str, external: bool, tmp_path: Path) -> None:
    path = foreign.save(foreign.KINDS[kind](), tmp_path / "m.onnx", external=external)
    lifted = lift_model(path)
    assert set(lifted.arrays) == WEIGHTS[kind]
    assert set(lifted.graph.parameters) == WEIGHTS[kind]
    _same(path, tmp_path / "out")


def test_no_weight_stays_in_the_graph(tmp_path: Path) -> None:
    for kind, make in foreign.KINDS.items():
        lifted = lift_model(foreign.save(make(), tmp_path / f"{kind}.onnx"))
        whole = sum(a.nbytes for a in lifted.arrays.values())
        assert len(lifted.graph.skeleton) < 900 < whole


def test_only_what_is_multiplied_may_go_on_a_lattice(tmp_path: Path) -> None:
    anchors = foreign.weight(40, 4)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Identity", ["w"], ["same"]),
        helper.make_node("Transpose", ["same"], ["turned"]),
        helper.make_node("MatMul", ["a", "turned"], ["b"]),
        helper.make_node("Add", ["a", "anchors"], ["c"]),
        helper.make_node("MatMul", ["c", "both"], ["d"]),
        helper.make_node("Add", ["d", "both"], ["y"]),
    ]
    held = [
        foreign.tensor(foreign.weight(8, 4), "w"),
        foreign.tensor(anchors, "anchors"),
        foreign.tensor(foreign.weight(4, 4)[:1].repeat(4, 0), "both"),
    ]
    proto = foreign.model(nodes, [foreign.value("x", 40, 8)], [foreign.value("b", 40, 8)], held)
    lifted = lift_model(foreign.save(proto, tmp_path / "m.onnx"))
    assert lifted.kernels == {"w"}


def test_old_models_that_list_weights_as_inputs(tmp_path: Path) -> None:
    proto = foreign.plain(opset=9)
    proto.ir_version = 3
    proto.graph.input.extend(
        foreign.value(i.name, *i.dims, kind=i.data_type) for i in proto.graph.initializer
    )
    path = foreign.save(proto, tmp_path / "m.onnx")
    assert lift_model(path).opset == 9
    _same(path, tmp_path / "out")


def test_types_without_a_coding_stay_in_the_graph(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["a", "v"], ["y"]),
    ]
    half = helper.make_tensor(
        "half", TensorProto.BFLOAT16, [16, 16], foreign.weight(16, 16).ravel().tolist()
    )
    held = [half, foreign.tensor(foreign.weight(16, 4), "v")]
    proto = foreign.model(nodes, [foreign.value("x", "n", 16)], [foreign.value("y", "n", 4)], held)
    for external in (False, True):
        path = foreign.save(proto, tmp_path / f"{external}.onnx", external=external)
        lifted = lift_model(path)
        assert set(lifted.arrays) == {"v"}
        assert any("without a coding" in note for note in lifted.notes)
        _same(path, tmp_path / f"out{external}")


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.lstm = nn.LSTM(24, 12, batch_first=True)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x)))  # (n, 4, 6, 6)
        return self.fc(self.lstm(y.permute(0, 2, 1, 3).flatten(2))[0][:, -1])


@pytest.mark.parametrize("optimise", [False, True])
def test_a_torch_export(optimise: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = _Net().eval()
    path = tmp_path / "m.onnx"
    program = torch.onnx.export(
        module,
        (torch.randn(2, 1, 6, 6),),
        dynamo=True,
        optimize=optimise,
        verbose=False,
        dynamic_shapes=({0: "batch"},),
    )
    assert program is not None
    program.save(path, external_data=True)
    lifted = lift_model(path)
    assert sum(a.size for a in lifted.arrays.values()) >= sum(
        p.numel() for p in module.conv.parameters()
    )
    assert any(a.shape[-3:] == (1, 3, 3) for n, a in lifted.arrays.items() if n in lifted.kernels)
    assert b"site-packages" not in lifted.graph.skeleton
    assert b".py" not in lifted.graph.skeleton
    _same(path, tmp_path / "out")


# hostile files


@pytest.mark.parametrize(
    "location",
    [
        "../secret.bin",
        "/etc/passwd",
        "data/../../secret.bin",
        "C:\\secret.bin",
        "",
        "..\\s",
        "a\0b",
    ],
)
def test_external_data_outside_the_folder_are_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(24 * 24 * 4))
    folder = tmp_path / "model"
    folder.mkdir()
    proto = foreign.plain()
    _point(proto.graph.initializer[0], location)
    path = foreign.save(proto, folder / "m.onnx")
    with pytest.raises(ForeignModel, match="'w' names external data at"):
        lift_model(path)


def _point(tensor: onnx.TensorProto, location: str, **entries: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


@pytest.mark.parametrize("which", ["file", "folder"])
def test_symbolic_links_are_refused(which: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "w.bin").write_bytes(bytes(24 * 24 * 4))
    folder = tmp_path / "model"
    folder.mkdir()
    if which == "file":
        (folder / "data").mkdir()
        (folder / "data" / "w.bin").symlink_to(tmp_path / "elsewhere" / "w.bin")
    else:
        (folder / "data").symlink_to(tmp_path / "elsewhere")
    proto = foreign.plain()
    _point(proto.graph.initializer[0], "data/w.bin")
    path = foreign.save(proto, folder / "m.onnx")
    with pytest.raises(ForeignModel, match="symbolic link"):
        lift_model(path)


def test_external_data_of_inner_graphs_and_constants_are_checked_too(tmp_path: Path) -> None:
    proto = foreign.branches()
    choose = next(n for n in proto.graph.node if n.name == "choose")
    inner = {a.name: a.g for a in choose.attribute}
    _point(inner["else_branch"].initializer[0], "../w.bin")
    with pytest.raises(ForeignModel, match="only relative paths below the model"):
        lift_model(foreign.save(proto, tmp_path / "a.onnx"))
    proto = foreign.function()
    _point(proto.functions[0].node[0].attribute[0].t, "/w.bin")
    with pytest.raises(ForeignModel, match="only relative paths below the model"):
        lift_model(foreign.save(proto, tmp_path / "b.onnx"))


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"offset": 10**9}, "does not fit"),
        ({"offset": -64}, "does not fit"),
        ({"length": 5}, "does not fit"),
        ({"offset": 64}, "does not fit"),
    ],
)
def test_external_data_that_do_not_fit(entries: dict[str, int], match: str, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(24 * 24 * 4))
    proto = foreign.plain()
    _point(proto.graph.initializer[0], "w.bin", **entries)
    with pytest.raises(ForeignModel, match=match):
        lift_model(foreign.save(proto, tmp_path / "m.onnx"))


def test_missing_external_data_are_named(tmp_path: Path) -> None:
    path = foreign.save(foreign.plain(), tmp_path / "m.onnx", external=True)
    (tmp_path / "data" / "w.bin").unlink()
    with pytest.raises(ForeignModel, match=r"needs 'data/w\.bin' beside it"):
        lift_model(path)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ForeignModel, match="cannot read"):
        lift_model(path)
    for data in (b"", b"hello, world", bytes(1000)):
        path.write_bytes(data)
        with pytest.raises(ForeignModel, match=r"m\.onnx is not"):
            lift_model(path)


@pytest.mark.parametrize("kind", foreign.WEIGHTLESS)
def test_a_model_without_weights_stays_as_it_is(kind: str, tmp_path: Path) -> None:
    proto = foreign.WEIGHTLESS[kind]()
    lifted = lift_model(foreign.save(proto, tmp_path / "m.onnx"))
    assert not lifted.arrays
    again = onnx.ModelProto.FromString(lifted.graph.skeleton).graph
    assert (list(again.node), list(again.input), list(again.output)) == (
        list(proto.graph.node),
        list(proto.graph.input),
        list(proto.graph.output),
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda w: w.dims.__setitem__(0, 23), "damaged"),
        (lambda w: w.dims.__setitem__(0, -1), "impossible shape"),
        (lambda w: w.dims.__setitem__(0, 2**60), "impossible shape"),
        (lambda w: setattr(w, "raw_data", b"abc"), "damaged"),
        (lambda w: setattr(w, "name", "b"), "two initialisers"),
    ],
)
def test_damaged_tensors(change: object, match: str, tmp_path: Path) -> None:
    proto = foreign.plain()
    change(proto.graph.initializer[0])  # type: ignore[operator]
    with pytest.raises(ForeignModel, match=match):
        lift_model(foreign.save(proto, tmp_path / "m.onnx"))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(foreign.KINDS)))
def test_changed_bytes_raise_only_our_errors(
    data: st.DataObject, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = bytearray(foreign.KINDS[kind]().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("changed") / "m.onnx"
    path.write_bytes(bytes(content))
    with suppress(ReleaseError):
        lift_model(path)


def test_a_difference_is_measured_per_output() -> None:
    wanted = {"a": np.array([[1.0, 2.0]]), "b": np.array([[10.0, 5.0]])}
    found = {"a": np.array([[2.5, 2.0]]), "b": np.array([[10.0, 4.0]])}
    made = differ(wanted, found)
    assert (made.absolute, made.relative, made.classes) == (1.5, 0.75, 0.5)

"""onnxruntime as it is opened here sends nothing to its makers."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper, save

from prunecast.compression.release import RuntimeFailure
from prunecast.compression.release.runtime import (
    import_onnxruntime,
    open_session,
    settings_text,
)
from support import foreign

SWITCHES = ("ORT_DISABLE_TELEMETRY", "CI", "TF_BUILD", "GITHUB_ACTIONS", "XDG_CACHE_HOME")
PROGRAM = """
import os, sys
import numpy as np
from pathlib import Path
from prunecast.compression.release.runtime import open_session

before = dict(os.environ)
session = open_session(Path(sys.argv[1]), threads=1)
session.run({"x": np.zeros((1, 3), np.float32)})
assert dict(os.environ) == before
"""


@pytest.mark.parametrize("switch", [None, "1"])
def test_a_session_leaves_nothing_behind(tmp_path: Path, switch: str | None) -> None:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in "xy"]
    node = helper.make_node("Relu", ["x"], ["y"])
    body = helper.make_graph([node], "g", ends[:1], ends[1:])
    opset = [helper.make_opsetid("", 21)]
    save(helper.make_model(body, opset_imports=opset, ir_version=10), tmp_path / "m.onnx")
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in SWITCHES}
    environment["HOME"] = str(home)
    if switch is not None:
        environment["ORT_DISABLE_TELEMETRY"] = switch
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "m.onnx")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [p for p in home.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("version", ["1.20.1", "1.23.2", "0.9"])
def test_versions_that_read_any_file_are_refused(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", version)
    with pytest.raises(RuntimeFailure, match=r"is too old, 1\.24 is needed"):
        import_onnxruntime()


def test_what_is_installed_is_what_is_asked_for() -> None:
    root = Path(__file__).parents[3]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for extra in ("edge", "server"):
        assert "onnxruntime>=1.24.1" in project["optional-dependencies"][extra]
    import_onnxruntime()


def test_a_setting_that_a_model_cannot_have_is_left_out_and_named(tmp_path: Path) -> None:
    save(foreign.shared_zeros(), tmp_path / "m.onnx")
    given = {"x": foreign.weight(3, 4)}
    plain = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    for memory in (None, 64 << 20):
        session = open_session(tmp_path / "m.onnx", threads=1, memory=memory)
        assert session.settings["session.x64quantprecision"] == "refused"
        assert settings_text(session.settings) == "session.x64quantprecision refused"
        np.testing.assert_array_equal(session.run(given)["y"], plain.run(None, given)[0])


def test_settings_in_force_are_named(tmp_path: Path) -> None:
    save(foreign.plain(), tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx", threads=1)
    assert session.settings == {"session.disable_quant_qdq": "1"}
    limited = open_session(tmp_path / "m.onnx", threads=1, memory=64 << 20)
    assert limited.settings == {
        "session.disable_quant_qdq": "1",
        "session.use_env_allocators": "1",
    }
    assert settings_text(limited.settings) == "session.disable_quant_qdq=1"


def test_an_onnxruntime_without_arenas_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("built without arenas")

    monkeypatch.setattr(onnxruntime, "create_and_register_allocator", refuse)
    save(foreign.shared_zeros(), tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx", threads=1, memory=64 << 20)
    assert session.run({"x": foreign.weight(3, 4)})["y"].shape == (3, 4)
    assert "session.use_env_allocators refused" in settings_text(session.settings)


def test_what_is_refused_in_any_way_is_refused(tmp_path: Path) -> None:
    model = foreign.shared_zeros()
    model.graph.node[0].op_type = "NoSuchOperator"
    save(model, tmp_path / "m.onnx")
    with pytest.raises(RuntimeFailure, match="NoSuchOperator"):
        open_session(tmp_path / "m.onnx")


LOADING = """
import sys
from pathlib import Path
from prunecast.common.bounded import own_bytes
from prunecast.compression.release.runtime import import_onnxruntime, open_session

import_onnxruntime().SessionOptions()
before = own_bytes()
session = open_session(Path(sys.argv[1]), threads=1)
print(own_bytes() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps nothing, or tells nothing")
def test_what_loading_has_freed_is_given_back(tmp_path: Path) -> None:
    width, layers = 256, 4
    nodes, weights = [], {}
    for layer in range(layers):
        weights[f"w{layer}"] = np.full((width, width, 3, 3), 0.01, np.float32)
        norm = [f"{name}{layer}" for name in ("gamma", "beta", "mean", "variance")]
        weights |= {name: np.ones(width, np.float32) for name in norm}
        convolution = [f"x{layer}", f"w{layer}"]
        nodes += [
            helper.make_node("Conv", convolution, [f"c{layer}"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", [f"c{layer}", *norm], [f"x{layer + 1}"]),
        ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width, 4, 4])
        for name in ("x0", f"x{layers}")
    ]
    held = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    body = helper.make_graph(nodes, "g", ends[:1], ends[1:], held)
    opset = [helper.make_opsetid("", 21)]
    save(
        helper.make_model(body, opset_imports=opset, ir_version=10),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
    )
    command = [sys.executable, "-c", LOADING, str(tmp_path / "m.onnx")]
    grown = int(subprocess.run(command, check=True, capture_output=True, timeout=300).stdout)
    size = sum(array.nbytes for array in weights.values())
    assert size < grown < 2 * size  # the fused weights, and not what they were made of

"""onnxruntime as it is opened here sends nothing to its makers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from onnx import TensorProto, helper, save

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
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert [p for p in home.rglob("*") if p.is_file()] == []

"""The commands that bring a release to a device, as they stand in docs/edge.md."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp

from prunecast.compression.versions import save_model
from prunecast.server.federation import CompressedGrid
from prunecast.simulations.runner.inprocess import InProcessGrid

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "quickstart-prunecast"


def commands() -> list[list[str]]:
    text = (ROOT / "docs/edge.md").read_text(encoding="utf-8")
    section = text.split("<!-- edge:begin -->")[1].split("<!-- edge:end -->")[0]
    blocks = re.findall(r"^```console\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in "".join(blocks).replace("\\\n", " ").splitlines()]


def test_a_device_gets_a_release_with_five_commands(
    start_engine: Callable[..., Any], free_port: Callable[[], int], tmp_path: Path
) -> None:
    images = np.random.default_rng(0).random((4, 1, 28, 28), dtype=np.float32)
    np.savez(tmp_path / "inputs.npz", x=images)
    logits = _publish_and_run(tmp_path / "digits.model", images)

    port = str(free_port())
    given = commands()
    assert len(given) == 5
    with start_engine(tmp_path, PYTHONPATH=str(EXAMPLE)) as engine:
        for command in given:
            arguments = [part.replace("8443", port) for part in command]
            if arguments[1] == "serve":
                engine.start("serve", *arguments, "--port", port, port=int(port))
                continue
            result = subprocess.run(
                [str(Path(sys.executable).parent / arguments[0]), *arguments[1:]],
                cwd=tmp_path,
                env=engine.env,
                capture_output=True,
                text=True,
                timeout=600,
            )
            assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    (outputs,) = np.load(tmp_path / "outputs.npz").values()
    np.testing.assert_allclose(outputs, logits, atol=1e-4)


def _publish_and_run(path: Path, images: np.ndarray) -> np.ndarray:
    """Save a published model, and compute in torch what a device must compute."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        from quickstart.task import Net
    finally:
        sys.path.remove(str(EXAMPLE))
    torch.manual_seed(0)
    network = Net()
    grid = CompressedGrid(InProcessGrid(ClientApp(), 1), "small")
    model = grid.published(ArrayRecord(network.state_dict()))
    save_model(model, path)
    network.load_state_dict({n: torch.from_numpy(a) for n, a in model.arrays().items()})
    return network(torch.from_numpy(images)).detach().numpy()

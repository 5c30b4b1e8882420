"""A device installs numpy, onnxruntime and tuf; nothing else may be needed."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

BLOCK = """
import sys

class Block:
    names = {"torch", "flwr", "onnx", "onnxscript", "ray", "starlette", "uvicorn"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_agent_imports_without_torch_flwr_and_onnx() -> None:
    done = _run(
        """
        import prunecast.client.edge as edge
        import prunecast.client.edge.control
        import prunecast.client.edge.inference, prunecast.client.edge.telemetry
        assert all(hasattr(edge, name) for name in edge.__all__)
        assert not {"torch", "flwr", "onnx"} & set(sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr


def test_the_agent_works_without_torch_flwr_and_onnx(
    publish, repository, config, images, tmp_path
) -> None:
    import numpy as np

    publish(1)
    np.savez(tmp_path / "x.npz", input=images)
    done = _run(
        f"""
        import pathlib, numpy
        from prunecast.client.edge import Agent, AgentConfig, open_model
        from prunecast.client.edge.updating.transport import Fetcher, Stream
        from tuf.api.exceptions import DownloadHTTPError

        class Folder(Fetcher):
            def open(self, url, offset=0):
                path = pathlib.Path({str(repository.path)!r}) / url.removeprefix("http://x/")
                if not path.is_file():
                    raise DownloadHTTPError("missing", 404)
                return Stream(offset, iter([path.read_bytes()[offset:]]))

        state = pathlib.Path({str(config.state)!r})
        config = AgentConfig(state, "http://x/", "toy", {config.root!r}, threads=1)
        with Agent(config, fetcher=Folder()) as agent:
            assert agent.update_once().outcome == "updated"
        x = dict(numpy.load({str(tmp_path / "x.npz")!r}))
        print(open_model(state).run(x)["output"].shape)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(4, 5)"


@pytest.mark.parametrize(
    "arguments", [["edge", "--help"], ["edge", "update", "--help"], ["release", "--help"]]
)
def test_help_works_with_only_the_edge_extra(arguments: list[str]) -> None:
    done = _run(
        f"""
        sys.argv = ["prunecast", *{arguments!r}]
        from prunecast.cli.main import run
        run()
        """
    )
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout

"""A device installs numpy, onnxruntime and tuf, and grpcio for a fleet; nothing else is needed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

BLOCK = """
import sys

class Block:
    names = {"torch", "flwr", "onnx", "onnxscript", "ray", "starlette", "uvicorn", "grpc"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Block())
"""


def _run(code: str, *, grpc: bool = False) -> subprocess.CompletedProcess[str]:
    block = BLOCK if not grpc else BLOCK.replace('"grpc"', "")
    return subprocess.run(
        [sys.executable, "-c", block + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_agent_imports_without_torch_flwr_and_onnx() -> None:
    done = _run(
        """
        import prunecast.client.edge as edge
        import prunecast.client.edge.inference, prunecast.client.edge.telemetry
        assert all(hasattr(edge, name) for name in edge.__all__)
        assert not {"torch", "flwr", "onnx", "grpc"} & set(sys.modules)
        """
    )
    assert done.returncode == 0, done.stderr
    done = _run("import prunecast.client.edge.control", grpc=True)
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


def test_control_without_grpc_names_the_extra(tmp_path) -> None:
    (tmp_path / "root.json").write_text("{}")
    done = _run(
        f"""
        import os
        os.chdir({str(tmp_path)!r})
        given = "--state s --name toy --root root.json --control h:1 --control-token t".split()
        sys.argv = ["prunecast", "edge", "run", *given]
        from prunecast.cli.main import run
        run()
        """
    )
    assert done.returncode == 1
    assert done.stderr == "error: grpc is not installed: pip install 'prunecast[edge-fleet]'\n"


def test_a_repository_is_followed_over_http_without_grpc(
    publish, repository, config, tmp_path
) -> None:
    publish(1)
    (tmp_path / "root.json").write_bytes(config.root)
    handler = partial(SimpleHTTPRequestHandler, directory=str(repository.path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            done = _run(
                f"""
                url = "http://127.0.0.1:{server.server_port}/"
                given = ["--state", {str(config.state)!r}, "--name", "toy", "--url", url]
                given += ["--root", {str(tmp_path / "root.json")!r}, "--threads", "1"]
                sys.argv = ["prunecast", "edge", "update", *given]
                from prunecast.cli.main import run
                run()
                """
            )
        finally:
            server.shutdown()
            thread.join()
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("release 1 is active, came as keyframe")

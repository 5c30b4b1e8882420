"""Server and agent as processes of their own, through the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Queue
from urllib.request import urlopen

import numpy as np
import pytest

from prunecast.compression.onnx.graph import ExportedGraph, save_graph
from prunecast.compression.release.manifest import ReleaseManifest
from prunecast.compression.versions import PublishedModel, save_model
from prunecast.server.repository import Repository
from prunecast.server.repository.serving import ReleaseServer

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("signals_end")]

COMMAND = [sys.executable, "-m", "prunecast.cli"]


def _call(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == code, done.stderr + done.stdout
    return done.stdout if code == 0 else done.stderr


class _Manager:
    """Hears what a process tells its service manager, until it is about to end."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._told: list[str] = []
        self._thread = threading.Thread(target=self._hear, daemon=True)
        self._thread.start()

    def _hear(self) -> None:
        while not self._told or self._told[-1] != "STOPPING=1":
            self._told.append(self._socket.recv(1000).decode())

    def told(self) -> list[str]:
        self._thread.join(60)
        assert not self._thread.is_alive()
        self._socket.close()
        return self._told


def _metadata(address: str) -> dict[str, object]:
    with urlopen(f"{address}/v2/models/toy", timeout=30) as answer:
        found: dict[str, object] = json.load(answer)
    return found


class _Process:
    """A process whose lines can be waited for."""

    def __init__(self, *arguments: object, **environment: str) -> None:
        self._process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)

    def line(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self._lines.get(timeout=300))
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(timeout=300)


@pytest.fixture
def process() -> Iterator[Callable[..., _Process]]:
    made: list[_Process] = []

    def process(*arguments: object, **environment: str) -> _Process:
        made.append(_Process(*arguments, **environment))
        return made[-1]

    yield process
    for one in made:
        one.end(signal.SIGKILL)


def test_two_releases_reach_a_device(
    graph: ExportedGraph,
    model: Callable[[int], PublishedModel],
    images: np.ndarray,
    tmp_path: Path,
    process: Callable[..., _Process],
) -> None:
    repository, keys, state = tmp_path / "repository", tmp_path / "keys", tmp_path / "state"
    save_graph(graph, tmp_path / "toy.graph")
    np.savez(tmp_path / "images.npz", input=images)
    for number in (1, 2):
        save_model(model(number), tmp_path / f"{number}.model")
    made = json.loads(_call("release", "init", repository, "--keys", keys, "--json"))

    def create(number: int) -> dict[str, object]:
        shown = _call(
            *("release", "create", repository, "toy", "--keys", keys, "--json"),
            *("--model", tmp_path / f"{number}.model", "--graph", tmp_path / "toy.graph"),
            *("--selftest", tmp_path / "images.npz", "--metric", "accuracy=0.5"),
        )
        return json.loads(shown)

    first = create(1)
    server = process("serve", repository, "--port", 0, "--json")
    url = server.line()["url"]
    follow = ("--state", state, "--url", url, "--name", "toy", "--root", made["root"], "--json")
    update = json.loads(_call("edge", "update", *follow))
    assert (update["outcome"], update["version"], update["payload"]) == ("updated", 1, "keyframe")
    assert update["downloaded"]["keyframe"] == first["keyframe_bytes"]
    second = create(2)
    update = json.loads(_call("edge", "update", *follow))
    assert (update["outcome"], update["version"], update["payload"]) == ("updated", 2, "patch")
    assert update["downloaded"]["patch"] == second["patch_bytes"]["1"]  # type: ignore[index]
    assert json.loads(_call("edge", "update", *follow))["outcome"] == "current"

    outputs = tmp_path / "outputs.npz"
    report = json.loads(
        _call(
            *("edge", "infer", "--state", state, "--json"),
            *("--inputs", tmp_path / "images.npz", "--outputs", outputs),
        )
    )
    assert report["version"] == 2
    a = model(2).arrays()
    want = np.maximum(images @ a["w1"].T + a["b1"], 0) @ a["w2"].T + a["b2"]
    assert np.abs(np.load(outputs)["output"] - want).max() < 1e-5
    assert json.loads(_call("edge", "status", "--state", state, "--json"))["active"]["confirmed"]

    assert "toy 2: verified" in _call("release", "verify", repository, "--root", made["root"])
    listed = json.loads(_call("release", "list", repository, "--json"))
    assert [r["version"] for r in listed["releases"]] == [1, 2]
    assert json.loads(_call("release", "show", repository, "toy"))["version"] == 2
    _call("release", "retire", repository, "toy", 1, "--keys", keys)
    renewed = json.loads(_call("release", "renew", repository, "--keys", keys, "--json"))
    assert set(renewed["renewed"]) == {"snapshot", "timestamp"}
    assert renewed["expires_soon"] == {}
    assert server.end() == 0


def test_a_following_agent_picks_up_a_release_and_ends_on_request(
    publish: Callable[[int], ReleaseManifest],
    repository: Repository,
    tmp_path: Path,
    process: Callable[..., _Process],
) -> None:
    publish(1)
    root = repository.path / "metadata" / "1.root.json"
    server = process("serve", repository.path, "--port", 0, "--json")
    manager = _Manager(tmp_path / "manager")
    agent = process(
        *("edge", "run", "--state", tmp_path / "state", "--url", server.line()["url"]),
        *("--name", "toy", "--root", root, "--interval", 0.2, "--json"),
        *("--bandwidth", 10_000_000, "--listen", f"unix:{tmp_path}/model.sock"),
        *("--listen", "127.0.0.1:0"),
        NOTIFY_SOCKET=f"{tmp_path}/manager",
        WATCHDOG_USEC="400000",
    )
    assert agent.line()["address"] == f"unix:{tmp_path}/model.sock"
    address = str(agent.line()["address"])
    assert agent.line()["version"] == 1
    assert _metadata(address)["versions"] == ["1"]
    publish(2)
    seen = [agent.line()]
    while seen[-1]["version"] != 2:
        seen.append(agent.line())
    assert seen[-1]["payload"] == "patch"
    assert _metadata(address)["versions"] == ["2"]
    assert server.end(signal.SIGINT) == 0
    while agent.line()["outcome"] != "failed":
        pass
    assert agent.end() == 0
    assert not (tmp_path / "model.sock").exists()
    told = manager.told()
    assert told[0] == "READY=1"
    assert "WATCHDOG=1" in told
    assert any(line.startswith("STATUS=release 2 is") for line in told)
    shown = json.loads(_call("edge", "status", "--state", tmp_path / "state", "--json"))
    assert [r["self_test"] for r in shown["telemetry"]["releases"]] == ["passed", "passed"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_process_that_is_asked_to_end_is_no_crash(
    publish: Callable[[int], ReleaseManifest],
    repository: Repository,
    tmp_path: Path,
    process: Callable[..., _Process],
    number: int,
) -> None:
    publish(1)
    state = tmp_path / "state"
    root = repository.path / "metadata" / "1.root.json"
    with ReleaseServer(repository.path) as server:
        follow = ("--state", state, "--url", server.url, "--name", "toy", "--root", root, "--json")
        running = process("edge", "run", *follow)
        assert running.line()["version"] == 1
        assert running.end(number) == (0 if number != signal.SIGKILL else -signal.SIGKILL)
        # the note that the next start finds
        assert (state / "start.json").exists() is (number == signal.SIGKILL)
        _call("edge", "update", *follow)
    ends = json.loads((state / "state.json").read_bytes())["active"]["ends"]
    assert ends[0] == ("killed" if number == signal.SIGKILL else "stopped")
    assert not (state / "start.json").exists()


def test_problems_are_one_line_with_the_remedy(
    repository: Repository, publish: Callable[[int], ReleaseManifest], tmp_path: Path
) -> None:
    root = repository.path / "metadata" / "1.root.json"
    state = tmp_path / "state"
    follow = ("--state", state, "--name", "toy", "--root", root)
    shown = _call("edge", "update", *follow, "--url", "http://127.0.0.1:9/", code=1)
    assert shown.startswith("error: no answer from")
    assert shown.count("\n") == 1
    assert len(shown) < 120
    _call("edge", "update", *follow, "--url", "ftp://x/", code=2)
    shown = _call(
        *("edge", "run", *follow, "--url", "http://127.0.0.1:9/", "--listen", "0.0.0.0:1"), code=1
    )
    assert "can be reached from other machines" in shown
    _call("edge", "update", *follow, "--url", "http://x/", "--quiet", "7-9", code=2)
    (tmp_path / "root.pem").write_text("-----BEGIN")
    wrong = ("--state", state, "--name", "toy", "--root", tmp_path / "root.pem")
    shown = _call("edge", "update", *wrong, "--url", "http://127.0.0.1:9/", code=1)
    assert "metadata/1.root.json" in shown
    assert "does not exist" in _call("edge", "status", "--state", tmp_path / "absent", code=1)
    _call("edge", "update", "--state", state, code=2)  # trust has no default
    shown = _call("serve", tmp_path / "nothing", code=1)
    assert "not a release repository" in shown
    publish(1)
    shown = _call("release", "retire", repository.path, "toy", 9, "--keys", state, code=1)
    assert "targets key is needed" in shown or "no live release 9" in shown
    shown = _call(
        "edge", "infer", "--state", tmp_path / "new", "--inputs", root, "--outputs", root, code=1
    )
    assert shown.startswith("error: ")


def test_a_torch_module_by_name_and_a_dense_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(
        "import torch\n"
        "def make():\n"
        "    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), "
        "torch.nn.Linear(8, 3))\n"
    )
    rng = np.random.default_rng(0)
    shapes = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (3, 8), "2.bias": (3,)}
    weights = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    np.savez(tmp_path / "weights.npz", **weights)
    np.savez(tmp_path / "x.npz", features=rng.standard_normal((3, 4)).astype(np.float32))
    repository, keys = tmp_path / "repository", tmp_path / "keys"
    _call("release", "init", repository, "--keys", keys)
    done = subprocess.run(
        [
            *(*COMMAND, "release", "create", str(repository), "small", "--keys", str(keys)),
            *("--model", str(tmp_path / "weights.npz"), "--bits", "8"),
            *("--module", "small:make", "--selftest", str(tmp_path / "x.npz"), "--json"),
            *("--save-graph", str(tmp_path / "small.graph")),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 1
    assert (tmp_path / "small.graph").is_file()
    manifest = json.loads(_call("release", "show", repository, "small"))
    assert manifest["inputs"] == [["features", "float32", ["batch", 4]]]

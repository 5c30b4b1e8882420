"""ServerApp, SuperLink and a SuperNode are killed in training, and the arrays are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.loopback.engine import descendants, wait_for
from prunecast.server.federation import Ledger, read_events
from prunecast.server.federation.operating.credentials import make_credentials

pytestmark = pytest.mark.engine

NODES, ROUNDS = 2, 4
SECONDS = 900  # for a run that is killed three times, on a machine that does much else


class Deployment:
    """A SuperLink with its database on the disk, and two SuperNodes with keys."""

    def __init__(self, engine: Any, free_port: Callable[[], int], app: Path) -> None:
        self.engine, self.app, self.folder = engine, app, engine.folder
        self.port = free_port()
        self.runtimes = [free_port() for _ in range(NODES)]
        make_credentials(self.folder / "keys", nodes=NODES)
        self.start_superlink()
        (self.folder / "flower").mkdir(exist_ok=True)
        (self.folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n\n[superlink.ours]\n'
            f'address = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{self.folder / "keys" / "ca.crt"}"\n'
        )
        for node in range(NODES):
            engine.flwr("supernode", "register", f"keys/nodes/node-{node + 1}.pub")
            self.start_node(node)

    def start_superlink(self) -> None:
        self.engine.start(
            "superlink",
            *("flower-superlink", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--ssl-ca-certfile", "keys/ca.crt", "--ssl-certfile", "keys/server.crt"),
            *("--ssl-keyfile", "keys/server.key", "--enable-supernode-auth"),
            *("--database", "state.db"),
            port=self.port,
        )

    def start_node(self, node: int) -> None:
        self.engine.start(
            f"supernode{node}",
            *("flower-supernode", "--superlink", f"127.0.0.1:{self.port}"),
            *("--root-certificates", "keys/ca.crt"),
            *("--auth-supernode-private-key", f"keys/nodes/node-{node + 1}"),
            *("--host", "127.0.0.1", "--port", str(self.runtimes[node])),
            "--node-config",
            f'partition-id={node} num-partitions={NODES} prunecast-store="{self.folder}/s{node}"',
            port=self.runtimes[node],
        )

    def replace_node(self, node: int) -> None:
        """Kill a SuperNode and start it again, once the SuperLink has missed it.

        Until then it refuses whoever comes with the same key.
        """
        self.kill(f"supernode{node}")

        def missed() -> bool:
            told = json.loads(self.engine.flwr("supernode", "list", "--format", "json"))
            return sum(one["status"] == "online" for one in told["nodes"]) < NODES

        wait_for(missed, SECONDS, f"the SuperLink to miss node {node}", every=20)
        self.start_node(node)

    def kill(self, name: str) -> None:
        """SIGKILL a process and all that it started, as the end of its machine would."""
        process = self.engine.processes[name]
        for pid in [*descendants(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(30)

    def kill_server_app(self) -> None:
        """SIGKILL the processes of the ServerApp alone."""
        found = []
        for pid in descendants(self.engine.processes["superlink"].pid):
            with suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes()
                found += [pid] if b"serverapp" in words else []
        assert found
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def supervise(self, folder: Path, strategy: str) -> subprocess.Popen[str]:
        config = (
            f'folder="{folder}" signs="{folder}" strategy="{strategy}" nodes={NODES} '
            f"num-server-rounds={ROUNDS}"
        )
        command = ("prunecast.cli", "federation", "supervise")
        supervisor = (*command, "--wait", "1", "--every", "20", "--json", "--")
        program = str(Path(sys.executable).with_name("flwr"))
        with (folder / "supervise.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", *supervisor, program, "run", ".", "--run-config", config],
                env=self.engine.env, cwd=self.app, stdin=subprocess.DEVNULL, text=True,
                stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip


@pytest.fixture(scope="module")
def deployment(
    start_engine: Callable[..., Any], free_port: Callable[[], int], tmp_path_factory: Any
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("resume")
    with start_engine(folder) as engine:
        yield Deployment(engine, free_port, Path(__file__).with_name("lasting"))


def ended(process: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """What the supervisor said at its end."""
    try:
        out, _ = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
    log = (folder / "supervise.log").read_text()
    assert process.returncode == 0, log
    told: dict[str, Any] = json.loads(out.splitlines()[-1])
    return told


def final(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "final.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_killed_three_times_it_ends_in_the_same_arrays(
    deployment: Deployment, tmp_path: Path, strategy: str
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    whole.mkdir()
    parted.mkdir()
    told = ended(deployment.supervise(whole, strategy), whole)
    assert [run["status"] for run in told["runs"]] == ["completed"]

    kills = {
        (2, 0): deployment.kill_server_app,
        (3, 1): lambda: (deployment.kill("superlink"), deployment.start_superlink()),
        (4, 0): lambda: deployment.replace_node(0),
    }
    for number, node in kills:
        (parted / f"stop-{number}-{node}").touch()
    supervisor = deployment.supervise(parted, strategy)
    try:
        for (number, node), kill in kills.items():
            reached = parted / f"reached-{number}-{node}"
            wait_for(reached.exists, SECONDS, f"node {node} to train round {number}")
            kill()
            (parted / f"stop-{number}-{node}").unlink()
        told = ended(supervisor, parted)
    finally:
        if supervisor.poll() is None:
            supervisor.kill()
    assert [run["status"] for run in told["runs"]] == ["failed"] * 3 + ["completed"]

    expected, found = final(whole), final(parted)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes(), name
    assert (parted / "final.model").read_bytes() == (whole / "final.model").read_bytes()

    runs = _runs(parted / "events.jsonl")
    assert [events[0].get("from_round") for events in runs] == [None, 1, 2, 3]
    # each goes on with what nodes hold: nobody is sent the model whole but in the first round
    ledger = parted / "ledger.jsonl"
    kinds = [[e.kind for e in Ledger.read(ledger, r[0]["run"], whole=False)] for r in runs]
    assert kinds[0].count("keyframe") == NODES
    assert all("keyframe" not in later for later in kinds[1:]), kinds


def _runs(path: Path) -> list[list[dict[str, Any]]]:
    """The events of every run in a file."""
    headers = [
        json.loads(line) for line in path.read_text().splitlines() if '"schema"' in line[:24]
    ]
    return [list(read_events(path, header["run"], whole=False)) for header in headers]

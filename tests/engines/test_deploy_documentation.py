"""docs/deploy.md, followed: its commands, and the commands of the units, as processes.

What a service manager does (users, credentials, folders, starting again) is done by hand here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loopback.engine import Engine, executable, wait_for
from prunecast.common.liveness import status_of
from prunecast.common.pulse import read_pulse
from prunecast.common.watching import HUNG
from prunecast.server.federation import read_events

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
UNITS = ROOT / "deploy/systemd"
LONG = 1200  # seconds: machines that run tests are busy


def block(name: str) -> str:
    """What stands in a marked block of code."""
    section = TEXT.split(f"<!-- deploy:{name}:begin -->")[1].split(f"<!-- deploy:{name}:end -->")[0]
    (code,) = re.findall(r"^```\w+\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
    return str(code)


def command_of(unit: str, instance: str, folders: Mapping[str, Path], **settings: str) -> list[str]:
    """ExecStart of a unit as systemd would have it, with programs found by PATH."""
    text = (UNITS / unit).read_text().replace("\\\n", " ")
    known: dict[str, str] = {}
    for line in re.findall(r"^Environment=(.*)$", text, re.MULTILINE):
        known |= dict(word.partition("=")[::2] for word in shlex.split(line))
    known |= settings
    (line,) = re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)
    words: list[str] = []
    for word in line.split():
        if found := re.fullmatch(r"\$(\w+)", word):
            words += shlex.split(known.get(found[1], ""))
            continue
        for letter, folder in folders.items():
            word = word.replace(f"%{letter}", str(folder))
        word = re.sub(r"\$\{(\w+)\}", lambda m: known[m[1]], word.replace("%i", instance))
        words.append(word.removeprefix("/opt/prunecast/bin/"))
    return words


@dataclass
class Deployment:
    """Processes of a federation, started by the units' commands."""

    engine: Engine
    folder: Path
    ports: dict[str, int]
    env: dict[str, str] = field(default_factory=dict)

    @property
    def folders(self) -> dict[str, Path]:
        return {"S": self.folder / "lib", "t": self.folder / "run", "d": self.folder / "keys"}

    def changed(self, text: str) -> str:
        """A command with the paths and ports of this test."""
        text = text.replace("/var/lib/", f"{self.folder}/lib/")
        text = text.replace("superlink.example:9092", f"127.0.0.1:{self.ports['gate']}")
        text = text.replace("examples/ready-apps", str(ROOT / "examples/ready-apps"))
        text = text.replace("9464", str(self.ports["metrics"]))
        return text.replace("127.0.0.1:8000", f"127.0.0.1:{self.ports['superlink']}")

    def begin(self, line: str) -> subprocess.Popen[str]:
        program, *arguments = shlex.split(self.changed(line))
        return subprocess.Popen(
            [executable(program), *arguments],
            cwd=self.folder,
            env=self.engine.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def call(self, line: str) -> str:
        with self.begin(line) as process:
            said, _ = process.communicate(timeout=LONG)
        assert process.returncode == 0, f"{line}\n{said}"
        return said

    def superlink(self) -> None:
        port = self.ports["superlink"]
        (self.folder / "lib/prunecast-superlink").mkdir(parents=True, exist_ok=True)
        (self.folder / "run/prunecast-superlink").mkdir(parents=True, exist_ok=True)
        command = command_of(
            "prunecast-superlink.service", "", self.folders, SUPERLINK_PORT=str(port)
        )
        engine = Engine(self.engine.env, self.folder / "lib/prunecast-superlink")
        engine.processes = self.engine.processes  # ended with the others
        engine.start("superlink", *command, port=port)

    def supernode(self, number: int) -> None:
        port = self.ports[f"node{number}"]
        keys = self.folder / f"keys-{number}"
        keys.mkdir(exist_ok=True)
        shutil.copy(self.folder / "keys/ca.crt", keys)
        shutil.copy(self.folder / f"keys/nodes/node-{number}", keys / "node.key")
        (self.folder / f"run/prunecast-supernode/{number}").mkdir(parents=True, exist_ok=True)
        state = self.folder / f"lib/prunecast-supernode/{number}"
        state.mkdir(parents=True, exist_ok=True)
        command = command_of(
            "prunecast-supernode@.service",
            str(number),
            {**self.folders, "d": keys},
            SUPERNODE_SUPERLINK=f"127.0.0.1:{self.ports['gate']}",
            SUPERNODE_PORT=str(port),
            SUPERNODE_CONFIG=f"partition-id={number - 1} num-partitions=2",
        )
        # the defaults would have the test wait for minutes
        place = command.index("watch") + 1
        command[place:place] = ["--interval", "1", "--silence", "10"]
        env = {**self.engine.env, "PRUNECAST_STORE": str(state / "store")}
        engine = Engine(env, self.folder)
        engine.processes = self.engine.processes
        engine.start(f"supernode{number}", *command, port=port)

    def pulse(self, service: str) -> dict[str, Any]:
        return read_pulse(self.folder / "run" / service / "pulse.json")

    def until_online(self, *numbers: int) -> None:
        """Wait for nodes, and start again what ends, as Restart=always does.

        A SuperLink takes the key of a node that was killed only after a minute.
        """

        def there() -> bool:
            for number in numbers:
                if self.engine.processes[f"supernode{number}"].poll() is not None:
                    self.supernode(number)
            logs = [(self.folder / f"supernode{n}.log").read_text() for n in numbers]
            admitted = all("SuperNode ID" in log for log in logs)
            return admitted and len(self.online()) == len(numbers)

        wait_for(there, LONG, "the nodes to be online", every=10)

    def online(self) -> list[str]:
        said = self.engine.flwr("supernode", "list", "--format", "json")
        nodes = json.loads(said[said.index("{") :])["nodes"]
        return [node["node-id"] for node in nodes if node["status"] == "online"]


@pytest.fixture(scope="module")
def deployed(
    start_engine: Callable[..., Any], free_port: Callable[[], int], tmp_path_factory: Any
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployed")
    names = ("superlink", "gate", "node1", "node2", "metrics", "releases", "watching")
    ports = {name: free_port() for name in names}
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None:  # nodes then come to the SuperLink itself
        ports["gate"] = ports["superlink"]
    with start_engine(folder) as engine:
        made = Deployment(engine, folder, ports)
        made.call(block("keys"))
        made.superlink()
        if nginx is not None:
            _start_nginx(made, nginx)
        (folder / "flower").mkdir(exist_ok=True)
        config = block("config").replace("/home/me", str(folder))
        (folder / "flower/config.toml").write_text(made.changed(config))
        for line in block("run").splitlines()[:2]:
            assert line.startswith("flwr supernode register")
            made.call(line)
        made.supernode(1)
        made.supernode(2)
        yield made


def _start_nginx(made: Deployment, nginx: str) -> None:
    text = (ROOT / "deploy/nginx/superlink.conf").read_text()
    text = text.replace("/etc/prunecast/keys", f"{made.folder}/keys")
    text = text.replace("listen 9092", f"listen 127.0.0.1:{made.ports['gate']}")
    spool = "".join(
        f"{kind}_temp_path {made.folder}/nginx-{kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = f"user {'root' if os.getuid() == 0 else 'nobody'};\n"
    whole = (
        f"{user}daemon off;\npid {made.folder}/nginx.pid;\nerror_log stderr;\n"
        f"events {{}}\nhttp {{\naccess_log off;\n{spool}{made.changed(text)}}}\n"
    )
    path = made.folder / "nginx.conf"
    path.write_text(whole)
    made.engine.start("nginx", nginx, "-c", str(path), port=made.ports["gate"])


def test_a_run_of_the_documentation(deployed: Deployment) -> None:
    *_, listing, run, status = block("run").splitlines()
    deployed.until_online(1, 2)
    assert deployed.call(listing).count("online") == 2
    url = f"http://127.0.0.1:{deployed.ports['metrics']}/metrics"
    with deployed.begin(run) as process:
        try:
            seen: set[str] = set()
            apps: set[int | None] = set()

            def watched() -> bool:
                apps.add(deployed.pulse("prunecast-supernode/1").get("client_app"))
                if status_of(url) == 200:
                    with urllib.request.urlopen(url, timeout=30) as answer:
                        seen.update(answer.read().decode().splitlines())
                return process.poll() is not None

            wait_for(watched, LONG, "the run to end", every=0.5)
        finally:
            process.kill()
        said = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, said
    assert "prunecast_run_rounds 2.0" in seen, said
    assert apps - {None}, "the watch saw no ClientApp"
    assert any(line.startswith('prunecast_run_node_version{node="') for line in seen)
    told = deployed.call(status)
    assert "finished, round 2 of 2" in told
    assert "2 answered" in told
    for node in (1, 2):
        store = deployed.folder / f"lib/prunecast-supernode/{node}/store"
        assert list(store.rglob("*.model"))


def test_a_supervised_run_goes_on_where_the_one_before_ended(deployed: Deployment) -> None:
    deployed.until_online(1, 2)
    folder = deployed.folder / "lib/prunecast-superlink/runs/digits"
    # three rounds in all, and each look at the run starts a process
    given = block("supervise").replace("supervise --", "supervise --every 20 --")
    said = deployed.call(given.replace("num-server-rounds=4", "num-server-rounds=3"))
    assert "is completed after" in said
    assert "finished, round 3 of 3" in deployed.call(f"prunecast federation status {folder}")
    whole = list(read_events(folder / "events.jsonl"))
    assert [e["round"] for e in whole if e["event"] == "round-finished"] == [0, 1, 2, 3]


def test_operators_do_not_come_in_by_the_gate(deployed: Deployment) -> None:
    if deployed.ports["gate"] == deployed.ports["superlink"]:
        pytest.skip("needs nginx")
    gate, ca = f"https://127.0.0.1:{deployed.ports['gate']}", deployed.folder / "keys/ca.crt"
    assert status_of(f"{gate}/health", authority=ca) == 200
    for path in (
        "v1/control/list-runs",
        "v1/runtime/acquire-task",
        "docs",
        "v1/fleet/../control/x",
    ):
        assert status_of(f"{gate}/{path}", authority=ca) in (400, 404)


def test_health_is_that_of_the_services(deployed: Deployment) -> None:
    for service in ("prunecast-superlink", "prunecast-supernode/1", "prunecast-supernode/2"):
        wait_for(lambda s=service: deployed.pulse(s)["well"], LONG, service, every=1)
        found = deployed.pulse(service)
        assert (found["state"], found["problems"]) == ("healthy", [])
        # heartbeats come every 18 to 23 s, and questions for messages every 3
        if "supernode" in service:
            assert time.time() - found["exchanged"] < 60
        pulse = deployed.folder / "run" / service / "pulse.json"
        assert "answered" in deployed.call(f"prunecast federation health {pulse} --reachable")


def test_a_node_that_hangs_is_ended_and_comes_back_with_its_model(deployed: Deployment) -> None:
    service = "prunecast-supernode/1"
    wait_for(lambda: deployed.pulse(service)["well"], LONG, service, every=1)
    store = deployed.folder / "lib/prunecast-supernode/1/store"
    before = sorted(path.name for path in store.rglob("*.model"))
    watch = deployed.engine.processes["supernode1"]
    os.kill(deployed.pulse(service)["pid"], signal.SIGSTOP)

    assert watch.wait(LONG) == HUNG
    assert "hung: it has not answered for" in (deployed.folder / "supernode1.log").read_text()
    assert deployed.pulse(service)["well"] is False

    deployed.supernode(1)
    deployed.until_online(1, 2)
    wait_for(lambda: deployed.pulse(service)["well"], LONG, service, every=1)
    deployed.until_online(1, 2)
    assert sorted(path.name for path in store.rglob("*.model")) == before != []


def test_a_node_that_is_stopped_signs_off_and_may_come_back_at_once(deployed: Deployment) -> None:
    deployed.until_online(1, 2)
    watch = deployed.engine.processes["supernode2"]
    watch.send_signal(signal.SIGTERM)
    assert watch.wait(LONG) == 0
    assert len(deployed.online()) == 1
    deployed.supernode(2)
    deployed.until_online(1, 2)


def test_the_release_server_of_its_unit(deployed: Deployment) -> None:
    home = deployed.folder / "lib/prunecast-releases"
    deployed.call(f"prunecast release init {home}/repository --keys {deployed.folder}/signing")
    ports = deployed.ports
    command = command_of(
        *("prunecast-releases.service", "", deployed.folders),
        RELEASES_PORT=str(ports["releases"]),
        RELEASES_METRICS_PORT=str(ports["watching"]),
    )
    deployed.engine.start("releases", *command, port=ports["releases"])
    context = ssl.create_default_context(cafile=str(deployed.folder / "keys/ca.crt"))
    url = f"https://localhost:{ports['releases']}/metadata/timestamp.json"
    with urllib.request.urlopen(url, timeout=60, context=context) as answer:
        assert answer.status == 200


def test_a_database_that_is_lost_comes_back(deployed: Deployment) -> None:
    """The last one: it ends the SuperLink."""
    deployed.until_online(1, 2)
    before = sorted(deployed.online())
    assert "whole" in deployed.call(block("backup"))
    watch = deployed.engine.processes["superlink"]
    watch.send_signal(signal.SIGTERM)
    watch.wait(LONG)
    for path in (deployed.folder / "lib/prunecast-superlink").glob("state.db*"):
        path.unlink()
    deployed.call(block("restore"))
    deployed.superlink()
    deployed.until_online(1, 2)
    assert sorted(deployed.online()) == before

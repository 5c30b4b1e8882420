"""Real Flower engines as processes, in a Flower home of their own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .certificates import loopback_certificate
from .relay import Relay, running_relay

__all__ = ["Engine", "EngineProblem", "FinishedRun", "engine_in", "relayed", "unused_port"]

# of machines that do much else
START_SECONDS = COMMAND_SECONDS = 180
RUN_SECONDS = 900


class EngineProblem(Exception):
    """Flower's processes did not do what they were started for."""


def wait_for(condition: Callable[[], Any], seconds: float, what: str, *, every: float = 0.2) -> Any:
    """The first true value of `condition`.

    Raises:
        EngineProblem: there is none within `seconds`; names `what`.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(every)
    raise EngineProblem(f"waited {seconds:.0f} s in vain for {what}")


def unused_port() -> int:
    """A port nobody uses now; Flower's commands cannot report one they chose themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody accepts connections on a local port."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def descendants(pid: int) -> list[int]:
    """Process ids of children, their children and so on (Flower starts sessions of their own)."""
    listing = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    children: dict[int, list[int]] = {}
    for line in listing.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found, queue = [], [pid]
    while queue:
        queue += (more := children.get(queue.pop(), []))
        found += more
    return found


@dataclass
class Engine:
    """Long-running processes, stopped with everything they started."""

    env: Mapping[str, str]
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str, port: int | None) -> None:
        """Start a command of the environment and wait until it listens on `port`.

        Args:
            name: of the process, and of its log.
            command: words of it.
            port: of 127.0.0.1; None where this process cannot reach it, and does not wait.
        """
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [executable(command[0]), *command[1:]],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        if port is None:
            return

        def ready() -> bool:
            if process.poll() is not None:
                raise EngineProblem(f"{name} exited with {process.returncode}:\n{log.read_text()}")
            return listens(port)

        wait_for(ready, START_SECONDS, f"{name} to listen on port {port}")

    def flwr(
        self, *arguments: str, cwd: Path | None = None, seconds: float = COMMAND_SECONDS
    ) -> str:
        """Output of a `flwr` command, which has `seconds` to end."""
        result = subprocess.run(
            [executable("flwr"), *arguments],
            env=self.env,
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        if result.returncode:
            raise EngineProblem(
                f"flwr {' '.join(arguments)} failed:\n{result.stdout}{result.stderr}"
            )
        return result.stdout

    def run(self, app: Path, *arguments: str, seconds: float = RUN_SECONDS) -> FinishedRun:
        """Run an app from its own folder and wait for its end, `seconds` at most."""
        answer = self.flwr("run", ".", "--format", "json", *arguments, cwd=app)
        run_id = str(json.loads(answer)["run-id"])

        def finished() -> dict[str, Any] | None:
            details = json.loads(self.flwr("list", "--run-id", run_id, "--format", "json"))
            run: dict[str, Any] = details["runs"][0]
            return run if run["status"].startswith("finished") else None

        deadline = time.monotonic() + seconds
        # one process waits for the end; each look at the status would start another, for which
        # the run's own processes would have to wait
        with contextlib.suppress(EngineProblem, subprocess.TimeoutExpired):
            self.flwr("log", run_id, "--stream", seconds=seconds)
        left = max(deadline - time.monotonic(), 1)
        what = f"run {run_id} to finish, which had {seconds:.0f} s"
        details = wait_for(finished, left, what, every=3)
        run = FinishedRun(details, self)
        if details["status"] != "finished:completed":
            raise EngineProblem(f"{details}\n{run.log}")
        return run

    def stop(self) -> None:
        """Ask every process to end, then end what is left."""
        started = [p for process in self.processes.values() for p in descendants(process.pid)]
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)
        deadline = time.monotonic() + 10
        while (alive := [pid for pid in started if _exists(pid)]) and time.monotonic() < deadline:
            time.sleep(0.2)
        for pid in alive:
            os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, and what `flwr list` says about it."""

    details: dict[str, Any]
    engine: Engine = field(repr=False)

    @cached_property
    def log(self) -> str:
        """Asked for when it is first read, while the engine runs."""
        return self.engine.flwr("log", self.details["run-id"], "--show")


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def executable(name: str) -> str:
    """A command of the environment that runs the tests."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        raise EngineProblem(f"{name} is not installed: pip install -e '.[dev]'")
    return path


def private_environment(folder: Path, **more: str) -> dict[str, str]:
    """An environment that touches nothing of the user's and reports nothing to anybody."""
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "FLWR_HOME": str(folder / "flower"),
        "PRUNECAST_STORE": str(folder / "store"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_DISABLE_DASHBOARD": "1",
        "NO_COLOR": "1",
        **more,
    }


@contextlib.contextmanager
def engine_in(folder: Path, **environment: str) -> Iterator[Engine]:
    """An engine without processes yet, stopped at the end."""
    engine = Engine(private_environment(folder, **environment), folder)
    try:
        yield engine
    finally:
        engine.stop()


@contextlib.contextmanager
def relayed(
    folder: Path, nodes: int, *, tls: bool = False, **environment: str
) -> Iterator[tuple[Engine, Relay]]:
    """A SuperLink, and SuperNodes that reach it by a relay; stopped at the end.

    Args:
        folder: an empty one, for logs, Flower's home and what nodes keep.
        nodes: how many; node n has the ``partition-id`` n.
        tls: whether they speak TLS, with a certificate of their own.
        environment: of the processes, beside the caller's.
    """
    port = unused_port()
    served, trusted = ["--insecure"], ["--insecure"]
    connection = "insecure = true"
    if tls:
        certificate, key = loopback_certificate(folder)
        served = ["--ssl-ca-certfile", str(certificate), "--ssl-certfile", str(certificate)]
        served += ["--ssl-keyfile", str(key)]
        trusted = ["--root-certificates", str(certificate)]
        connection = f'root-certificates = "{certificate}"'
    with engine_in(folder, **environment) as engine, running_relay("127.0.0.1", port) as relay:
        engine.start(
            "superlink",
            *("flower-superlink", *served, "--host", "127.0.0.1", "--port", str(port)),
            port=port,
        )
        (folder / "flower").mkdir(exist_ok=True)
        (folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n\n[superlink.ours]\naddress = "127.0.0.1:{port}"\n'
            f"{connection}\n"
        )
        for node in range(nodes):
            runtime = unused_port()
            engine.start(
                f"supernode{node}",
                *("flower-supernode", *trusted, "--superlink", relay.address),
                *("--host", "127.0.0.1", "--port", str(runtime)),
                "--node-config",
                f'partition-id={node} num-partitions={nodes} prunecast-store="{folder}/s{node}"',
                port=runtime,
            )
        yield engine, relay

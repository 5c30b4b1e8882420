"""The process that runs Flower's simulation engine.

Flower and Ray write to standard output and error from several processes and from C++; in a
process of its own all of that ends in one log file, and the caller's global state stays as it is.

Started as ``python -m prunecast.simulations.runner.engine FOLDER``; standard output carries events
alone, one JSON object per line.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.simulations.runner import EngineFailed

if TYPE_CHECKING:
    from prunecast.server.federation.reporting.events import OnEvent
    from prunecast.simulations.runner.prepared import PreparedRun
    from prunecast.simulations.scenarios import EngineSpec

__all__ = ["ENVIRONMENT", "end_process", "main", "run_engine", "simulate", "start_process"]

_GRACE_SECONDS = 15.0
_CONNECT_SECONDS = 10.0

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
"""What the engine's process gets on top of the caller's environment."""


def run_engine(prepared: PreparedRun, log: Path) -> Iterator[dict[str, Any]]:
    """Train all its arms in a process of its own; yields its events as they come.

    Args:
        prepared: what to run.
        log: file that gets everything Flower and Ray print.

    Raises:
        EngineFailed: the process failed; names the log.
    """
    finished = False
    process = start_process(__name__, prepared.folder, log)
    assert process.stdout is not None
    try:
        with process.stdout as events:
            for line in events:
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "failed":
                    raise EngineFailed(f"the simulation failed: {event['reason']} (see {log})")
                finished = finished or event["event"] == "outcome"
                yield event
        with suppress(subprocess.TimeoutExpired):  # a busy machine takes long to end Ray
            process.wait(_GRACE_SECONDS)
    finally:
        code = end_process(process)
    if not finished:
        how = f"with code {code}"
        if code < 0:
            how = f"by {signal.Signals(-code).name}, for want of memory perhaps"
        raise EngineFailed(f"the simulation engine ended {how}: see {log}")


def start_process(module: str, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """Start ``python -m MODULE FOLDER``, which tells events in lines on its standard output.

    Args:
        module: to run.
        folder: its only argument.
        log: file that gets everything else that it prints.
    """
    environment = {
        **os.environ,
        **ENVIRONMENT,
        # what the caller can import (a model in the current folder), the clients can
        "PYTHONPATH": os.pathsep.join(part for part in [os.getcwd(), *sys.path] if part),
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(folder.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the caller, which ends the process
        )


def end_process(process: subprocess.Popen[bytes]) -> int:
    """Whatever is left of such a process ends; its exit status, as `subprocess` has it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def simulate(prepared: PreparedRun, emit: OnEvent) -> None:
    """Run all arms of a prepared run with the engine its scenario names.

    Ends with the event ``outcome``, which holds what every arm gave.

    Raises:
        EngineFailed: clients failed.
    """
    import torch

    torch.set_num_threads(1)
    from prunecast.simulations.runner.federate import run_arms, simulated_client

    client = simulated_client(prepared)
    engine, count = prepared.scenario.engine, prepared.scenario.clients.count
    if engine.backend == "inline":
        from prunecast.simulations.runner.inprocess import InProcessGrid

        outcomes = run_arms(InProcessGrid(client, count), prepared, emit)
    else:
        from flwr.app import Context
        from flwr.serverapp import Grid, ServerApp
        from flwr.simulation import run_simulation

        server, outcomes = ServerApp(), []

        @server.main()  # type: ignore[untyped-decorator, unused-ignore]
        def serve(grid: Grid, context: Context) -> None:
            outcomes.extend(run_arms(grid, prepared, emit))

        _start_ray(engine)
        cpus: float = engine.cpus
        run_simulation(
            server_app=server,
            client_app=client,
            num_supernodes=count,
            backend_config={"client_resources": {"num_cpus": cpus, "num_gpus": engine.gpus}},
        )
    emit({"event": "outcome", "arms": outcomes})


def _start_ray(engine: EngineSpec) -> None:
    """Start Ray, or join a cluster, before Flower would, which waits for ever where no client fits.

    Raises:
        EngineFailed: there is no such cluster, or no machine has what a client needs.
    """
    import ray

    # of this process there is the path in the environment alone: see `run_engine`
    environment = {"env_vars": {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}}
    chosen: dict[str, Any] = {"address": engine.address}
    if not engine.address:  # or Ray would join whatever cluster this machine has begun last
        chosen = {"address": "local", "num_cpus": engine.concurrent * engine.cpus}
    host, _, port = engine.address.rpartition(":")
    try:
        if host:  # Ray goes on trying for minutes
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        ray.init(runtime_env=environment, include_dashboard=False, **chosen)
    except OSError:  # ConnectionError is one
        raise EngineFailed(
            f"no Ray cluster answers at engine.address = {engine.address!r}: start one with "
            "ray start --head, or leave the key out"
        ) from None  # the cause is what `main` tells
    nodes = ray.nodes()  # type: ignore[no-untyped-call, unused-ignore]
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(m.get("CPU", 0) >= engine.cpus and m.get("GPU", 0) >= engine.gpus for m in machines):
        found = "; ".join(f"{m.get('CPU', 0):g} CPUs, {m.get('GPU', 0):g} GPUs" for m in machines)
        raise EngineFailed(
            f"no machine has the engine.cpus = {engine.cpus} and engine.gpus = {engine.gpus:g} "
            f"that a client takes (there are {found}): lower them"
        )


def main(arguments: list[str]) -> int:
    """Entry point of the process; 0 when all arms were trained."""
    from prunecast.simulations.runner.prepared import PreparedRun

    os.environ.update(ENVIRONMENT)
    logging.getLogger("flwr").propagate = False
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as events:
        os.dup2(2, 1)  # whatever else is printed, here and in Ray's processes, is for the log

        def emit(event: Mapping[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        try:
            simulate(PreparedRun.open(Path(arguments[0])), emit)
        except Exception as error:  # reported to the caller; the traceback stays in the log
            traceback.print_exc()
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            own = type(cause).__module__.startswith("prunecast.")
            kind = "" if own else f"{type(cause).__name__}: "
            emit({"event": "failed", "reason": f"{kind}{cause}"})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

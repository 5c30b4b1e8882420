"""Start the engine's process and listen to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunecast.simulations.runner.engine import ENVIRONMENT
from prunecast.simulations.runner.errors import EngineFailed
from prunecast.simulations.runner.job import Job

__all__ = ["run_engine"]

_GRACE_SECONDS = 15.0


def run_engine(job: Job, log: Path) -> Iterator[dict[str, Any]]:
    """Run a prepared job in a process of its own; yields its events as they come.

    Args:
        job: what to run.
        log: file that gets everything Flower and Ray print.

    Raises:
        EngineFailed: the process failed; names the log.
    """
    finished = False
    with _process(job.folder, log) as (process, events):
        for line in events:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "failed":
                raise EngineFailed(f"the simulation failed: {event['reason']} (see {log})")
            finished = finished or event["event"] == "outcome"
            yield event
        code = process.wait(_GRACE_SECONDS)
    if not finished:
        raise EngineFailed(f"the simulation engine ended with code {code}: see {log}")


@contextmanager
def _process(folder: Path, log: Path) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    reading, writing = os.pipe()
    environment = {
        **os.environ,
        **ENVIRONMENT,
        # what the caller can import (a model in the current folder), the clients can
        "PYTHONPATH": os.pathsep.join(part for part in [os.getcwd(), *sys.path] if part),
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "prunecast.simulations.runner.engine"]
    with log.open("ab") as output, os.fdopen(reading, "r", encoding="utf-8") as events:
        try:
            process = subprocess.Popen(
                [*command, str(folder.resolve()), str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                pass_fds=(writing,),
                start_new_session=True,  # Ctrl-C reaches the caller, which ends the engine
            )
        finally:
            os.close(writing)
        try:
            yield process, events
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of the engine ends with the run."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

"""Lives of an agent, each in a process of its own that costs a fork and can be killed.

Run as a script. It imports the agent and onnxruntime once; for every line on standard input, a
JSON object, it forks a child that is one life of an agent, and tells in JSON lines what happens.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime  # noqa: F401  before the fork: a life must not import it again

from prunecast.client.edge import Agent, AgentConfig
from prunecast.client.edge.errors import EdgeError
from prunecast.client.edge.updating.transport import HttpFetcher


def _say(**event: Any) -> None:
    os.write(1, json.dumps(event).encode() + b"\n")


def _count_calls(die_at: int | None) -> list[int]:
    """Count the calls that touch the file system; SIGKILL this process at the n-th."""
    calls = [0]
    watched = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink"}

    def audit(event: str, _: tuple[Any, ...]) -> None:
        if event in watched:
            calls[0] += 1
            if calls[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    return calls


def _live(order: dict[str, Any]) -> None:
    calls = _count_calls(order["die_at"])
    root = Path(order["root"]).read_bytes()
    config = AgentConfig(Path(order["state"]), order["url"], "toy", root, threads=1)
    inputs = {"input": np.load(order["inputs"])}
    with Agent(config, fetcher=HttpFetcher()) as agent:
        if agent.model.version is not None:
            served = agent.model.infer(inputs)
            answer = [[float(x) for x in row] for row in served.outputs["output"]]
            _say(event="serves", version=served.version, answer=answer)
            agent.confirm()
        else:
            _say(event="serves", version=None, answer=None)
        try:
            result = agent.update_once()
            agent.confirm()
        except EdgeError as error:
            _say(event="failed", error=str(error))
        else:
            _say(event=result.outcome, version=result.version, reason=result.reason)
        _say(event="done", calls=calls[0])


def main() -> None:
    """Fork a life for every order until standard input ends."""
    _say(event="ready")
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _live(order)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        begun = time.monotonic()
        if order["delay"] is not None:  # not reaped yet, so the number is still its own
            handle = os.pidfd_open(pid)
            if not select.select([handle], [], [], order["delay"])[0]:
                os.kill(pid, signal.SIGKILL)
            os.close(handle)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        _say(event="ended", code=code, seconds=time.monotonic() - begun)


if __name__ == "__main__":
    main()

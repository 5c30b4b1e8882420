"""A ClientApp that waits for ever, on a real SuperNode: nobody but the watch finds out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.loopback.engine import wait_for
from prunecast.common.liveness import descendants, status_of
from prunecast.common.pulse import read_pulse
from prunecast.common.watching import HUNG

pytestmark = pytest.mark.engine

LONG = 1200  # seconds: machines that run tests are busy
LOAD = "arrays, goal = load(message, context)\n"
HANGS = f"import threading\n    threading.Event().wait()\n    {LOAD}"


def test_a_client_app_that_waits_for_ever_is_ended_with_its_node(
    start_engine: Callable[..., Any], free_port: Callable[[], int], tiny_app: Path, tmp_path: Path
) -> None:
    app = tmp_path / "app"
    shutil.copytree(tiny_app, app, ignore=shutil.ignore_patterns("__pycache__"))
    code = app / "tiny/client_app.py"
    code.write_text(code.read_text().replace(LOAD, HANGS, 1))  # in its training
    port, pulse = free_port(), tmp_path / "pulse.json"
    with start_engine(tmp_path) as engine:
        address = f"127.0.0.1:{port}"
        engine.start(
            "superlink",
            *("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)),
            port=port,
        )
        (tmp_path / "flower").mkdir(exist_ok=True)
        (tmp_path / "flower/config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n\n[superlink.ours]\naddress = "{address}"\n'
            "insecure = true\n"
        )
        runtimes = free_port(), free_port()
        watch = ["--pulse", str(pulse), "--interval", "1", "--stalled", "60"]
        for number, runtime in enumerate(runtimes):
            command = ["prunecast", "federation", "watch", *(watch if number == 0 else []), "--"]
            engine.start(
                f"supernode{number}",
                *(*command, "flower-supernode", "--insecure", "--superlink", address),
                *("--host", "127.0.0.1", "--port", str(runtime)),
                *("--node-config", f"partition-id={number} num-partitions=2"),
                port=runtime,
            )
        engine.flwr("run", ".", "--run-config", f'output="{tmp_path}"', cwd=app)
        wait_for(lambda: read_pulse(pulse).get("client_app"), LONG, "a ClientApp", every=1)
        found = read_pulse(pulse)
        assert found["state"] == "healthy"
        below = descendants(found["pid"])
        assert status_of(f"http://127.0.0.1:{runtimes[0]}/health") == 200

        assert engine.processes["supernode0"].wait(LONG) == HUNG
        log = (tmp_path / "supernode0.log").read_text()
        assert "hung: its ClientApp has computed nothing for" in log
        # until then everything else was well: it exchanged heartbeats with its SuperLink
        assert time.time() - found["exchanged"] < LONG
        assert "stood still" not in log
        assert "exchanged nothing" not in log
        for pid in below:
            wait_for(lambda pid=pid: not _runs(pid), LONG, f"process {pid} to end")
        # the other one is watched with defaults, which leave a ClientApp its time
        assert engine.processes["supernode1"].poll() is None
        listed = engine.flwr("list", "--format", "json")
        assert json.loads(listed[listed.index("{") :])["runs"][0]["status"] == "running"


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False

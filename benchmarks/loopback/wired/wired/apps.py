"""Both sides; the environment names the run's folder and whom to tell where an arm begins."""

import os
import urllib.request
from contextlib import suppress
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.prepared import PreparedRun

prepared = PreparedRun.open(Path(os.environ["WIRED_FOLDER"]))
client = simulated_client(prepared)
server = ServerApp()


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Train every arm; what counts the traffic is told by requests of its own."""
    address = (Path(os.environ["WIRED_FOLDER"]) / "relay").read_text()
    arms = iter(prepared.scenario.arms)

    def tell(event: dict) -> None:
        mark = {"run-started": "/begin", "run-finished": "/end"}.get(event["event"])
        if mark is not None:
            name = next(arms) if mark == "/begin" else ""
            with suppress(OSError):  # the SuperLink knows no such request
                urllib.request.urlopen(f"http://{address}{mark}/{name}", timeout=30).close()

    run_arms(grid, prepared, tell)

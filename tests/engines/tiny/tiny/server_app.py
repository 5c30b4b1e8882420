"""What the server does; leaves `ledger.jsonl`, `losses.json` and `final.npz` in `output`."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from prunecast.server.federation import CompressedGrid, Policy
from tiny.task import initial

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    output = Path(config["output"])
    grid = CompressedGrid(grid, Policy.from_run_config(config), ledger=output / "ledger.jsonl")
    arrays = ArrayRecord({name: Array(array) for name, array in initial(config["rows"]).items()})
    result = FedAvg().start(
        grid=grid, initial_arrays=arrays, num_rounds=config["num-server-rounds"], timeout=120
    )
    grid.ledger.close()
    np.savez(output / "final.npz", **{n: a.numpy() for n, a in result.arrays.items()})
    losses = {r: m["loss"] for r, m in result.evaluate_metrics_clientapp.items()}
    (output / "losses.json").write_text(json.dumps(losses))

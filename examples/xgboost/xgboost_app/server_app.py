"""What the server does."""

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedXgbBagging

from prunecast.server import CompressedGrid, Policy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Put the trees of all nodes into one forest, round by round."""
    grid = CompressedGrid(grid, Policy.from_run_config(context.run_config))
    nothing = np.zeros(0, np.uint8)  # no tree yet
    FedXgbBagging().start(
        grid=grid,
        initial_arrays=ArrayRecord([nothing]),
        num_rounds=context.run_config["num-server-rounds"],
    )
    sent = grid.ledger.totals()
    print(f"{sent.payload_bytes:,} bytes on the wire, {sent.dense_bytes:,} without Prunecast")

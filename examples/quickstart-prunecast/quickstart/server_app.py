"""What the server does."""

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from prunecast.server import CompressedGrid, Policy
from quickstart.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Average what the nodes learned."""
    grid = CompressedGrid(grid, Policy.from_run_config(context.run_config))
    torch.manual_seed(0)
    strategy = FedAvg()
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=context.run_config["num-server-rounds"],
    )
    sent = grid.ledger.totals()
    print(f"{sent.payload_bytes:,} bytes on the wire, {sent.dense_bytes:,} without Prunecast")

"""What the server does."""

from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from jax_app.task import flattened, initial_params
from prunecast.server import CompressedGrid, Policy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Average what the nodes learned."""
    grid = CompressedGrid(grid, Policy.from_run_config(context.run_config))
    arrays = {name: Array(array) for name, array in flattened(initial_params(seed=0)).items()}
    FedAvg().start(
        grid=grid,
        initial_arrays=ArrayRecord(arrays),
        num_rounds=context.run_config["num-server-rounds"],
    )
    sent = grid.ledger.totals()
    print(f"{sent.payload_bytes:,} bytes on the wire, {sent.dense_bytes:,} without Prunecast")

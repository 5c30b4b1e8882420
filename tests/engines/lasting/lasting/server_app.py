"""A run that goes on from its checkpoint; leaves what it reached in ``final.npz``."""

from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg

from prunecast.server import Deadlines, Run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    nodes, folder = config["nodes"], Path(config["folder"])
    options = {"min_train_nodes": nodes, "min_available_nodes": nodes, "fraction_evaluate": 0.0}
    if config["strategy"] == "fedadam":
        strategy = FedAdam(eta=0.05, beta_1=0.9, beta_2=0.99, **options)
    else:
        strategy = FedAvg(**options)
    rng = np.random.default_rng(1)
    first = {"weight": rng.normal(size=(96, 40)).astype("f4"), "bias": np.zeros(96, "f4")}
    run = Run(
        grid, strategy, policy="balanced", folder=folder, seed=5, job="lasting", resume="auto",
        stop_on_failure=True,  # a round without one of its nodes would reach something else
        deadlines=Deadlines.from_run_config(config),
    )  # fmt: skip
    result = run.start(
        ArrayRecord({name: Array(array) for name, array in first.items()}),
        num_rounds=config["num-server-rounds"],
        timeout=config["timeout"],
    )
    np.savez(folder / "final.npz", **{n: a.numpy() for n, a in result.arrays.items()})

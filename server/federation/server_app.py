"""The ready ServerApp: bring a model, name it in Flower's run config.

In ``pyproject.toml`` of a Flower app::

    [tool.flwr.app.components]
    serverapp = "prunecast.server.federation.server_app:app"

    [tool.flwr.app.config]
    model = "myapp.task:net"              # () -> torch.nn.Module
    num-server-rounds = 30
    prunecast.preset = "small"            # and every knob of `Policy`, as prunecast.<knob>

Keys, with defaults:

========================  ==========================================================================
``model``                 required: ``package.module:function`` that returns a torch module
``num-server-rounds``     3
``strategy``              "fedavg"; see `prunecast.server.federation.strategies`
``strategy.<option>``     an option of the strategy, such as ``strategy.fraction-train = 0.5``
``evaluate``              "" or ``package.module:function``, (model, Context) -> dict of metrics,
                          given the *published* model before the first and after each round
``seed``                  0: of the initial weights and of the sampling of nodes
``timeout``               3600 seconds to wait for the replies of a round
``ledger``                "" or the path of a JSON Lines file for the byte ledger
``output``                "" or the path of a file for the final published model
``prunecast.<knob>``      see `Policy.from_run_config`
``release.<key>``         releases during the run, see `prunecast.server.federation.release_config`
========================  ==========================================================================
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from logging import INFO
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from torch import nn

from prunecast.common.references import load_callable
from prunecast.compression.flower.internals import log
from prunecast.compression.versions import save_model
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.grid import CompressedGrid
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.release_config import releases_from_config
from prunecast.server.federation.strategies import build_strategy

__all__ = ["app", "initial_arrays"]

app = ServerApp()
"""The ready ServerApp, configured by Flower's run config alone."""

_OPTION = "strategy."


def initial_arrays(model: Callable[[], nn.Module], *, seed: int) -> tuple[nn.Module, ArrayRecord]:
    """A model with weights drawn from `seed`, and its arrays; torch's global state is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = model()
    return module, ArrayRecord(module.state_dict())


@app.main()  # type: ignore[untyped-decorator, unused-ignore]
def main(grid: Grid, context: Context) -> None:
    """Train the configured model.

    Raises:
        FederationError: a key of the run config is missing or unusable.
    """
    config = context.run_config
    seed = _get(config, "seed", 0)
    random.seed(seed)  # Flower samples nodes with it
    module, arrays = initial_arrays(_function(config, "model"), seed=seed)
    strategy = build_strategy(
        _get(config, "strategy", "fedavg"),
        {k.removeprefix(_OPTION): v for k, v in config.items() if k.startswith(_OPTION)},
    )
    releases = releases_from_config(config, _function(config, "model"))
    ledger = _get(config, "ledger", "")
    compressed = CompressedGrid(
        grid, Policy.from_run_config(config), ledger=Path(ledger) if ledger else None
    )
    evaluate_fn = None
    if _get(config, "evaluate", ""):
        measure = _function(config, "evaluate")

        def evaluate(server_round: int, received: ArrayRecord) -> MetricRecord:
            module.load_state_dict(received.to_torch_state_dict())
            return MetricRecord(dict(measure(module, context)))

        evaluate_fn = compressed.evaluate_published(evaluate)
    if releases is not None:
        evaluate_fn = releases.watch(strategy, compressed, evaluate_fn)
    try:
        result = strategy.start(
            grid=compressed,
            initial_arrays=arrays,
            num_rounds=_get(config, "num-server-rounds", 3),
            timeout=float(_get(config, "timeout", 3600)),
            evaluate_fn=evaluate_fn,
        )
    finally:
        compressed.ledger.close()
    totals = compressed.ledger.totals()
    log(
        INFO,
        "Prunecast: %d bytes down, %d up; plain Flower: %d down, %d up",
        totals.bytes_down,
        totals.bytes_up,
        totals.dense_bytes_down,
        totals.dense_bytes_up,
    )
    output = _get(config, "output", "")
    if output and result.arrays:
        save_model(compressed.published(result.arrays), Path(output))


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    value = config.get(key, default)
    if type(value) is not type(default):
        raise FederationError(f"{key} = {value!r} in the run config is no {type(default).__name__}")
    return value


def _function(config: Mapping[str, Any], key: str) -> Callable[..., Any]:
    reference = config.get(key)
    if not isinstance(reference, str) or not reference:
        raise FederationError(
            f'the run config lacks {key!r}: set {key} = "package.module:function"'
        )
    try:
        return load_callable(reference)
    except ValueError as error:
        raise FederationError(f"{key} in the run config: {error}") from error

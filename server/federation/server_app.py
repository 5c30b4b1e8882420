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
``folder``                "" or the folder that gets ledger, events, checkpoint and final model,
                          see `prunecast.server.federation.run`
``resume``                "" or a checkpoint to go on from, such as the folder's
``name``                  "": what people call the run
``ledger``                "" or the path of a JSON Lines file for the byte ledger
``output``                "" or the path of a file for the final published model
``prunecast.<knob>``      see `Policy.from_run_config`
``release.<key>``         releases during the run, see `prunecast.server.federation.release_config`
========================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from prunecast.common.references import load_callable
from prunecast.server.federation.checkpoints import Checkpoint
from prunecast.server.federation.errors import CheckpointError, FederationError
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.release_config import releases_from_config
from prunecast.server.federation.run import Run, initial_arrays
from prunecast.server.federation.strategies import build_strategy

__all__ = ["app"]

app = ServerApp()
"""The ready ServerApp, configured by Flower's run config alone."""

_OPTION = "strategy."


@app.main()  # type: ignore[untyped-decorator, unused-ignore]
def main(grid: Grid, context: Context) -> None:
    """Train the configured model.

    Raises:
        FederationError: a key of the run config is missing or unusable.
    """
    config = context.run_config
    seed = _get(config, "seed", 0)
    module, arrays = initial_arrays(_function(config, "model"), seed=seed)
    strategy = build_strategy(
        _get(config, "strategy", "fedavg"),
        {k.removeprefix(_OPTION): v for k, v in config.items() if k.startswith(_OPTION)},
    )
    evaluate_fn = None
    if _get(config, "evaluate", ""):
        measure = _function(config, "evaluate")

        def evaluate(server_round: int, published: ArrayRecord) -> MetricRecord:
            module.load_state_dict(published.to_torch_state_dict())
            return MetricRecord(dict(measure(module, context)))

        evaluate_fn = evaluate
    run = Run(
        grid,
        strategy,
        policy=Policy.from_run_config(config),
        folder=_get(config, "folder", "") or None,
        evaluate_fn=evaluate_fn,
        releases=releases_from_config(config, _function(config, "model")),
        seed=seed,
        name=_get(config, "name", ""),
        ledger=_get(config, "ledger", "") or None,
        output=_get(config, "output", "") or None,
    )
    resume = _get(config, "resume", "")
    run.start(
        _resumed(Path(resume), arrays) if resume else arrays,
        num_rounds=_get(config, "num-server-rounds", 3),
        timeout=float(_get(config, "timeout", 3600)),
    )


def _resumed(path: Path, arrays: ArrayRecord) -> Checkpoint:
    checkpoint = Checkpoint.load(path)
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    if {name: array.shape for name, array in checkpoint.arrays.items()} != shapes:
        raise CheckpointError(
            f"resume = {str(path)!r} in the run config is of another model: its tensors are not "
            "those of the configured one"
        )
    return checkpoint


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

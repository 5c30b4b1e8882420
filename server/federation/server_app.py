"""The ready ServerApp: bring a model, name it in Flower's run config.

In ``pyproject.toml`` of a Flower app::

    [tool.flwr.app.components]
    serverapp = "prunecast.server.federation.server_app:app"

    [tool.flwr.app.config]
    model = "myapp.task:net"              # () -> torch.nn.Module
    num-server-rounds = 30
    prunecast.preset = "small"            # and every knob of `Policy`, as prunecast.<knob>

docs/run.md lists the keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from logging import INFO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from prunecast.common.references import configured_callable, typed
from prunecast.compression.flower.internals import log
from prunecast.compression.pruning.structure.channels import current_channels
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.exchange.deadlines import Deadlines
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.masks.prunable import check_model, frozen_parameters
from prunecast.server.federation.publishing.widths import leading_slices
from prunecast.server.federation.releasing import releases_from_config
from prunecast.server.federation.run import CHECKPOINT, Run, initial_arrays
from prunecast.server.federation.shrinking.choosing import FittedModule, module_chooser
from prunecast.server.federation.state.checkpoints import Checkpoint, check_model_of
from prunecast.server.federation.state.resuming import AUTO
from prunecast.server.federation.strategies import build_strategy

if TYPE_CHECKING:
    from prunecast.server.federation.reporting.metrics import MetricsServer, RunMetrics

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
    model = configured_callable(config, "model", FederationError)
    module, arrays = initial_arrays(model, seed=seed)
    strategy = build_strategy(
        _get(config, "strategy", "fedavg"),
        {k.removeprefix(_OPTION): v for k, v in config.items() if k.startswith(_OPTION)},
    )
    policy, evaluate_fn = Policy.from_run_config(config), None
    if _get(config, "evaluate", ""):
        measure = configured_callable(config, "evaluate", FederationError)

        def evaluate(server_round: int, published: ArrayRecord) -> MetricRecord:
            plan = current_channels()
            held = evaluated.of(plan if plan is not None else run.grid.channels())
            held.load_state_dict(published.to_torch_state_dict())
            return MetricRecord(dict(measure(held, context)))

        classes = 1 + len(policy.widths)
        evaluated, evaluate_fn = FittedModule(model, module, classes), evaluate
    choose = slices = None
    if _get(config, "example", ""):
        example = configured_callable(config, "example", FederationError)
        choose, slices = module_chooser(model, example), leading_slices(model, example)
    resume, checkpoint = _get(config, "resume", ""), _get(config, "checkpoint", "")
    from_path = resume not in ("", AUTO)
    initial = _resumed(Path(resume), arrays) if from_path else arrays
    removed = initial.channels if isinstance(initial, Checkpoint) else None
    rounds = _get(config, "num-server-rounds", 3)
    if not from_path:
        check_model(policy, arrays, rounds, frozen=frozen_parameters(module))
    metrics = _metrics(config)
    run = Run(
        grid,
        strategy,
        policy=policy,
        folder=_get(config, "folder", "") or None,
        on_event=None if metrics is None else metrics[0],
        evaluate_fn=evaluate_fn,
        releases=releases_from_config(config, model, removed),
        seed=seed,
        name=_get(config, "name", ""),
        ledger=_get(config, "ledger", "") or None,
        output=_get(config, "output", "") or None,
        checkpoint=Path(checkpoint) / CHECKPOINT if checkpoint else None,
        checkpoints=_get(config, "checkpoints", 2),
        resume=AUTO if resume == AUTO else "",
        job=_get(config, "job", ""),
        stop_on_failure=_get(config, "stop-on-failure", False),
        channels=choose,
        slices=slices,
        deadlines=Deadlines.from_run_config(config),
    )
    with nullcontext() if metrics is None else metrics[1]:
        run.start(
            initial,
            num_rounds=rounds,
            timeout=_get(config, "timeout", 3600.0),
        )


def _metrics(config: Mapping[str, Any]) -> tuple[RunMetrics, MetricsServer] | None:
    """What Prometheus is told, and where; None where no port is configured."""
    port = _get(config, "metrics-port", -1)
    if port < 0:
        return None
    from prunecast.server.federation.reporting.metrics import MetricsServer, RunMetrics

    told = RunMetrics(_get(config, "metrics-nodes", 50))
    server = MetricsServer(told.text, host=_get(config, "metrics-address", "127.0.0.1"), port=port)
    log(INFO, "Metrics at %s", server.url)
    return told, server


def _resumed(path: Path, arrays: ArrayRecord) -> Checkpoint:
    checkpoint = Checkpoint.load(path)
    check_model_of(checkpoint, arrays, f"resume = {str(path)!r} in the run config")
    return checkpoint


def _get(config: Mapping[str, Any], key: str, default: Any) -> Any:
    return typed(key, config.get(key, default), type(default), FederationError)

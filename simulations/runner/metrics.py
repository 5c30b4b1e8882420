"""What pruning did to the model of an arm: counted, measured and estimated when it has trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prunecast.compression.pruning.operations import FLOAT32, INT8, Kept

if TYPE_CHECKING:
    from torch import Tensor, nn

    from prunecast.simulations.tasks import Task

__all__ = ["model_figures", "pruning_figures"]

Row = Mapping[str, Any]


def model_figures(module: nn.Module, inputs: tuple[Tensor, ...], original: int) -> dict[str, Any]:
    """Count a module with its final weights, and time it on one example with torch, on one thread.

    Args:
        module: with the weights that were measured last; left in evaluation mode.
        inputs: examples; the first one is run.
        original: parameters that it had before anything was pruned.

    Returns:
        What docs/result.md says of ``pruning``, apart from rounds, nodes and the server's cost.
    """
    import torch

    from prunecast.compression.pruning.counting import count_operations
    from prunecast.compression.release.timing import median_seconds

    module.eval()
    example = tuple(x[:1] for x in inputs)
    counted = count_operations(module, example)
    layers: dict[str, dict[str, Any]] = {}
    nonzero: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        nonzero[name] = int(torch.count_nonzero(parameter.detach()))
        uses = counted.uses.get(name, 0.0)
        layers[name] = {
            "parameters": parameter.numel(),
            "nonzero": nonzero[name],
            "macs": round(uses * parameter.numel()),
            "effective_macs": round(uses * nonzero[name]),
        }
    stored = sum(layer["parameters"] for layer in layers.values())
    kept = Kept(original, stored, sum(nonzero.values()))

    def run() -> None:
        with torch.inference_mode():
            module(*example)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds, joules = median_seconds(run)
    finally:
        torch.set_num_threads(threads)
    energy = {
        name: kind.joules(counted.macs, stored, counted.activations)
        for name, kind in (("fp32", FLOAT32), ("int8", INT8))
    }
    return {
        "parameters": {"original": original, "stored": stored, "nonzero": kept.nonzero},
        "compression_ratio": kept.compression_ratio,
        "efficiency": kept.efficiency,
        "macs": counted.macs,
        "effective_macs": counted.effective(nonzero),
        "layers": layers,
        "inference": {
            "runtime": "torch",
            "ms": 1e3 * seconds,
            "per_second": 1 / seconds,
            "joules": joules,
            "estimated_bytes": FLOAT32.memory(stored, counted.largest),
            "estimated_joules": energy,
        },
    }


def pruning_figures(
    model: Mapping[str, Any], rounds: Sequence[Row], task: Task, cost: Row | None
) -> dict[str, Any]:
    """The whole of ``pruning``: the model, and what it reached before and after.

    Args:
        model: of `model_figures`.
        rounds: of the arm; *before* is the last one after training whose model had all weights and
            channels, *after* is the last one.
        task: says whether its metric is an error.
        cost: what making masks took; None where nothing was to be pruned.
    """
    after = rounds[-1]
    original = model["parameters"]["original"]
    dense = [
        row
        for row in rounds
        if row["round"] and not row["sparsity"] and row["parameters"] == original
    ]
    before = dense[-1] if dense and dense[-1] is not after else None
    figures: dict[str, Any] = {
        **model,
        "before": _reached(before, task.metric),
        "after": _reached(after, task.metric),
        "pruning_loss": None,
        "recovery_ratio": None,
        "cost": None if cost is None else dict(cost),
    }
    if before is not None:
        lost = before[task.metric] - after[task.metric]
        figures["pruning_loss"] = -lost if task.lower_is_better else lost
        figures["recovery_ratio"] = before["loss"] / after["loss"] if after["loss"] else None
    return figures


def _reached(row: Row | None, metric: str) -> dict[str, Any] | None:
    """What a round reached, on the held-out examples and where nodes evaluated over them."""
    if row is None:
        return None
    return {
        "round": row["round"],
        metric: row[metric],
        "loss": row["loss"],
        "nodes": row.get("nodes") or None,
    }

"""The run of a ServerApp, from its events: as a result of one arm, as far as events tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunecast.common.files import StorageError
from prunecast.simulations.runner import ResultError

__all__ = ["result_of_events"]

_PERCENT = ("acc", "accuracy", "eval_acc", "f1", "auc")
_ERRORS = ("loss", "error", "mae", "mse", "rmse", "perplexity")


def result_of_events(folder: Path) -> dict[str, Any]:
    """What `prunecast.server.Run` left in a folder, as far as its last run goes.

    The metric is that of ``evaluate_fn``: one that sounds like an accuracy, or the first.

    Raises:
        ResultError: the events cannot be read, or tell of no round.
    """
    from prunecast.server.federation.reporting.events import read_events

    path = folder / "events.jsonl"
    try:
        started, *events = read_events(path)
    except (StorageError, ValueError) as error:
        raise ResultError(f"cannot read {path} ({error}): give another folder") from error
    rounds = [event for event in events if event["event"] == "round-finished"]
    if not rounds:
        raise ResultError(f"{path} tells of no round: wait for the first, or give another folder")
    metric = _metric(rounds[-1])
    name, seconds = started["name"] or folder.name, rounds[-1]["seconds"]
    rows = [_row(event, metric) for event in rounds if _measured(event).get(metric) is not None]
    if not rows:
        raise ResultError(
            f"{path} has no metric: give the run an evaluate_fn, or its nodes one to report"
        )
    last, end = rounds[-1], events[-1]
    dense, spent = (
        end.get(f"{kind}bytes_up", 0) + end.get(f"{kind}bytes_down", 0) for kind in ("dense_", "")
    )
    finished = end["event"] == "run-finished"
    return {
        "scenario": {
            "name": name,
            "description": "" if finished else "This run did not finish, or goes on.",
            "seed": started["seed"] or 0,
            "rounds": started["rounds"],
            "strategy": {"name": started["strategy"]},
        },
        "started": started["time"],
        "seconds": seconds,
        "task": {
            "metric": metric,
            "percent": metric in _PERCENT,
            "lower_is_better": any(word in metric for word in _ERRORS),
            "verb": "answered",
        },
        "arms": {
            name: {
                "kind": "run",
                "label": name,
                "text": "",
                "run_id": started["run"],
                "trained": True,
                "published": started["policy"]["down"] != "dense",
                "baseline": False,
                metric: rows[-1][metric],
                "sparsity": last["sparsity"],
                "bytes_up": last["bytes_up"],
                "bytes_down": last["bytes_down"],
                "seconds": seconds,
                "ledger": "ledger.jsonl",
                "by_kind": {},
                "rounds": rows,
                **({"reduction": dense / spent} if finished and spent else {}),
            }
        },
        "release": None,
    }


def _measured(event: dict[str, Any]) -> dict[str, Any]:
    metrics = event["metrics"] or event["client_metrics"].get("evaluate") or {}
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def _metric(event: dict[str, Any]) -> str:
    found = _measured(event)
    return next((name for name in found if name in _PERCENT), next(iter(found), "metric"))


def _row(event: dict[str, Any], metric: str) -> dict[str, Any]:
    same = ("round", "sparsity", "bytes_up", "bytes_down", "seconds")
    found = _measured(event)
    return {**{key: event[key] for key in same}, metric: found[metric], "loss": found.get("loss")}

"""What a sweep leaves: one table, in which the Pareto front is marked, and its plot."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.common.files import write_atomically
from prunecast.common.text import bytes_text, ratio_text
from prunecast.simulations.report import score_text
from prunecast.simulations.report.figure import empty_plot, png_of

if TYPE_CHECKING:
    from optuna.study import Study

    from prunecast.simulations.sweeps.study import Sweep

__all__ = ["PLOT", "TABLE", "document_of", "front_rows", "pareto_figure", "write_results"]

SCHEMA = 1
TABLE, PLOT = "trials.parquet", "pareto.png"

_FRONT, _OTHER, _BASE = "#d55e00", "#8a8a8a", "#0072b2"  # Okabe and Ito
_NAMED = 12  # trials of the front that the plot names


def document_of(sweep: Sweep, study: Study) -> dict[str, Any]:
    """The sweep as data: docs/sweeps.md explains every key."""
    task = sweep.scenario.task
    best = {trial.number for trial in study.best_trials}
    base = study.user_attrs.get("baseline")
    dense = base["bytes_down"] + base["bytes_up"] if base else None
    rows = []
    for trial in study.get_trials(deepcopy=False):
        attributes = trial.user_attrs
        spent, reached = trial.values or (None, None)
        rows.append(
            {
                "trial": trial.number,
                "state": trial.state.name.lower(),
                "point": dict(trial.params),
                "bytes_down": attributes.get("bytes_down"),
                "bytes_up": attributes.get("bytes_up"),
                "bytes": None if spent is None else int(spent),
                task.metric: reached,
                "spread": attributes.get("spread"),
                "ratio": round(dense / spent, 3) if dense and spent else None,
                "seconds": attributes.get("seconds"),
                "front": trial.number in best,
                "same_as": attributes.get("same_as"),
                "reason": attributes.get("reason", ""),
            }
        )
    return {
        "schema": SCHEMA,
        "scenario": sweep.scenario.name,
        "arm": sweep.arm,
        "sampler": sweep.spec.sampler,
        "repeats": sweep.spec.repeats,
        "task": {k: getattr(task, k) for k in ("metric", "percent", "lower_is_better")},
        "parameters": [parameter.key for parameter in sweep.spec.space()],
        "baseline": base and {"arm": sweep.baseline, **base},
        "trials": rows,
    }


def front_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the points that no other beats in both, the fewest bytes first."""
    metric = document["task"]["metric"]
    names = _short(document["parameters"])
    header = ["trial", *names.values(), "bytes", "ratio", metric]
    rows = []
    for row in sorted((r for r in document["trials"] if r["front"]), key=lambda r: r["bytes"]):
        values = [_value_text(row["point"][key]) for key in names]
        score = score_text(document, row[metric])
        if row["spread"] is not None:
            score = f"{score.removesuffix(' %')} ± {score_text(document, row['spread'])}"
        rows.append(
            [str(row["trial"]), *values, bytes_text(row["bytes"]), ratio_text(row["ratio"]), score]
        )
    base = document["baseline"]
    if base:
        rows.append(
            [
                *(base["arm"], *("" for _ in names)),
                *(bytes_text(base["bytes_down"] + base["bytes_up"]), ratio_text(1.0)),
                score_text(document, base["reached"]),
            ]
        )
    return header, rows


def _short(keys: list[str]) -> dict[str, str]:
    """The last parts of keys, as far as they differ."""
    last = {key: key.rpartition(".")[2] for key in keys}
    names = list(last.values())
    return {key: name if names.count(name) == 1 else key for key, name in last.items()}


def _value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write_results(folder: Path, document: Mapping[str, Any]) -> None:
    """Write ``trials.parquet`` and ``pareto.png``.

    A column for each key of a row, those of the point by their names; the rest of the document is
    JSON in the schema's metadata, under ``prunecast``.

    Raises:
        StorageError: a file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    metric, parameters = document["task"]["metric"], document["parameters"]
    columns: dict[str, Any] = {}
    types = {
        "trial": pa.int64(),
        "state": pa.string(),
        **dict.fromkeys(parameters),
        **dict.fromkeys(("bytes_down", "bytes_up", "bytes"), pa.int64()),
        **dict.fromkeys((metric, "spread", "ratio", "seconds"), pa.float64()),
        "front": pa.bool_(),
        "same_as": pa.int64(),
        "reason": pa.string(),
    }
    for name, kind in types.items():
        values = [
            row["point"].get(name) if kind is None else row[name] for row in document["trials"]
        ]
        if kind is None and any(isinstance(value, float) for value in values):
            values = [None if value is None else float(value) for value in values]
        columns[name] = pa.array(values, kind)
    rest = {key: value for key, value in document.items() if key != "trials"}
    table = pa.table(columns).replace_schema_metadata({"prunecast": json.dumps(rest)})
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_atomically(folder / TABLE, buffer.getvalue())
    write_atomically(folder / PLOT, pareto_figure(document))


def pareto_figure(document: Mapping[str, Any], *, dots_per_inch: int = 150) -> bytes:
    """A PNG: what every trial reached against its bytes, the front joined and named."""
    task, metric = document["task"], document["task"]["metric"]
    axes = empty_plot("bytes of a run", metric, dots_per_inch)
    trained = [row for row in document["trials"] if row["bytes"] is not None]
    front = sorted((row for row in trained if row["front"]), key=lambda row: row["bytes"])
    others = [row for row in trained if not row["front"]]
    axes.plot(
        *([row["bytes"] for row in others], [row[metric] for row in others]),
        *("o",),
        color=_OTHER,
        markersize=5,
        alpha=0.6,
        label=f"{len(others)} trials that another beats",
    )
    axes.plot(
        *([row["bytes"] for row in front], [row[metric] for row in front]),
        *("o-",),
        color=_FRONT,
        markersize=6,
        linewidth=1.5,
        label=f"{len(front)} that none beats: the Pareto front",
    )
    below = task["lower_is_better"]
    for (x, y), names in _named(front, metric).items():
        axes.annotate(
            names,
            (x, y),
            xytext=(0, -7 if below else 7),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8,
        )
    base = document["baseline"]
    if base:  # a line: as a point, far to the right, it would press all others together
        spent = base["bytes_down"] + base["bytes_up"]
        label = f"{base['arm']}: {score_text(document, base['reached'])} for {bytes_text(spent)}"
        axes.axhline(base["reached"], linestyle="--", color=_BASE, linewidth=1.5, label=label)
    axes.margins(x=0.06, y=0.12)
    return png_of(axes, is_percent=task["percent"])


def _named(front: list[dict[str, Any]], metric: str) -> dict[tuple[int, float], str]:
    """Names of points of the front, as many as do not lie on each other; the same point has one."""
    numbers: dict[tuple[int, float], list[str]] = {}
    for row in front:
        numbers.setdefault((row["bytes"], row[metric]), []).append(str(row["trial"]))
    step = max(1, -(-len(numbers) // _NAMED))
    return {
        place: ", ".join(found[:2]) + (", ..." if len(found) > 2 else "")
        for place, found in list(numbers.items())[::step]
    }

"""Tables, plots and the stand-alone page of a run."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunecast.common.files import write_atomically
from prunecast.common.text import bytes_text, duration_text, percent, ratio_text
from prunecast.simulations.report.charts import (
    COLOURS,
    accuracy_figure,
    bytes_per_round,
    score_text,
)

__all__ = [
    "FIGURE",
    "PAGE",
    "accuracy_figure",
    "arm_rows",
    "release_rows",
    "render_page",
    "score_text",
    "write_report",
]

FIGURE, PAGE = "accuracy.png", "report.html"


def arm_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of arms."""
    metric = result["task"]["metric"]
    header = ["arm", metric, "sparsity", "bytes up", "bytes down", "total", "reduction"]
    simulated = any("simulated" in arm for arm in result["arms"].values())
    if simulated:
        header.append("simulated time")
    rows = [
        [
            arm["label"],
            score_text(result, arm[metric]),
            percent(arm["sparsity"], 0) if arm["sparsity"] else "–",
            bytes_text(arm["bytes_up"]),
            bytes_text(arm["bytes_down"]),
            bytes_text(arm["bytes_up"] + arm["bytes_down"]),
            ratio_text(arm.get("reduction")),
            *([duration_text(arm["simulated"]["seconds"])] if simulated else []),
        ]
        for arm in result["arms"].values()
    ]
    return header, rows


def release_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of what a device downloads; empty without a release."""
    release = result.get("release")
    if not release:
        return [], []
    full = release["onnx_bytes"]
    first, second = (download["version"] for download in release["downloads"])
    sizes = {
        f"release {first}, keyframe (a new device)": release["first_keyframe_bytes"],
        f"release {second}, keyframe": release["keyframe_bytes"],
        f"release {second}, patch from release {first}": release["patch_bytes"],
        f"all the device received for release {second}": sum(
            release["downloads"][1]["bytes"].values()
        ),
    }
    if full:
        sizes = {"the model as one .onnx file": full, **sizes}
    rows = [
        [what, bytes_text(size), ratio_text(full / size) if full and size else "–"]
        for what, size in sizes.items()
    ]
    return ["what travels", "bytes", "reduction"], rows


def render_page(result: Mapping[str, Any], figure: bytes) -> str:
    """The page as HTML; everything it shows is inside it.

    Args:
        result: content of ``result.json``.
        figure: the PNG of `accuracy_figure`.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(bytes=bytes_text, percent=percent, ratio=ratio_text)
    environment.filters["score"] = partial(score_text, result)
    folder, arms = files(__name__), result["arms"]
    return environment.from_string((folder / "report.html").read_text()).render(
        result=result,
        style=(folder / "report.css").read_text(),
        figure=base64.b64encode(figure).decode(),
        arms=arms,
        arm_table=arm_rows(result),
        release_table=release_rows(result),
        colours=dict(zip(arms, COLOURS, strict=False)),
        chart=bytes_per_round(arms),
        kinds={n: _where_bytes_went(arm["by_kind"]) for n, arm in arms.items() if arm["trained"]},
        metric=result["task"]["metric"],
        headline=_headline(result),
    )


def _where_bytes_went(
    by_kind: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> list[dict[str, Any]]:
    """Rows for a bar list: direction, kind, messages, bytes, share of the total; largest first."""
    rows: list[dict[str, Any]] = [
        {"direction": direction, "kind": kind, **sums}
        for direction, kinds in by_kind.items()
        for kind, sums in kinds.items()
    ]
    total = sum(row["bytes"] for row in rows) or 1
    shares = [{**row, "share": row["bytes"] / total} for row in rows]
    return sorted(shares, key=lambda row: -int(row["bytes"]))


def _headline(result: Mapping[str, Any]) -> dict[str, Any] | None:
    """The best arm that publishes versions against the baseline, where there are both."""
    arms, task = result["arms"], result["task"]
    baseline = next(((name, arm) for name, arm in arms.items() if arm["baseline"]), None)
    published = [arm for arm in arms.values() if arm["published"]]
    if baseline is None or not published:
        return None
    arm = max(published, key=lambda arm: float(arm["reduction"]))
    name, dense = baseline
    gained = arm[task["metric"]] - dense[task["metric"]]
    return {
        "arm": arm["label"],
        "reduction": arm["reduction"],
        "total": arm["bytes_up"] + arm["bytes_down"],
        "score": arm[task["metric"]],
        "gained": f"{100 * gained:+.1f} points" if task["percent"] else f"{gained:+.3g}",
        "dense": name,
        "dense_total": dense["bytes_up"] + dense["bytes_down"],
    }


def write_report(folder: Path, result: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write ``accuracy.png`` and ``report.html`` into a run folder; returns their paths.

    Raises:
        StorageError: a file cannot be written.
    """
    figure = accuracy_figure(result)
    write_atomically(folder / FIGURE, figure)
    write_atomically(folder / PAGE, render_page(result, figure).encode())
    return folder / FIGURE, folder / PAGE

"""The stand-alone page of a run, and the picture beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunecast.common.files import write_atomically
from prunecast.common.text import bytes_text, percent, ratio_text
from prunecast.simulations.report.charts import bytes_per_round, where_bytes_went
from prunecast.simulations.report.figure import COLOURS, accuracy_figure
from prunecast.simulations.report.text import arm_rows, release_rows, score_text

__all__ = ["FIGURE", "PAGE", "render_page", "write_report"]

FIGURE, PAGE = "accuracy.png", "report.html"


def render_page(result: Mapping[str, Any], figure: bytes) -> str:
    """The page as HTML; everything it shows is inside it.

    Args:
        result: content of ``result.json``.
        figure: the PNG of `accuracy_figure`.
    """
    import jinja2

    folder = files("prunecast.simulations.report")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(bytes=bytes_text, percent=percent, ratio=ratio_text)
    environment.filters["score"] = partial(score_text, result)
    arms = result["arms"]
    trained = {name: arm for name, arm in arms.items() if arm["trained"]}
    colours = dict(zip(arms, COLOURS * 4, strict=False))
    return environment.from_string(folder.joinpath("report.html").read_text()).render(
        result=result,
        style=folder.joinpath("report.css").read_text(),
        figure=base64.b64encode(figure).decode(),
        arms=arms,
        arm_table=arm_rows(result),
        release_table=release_rows(result),
        colours=colours,
        rounds_chart=bytes_per_round(arms, colours),
        trained=trained,
        kinds={name: where_bytes_went(arm["by_kind"]) for name, arm in trained.items()},
        metric=result["task"]["metric"],
        headline=_headline(result),
    )


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

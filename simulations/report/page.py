"""The stand-alone page of a run, and the picture beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunecast.common.files import write_atomically
from prunecast.common.text import bytes_text, percent, ratio_text
from prunecast.simulations.report.charts import bytes_per_round, where_bytes_went
from prunecast.simulations.report.figure import COLOURS, accuracy_figure
from prunecast.simulations.report.text import arm_rows, release_rows

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
    arms = result["arms"]
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
        kinds={
            n: where_bytes_went(a["by_kind"]) for n, a in arms.items() if a["kind"] != "recoded"
        },
        headline=_headline(arms),
    )


def _headline(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The best compressed arm against the dense one, where there are both."""
    dense = next(((n, a) for n, a in arms.items() if a["kind"] == "dense"), None)
    compressed = [(n, a) for n, a in arms.items() if a["kind"] == "prunecast"]
    if dense is None or not compressed:
        return None
    name, arm = max(compressed, key=lambda item: float(item[1]["reduction"]))
    return {
        "arm": name,
        "reduction": arm["reduction"],
        "total": arm["bytes_up"] + arm["bytes_down"],
        "accuracy": arm["accuracy"],
        "points": 100 * (arm["accuracy"] - dense[1]["accuracy"]),
        "dense": dense[0],
        "dense_total": dense[1]["bytes_up"] + dense[1]["bytes_down"],
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

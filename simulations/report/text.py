"""Rows of the tables that a run's figures are shown in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunecast.common.text import bytes_text, percent, ratio_text

__all__ = ["arm_rows", "release_rows", "score_text"]


def score_text(result: Mapping[str, Any], value: float) -> str:
    """A value of the metric of a result's task."""
    return percent(value) if result["task"]["percent"] else f"{value:.4g}"


def arm_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of arms."""
    metric = result["task"]["metric"]
    header = ["arm", metric, "sparsity", "bytes up", "bytes down", "total", "reduction"]
    rows = []
    for arm in result["arms"].values():
        rows.append(
            [
                arm["label"],
                score_text(result, arm[metric]),
                percent(arm["sparsity"], 0) if arm["sparsity"] else "–",
                bytes_text(arm["bytes_up"]),
                bytes_text(arm["bytes_down"]),
                bytes_text(arm["bytes_up"] + arm["bytes_down"]),
                ratio_text(arm.get("reduction")),
            ]
        )
    return header, rows


def release_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of what a device downloads; empty without a release."""
    release = result.get("release")
    if not release:
        return [], []
    full = release["onnx_bytes"]

    def row(what: str, size: int) -> list[str]:
        return [what, bytes_text(size), ratio_text(full / size) if full and size else "–"]

    first, second = (download["version"] for download in release["downloads"])
    rows = [
        row(f"release {first}, keyframe (a new device)", release["first_keyframe_bytes"]),
        row(f"release {second}, keyframe", release["keyframe_bytes"]),
        row(f"release {second}, patch from release {first}", release["patch_bytes"]),
    ]
    if full:
        rows.insert(0, row("the model as one .onnx file", full))
    total = sum(release["downloads"][1]["bytes"].values())
    rows.append(row(f"all the device received for release {second}", total))
    return ["what travels", "bytes", "reduction"], rows

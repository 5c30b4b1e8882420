"""Figures as people read them."""

from __future__ import annotations

__all__ = ["arm_rows", "bytes_text", "percent", "ratio_text", "release_rows"]

from collections.abc import Mapping
from typing import Any


def bytes_text(count: float | None) -> str:
    """Bytes in decimal units with three significant digits: ``984 MB``, ``6.53 MB``, ``812 B``."""
    if count is None:
        return "–"
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if round(value, 0 if unit == "B" else 1) < 1000:
            break
        value /= 1000
    else:
        unit = "TB"
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def percent(fraction: float, digits: int = 1) -> str:
    """A fraction as a percentage."""
    return f"{100 * fraction:.{digits}f} %"


def ratio_text(ratio: float | None) -> str:
    """How many times smaller."""
    if ratio is None:
        return "–"
    return f"{ratio:.0f}×" if ratio >= 99.5 else f"{ratio:.1f}×" if ratio >= 10 else f"{ratio:.2f}×"


def arm_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of arms."""
    header = ["arm", "accuracy", "sparsity", "bytes up", "bytes down", "total", "reduction"]
    rows = []
    for name, arm in result["arms"].items():
        label = name
        if arm["kind"] == "recoded":
            label = f"{name} (level {arm['level']})"
        rows.append(
            [
                label,
                percent(arm["accuracy"]),
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

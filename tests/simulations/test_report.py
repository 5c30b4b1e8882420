"""Tables, picture and page from a result."""

from __future__ import annotations

import re
from typing import Any

import pytest

from prunecast.simulations.report import (
    accuracy_figure,
    arm_rows,
    release_rows,
    render_page,
    sections_of,
    study_of,
    write_report,
)


def arm(kind: str, scale: int, reduction: float) -> dict[str, Any]:
    rounds = [
        {
            "round": number,
            "accuracy": 0.1 + 0.2 * number,
            "loss": 2.0 - 0.4 * number,
            "sparsity": 0.3 * number if kind == "prunecast" else 0.0,
            "bytes_up": scale * number,
            "bytes_down": 2 * scale * number,
            "seconds": 1.0 * number,
        }
        for number in range(4)
    ]
    return {
        "kind": kind,
        "label": kind,
        "text": "preset small" if kind == "prunecast" else "",
        "trained": kind != "recoded",
        "published": kind == "prunecast",
        "baseline": kind == "dense",
        "accuracy": 0.7,
        "loss": 0.8,
        "sparsity": rounds[-1]["sparsity"],
        "bytes_up": 3 * scale,
        "bytes_down": 6 * scale,
        "messages": 12,
        "encode_ms": 1.0,
        "decode_ms": 1.0,
        "seconds": 3.0,
        "ledger": "ledger.jsonl",
        "by_kind": {
            "up": {"update": {"messages": 6, "bytes": 3 * scale}},
            "down": {"keyframe": {"messages": 6, "bytes": 6 * scale}},
        },
        "rounds": rounds,
        "reduction": reduction,
    }


@pytest.fixture
def result(tiny) -> dict[str, Any]:
    from prunecast.simulations.scenarios import scenario_from_mapping

    scenario = scenario_from_mapping({**tiny, "name": "x<script>alert(1)</script>"[:1]})
    return {
        "schema": 2,
        "task": {
            "metric": "accuracy",
            "percent": True,
            "lower_is_better": False,
            "verb": "classified",
        },
        "scenario": {**scenario.to_mapping(), "description": "<script>alert(1)</script>"},
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 12.5,
        "software": {"python": "3.11"},
        "machine": {"system": "Linux", "cpus": 2},
        "data": {"partition": "iid", "training": 180, "held_out": 60, "per_client": [50, 60, 70]},
        "arms": {
            "dense": arm("dense", 1_000_000, 1.0),
            "dense-zstd": {
                **arm("recoded", 900_000, 1.111),
                "label": "dense-zstd (level 3)",
                "seconds": None,
                "of": "dense",
                "codec": "zstd",
                "level": 3,
            },
            "prunecast": arm("prunecast", 8_000, 125.0),
        },
        "release": {
            "name": "tiny",
            "arm": "prunecast",
            "onnx_bytes": 1_640_000,
            "weights_bytes": 410_000,
            "keyframe_bytes": 60_000,
            "patch_bytes": 4_000,
            "first_keyframe_bytes": 61_000,
            "published_accuracy": 0.7,
            "device_accuracy": 0.7,
            "examples": 60,
            "identical_examples": 60,
            "downloads": [
                {"version": 1, "payload": "keyframe", "bytes": {"keyframe": 61_000}, "seconds": 1},
                {"version": 2, "payload": "patch", "bytes": {"patch": 4_000}, "seconds": 1},
            ],
            "selftest_difference": 0.0,
            "foreign_modules": [],
        },
    }


def test_tables_have_a_row_per_arm_and_per_download(result):
    header, rows = arm_rows(result)
    assert all(len(row) == len(header) for row in rows)
    assert [row[0] for row in rows] == ["dense", "dense-zstd (level 3)", "prunecast"]
    assert rows[2][1:] == ["70.0 %", "90 %", "24.0 kB", "48.0 kB", "72.0 kB", "125×"]
    header, rows = release_rows(result)
    assert [row[2] for row in rows] == ["1.00×", "26.9×", "27.3×", "410×", "410×"]
    assert release_rows({**result, "release": None}) == ([], [])


def test_what_the_device_gains_stands_with_the_release(result):
    figures = {"ms": 2.0, "joules": None, "estimated_joules": 3e-6}
    before = {"parameters": 1000, "nonzero": 1000, "macs": 5000, "effective_macs": 5000}
    before |= {"onnx_bytes": 4000, "fp32": figures, "int8": None}
    after = {**before, "nonzero": 100, "effective_macs": 600}
    gains = {"before": before, "after": after, "int8": "int8", "structured": False}
    result["release"]["gains"] = gains
    section = next(s for s in sections_of(study_of(result)) if s.title == "To the edge")
    table = section.tables[-1]
    assert ["parameters that are not zero", "1,000", "100", "10.0×"] in table.rows
    assert ["bytes, patch from 1", "4,000", "4,000", "1.00×"] in table.rows
    assert "900 zeros lie among other weights: they save bytes alone" in section.note


def test_the_picture_is_a_png_and_the_same_every_time(result):
    first = accuracy_figure(study_of(result), dots_per_inch=50)
    assert first.startswith(b"\x89PNG\r\n")
    assert accuracy_figure(study_of(result), dots_per_inch=50) == first


def test_the_page_stands_alone(result):
    page = render_page([study_of(result)], [b"picture"])
    assert "data:image/png;base64,cGljdHVyZQ==" in page
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "http" not in page.replace("http-equiv", "")
    assert "prefers-color-scheme: dark" in page
    assert "125×" in page
    assert "keyframe" in page


def test_text_from_the_scenario_is_escaped(result):
    page = render_page([study_of(result)])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize("missing", ["release", "dense", "prunecast"])
def test_pages_of_other_scenarios_render(result, missing, tmp_path):
    if missing == "release":
        result["release"] = None
    else:
        for name in [n for n in result["arms"] if n.startswith(missing)]:
            del result["arms"][name]
            del result["scenario"]["arms"][name]
        for entry in result["arms"].values():
            if missing == "dense":
                del entry["reduction"]
    figure, page = write_report(tmp_path, result)
    assert figure.stat().st_size > 1000
    assert page.stat().st_size > 1000

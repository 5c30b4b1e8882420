"""docs/edge.md: options, fields, bounds and the example request are those of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.client.edge import EdgeModel
from prunecast.client.edge.inference import EndpointLimits, InferenceProtocol
from prunecast.client.edge.telemetry import ReleaseFigures, TelemetrySnapshot
from support.served import loaded_release

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "edge.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_options_exist() -> None:
    shown = "".join(
        CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"}).output
        for command in (
            *("edge run", "edge status", "edge update", "edge infer"),
            *("release init", "release create", "serve"),
        )
    )
    of_the_agent = TEXT.replace(section("Measured"), "")
    for option in re.findall(r"(?<![\w-])(--[a-z]+(?:-[a-z]+)*)", of_the_agent):
        assert option in shown or option in ("--now", "--unix-socket"), option


def test_fields_of_the_telemetry_are_those_that_are_told() -> None:
    described = set(re.findall(r"`(\w+)`", section("What it tells").split("\n\n")[1]))
    snapshot = TelemetrySnapshot("", "", releases=(ReleaseFigures(1),)).to_json()
    told = set(snapshot) | set(snapshot["releases"][0])
    shortened = {"p90", "p99", "passed", "failed"}
    assert described - shortened <= told
    assert told - described <= {"schema", "version", "latency_p90_seconds", "latency_p99_seconds"}


def test_bounds_are_the_defaults() -> None:
    limits, bounds = EndpointLimits(), section("Calling it from anything else")
    for value in (
        f"{limits.body_bytes >> 20} MiB, {limits.json_bytes >> 20} MiB",
        f"{limits.total_bytes >> 20} MiB",
        f"{limits.output_bytes >> 20} MiB, {limits.json_output_bytes >> 20} MiB",
        f"{limits.answers_bytes >> 20} MiB",
        f"{limits.connections}, {limits.running}",
        f"{limits.request_seconds:.0f} s, {limits.idle_seconds:.0f} s",
        f"{limits.waiting_seconds:.0f} s",
        f"{limits.inference_seconds:.0f} s",
    ):
        assert f"| {value} |" in bounds


def test_the_example_request_is_understood(tmp_path: Path) -> None:
    found = re.search(r"-d '(\{.*\})'", TEXT)
    assert found
    protocol = InferenceProtocol(EdgeModel(loaded_release(1, tmp_path)), "digits")
    body = memoryview(found[1].encode())
    answer = protocol.answer("POST", "/v2/models/digits/infer", body)
    # the example's model has four features, this one has twelve: read, and refused by shape alone
    assert json.loads(answer.body)["error"].startswith("input 'input' must be float32")


@pytest.mark.parametrize("number", range(2))
def test_python_compiles(number: int) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    compile(blocks[number], "docs/edge.md", "exec")

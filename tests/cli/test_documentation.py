"""docs/compress.md and docs/prune.md: commands and code run, on a network of our own."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.files.formats import write_tensors
from prunecast.compression.files.tensors import FileTensor

DOCS = Path(__file__).parents[2] / "docs"
TEXT, PRUNE = ((DOCS / f"{n}.md").read_text(encoding="utf-8") for n in ("compress", "prune"))


def blocks(language: str, text: str = TEXT) -> str:
    found = re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(found)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    weight = np.random.default_rng(0).laplace(size=(60, 50)).astype(np.float32)
    tensors = {"classifier.weight": FileTensor(weight, "float32")}
    write_tensors(tmp_path / "model.npz", tensors)
    write_tensors(tmp_path / "model.safetensors", tensors)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_run_in_order(folder: Path) -> None:
    commands = [shlex.split(line) for line in blocks("console").splitlines()]
    assert len(commands) >= 5
    for _, *arguments in commands:
        if arguments[0] != "inspect":
            arguments.append("--force")
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{arguments}\n{result.output}"


def test_options_named_in_the_text_exist() -> None:
    shown = CliRunner().invoke(app, ["compress", "--help"], env={"COLUMNS": "200"}).output
    for option in set(re.findall(r"`(--[a-z-]+)", TEXT)):
        assert option in shown or option == "--output", option


def test_code_runs(folder: Path) -> None:
    scope: dict[str, object] = {}
    exec(compile(blocks("python"), "docs/compress.md", "exec"), scope)
    assert isinstance(scope["weight"], np.ndarray)
    assert scope["weight"].shape == (60, 50)


def test_the_commands_and_the_code_of_pruning_run(folder: Path) -> None:
    for line in blocks("console", PRUNE).splitlines():
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, f"{line}\n{result.output}"
    scope: dict[str, Any] = {}
    exec(compile(blocks("python", PRUNE), "docs/prune.md", "exec"), scope)
    assert scope["pruned"].report().removed == int(0.9 * 64 * 128) + int(0.9 * 1280)
    shown = CliRunner().invoke(app, ["prune", "--help"], env={"COLUMNS": "200"}).output
    for option in set(re.findall(r"`(--[a-z-]+)", PRUNE)) - {"--memory-gigabytes"}:  # a benchmark's
        assert option in shown, option
    layer = nn.Module()
    layer.classifier = nn.Linear(50, 60)
    scope["hold"](torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    assert int((layer.classifier.weight == 0).sum()) == 2700

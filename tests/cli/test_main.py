"""The command: help without extras, errors in one line, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from prunecast.cli.console import explain, is_usage
from prunecast.cli.main import app
from prunecast.simulations.scenarios import ScenarioError, packaged_scenarios

COMMANDS = [
    *("demo", "simulate", "report", "data", "release", "serve", "edge", "fleet", "node"),
    "federation",
    *("compress", "decompress", "inspect"),
]


@pytest.fixture
def run():
    runner = CliRunner()

    def invoke(*arguments: object):
        return runner.invoke(app, [str(a) for a in arguments], prog_name="prunecast")

    return invoke


def test_help_lists_every_command(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage: prunecast " + command in result.output


def test_version_is_printed(run):
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("prunecast ")


def test_help_needs_no_extra_and_no_heavy_import():
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in HEAVY: raise ModuleNotFoundError(name=name)\n"
        "HEAVY = {'torch','flwr','ray','onnx','onnxruntime','tuf','datasets','matplotlib',\n"
        "         'sqlalchemy'}\n"
        "sys.meta_path.insert(0, Missing())\n"
        "from typer.testing import CliRunner\n"
        "from prunecast.cli.main import app\n"
        "for group in ([], ['edge'], ['fleet'], ['demo']):\n"
        "    result = CliRunner().invoke(app, [*group, '--help'])\n"
        "    assert result.exit_code == 0, result\n"
        "result = CliRunner().invoke(app, ['demo'])\n"
        "assert result.exit_code == 1, result\n"
        "assert \"pip install 'prunecast[sim]'\" in result.output, result.output\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_wrong_scenario_is_a_usage_error_in_one_line(run, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text("schema = 1\nround = 3\n")
    result = run("simulate", path)
    assert result.exit_code == 2
    assert result.output == "error: round: unknown key; did you mean 'rounds'?\n"


@pytest.mark.parametrize("debug", [["--debug"], []])
def test_debugging_shows_the_traceback(run, monkeypatch, debug):
    if not debug:
        monkeypatch.setenv("PRUNECAST_DEBUG", "1")
    result = run(*debug, "simulate", "nope.toml")
    assert isinstance(result.exception, ScenarioError)


def test_a_wrong_policy_is_a_usage_error(run, tmp_path):
    path = tmp_path / "wrong.toml"
    path.write_text('schema = 1\n[arms.a]\nkind = "prunecast"\npreset = "huge"\n')
    result = run("simulate", "--check", path)
    assert result.exit_code == 2
    assert "prunecast.preset = 'huge' is unknown: choose one of" in result.output


def test_check_looks_at_the_data_too(run, tmp_path):
    path = tmp_path / "greedy.toml"
    path.write_text("schema = 1\n[data]\nheld_out = 5000\n")
    result = run("simulate", "--check", path)
    assert result.exit_code == 1
    assert "data.held_out = 5000, but there are 5000 examples: lower it" in result.output
    result = run("simulate", path, "--output", tmp_path / "runs")
    assert result.exit_code == 1
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    assert run("simulate", path, "--output", tmp_path / "runs").exit_code == 1
    assert list((tmp_path / "runs").iterdir()) == []


def test_check_prints_the_whole_scenario(run):
    result = run("simulate", "demo", "--check", "--json", "--seed", 5, "--rounds", 7)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert (document["seed"], document["rounds"]) == (5, 7)
    assert document["arms"]["dense-zstd"] == {
        "kind": "recoded",
        "of": "dense",
        "codec": "zstd",
        "level": 3,
    }


def test_packaged_scenarios_are_listed_with_what_they_train(run):
    result = run("simulate", "--list")
    assert result.exit_code == 0
    for name in packaged_scenarios():
        assert re.search(rf"^ *{name} +\S", result.stdout, re.M), name
    assert "LeNet of niid_bench" in result.stdout


def test_a_folder_without_a_run_fails_in_one_line(run, tmp_path):
    result = run("report", tmp_path)
    assert result.exit_code == 1
    assert result.output.startswith("error: cannot read ")
    assert result.output.count("\n") == 1


def test_a_missing_argument_is_a_usage_error(run):
    assert run("simulate").exit_code == 2
    assert run("dance").exit_code == 2


def test_errors_are_explained_in_one_line():
    assert is_usage(ScenarioError("a", "b", "c"))
    assert not is_usage(ValueError("a"))
    assert explain(ValueError("a\nb"), "demo").startswith("ValueError: a b (run with prunecast")
    assert explain(FileNotFoundError(2, "No such file", "x"), "demo") == "x: No such file"
    missing = ModuleNotFoundError("No module named 'tuf'", name="tuf")
    assert explain(missing, "edge") == "tuf is not installed: pip install 'prunecast[edge]'"


@pytest.mark.engine
def test_simulate_and_report_from_the_command_line(run, tmp_path):
    import numpy as np

    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 120)
    images = rng.random((120, 1, 28, 28), dtype=np.float32) + labels[:, None, None, None]
    np.savez(tmp_path / "data.npz", x=images.astype(np.float32), y=labels)
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(
        'schema = 1\nname = "two"\nrounds = 1\n[data]\nsource = "npz"\npath = "data.npz"\n'
        'held_out = 20\n[partition]\nkind = "iid"\n[clients]\ncount = 2\n'
        '[engine]\nbackend = "inline"\n'
    )
    result = run("simulate", scenario, "--output", tmp_path / "runs", "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert set(document["arms"]) == {"dense", "prunecast"}
    again = run("report", document["folder"])
    assert again.exit_code == 0
    assert "prunecast" in again.stdout
    assert document["folder"] in again.stdout


def test_simulate_imports_a_model_of_the_current_folder(tmp_path, monkeypatch):
    scenario = tmp_path / "own.toml"
    text = (
        'schema = 1\nname = "own"\nrounds = 1\n[model]\nfactory = "ournet:make"\n'
        '[arms.dense]\nkind = "dense"\n'
    )
    scenario.write_text(text)
    (tmp_path / "ournet.py").write_text(
        "from torch import nn\n\n"
        "def make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))\n"
    )
    command = [sys.executable, "-m", "prunecast.cli", "simulate", "--check", "own.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    scenario.write_text(text.replace("ournet:make", "nobody:make"))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode in (1, 2)
    assert "model.factory" in done.stderr
    assert "Traceback" not in done.stderr

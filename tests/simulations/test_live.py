"""What other tools are told of a run while it goes on."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAvg
from tensorboardX.proto.event_pb2 import Event
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.server.federation import Run, read_events
from prunecast.simulations.kinds import ScenarioError
from prunecast.simulations.live import LOGGERS, Logger, LoggerMissing, Told, loggers_of
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, initial_arrays, make_app, to_record


def scalars(path: Path) -> dict[str, dict[int, float]]:
    """What an event file of TensorBoard holds, by tag and step: TFRecords of protocol buffers."""
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found.setdefault(value.tag, {})[event.step] = value.simple_value
        at += 16 + length
    return found


def federation(tmp_path: Path, told: Any, rounds: int = 2) -> Path:
    folder = tmp_path / "digits"
    measured = iter([0.1, 0.4, 0.8])
    run = Run(
        InProcessGrid(make_app(tmp_path / "store"), 2, run_id=RUN_ID),
        FedAvg(),
        policy="small",
        folder=folder,
        name="small",
        seed=5,
        evaluate_fn=lambda number, arrays: MetricRecord({"accuracy": next(measured)}),
        on_event=told,
    )
    run.start(to_record(initial_arrays()), num_rounds=rounds)
    return folder


def test_tensorboard_reads_what_the_events_say(tmp_path: Path) -> None:
    with Told(loggers_of(["tensorboard"]), tmp_path / "digits") as told:
        folder = federation(tmp_path, told)
    [path] = (folder / "tensorboard" / "small-seed-5").iterdir()
    found = scalars(path)
    rounds = [e for e in read_events(folder / "events.jsonl") if e["event"] == "round-finished"]
    assert [found["accuracy"][e["round"]] for e in rounds] == pytest.approx([0.1, 0.4, 0.8])
    for name in ("bytes_up", "bytes_down", "sparsity", "seconds"):
        assert found[name] == pytest.approx({e["round"]: e[name] for e in rounds}, rel=1e-6)
    assert found["norm"].keys() == {1, 2}  # of the clients' own evaluation


class Notes(Logger):
    """Keeps what it is told; fails when it is told to."""

    package = "json"

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.fails, self.told = fails, list[tuple[Any, ...]]()

    def note(self, *what: Any) -> None:
        self.told.append(what)
        if what[0] == self.fails:
            raise OSError("no route to host")

    def begin(self, folder, name, settings) -> None:
        self.note("begin", name, settings["seed"], settings["policy.down"])

    def tell(self, number, values) -> None:
        self.note("tell", number, values["accuracy"])

    def end(self, failed) -> None:
        self.note("end", failed)


def test_a_tool_hears_every_run_begin_and_end(tmp_path: Path) -> None:
    notes = Notes()
    with Told([notes], tmp_path) as told:
        federation(tmp_path, told)
    rounds = [("tell", number, value) for number, value in enumerate((0.1, 0.4, 0.8))]
    assert notes.told == [("begin", "small-seed-5", 5, "lattice"), *rounds, ("end", False)]


def test_a_run_that_is_cut_off_ends_as_failed(tmp_path: Path) -> None:
    notes = Notes()
    started = {"event": "run-started", "name": "small", "seed": 1, "policy": {"down": "dense"}}
    with Told([notes], tmp_path) as told:
        told(started)
    assert notes.told[-1] == ("end", True)
    with Told([notes], tmp_path) as told:
        told(started)
        told({"event": "run-failed", "reason": "x"})
    assert notes.told.count(("end", True)) == 2


@pytest.mark.parametrize("fails", ["begin", "tell", "end"])
def test_a_tool_that_fails_is_left_out_and_the_training_goes_on(tmp_path, caplog, fails) -> None:
    broken, whole = Notes(fails), Notes()
    with Told([broken, whole], tmp_path) as told:
        folder = federation(tmp_path, told)
    assert [kind for kind, *_ in broken.told][-1] == fails
    assert len(whole.told) == 5
    *_, last = read_events(folder / "events.jsonl")
    assert last["event"] == "run-finished"
    warned = [r.getMessage() for r in caplog.records if r.name == "prunecast"]
    assert warned == ["json is told no more: OSError: no route to host"]


@pytest.mark.parametrize("name", LOGGERS)
def test_a_tool_that_is_missing_is_named_with_its_command(monkeypatch, name) -> None:
    package = LOGGERS[name].package
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(LoggerMissing, match=f"{package} is missing: pip install {package}"):
        loggers_of([name])


def test_the_command_line_names_tools_before_anything_runs(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    arguments = ["--output", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, ["simulate", "demo", *arguments, "--log", "wandb"])
    assert (result.exit_code, result.output) == (
        1,
        "error: wandb is missing: pip install wandb\n",
    )
    result = CliRunner().invoke(app, ["demo", *arguments, "--log", "tensorbord"])
    assert result.exit_code == 2
    assert "--log" in result.output
    assert "choose one of mlflow, tensorboard, wandb" in result.output
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ScenarioError):
        loggers_of(["visdom"])


def test_settings_are_readable_text_in_every_tool(tmp_path: Path) -> None:
    notes: list[str] = []

    class Settings(Notes):
        def begin(self, folder, name, settings) -> None:
            notes.append(json.dumps(settings))

    with Told([Settings()], tmp_path) as told:
        federation(tmp_path, told, rounds=1)
    assert json.loads(notes[0])["strategy"] == "FedAvg"

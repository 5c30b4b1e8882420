"""Registries: a kind is a file, or a class of one's own; and tasks other than classification."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from prunecast.server.federation import Policy
from prunecast.simulations.arms import ARMS, Arm
from prunecast.simulations.data import DATA, DataError, DataSource, Examples, load_examples
from prunecast.simulations.kinds import Registry, ScenarioError, written
from prunecast.simulations.partitions import PARTITIONS, Partition
from prunecast.simulations.report import render_page, study_of, write_report
from prunecast.simulations.runner.prepared import PreparedRun, prepare
from prunecast.simulations.runner.run import new_run_folder, run_scenario
from prunecast.simulations.scenarios import scenario_from_mapping
from prunecast.simulations.tasks import TASKS

KINDS: list[tuple[Registry[Any], list[str]]] = [
    (ARMS, ["dense", "majority-vote", "masks", "nncodec", "prunecast", "recoded", "scheme"]),
    (DATA, ["flower-datasets", "function", "idx", "mnist-5k", "named", "npz", "synthetic"]),
    (PARTITIONS, ["dirichlet", "flower", "iid", "natural", "niid-bench"]),
    (
        TASKS,
        ["classification", "function", "positions", "rating", "reconstruction", "regression"],
    ),
]


@dataclass(frozen=True)
class Lossless(Arm):
    """An arm of the user's own, with a key."""

    floor: float = 0.0

    publishes = True

    def grid_policy(self) -> Policy:
        return Policy.preset("lossless")

    def text(self) -> str:
        return f"floor {self.floor}"


@dataclass(frozen=True)
class Alternating(Partition):
    """A partition of the user's own that no library draws."""

    def split(self, groups: Any, *, clients: int, seed: int) -> list[Any]:
        return [np.arange(first, len(groups), clients) for first in range(clients)]


@dataclass(frozen=True)
class Waves(DataSource):
    """Two inputs of different dtypes, and a number to estimate."""

    count: int = 360

    def read(self) -> Examples:
        rng = np.random.default_rng(2)
        place = rng.random((self.count, 3), dtype=np.float32)
        octave = rng.integers(0, 3, self.count)
        return Examples({"place": place, "octave": octave}, place.sum(1) * (octave + 1))


class Estimator(nn.Module):
    """Of two inputs, the second one an index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 16)
        self.first = nn.Linear(3, 16)
        self.last = nn.Linear(16, 1)

    def forward(self, place: torch.Tensor, octave: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(place) * self.table(octave)))


def regression(**release: Any) -> dict[str, Any]:
    mapping: dict[str, Any] = {
        "schema": 1,
        "name": "waves",
        "rounds": 3,
        "data": {"source": f"{__name__}:Waves", "held_out": 60},
        "partition": {"alpha": 1.0, "min_size": 5},
        "task": {"kind": "regression", "loss": "huber"},
        "clients": {"count": 3},
        "model": {"factory": f"{__name__}:Estimator"},
        "training": {"batch_size": 16, "device": "cpu", "epochs": 4},
        "engine": {"backend": "inline"},
        "arms": {"dense": {"kind": "dense"}, "prunecast": {"preset": "balanced"}},
    }
    return {**mapping, "release": release} if release else mapping


@pytest.mark.parametrize(("registry", "names"), KINDS)
def test_every_module_is_a_kind(registry, names):
    assert registry.names() == names
    for name in names:
        assert registry.find(name).kind() == name
        made = registry.make(name)
        assert registry.read(written(made), "x") == made


def test_classes_of_the_users_own_take_part(tiny, tmp_path):
    tiny["partition"] = {"kind": f"{__name__}:Alternating"}
    tiny["arms"] = {"dense": {"kind": "dense"}}
    tiny["arms"]["mine"] = {"kind": f"{__name__}:Lossless", "floor": 0.5}
    scenario = scenario_from_mapping({**tiny, "rounds": 1})
    assert scenario_from_mapping(scenario.to_mapping()) == scenario
    assert scenario.publishing_arms() == {"mine": Lossless(0.5)}
    prepared = prepare(scenario, tmp_path)
    assert prepared.sizes == (60, 60, 60)
    assert PreparedRun.open(tmp_path) == prepared
    folder = new_run_folder(tmp_path, "mine")
    result = run_scenario(scenario, folder)
    mine = result["arms"]["mine"]
    assert (mine["kind"], mine["floor"]) == (f"{__name__}:Lossless", 0.5)
    assert mine["published"]
    assert mine["reduction"] > 1.0
    assert (folder / "ledger.jsonl").is_file()
    page = render_page([study_of(result)])
    assert "floor 0.5" in page
    assert f"{__name__}:Alternating" in page


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (f"{__name__}:Nothing", "has no 'Nothing'"),
        (f"{__name__}:Waves", "is no Arm; derive prunecast.simulations.arms.Arm"),
        ("nowhere:Arm", "no module 'nowhere'"),
        (3, "choose one of dense"),
    ],
)
def test_classes_that_cannot_be_used_are_named(tiny, kind, said):
    tiny["arms"] = {"mine": {"kind": kind}}
    with pytest.raises(ScenarioError, match=said) as caught:
        scenario_from_mapping(tiny)
    assert caught.value.key == "arms.mine.kind"


def test_an_arm_that_sends_whole_models_publishes_nothing(tiny):
    policy = {"policy": {"down": "dense", "up": "stc"}}
    tiny["arms"] = {"down": policy, "both": {"preset": "dense"}, "ours": {"preset": "small"}}
    assert list(scenario_from_mapping(tiny).publishing_arms()) == ["ours"]


def test_partitioners_of_flower_datasets_are_named():
    labels = np.arange(400) % 10
    spec = PARTITIONS.make("flower", options={"num_classes_per_partition": 2})
    parts = spec.split(labels, clients=10, seed=1)
    assert {len(set(labels[part].tolist())) for part in parts} == {2}
    assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
    for wrong in ({"name": "LuckyPartitioner"}, {"options": {"speed": 1}}):
        with pytest.raises(DataError, match=r"change partition\.name, partition\.options"):
            PARTITIONS.make("flower", **wrong).split(labels, clients=10, seed=1)


def test_inputs_keep_their_dtype_and_number(tmp_path):
    path = tmp_path / "two.npz"
    place, octave = np.random.default_rng(0).random((20, 2)), np.arange(20) % 3
    np.savez(path, place=place, octave=octave, height=place.sum(1))
    keys = {"path": str(path), "inputs": ["place", "octave"], "targets": "height", "held_out": 5}
    source = DATA.read({"source": "npz", "dtype": "stored", **keys}, "data")
    training, held_out = load_examples(source, TASKS.make("regression"), seed=1)
    assert list(training.inputs) == ["place", "octave"]
    assert [v.dtype for v in training.inputs.values()] == [place.dtype, octave.dtype]
    assert (training.targets.shape, training.targets.dtype) == ((15, 1), np.float32)
    held_out.save(tmp_path / "saved.npz")
    again = Examples.load(tmp_path / "saved.npz")
    assert list(again.inputs) == list(held_out.inputs)
    for name, values in held_out.inputs.items():
        assert again.inputs[name].tobytes() == values.tobytes()
    converted = DATA.read({"source": "npz", **keys}, "data").read()
    assert {v.dtype for v in converted.inputs.values()} == {np.dtype(np.float32)}


def test_answers_of_numbers_are_compared_with_a_tolerance():
    task = TASKS.make("regression", tolerance=0.01)
    server = np.array([[1.0], [-2.0], [0.0]], dtype=np.float32)
    device = server + np.array([[0.019], [0.021], [0.0]], dtype=np.float32)
    assert task.different(server, device).tolist() == [1]
    assert task.different(server, np.full_like(server, np.nan)).tolist() == [0, 1, 2]
    assert task.score(device, server) == pytest.approx(0.04 / 3, rel=1e-4)
    groups = task.groups(np.arange(100, dtype=np.float32)[:, None])
    assert np.bincount(groups).tolist() == [10] * 10
    with pytest.raises(DataError, match="finite numbers"):
        task.targets(np.array([1.0, np.inf]))


@pytest.mark.engine
def test_a_regression_of_two_inputs_reaches_the_device(tmp_path):
    scenario = scenario_from_mapping(regression(name="waves", every=2, metric="mae"))
    folder = new_run_folder(tmp_path, "waves")
    events: list[Any] = []
    result = run_scenario(scenario, folder, on_event=events.append)
    dense, ours = result["arms"]["dense"], result["arms"]["prunecast"]
    for arm in (dense, ours):
        assert arm["rounds"][-1]["mae"] == arm["mae"] < 0.5 * arm["rounds"][0]["mae"]
        assert "accuracy" not in arm
    release = result["release"]
    assert release["published_mae"] == ours["mae"]
    assert release["device_mae"] == pytest.approx(ours["mae"], rel=1e-4)
    assert release["identical_examples"] == release["examples"] == 60
    assert [made["round"] for made in release["automatic"]] == [2]
    assert release["automatic"][0]["metrics"]["mae"] == ours["rounds"][2]["mae"]
    figure, page = write_report(folder, result)
    assert figure.stat().st_size > 1000
    assert "estimated 60 of 60 held-out examples" in page.read_text()
    assert any(event.get("score") == f"{ours['mae']:.4g}" for event in events)


def test_a_device_reads_examples_and_tasks_without_torch():
    import subprocess

    code = (
        "import sys\n"
        "from prunecast.simulations.tasks import TASKS\n"
        "import prunecast.simulations.data\n"
        "[TASKS.make(name) for name in TASKS.names()]\n"
        "assert not {'torch', 'flwr'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])

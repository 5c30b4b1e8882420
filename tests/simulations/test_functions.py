"""Data and tasks of the user's own by ``module:function``, and data through flwr-datasets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prunecast.simulations.data import DATA, DataError, Examples
from prunecast.simulations.kinds import ScenarioError
from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.prepared import prepare
from prunecast.simulations.runner.run import check_scenario
from prunecast.simulations.scenarios import scenario_from_mapping
from prunecast.simulations.tasks import TASKS

Arrays = tuple[Any, ...]


def points(count: int = 120, classes: int = 3) -> Arrays:
    """Points around a corner for each class, and who measured them."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, count)
    corners = np.eye(classes, 4, dtype=np.float32)
    return corners[labels] + rng.normal(0, 0.1, (count, 4)).astype("f4"), labels, labels % 2


def later_points(count: int = 120, classes: int = 3) -> Examples:
    inputs, labels, _ = points(40, classes)
    return Examples({"x": inputs}, labels)


def broken(**options: Any) -> Arrays:
    raise RuntimeError("no sensor")


def lonely() -> NDArray[Any]:
    return np.zeros(3)


def named_by_text() -> Arrays:
    return {"x": np.zeros((2, 3), "f4")}, np.zeros(2, int), np.array(["a", "b"])


def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.multi_margin_loss(outputs, targets)


def least_recall(outputs: NDArray[Any], targets: NDArray[Any]) -> float:
    right = outputs.argmax(1) == targets
    return min(float(right[targets == label].mean()) for label in np.unique(targets))


def network() -> torch.nn.Module:
    return torch.nn.Linear(4, 3)


def scenario(**tables: Any) -> dict[str, Any]:
    task = {"kind": "function", "loss": f"{__name__}:loss"}
    task |= {"score_function": f"{__name__}:least_recall", "metric": "recall", "unit": "fraction"}
    return {
        "schema": 1,
        "rounds": 3,
        "data": {"source": "function", "function": f"{__name__}:points", "held_out": 30},
        "partition": {"kind": "natural"},
        "task": task,
        "clients": {"count": 2},
        "model": {"factory": f"{__name__}:network"},
        "training": {"batch_size": 8, "epochs": 3, "device": "cpu"},
        "engine": {"backend": "inline"},
        "arms": {"dense": {"kind": "dense"}},
        **tables,
    }


def test_data_and_task_by_function_are_trained_and_measured(tmp_path: Path) -> None:
    chosen = scenario_from_mapping(scenario())
    assert scenario_from_mapping(chosen.to_mapping()) == chosen
    assert (chosen.task.metric, chosen.task.percent, chosen.task.lower_is_better) == (
        "recall", True, False
    )  # fmt: skip
    prepared = prepare(chosen, tmp_path, check_scenario(chosen))
    [dense] = run_arms(InProcessGrid(simulated_client(prepared), 2), prepared, lambda event: None)
    recalls = [row["recall"] for row in dense["rounds"]]
    assert recalls[-1] == 1.0 > recalls[0]
    assert dense["rounds"][-1]["loss"] < dense["rounds"][0]["loss"]


def test_a_function_gives_inputs_targets_and_identities() -> None:
    source = DATA.make("function", function=f"{__name__}:points", options={"count": 7})
    found = source.read()
    inputs, targets, whose = points(7)
    assert found.inputs["x"].tobytes() == inputs.tobytes()
    assert (found.targets.tolist(), found.identities.tolist()) == (targets.tolist(), whose.tolist())
    assert source.read_test() is None
    apart = DATA.make("function", function=f"{__name__}:points", test=f"{__name__}:later_points")
    assert len(apart.read_test()) == 40


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "broken",
            r"data\.function: .*:broken fails \(RuntimeError: no sensor\): correct it, or data",
        ),
        ("lonely", r"data\.function: .*:lonely returns a ndarray, not \(inputs, targets\) or"),
        ("named_by_text", r"identities of .*:named_by_text are <U1, not whole numbers: numpy\.uni"),
        ("nothing", r"data\.function: module .* has no 'nothing'; name a function"),
    ],
)
def test_what_a_function_returns_that_cannot_be_used_is_said(name: str, says: str) -> None:
    with pytest.raises((DataError, ScenarioError), match=says):
        DATA.make("function", function=f"{__name__}:{name}").read()


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"data": {"source": "function"}}, r"data\.function: is missing; .*name it as package"),
        ({"task": {"kind": "function", "metric": "loss"}}, r"task\.metric: is 'loss'; use a-z"),
        ({"task": {"kind": "function"}}, r"task\.loss: is missing; .*name it as package"),
        (
            {"task": {"kind": "function", "loss": "torch:nothing"}},
            r"task\.loss: module 'torch' has no 'nothing'; name a function",
        ),
        ({"data": {"source": "flower-datasets"}}, r"data\.name: is missing; .*ylecun/mnist"),
        (
            {"data": {"source": "flower-datasets", "name": "x/y", "inputs": []}},
            r"data\.inputs: names no column; name at least one",
        ),
    ],
)
def test_what_is_missing_is_said_before_anything_trains(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        check_scenario(scenario_from_mapping(scenario(**tables)))


def test_a_task_by_function_groups_and_compares() -> None:
    task = TASKS.make("function", loss=f"{__name__}:loss", score_function=f"{__name__}:loss")
    assert task.targets(np.array([3, 5], np.uint8)).dtype == np.int64
    assert task.targets(np.array([[0.5]])).dtype == np.float32
    assert task.groups(np.array([7, 2, 7])).tolist() == [1, 0, 1]
    assert sorted(set(task.groups(np.arange(20.0, dtype="f4")).tolist())) == list(range(10))
    server = np.array([[10.0, 0.0], [1.0, 1.0]], np.float32)
    assert task.different(server, np.add(server, [[1e-4, 0], [0, 0.1]])).tolist() == [1]
    with pytest.raises(DataError, match="targets must be finite numbers"):
        task.targets(np.array([np.inf]))


# -- through flwr-datasets ------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that `datasets` reads as it reads the Hub, which cannot be reached."""
    import datasets
    import huggingface_hub.constants
    from PIL import Image

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "0")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "photo": datasets.Image(),
            "label": datasets.ClassLabel(names=["even", "odd"]),
            "user": datasets.Value("string"),
            "row": datasets.Sequence(datasets.Value("float64")),
        }
    )
    folder = tmp_path / "pictures"
    folder.mkdir()
    for split, count in (("train", 6), ("test", 2)):
        grey = [np.full((4, 5), 51 * n, np.uint8) for n in range(count)]
        rows = {
            "image": [Image.fromarray(values) for values in grey],
            "photo": [Image.fromarray(np.stack([values] * 3, -1)) for values in grey],
            "label": [n % 2 for n in range(count)],
            "user": [("ann", "zoe", "bob")[n % 3] for n in range(count)],
            "row": [[0.5] * (1 + n % 2) for n in range(count)],
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_columns_are_read_through_flwr_datasets(stored: Path) -> None:
    made = {"inputs": ("image", "photo"), "identity": "user"}
    source = DATA.make("flower-datasets", name=stored.name, **made).located(stored.parent)
    found = source.read()
    assert {name: values.shape for name, values in found.inputs.items()} == {
        "image": (6, 1, 4, 5), "photo": (6, 3, 4, 5)
    }  # fmt: skip
    np.testing.assert_allclose(found.inputs["image"][:, 0, 0, 0], np.arange(6) / 5, rtol=1e-6)
    assert found.inputs["photo"].dtype == np.float32
    assert found.targets.tolist() == [0, 1] * 3
    assert found.identities.tolist() == [0, 2, 1] * 2  # ann, zoe, bob
    assert len(source.read_test()) == 2


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"name": "nobody/nothing"},
            r"^'nobody/nothing' \(train\) cannot be loaded .*: without a netw",
        ),
        (
            {"split": "dev"},
            r"\(dev\) cannot be loaded by flwr-datasets .*mend data\.name, data\.sub",
        ),
        ({"targets": "y"}, r"has no column 'y', it has 'image', .*: name them by data\.inputs"),
        ({"inputs": ("row",)}, r"column 'row' of .* has examples of different sizes"),
    ],
)
def test_what_flwr_datasets_cannot_load_is_told_in_a_line(
    stored: Path, keys: dict[str, Any], says: str
) -> None:
    with pytest.raises(DataError, match=says) as caught:
        DATA.make("flower-datasets", **{"name": str(stored), **keys}).read()
    assert "\n" not in str(caught.value)


def test_only_a_source_that_fetches_leaves_the_network_on(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    data = {"source": "flower-datasets", "name": str(stored), "split": "dev"}
    with pytest.raises(DataError, match="flwr-datasets"):
        check_scenario(scenario_from_mapping(scenario(data=data)))
    assert "HF_HUB_OFFLINE" not in os.environ
    with pytest.raises(DataError, match="identities cannot be spread"):
        check_scenario(scenario_from_mapping(scenario(clients={"count": 3})))
    assert os.environ["HF_HUB_OFFLINE"] == "1"

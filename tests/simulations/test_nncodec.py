"""NNCodec as an arm: where it is not installed one line says so; where it is, it trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunecast.server.federation import Ledger
from prunecast.simulations.arms import ARMS, nncodec
from prunecast.simulations.arms.nncodec import Nncodec, coded, decoded, step_of
from prunecast.simulations.comparison import Comparison
from prunecast.simulations.kinds import ScenarioError
from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.prepared import prepare
from prunecast.simulations.runner.run import check_scenario
from prunecast.simulations.scenarios import scenario_from_mapping

installed = pytest.mark.skipif(bool(Nncodec.missing()), reason=Nncodec.missing())
ROUNDS = 4


def normalised() -> torch.nn.Module:
    """A network with running statistics, and a counter of batches."""
    first, last = torch.nn.Linear(784, 16, bias=False), torch.nn.Linear(16, 3)
    return torch.nn.Sequential(torch.nn.Flatten(), first, torch.nn.BatchNorm1d(16), last)


@pytest.mark.parametrize("module", ["nncodec.nothing.at_all", "json.nothing"])
def test_where_it_is_not_installed_a_line_says_how_to(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setattr(nncodec, "_EXTENSION", module)
    scenario = scenario_from_mapping({**tiny, "arms": {"nnc": {"kind": "nncodec"}}})
    with pytest.raises(
        ScenarioError, match=r"^arms\.nnc: is not installed; pip install --no-deps nnc"
    ):
        check_scenario(scenario)
    compared = Comparison.of(scenario_from_mapping(tiny))
    assert "nncodec" not in compared.arms
    assert list(compared.left_out) == ["nncodec"]
    assert compared.left_out["nncodec"].startswith("pip install --no-deps nncodec==2.1.3")
    with pytest.raises(ScenarioError, match=r"arms\.nncodec: is not installed; pip install"):
        Comparison.of(scenario_from_mapping(tiny), names=["dense", "nncodec"])


def test_steps_follow_from_the_parameter() -> None:
    assert [step_of(qp) for qp in (0, -1, -2, -3, -4)] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert step_of(-26) == 0.01171875
    arm = ARMS.make("nncodec", qp=-4, nonweight_qp=-8)
    arrays = {
        "w": np.array([[0.6, -0.2]], np.float32),
        "b": np.array([0.6, 1e30], np.float32),
        "count": np.array(3),
    }
    whole = arm.integers(arrays)
    assert {name: q.tolist() for name, q in whole.items()} == {"w": [[1, 0]], "b": [2, 2**31 - 1]}
    assert arm.floats(whole)["w"].tolist() == [[0.5, 0.0]]


@installed
def test_integers_come_back_as_they_were() -> None:
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        "kernel": rng.integers(-3, 4, (4, 3, 2, 2)),
        "rows": rng.integers(-900, 900, (5, 7)) * (np.arange(5) % 2)[:, None],
        "vector": rng.integers(-(2**20), 2**20, 9),
        "number": 7,
        "nothing": np.zeros((0, 3)),
        "zeros": np.zeros((3, 3)),
    }
    integers = {name: np.asarray(value, np.int32) for name, value in values.items()}
    stream = coded(integers)
    assert stream.dtype == np.uint8
    found = decoded(stream, {name: q.shape for name, q in integers.items()})
    for name, q in integers.items():
        np.testing.assert_array_equal(found[name], q, err_msg=name)


@installed
def test_a_federation_learns_and_who_missed_a_round_gets_the_whole_model(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    mapping = {**tiny, "rounds": ROUNDS, "clients": {"count": 3, "fraction": 0.67}}
    mapping["model"] = {"factory": f"{__name__}:normalised", "initial": "drawn"}
    mapping["partition"] = {"kind": "iid"}
    mapping["arms"] = {"dense": {"kind": "dense"}, "nnc": {"kind": "nncodec", "qp": -30}}
    scenario = scenario_from_mapping(mapping)
    prepared = prepare(scenario, tmp_path, check_scenario(scenario))
    grid = InProcessGrid(simulated_client(prepared), 3)
    dense, nnc = run_arms(grid, prepared, lambda event: None)
    assert nnc["rounds"][-1]["loss"] < nnc["rounds"][0]["loss"]
    for way in ("up", "down"):
        assert nnc["rounds"][-1][f"bytes_{way}"] < 0.4 * dense["rounds"][-1][f"bytes_{way}"]
    down = [e for e in Ledger.read(prepared.ledger("nnc")) if e.direction == "down"]
    assert len(down) == 2 * ROUNDS
    by_round: dict[int, list[Any]] = {}
    for number, entry in enumerate(down):
        by_round.setdefault(number // 2, []).append(entry)
    for number in range(1, ROUNDS):
        sizes = {e.node: e.payload_bytes for e in by_round[number]}
        before = {e.node for e in by_round[number - 1]}
        stayed = [size for node, size in sizes.items() if node in before]
        missed = [size for node, size in sizes.items() if node not in before]
        assert all(one != other for one in stayed for other in missed)


@installed
def test_clients_hold_what_is_measured(tiny: dict[str, Any], tmp_path: Path) -> None:
    """With steps that lose next to nothing, the arm is the dense one."""
    mapping = {**tiny, "rounds": 2, "model": {"factory": f"{__name__}:normalised"}}
    mapping["partition"] = {"kind": "iid"}
    fine = {"kind": "nncodec", "qp": -90, "nonweight_qp": -90}
    mapping["arms"] = {"dense": {"kind": "dense"}, "nnc": fine}
    scenario = scenario_from_mapping(mapping)
    prepared = prepare(scenario, tmp_path, check_scenario(scenario))
    dense, nnc = run_arms(
        InProcessGrid(simulated_client(prepared), 3), prepared, lambda event: None
    )
    for one, other in zip(dense["rounds"], nnc["rounds"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)

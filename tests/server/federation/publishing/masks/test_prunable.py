"""Models that cannot be pruned as their policy asks: refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import nn

from prunecast.server.federation import Policy, PolicyError, Run, server_app
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, initial_arrays, make_app, to_arrays, to_record

LARGEST = r"its largest matrix or kernel, 'fc.weight',"
# knobs, and the line that they are refused with; the largest matrix has 2,560 elements
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "below the least size": (
        {"sparsity": 0.8, "pruning_min_size": 5000},
        r"prunecast.sparsity \(policy sparsity\) = 0.8, and nothing of the model can be pruned: "
        rf"{LARGEST} has 2560 elements, below prunecast.pruning-min-size = 5000; lower that, or "
        r"set prunecast.sparsity = 0.0$",
    ),
    "excluded": (
        {"sparsity": 0.8, "pruning_exclude": ("*",)},
        rf"{LARGEST} is named by prunecast.pruning-exclude; name less there",
    ),
    "a pattern and nothing to prune": (
        {"pruning_pattern": "2:4", "pruning_min_size": 5000},
        r"prunecast.pruning-pattern .* = '2:4', .*, or set prunecast.pruning-pattern = ''$",
    ),
    "automatic and nothing to prune": (
        {"pruning_schedule": "automatic", "pruning_min_size": 5000},
        r"prunecast.pruning-schedule .* = 'automatic', .* prunecast.pruning-schedule = 'cubic'$",
    ),
    "another record": (
        {"sparsity": 0.8, "pruning_records": ("weights",)},
        r"prunecast.pruning-records .* = \('weights',\), and the model's record is 'arrays'.*name "
        "it there",
    ),
    "a pattern that does not divide": (
        {"pruning_pattern": "2:7"},
        r"the pattern does not divide 'fc.weight' of shape \[64, 40\].*exclude",
    ),
    "a layer that would vanish": (
        {"sparsity": 0.9999, "pruning_scope": "global", "pruning_min_size": 1},
        "layers such as 'conv.weight' would vanish: lower it, or exclude them",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_run_is_refused_and_leaves_nothing(what: str, tmp_path: Path) -> None:
    knobs, line = REFUSED[what]
    seen: list[Any] = []
    inner = InProcessGrid(make_app(tmp_path / "store", seen), 2, run_id=RUN_ID)
    policy = Policy(pruning_begin=1, pruning_end=3, **knobs)
    run = Run(inner, FedAvg(), policy=policy, folder=tmp_path / "run")
    with pytest.raises(PolicyError, match=line) as raised:
        run.start(to_record(initial_arrays()), num_rounds=4)
    assert "\n" not in str(raised.value)
    assert seen == []
    assert not (tmp_path / "run").exists()


def test_a_sparsity_of_one_is_no_policy() -> None:
    with pytest.raises(PolicyError, match=r"prunecast.sparsity .* = 1.0: .* below 1$"):
        Policy(sparsity=1.0)


def test_a_grid_alone_refuses_with_the_first_message(federation: Any) -> None:
    policy = Policy(sparsity=0.8, pruning_min_size=5000, pruning_begin=1, pruning_end=3)
    grid, _, seen = federation(policy)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    with pytest.raises(PolicyError, match="nothing of the model can be pruned"):
        grid.push_messages([Message(content, 1, "train")])
    assert seen == []


def test_a_model_with_nothing_to_prune_is_fine_where_nobody_asks(federation: Any) -> None:
    grid, _, seen = federation(Policy(pruning_min_size=5000))
    arrays = to_record(initial_arrays())
    FedAvg(fraction_evaluate=0.0).start(grid=grid, initial_arrays=arrays, num_rounds=1)
    assert seen
    assert to_arrays(arrays)["fc.weight"].all()


def frozen() -> nn.Module:
    """A backbone that nobody trains, with a head too small to be pruned."""
    backbone = nn.Linear(64, 32).requires_grad_(False)
    return nn.Sequential(backbone, nn.Linear(32, 4))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"prunecast.sparsity": 0.8}, "'0.weight', is frozen, so nothing would recover; train it"),
        ({"prunecast.sparsity": 0.8, "prunecast.pruning-min-size": 4000}, "has 2048 elements"),
        ({"prunecast.sparsity": 1.0}, r"prunecast.sparsity .* = 1.0: give the fraction of zeros"),
        ({"prunecast.pruning-pattern": "2:5"}, "is frozen"),
    ],
)
def test_the_ready_server_app_refuses_in_a_line_and_leaves_nothing(
    config: dict[str, Any], line: str, tmp_path: Path
) -> None:
    seen: list[Any] = []
    inner = InProcessGrid(make_app(tmp_path / "store", seen), 2, run_id=RUN_ID)
    whole = {"model": f"{__name__}:frozen", "num-server-rounds": 9, "folder": str(tmp_path / "run")}
    with pytest.raises(PolicyError, match=line):
        server_app.app(inner, Context(RUN_ID, 0, {}, RecordDict(), {**whole, **config}))
    assert seen == []
    assert not (tmp_path / "run").exists()

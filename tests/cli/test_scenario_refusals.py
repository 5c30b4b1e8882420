"""Scenarios that cannot be run: one line that names key and remedy, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from typer.testing import CliRunner

from prunecast.cli.main import app

COUNT = 120
NOT_FINITE = 7  # an example


def arrays(**changes: np.ndarray) -> dict[str, np.ndarray]:
    images = np.random.default_rng(0).random((COUNT, 1, 28, 28), dtype=np.float32)
    return {"x": images, "y": np.arange(COUNT) % 10, **changes}


def images_with(value: float) -> np.ndarray:
    images = arrays()["x"]
    images[NOT_FINITE, 0, 3, 3] = value
    return images


def targets_with(value: float) -> np.ndarray:
    targets = np.arange(COUNT, dtype=np.float32)
    targets[NOT_FINITE] = value
    return targets


SMALL = {"kind": "prunecast", "preset": "small"}


def pruning(**knobs: Any) -> dict[str, Any]:
    """An arm that cannot prune as it should."""
    return {"rounds": 9, "arms": {"a": {"kind": "prunecast", "preset": "balanced",
                                        "policy": knobs}}}  # fmt: skip


FLOWER = {"kind": "flower", "name": "ShardPartitioner"}
# what is wrong, arrays of the file, and the key and the remedy that the line names
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "unknown key": ({"round": 3}, {}, "round: unknown key", "did you mean 'rounds'?"),
    "unknown key of a table": (
        {"training": {"epoch": 1}}, {}, "training.epoch: unknown key", "did you mean 'epochs'?"
    ),
    "unknown key of an arm": (
        {"arms": {"a": {**SMALL, "presets": "x"}}}, {}, "arms.a.presets: ", "did you mean 'preset'"
    ),
    "unknown knob": (
        {"arms": {"a": {**SMALL, "policy": {"up_stride": 3}}}}, {},
        "arms.a: unknown knob 'up_stride'", "choose one of budget_knobs, budget_node,",
    ),
    "missing file": (
        {"data": {"path": "none.npz"}}, {}, "data.path: cannot read the data", "name an .npz file"
    ),
    "missing path": ({"data": {"path": ""}}, {}, "data.path: is missing", "name it"),
    "missing array": (
        {"data": {"targets": "z"}}, {}, "has no array 'z', it holds 'x', 'y'", "data.targets"
    ),
    "data set that is not there": (
        {"data": {"source": "named", "name": "activity", "held_out": 20}}, {},
        "data.name: the data set 'activity' is not here", "prunecast data get activity",
    ),
    "no examples left": (
        {"data": {"held_out": COUNT}}, {}, f"data.held_out = {COUNT}", "lower it"
    ),
    "more clients than examples": (
        {"clients": {"count": 300}}, {}, "100 examples to train on, for 300 clients",
        "lower clients.count or data.held_out",
    ),
    "impossible Dirichlet": (
        {"partition": {"kind": "dirichlet", "alpha": 0.01, "min_size": 40}}, {},
        "100 examples cannot be spread over 4 clients", "lower partition.min_size or clients.count",
    ),
    "impossible shards": (
        {"partition": {**FLOWER, "options": {"num_shards_per_partition": 2, "shard_size": 500}}},
        {}, "cannot be spread", "change partition.name, partition.options or clients.count",
    ),
    "no natural parts": (
        {"partition": {"kind": "natural"}}, {}, "partition.kind = 'natural'", "data.identity"
    ),
    "labels from 1": (
        {}, {"y": np.arange(COUNT) % 10 + 1}, "data.targets: labels reach from 1 to 10",
        "subtract 1 from labels that count from 1",
    ),
    "labels below 0": (
        {}, {"y": np.arange(COUNT) % 10 - 1}, "data.targets: labels count from 0", "add 1"
    ),
    "NaN in inputs": (
        {}, {"x": images_with(np.nan)}, f"data.inputs: input 'x' holds NaN in 1 of {COUNT}",
        f"the first is example {NOT_FINITE}: fill them in, or leave those examples out",
    ),
    "NaN in targets": (
        {"task": {"kind": "regression"}}, {"y": targets_with(np.nan)},
        f"data.targets: targets hold NaN in 1 of {COUNT}", "leave those examples out",
    ),
    "NaN among labels": (
        {}, {"y": targets_with(np.nan)}, "data.targets: targets hold NaN in 1 of", "fill them in"
    ),
    "infinity": ({}, {"x": images_with(np.inf)}, "data.inputs: ", "replace it"),
    "lengths that differ": (
        {}, {"y": np.arange(90) % 10}, f"data.inputs: there are {COUNT} of input 'x', but 90",
        "give each example one of both",
    ),
    "zero clients": ({"clients": {"count": 0}}, {}, "clients.count: is 0", "at least 1"),
    "no clients in a round": (
        {"clients": {"count": 4, "fraction": 0.0}}, {}, "clients.fraction: is 0.0", "above 0"
    ),
    "more clients in a round than there are": (
        {"strategy": {"name": "fedavg", "options": {"min_train_nodes": 9}}}, {},
        "strategy.options.min_train_nodes: is 9, and there are 4 clients", "lower it, or raise",
    ),
    "zero rounds": ({"rounds": 0}, {}, "rounds: is 0", "at least 1"),
    "nothing to train": ({"arms": {}}, {}, "arms: nothing is trained", "add an arm of kind"),
    "unknown network": ({"network": {"profile": "2g"}}, {}, "network.profile: ", "choose one of"),
    "sparsity of one": (
        pruning(sparsity=1.0), {}, "arms.a: prunecast.sparsity (policy sparsity) = 1.0",
        "below 1",
    ),
    "nothing to prune": (
        pruning(sparsity=0.9, pruning_min_size=10**7), {},
        "arms.a: prunecast.sparsity (policy sparsity) = 0.9, and nothing of the model can be",
        "below prunecast.pruning-min-size = 10000000; lower that, or set prunecast.sparsity = 0.0",
    ),
    "all of it excluded": (
        pruning(sparsity=0.9, pruning_exclude=["*"]), {}, "prunecast.pruning-exclude", "name less"
    ),
    "all of it frozen": (
        {**pruning(sparsity=0.9), "model": {"factory": "support.networks:frozen"}}, {},
        "'1.weight', is frozen", "train it",
    ),
    "a pattern that does not divide": (
        pruning(pruning_pattern="2:5"), {}, "arms.a: the model cannot be pruned as the policy says",
        "exclude what it does not divide",
    ),
    "layers that would vanish": (
        pruning(sparsity=0.999999, pruning_scope="global"), {}, "arms.a: the model cannot be",
        "would vanish: lower it, or exclude them",
    ),
    "channels that go too late": (
        pruning(channels=0.5, channels_at=[9]), {}, "arms.a: channels go after round 9 of 9",
        "set prunecast.channels-at to earlier rounds",
    ),
    "channels of a module that cannot lose any": (
        {**pruning(channels=0.5, channels_at=[2]), "model": {"factory": "support.networks:frozen"}},
        {}, "arms.a: Sequential has no channels that could be removed", "channels",
    ),
    "channels to be tried of a module that cannot lose any": (
        {**pruning(pruning_schedule="automatic", pruning_knobs=["channels"]),
         "model": {"factory": "support.networks:frozen"}},
        {}, "arms.a: Sequential has no channels that could be removed", "channels",
    ),
    "device answers that fail to compare": (
        {"task": {"kind": "support.incomparable:Fails"}, "release": {"name": "m"}}, {},
        "task.kind: support.incomparable:Fails cannot compare what a device answers (no idea)",
        "mend its method `different`, or leave out [release]",
    ),
    "device answers that are never the same": (
        {"task": {"kind": "support.incomparable:NeverTheSame"}, "release": {"name": "m"}}, {},
        "task.kind: support.incomparable:NeverTheSame finds", "mend its method `different`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_scenario_is_refused_in_a_line(what: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    changes, changed, key, remedy = BAD[what]
    np.savez(tmp_path / "data.npz", **arrays(**changed))
    data = {"source": "npz", "path": "data.npz", "held_out": 20, **changes.get("data", {})}
    if data["source"] != "npz":
        del data["path"]
    scenario = {
        "schema": 1,
        "rounds": 1,
        "clients": {"count": 4},
        "partition": {"kind": "iid"},
        "training": {"device": "cpu"},
        "arms": {"dense": {"kind": "dense"}, "small": SMALL},
        **changes,
        "data": data,
    }
    path = tmp_path / "bad.toml"
    path.write_text(tomli_w.dumps(scenario))
    arguments = ["simulate", str(path), "--output", str(tmp_path / "runs")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code in (1, 2), result.output
    told = result.output.splitlines()
    [line] = [text for text in told if text != "checking the scenario and its data"]
    assert line.startswith("error: ")
    assert key in line
    assert remedy in line
    assert not (tmp_path / "runs").exists()

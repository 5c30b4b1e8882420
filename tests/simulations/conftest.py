"""A tiny scenario on data made up here, without Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of 28 x 28 images: a bright quarter each, under noise."""
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 3, 240)
    images = rng.random((240, 1, 28, 28), dtype=np.float32) * 0.5
    for label, (row, column) in enumerate([(0, 0), (0, 14), (14, 0)]):
        images[labels == label, :, row : row + 14, column : column + 14] += 0.4
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, x=images, y=labels)
    return path


@pytest.fixture
def tiny(digits: Path) -> dict[str, Any]:
    """A scenario as a mapping."""
    return {
        "schema": 1,
        "name": "tiny",
        "seed": 3,
        "rounds": 3,
        "data": {"source": "npz", "path": str(digits), "held_out": 60},
        "partition": {"kind": "dirichlet", "alpha": 1.0, "min_size": 5},
        "clients": {"count": 3},
        "model": {"initial": "drawn"},
        "training": {"batch_size": 16, "device": "cpu"},
        "engine": {"backend": "inline"},
        "arms": {
            "dense": {"kind": "dense"},
            "dense-zstd": {"kind": "recoded", "of": "dense", "level": 3},
            "prunecast": {
                "kind": "prunecast",
                "preset": "small",
                "policy": {"pruning_begin": 1, "pruning_end": 3, "sparsity": 0.8},
            },
        },
    }


def finished_run(mapping: dict[str, Any], folder: Path) -> Path:
    """What `run_scenario` leaves, without a process of its own."""
    from prunecast.simulations.runner.federate import run_arms, simulated_client
    from prunecast.simulations.runner.inprocess import InProcessGrid
    from prunecast.simulations.runner.prepared import prepare
    from prunecast.simulations.runner.run import SCENARIO, build_arms
    from prunecast.simulations.scenarios import save_scenario, scenario_from_mapping

    scenario = scenario_from_mapping(mapping)
    prepared = prepare(scenario, folder)
    grid = InProcessGrid(simulated_client(prepared), num_nodes=scenario.clients.count)
    outcomes = run_arms(grid, prepared, lambda event: None)
    task = {key: getattr(scenario.task, key) for key in ("metric", "percent", "lower_is_better")}
    document = {
        "schema": 2,
        "scenario": scenario.to_mapping(),
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 1.0,
        "task": {**task, "verb": "classified"},
        "data": {
            "partition": "by label",
            "held_out": 60,
            "per_client": list(prepared.sizes),
        },
        "arms": build_arms(prepared, outcomes),
        "release": None,
    }
    shutil.rmtree(prepared.work)
    (folder / "result.json").write_text(json.dumps(document))
    save_scenario(scenario, folder / SCENARIO)
    return folder


@pytest.fixture(scope="session")
def folders(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two seeds of three arms; one client in three rests in every round."""
    where = tmp_path_factory.mktemp("runs")
    policy = {"pruning_begin": 1, "pruning_end": 3, "sparsity": 0.8}
    found = []
    for seed in (3, 4):
        mapping = {
            "schema": 1,
            "name": "tiny",
            "seed": seed,
            "rounds": 4,
            "data": {"source": "npz", "path": str(digits), "held_out": 60},
            "partition": {"kind": "iid"},
            "clients": {"count": 3, "fraction": 0.67},
            "training": {"batch_size": 16, "device": "cpu"},
            "engine": {"backend": "inline"},
            "arms": {
                "dense": {"kind": "dense"},
                "dense-zstd": {"kind": "recoded", "of": "dense", "level": 3},
                "ours": {"kind": "prunecast", "preset": "small", "policy": policy},
            },
        }
        found.append(finished_run(mapping, where / f"run-{seed}"))
    return found


@pytest.fixture(name="finished_run")
def _finished_run() -> Callable[[dict[str, Any], Path], Path]:
    """Runs a scenario into a folder."""
    return finished_run

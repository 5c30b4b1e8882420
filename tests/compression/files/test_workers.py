"""Pruning on a Ray cluster: the same bytes as here, errors as here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prunecast.compression.files import CannotPrune
from prunecast.compression.files.checkpoints import open_checkpoint
from prunecast.compression.files.formats import write_tensors
from prunecast.compression.files.pruning import Pruning, prune_checkpoint
from prunecast.compression.files.tensors import FileTensor
from prunecast.compression.files.workers import ClusterUnavailable, ray_cluster
from prunecast.compression.files.zeroing import default_targets

pytestmark = pytest.mark.engine


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "m.safetensors"
    tensors = {
        f"w{i}": FileTensor(np.round(rng.normal(size=(300, 200 + i)), 2).astype("f4"), "float32")
        for i in range(5)
    }
    write_tensors(path, tensors)
    return path


def test_two_machines_write_what_one_process_writes(
    checkpoint: Path, tmp_path: Path, two_machines: Any
) -> None:
    source = open_checkpoint(checkpoint)
    with ray_cluster(two_machines.address) as run:
        for how in ({"allocation": "global"}, {"allocation": "lamp"}, {"pattern": "2:4"}):
            given = Pruning(0.5, exclude=("w1", "w2", "w3") if "pattern" in how else (), **how)
            files = []
            for name, options in (("here", {}), ("there", {"run": run})):
                targets = default_targets(source, tmp_path / f"{name}.safetensors")
                prune_checkpoint(source, targets, given, **options)
                files.append([targets.files[source.path.name], targets.masks])
            for here, there in zip(*files, strict=True):
                assert here.read_bytes() == there.read_bytes()
        broken = tmp_path / "broken.safetensors"
        write_tensors(broken, {"w": FileTensor(np.full((40, 40), np.nan, "f4"), "float32")})
        with pytest.raises(CannotPrune, match="'w' holds NaN or an infinity"):
            prune_checkpoint(
                open_checkpoint(broken),
                default_targets(open_checkpoint(broken)),
                Pruning(0.5),
                run=run,
            )
    assert not list(tmp_path.glob(".*"))


def test_no_cluster_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # not "auto", which finds the cluster of whatever other test has one on this machine
    with (
        pytest.raises(ClusterUnavailable, match="no Ray cluster answers at"),
        ray_cluster("127.0.0.1:1"),
    ):
        pass

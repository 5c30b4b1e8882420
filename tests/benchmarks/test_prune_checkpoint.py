"""The benchmark of pruned checkpoints, at 8 MB: it measures a process of its own and checks it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.prune_checkpoint import layers, main, make
from prunecast.compression.files.checkpoints import open_checkpoint


@pytest.mark.parametrize("shards", [1, 3])
def test_a_checkpoint_of_about_that_size_is_made(tmp_path: Path, shards: int) -> None:
    path = make(tmp_path, 1_000_000, "bfloat16", shards, 64)
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.files) == (1 if shards == 1 else 4)
    shapes = {t.name: t.spec.shape for t in checkpoint.tensors}
    assert shapes == dict(layers(1_000_000, "bfloat16", 64))
    assert 1_000_000 <= sum(t.spec.nbytes for t in checkpoint.tensors) < 1_200_000


def test_it_is_pruned_within_the_memory_that_is_stated(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    assert main(["--smoke", "--folder", str(tmp_path), "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["removed"] == found["zeros"] == int(0.9 * found["prunable"])
    assert 20e6 < found["peak_memory_bytes"] < found["memory_bound_bytes"] < 300e6
    assert list(tmp_path.iterdir()) == [figures]
    with pytest.raises(RuntimeError, match="allow more with --memory"):
        main(["--smoke", "--memory-gigabytes", "0.1", "--folder", str(tmp_path)])

"""Parts of the patch benchmark that its figures rest on."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "delivery"


def _module(name: str) -> ModuleType:
    spec = spec_from_file_location(f"delivery_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


def test_chunks_join_to_the_data_and_have_the_stated_sizes() -> None:
    pytest.importorskip("zstandard")
    chunks = _module("chunks")
    for data in (b"", b"a", _bytes(5000), bytes(200_000), _bytes(2_000_000)):
        cut = chunks.chunks(data)
        assert b"".join(cut) == data
        assert all(chunks._LEAST <= len(c) <= chunks._MOST for c in cut[:-1])
    sizes = [len(c) for c in chunks.chunks(_bytes(4_000_000))]
    assert 12_000 < np.mean(sizes) < 26_000


def test_an_insertion_moves_few_boundaries() -> None:
    pytest.importorskip("zstandard")
    chunks = _module("chunks")
    old = _bytes(1_000_000)
    new = old[:400_000] + b"inserted" + old[400_000:]
    patch = chunks.create(old, new)
    assert chunks.apply(old, patch) == new
    assert len(patch) < 100_000
    assert chunks.apply(b"", chunks.create(b"", new)) == new


def test_differences_come_back_and_the_mask_helps() -> None:
    plain = _module("plain")
    rng = np.random.default_rng(1)
    held = rng.integers(1, 256, 20_000, np.uint8) * (rng.random(20_000) < 0.1)
    new = held + rng.integers(0, 2, 20_000, np.uint8) * (held != 0)
    new[7] += 200
    old, wanted = held.astype(np.uint8).tobytes(), new.astype(np.uint8).tobytes()
    whole, masked = plain.create(old, wanted), plain.create_masked(old, wanted)
    assert plain.apply(old, whole) == wanted
    assert plain.apply_masked(old, masked) == wanted
    assert len(masked) < len(whole)


def test_a_moved_mask_keeps_its_size() -> None:
    rounds = _module("rounds")
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((64, 64)).astype(np.float32), "b": np.ones(3, np.float32)}
    masks = rounds.largest(weights, 0.1)
    assert list(masks) == ["w"]
    assert masks["w"].sum() == round(0.1 * 64 * 64)
    free = {k: v + rng.standard_normal(v.shape).astype(np.float32) / 2 for k, v in weights.items()}
    moved = rounds.moved(free, masks, 0.03)
    assert moved["w"].sum() == masks["w"].sum()
    assert (moved["w"] & ~masks["w"]).sum() == round(0.03 * masks["w"].sum())


def test_rounds_come_back_by_case(tmp_path: Path) -> None:
    rounds = _module("rounds")
    names = ("dense.0", "dense.1", "pruned.0", "pruned.1", "moved.1")
    path = rounds.path_of(tmp_path, 3)
    rounds.save(path, {f"{n}/w": np.full(2, i, np.float32) for i, n in enumerate(names)})
    found = {case: (a["w"][0], b["w"][0]) for case, (a, b) in rounds.load(path).items()}
    assert list(found.values()) == [(0, 1), (2, 3), (2, 4)]
    assert tuple(found) == rounds.CASES

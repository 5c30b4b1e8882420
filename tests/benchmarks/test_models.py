"""The models that the benchmark trains: the same every time, and what the cases take them for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("mlxtend")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def harness() -> Iterator[SimpleNamespace]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        names = ("cases", "store", "training.federated", "training.tasks", "training.networks")
        modules = {n.rpartition(".")[2]: importlib.import_module(f"harness.{n}") for n in names}
        patch.setattr(modules["federated"], "DENSE_ROUNDS", 2)
        patch.setattr(modules["federated"], "PRUNED_ROUNDS", 7)
        yield SimpleNamespace(**modules)


@pytest.fixture(scope="module")
def trained(harness: SimpleNamespace) -> dict[str, Any]:
    return train(harness)


def train(harness: SimpleNamespace) -> dict[str, Any]:
    task = harness.tasks.Digits(harness.networks.lenet, rate=0.1, steps=1, batch=8)
    task.held_out = task.held_out[:20]
    said: list[str] = []
    found: dict[str, Any] = harness.federated.train(task, 0, lambda what, score: said.append(what))
    assert len(said) == 2 + 7
    return found


def test_the_same_seed_gives_the_same_tensors(
    harness: SimpleNamespace, trained: dict[str, Any]
) -> None:
    again = train(harness)
    assert list(again) == list(trained)
    assert all(again[k].tobytes() == v.tobytes() for k, v in trained.items())


def test_cases_are_what_they_say(
    harness: SimpleNamespace, trained: dict[str, Any], tmp_path: Path
) -> None:
    assert "lenet" in harness.store.missing(tmp_path)
    harness.store.save(tmp_path, "lenet", trained)
    assert "lenet" not in harness.store.missing(tmp_path)
    cases = {
        c.name.removeprefix("lenet/"): c
        for c in harness.cases.all_cases(trained=tmp_path, own=None, wanted=["lenet/"])
    }
    assert {c.kind for c in cases.values()} == set(harness.cases.KINDS)
    for case in cases.values():
        assert case.parameters == 44_246
        assert any(v.any() for v in case.tensors.values()), case.name

    pruned = [q for q in cases["pruned-late"].tensors.values() if q.size >= 1024 and q.ndim > 1]
    kept = sum(int(np.count_nonzero(q)) for q in pruned) / sum(q.size for q in pruned)
    assert 0.05 < kept <= 0.1 + 1e-3
    for name in ("masked-mid", "masked-late", "masked-only-late"):
        case = cases[name]
        for tensor, mask in case.context.mask.items():
            assert not case.tensors[tensor][~mask].any()
    held = cases["delta-late"].context.previous
    following = cases["pruned-late"].tensors
    for tensor, moved in cases["delta-late"].tensors.items():
        assert (held[tensor] + moved == following[tensor]).all()


def test_only_rows_that_were_met_move_in_the_recommender(harness: SimpleNamespace) -> None:
    task = harness.tasks.Recommender(clients=harness.tasks.CLIENTS, users=20, steps=3, batch=8)
    torch.manual_seed(0)
    model = task.build()
    before = model.items.weight.detach().numpy().copy()
    optimiser, rng = task.optimiser(model), np.random.default_rng(0)
    for _ in range(task.steps):
        optimiser.zero_grad()
        task.loss(model, 0, rng).backward()
        optimiser.step()
    moved = (model.items.weight.detach().numpy() != before).any(1)
    seen = np.zeros(len(moved), bool)
    seen[task.seen[0].ravel()] = True
    assert 0 < moved.sum() < 1000
    # besides items of this client's users, only the random ones it was compared with
    assert (moved & ~seen).sum() <= task.steps * task.batch

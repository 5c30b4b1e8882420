"""RigL and FedDST in a federation: clients vote, masks move where they say, bytes are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import (
    compression_mod,
    contribute_statistics,
    current_masks,
    wanted_statistics,
)
from prunecast.server.federation import Checkpoint, Policy, PolicyError
from prunecast.server.federation.publishing.publisher import Publisher
from support.federation import initial_arrays, seed_of, to_arrays, to_record

POLICY = {
    "sparsity": 0.8, "pruning_schedule": "static", "pruning_min_size": 1000,
    "pruning_interval": 3, "pruning_end": 10,
}  # fmt: skip


def app(store: Path, seen: list[Any]) -> ClientApp:
    """Trains a bias alone, and would grow the first column; of the second, nodes disagree."""
    client = ClientApp(mods=[compression_mod(store)])

    @client.train()
    def train(message: Message, context: Context) -> Message:
        arrays = to_arrays(message.content["arrays"])
        seen.append((context.node_id, wanted_statistics(), current_masks(), arrays))
        for name in wanted_statistics():
            gradient = np.full(arrays["fc.weight"].shape, 1e-3 * context.node_id)
            gradient[:, 0] = 1.0  # all want to go down here
            gradient[:, 1] = 5.0 if context.node_id == 1 else -5.0  # of which nothing is left
            contribute_statistics(name, {"fc.weight": gradient, "bn.running_mean": np.ones(16)})
        rng = np.random.default_rng(seed_of(message, context))
        arrays["fc.bias"] = rng.normal(size=64).astype(np.float32)  # another version every round
        content = RecordDict({"arrays": to_record(arrays)})
        content["metrics"] = MetricRecord({"num-examples": 1})
        return Message(content, reply_to=message)

    return client


@pytest.fixture
def run(federation: Any, tmp_path: Path) -> Any:
    def start(rounds: int = 8, **knobs: Any) -> tuple[Any, list[Any]]:
        seen: list[Any] = []
        client = app(tmp_path / "growing", seen)
        grid, _, _ = federation(Policy(**{**POLICY, **knobs}), nodes=2, app=client)
        FedAvg(fraction_evaluate=0.0).start(
            grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=rounds
        )
        return grid, [(wanted, masks, arrays) for node, wanted, masks, arrays in seen if node == 1]

    return start


@pytest.mark.parametrize(("rule", "statistic"), [("rigl", "growth"), ("feddst", "votes")])
def test_masks_move_every_few_rounds_to_where_clients_vote(
    rule: str, statistic: str, run: Any
) -> None:
    grid, rounds = run(pruning_masks=rule)
    asked = [n for n, (wanted, _, _) in enumerate(rounds, start=1) if wanted]
    assert asked == [3, 6]
    assert rounds[2][0] == (statistic,)
    masks = [masks["fc.weight"] for _, masks, _ in rounds]
    kept = masks[0].sum()
    assert kept == 2560 - int(0.8 * 2560)
    for number in range(2, 9):
        before, after = masks[number - 2], masks[number - 1]
        assert after.sum() == kept
        grown = after & ~before
        if number in (4, 7):
            share = 0.15 * (1 + np.cos(np.pi * number / 10))
            most = int(np.ceil(share * kept))
            assert grown.sum() <= most
            assert not grown[:, 1].any()  # votes against each other
            assert grown[:, 0].sum() > 10 or number == 7  # of so few that all votes cancel
            model = rounds[number - 1][2]["fc.weight"]
            # against the gradient, and no further than the lattice has to
            down = model[grown & (np.arange(40) == 0)]
            assert (down == -np.abs(model[model != 0]).min()).all()
        else:
            assert not grown.any()
    events = [e for e in grid.pruned() if e["what"] == "moved"]
    assert [e["grown"] for e in events] == [int((masks[n] & ~masks[n - 1]).sum()) for n in (3, 6)]


def test_what_votes_cost_is_counted_and_is_little(run: Any) -> None:
    grid, _ = run(pruning_masks="feddst", rounds=6)
    up = {
        n: [e for e in grid.ledger.entries if e.direction == "up" and e.round == n]
        for n in range(1, 7)
    }
    voted, silent = up[3][0], up[4][0]
    assert voted.payload_bytes > silent.payload_bytes + 20
    assert voted.payload_bytes < silent.payload_bytes + 2560 / 8
    assert abs(voted.dense_bytes - silent.dense_bytes) < 100  # plain Flower has no such record


def test_nothing_moves_where_nobody_votes_and_they_are_asked_again(federation: Any) -> None:
    grid, _, _ = federation(Policy(**POLICY, pruning_masks="rigl"))
    publisher = grid._streams.stream(grid.run.run_id, "arrays")
    wanted, rng = [], np.random.default_rng(1)
    models = []
    for _ in range(9):
        master = {n: a + rng.normal(size=a.shape).astype("f4") for n, a in initial_arrays().items()}
        models.append(publisher.publish(master).model.masks()["fc.weight"])
        wanted.append([name.partition("@")[0] for name in publisher.wanted])
    assert wanted == [[], [], *[["growth"]] * 6, []]  # nothing moves from round 10 on
    assert all((mask == models[0]).all() for mask in models)


def test_tied_weights_move_as_one() -> None:
    """Nodes vote under the first of their names; a draw would drop others under the second."""
    policy = Policy(**POLICY, pruning_masks="rigl", pruning_criterion="random")
    publisher, rng = Publisher(policy, b"s", policy.pruning()), np.random.default_rng(3)
    masks = []
    for version in range(4):
        table = rng.normal(size=(40, 40)).astype("f4")
        votes = {"growth": {"tokens": rng.normal(size=(40, 40)).astype("f4")}} if version else {}
        model = publisher.publish({"tokens": table, "head": table.copy()}, votes).model
        masks.append(model.masks())
        assert (masks[-1]["tokens"] == masks[-1]["head"]).all()
        assert (model.arrays()["tokens"] == model.arrays()["head"]).all()
    assert any((mask["tokens"] != masks[0]["tokens"]).any() for mask in masks)


def test_moves_go_on_after_a_resume(federation: Any, tmp_path: Path) -> None:
    policy = Policy(**POLICY, pruning_masks="rigl", hysteresis=0.5)
    rng = np.random.default_rng(2)
    given = [
        {n: rng.normal(size=a.shape).astype("f4") for n, a in initial_arrays().items()}
        for _ in range(8)
    ]
    votes = [{"growth": {"fc.weight": rng.normal(size=(64, 40)).astype("f4")}} for _ in range(8)]
    whole, first, second = (Publisher(policy, b"s", policy.pruning()) for _ in range(3))
    expected = [whole.publish(m, v).model for m, v in zip(given, votes, strict=True)]
    for at in range(5):
        made = first.publish(given[at], votes[at])
    path = tmp_path / "c.safetensors"
    Checkpoint(made.master, *first.position).save(path)
    held = Checkpoint.load(path)
    second.resume(held.counter, held.steps, held.clock, held.progress, held.masks, held.searched)
    found = [second.publish(held.arrays).model]
    found += [second.publish(m, v).model for m, v in zip(given[5:], votes[5:], strict=True)]
    for one, other in zip(found, expected[4:], strict=True):
        assert all((a == other.arrays()[n]).all() for n, a in one.arrays().items())


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"pruning_interval": 0}, "pruning-interval.*1 or more"),
        ({"pruning_regrow": 0.0}, r"pruning-regrow.*up to 0\.5"),
        ({"pruning_regrow": 0.6}, r"pruning-regrow.*up to 0\.5"),
        ({"pruning_pattern": "2:4", "sparsity": 0.5}, "single weights move"),
    ],
)
def test_what_cannot_be_moved_is_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        Policy(**{**POLICY, "pruning_masks": "rigl", **knobs})

"""What the publisher prunes: the same versions as ever by default, others by another criterion."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import compression_mod, contribute_statistics, wanted_statistics
from prunecast.compression.flower import payload_of, payload_record
from prunecast.compression.pruning.criteria import CRITERIA
from prunecast.compression.pruning.statistics import pack_statistics
from prunecast.compression.versions import LatticeTensor
from prunecast.server.federation import CompressedGrid, NonFiniteModel, Policy, PolicyError
from prunecast.server.federation.policy import _say_once
from prunecast.server.federation.publishing.publisher import Publisher
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import (
    RUN_ID,
    initial_arrays,
    local_step,
    make_app,
    seed_of,
    to_arrays,
    to_record,
)

pytestmark = pytest.mark.usefixtures("unpacked")  # they look into messages

SHAPES: dict[str, tuple[tuple[int, ...], str]] = {
    "conv.weight": ((16, 3, 5, 5), "f4"),
    "fc.weight": ((40, 64), "f8"),
    "emb": ((70, 16), "f2"),
    "tied.weight": ((32, 48), "f4"),
    "head.weight": ((10, 40), "f4"),
    "fc.bias": ((64,), "f4"),
    "running_mean": ((16,), "f4"),
}
BALANCED = {"pruning_begin": 0, "pruning_end": 3, "pruning_min_size": 400}


def masters(count: int) -> Iterator[dict[str, np.ndarray]]:
    """Weights that drift, of all float widths, made of integers so that every machine has them."""
    rng = np.random.default_rng(24)
    start = {n: rng.integers(-3000, 3001, shape) for n, (shape, _) in SHAPES.items()}
    start["tied.weight"] //= 1000  # seven magnitudes: ties decide
    for version in range(count):
        yield {
            name: (
                values * (1 + version * rng.integers(-40, 41, values.shape) / 200) / 4096
            ).astype(SHAPES[name][1])
            for name, values in start.items()
        }


SPARSE = {"sparsity": 0.9, "pruning_begin": 1, "pruning_end": 4}


@pytest.mark.parametrize(
    ("preset", "knobs", "models", "masks"),
    [
        (
            "small",
            {**SPARSE, "pruning_exclude": ("tied.*",)},
            "b40c23232eb367634dd065573d82191c",
            "e8527dfcbb90eeb70cb3c20078853d02",
        ),
        (  # emptied "tied.weight" then; now one weight of it stays, and one less of another
            "small",
            SPARSE,
            "0ab202e231bf2f8702a7f356114fbd35",
            "50d278822951f61e020f0df495607e21",
        ),
        (
            "balanced",
            {**BALANCED, "sparsity": 0.75, "pruning_exclude": ("head.*",)},
            "a6ef31683bfe4c3629db0d91dc266ab4",
            "5c958fdac233253e164b233c96243dbb",
        ),
        (
            "balanced",
            {},
            "33fd95b628f042a9e6a4f05c343e59ee",
            "e3b0c44298fc1c149afbf4c8996fb924",
        ),
        (  # less than one weight of each tensor: all are kept, and yet the tensors count as pruned
            "balanced",
            {"sparsity": 0.0005, "pruning_begin": 0, "pruning_end": 2},
            "9198f3bea46d59f23c578a2220c9acbe",
            "ac97615475bd849aa0fa616e4e9a7db9",
        ),
    ],
)
def test_versions_are_those_of_the_code_before_there_were_plans(
    preset: str, knobs: dict[str, Any], models: str, masks: str
) -> None:
    """Digests written down from magnitude pruning as it was wired into the publisher.

    But for the case that says otherwise.
    """
    then = {"down_step": 0.1, "vector_step": 0.025, "hysteresis": 0.5, "pruning_align": False}
    policy = Policy.preset(preset, statistics_bits=0, **{**then, **knobs})
    publisher = Publisher(policy, b"s", policy.pruning())
    found, pruned = hashlib.sha256(), hashlib.sha256()
    for master in masters(6):
        model = publisher.publish(master).model
        found.update(model.digest)
        for name, mask in model.masks().items():
            pruned.update(name.encode() + np.packbits(mask).tobytes())
    assert (pruned.hexdigest()[:32], found.hexdigest()[:32]) == (masks, models)


# -- the clock -----------------------------------------------------------------------------------

CLOCKED = {"sparsity": 0.8, "pruning_begin": 1, "pruning_end": 9, "pruning_min_size": 100}


def grid_of(tmp_path: Path, nodes: int = 2, **knobs: Any) -> CompressedGrid:
    inner = InProcessGrid(make_app(tmp_path), nodes, run_id=RUN_ID)
    return CompressedGrid(inner, Policy.preset("balanced", **CLOCKED, **knobs), poll_interval=0.01)


def message(seed: int, node: int = 1, server_round: int = 0, kind: str = "train") -> Message:
    content = RecordDict({"arrays": to_record(initial_arrays(seed))})
    if server_round:
        content["config"] = ConfigRecord({"server-round": server_round})
    return Message(content, node, kind)


def sparsities(grid: CompressedGrid) -> list[float]:
    """Of the versions that the one stream knows, in their order, as a schedule states them."""
    (publisher,) = grid._streams._streams.values()
    return [
        1 - float(m.masks()["fc.weight"].mean()) if m.masks() else 0.0
        for m in map(publisher.history.get, publisher.history)
    ]


def schedule(*rounds: int) -> Any:
    return pytest.approx([Policy(**CLOCKED).pruning().schedule(r) for r in rounds], abs=0.03)


def test_models_of_several_widths_are_of_one_round(tmp_path: Path) -> None:
    """As of HeteroFL: every class of devices gets a content of its own."""
    grid = grid_of(tmp_path, nodes=6)
    for server_round in (1, 2, 3):
        classes = [(10 * server_round + node // 2, node) for node in range(6)]
        batch = [message(seed, node + 1, server_round) for seed, node in classes]
        assert not any(reply.has_error() for reply in grid.send_and_receive(batch))
    assert sparsities(grid) == schedule(1, 1, 1, 2, 2, 2, 3, 3, 3)


def test_what_a_round_arrived_at_is_the_model_that_the_next_one_trains(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    for seed, server_round, kind in ((0, 4, "train"), (1, 4, "evaluate"), (1, 5, "train")):
        list(grid.send_and_receive([message(seed, 1, server_round, kind)]))
    assert grid.published(to_record(initial_arrays(2))).counter == 3
    assert sparsities(grid) == schedule(4, 5, 6)


def test_rounds_may_be_skipped_and_never_go_back(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    for seed, server_round in enumerate((1, 7, 3, 8)):
        list(grid.send_and_receive([message(seed, 1, server_round)]))
    assert sparsities(grid) == schedule(1, 7, 7, 8)


def test_an_asynchronous_loop_states_its_rounds_by_hand(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A new model after every reply is no round."""
    grid = grid_of(tmp_path)
    for seed in range(6):
        grid.begin_round(1 + seed // 3)
        list(grid.send_and_receive([message(seed, 1 + seed % 2)]))
    assert sparsities(grid) == schedule(1, 1, 1, 2, 2, 2)
    assert "states its round" not in caplog.text


def test_without_rounds_every_batch_is_one_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = grid_of(tmp_path, nodes=4)
    for number in range(3):
        batch = [message(2 * number + node // 2, node + 1) for node in range(4)]
        list(grid.send_and_receive(batch))
    assert sparsities(grid) == schedule(1, 1, 2, 2, 3, 3)
    assert caplog.text.count("No message states its round") == 1
    assert "begin_round" in caplog.text


@pytest.mark.parametrize(("rounds", "said"), [(3, "0%"), (12, "57%"), (24, None), (40, None)])
def test_a_schedule_that_cannot_end_is_named_once(
    caplog: pytest.LogCaptureFixture, rounds: int, said: str | None
) -> None:
    _say_once.cache_clear()
    config = {"prunecast.preset": "small", "prunecast.pruning-end": 25, "num-server-rounds": rounds}
    policy = Policy.from_run_config(config)
    policy.check_rounds(rounds)
    assert caplog.text.count("Pruning ends in round 25") == (said is not None)
    if said is not None:
        assert "prunecast.pruning-end" in caplog.text
        assert "instead of 80%" in caplog.text
        reached = policy.pruning().schedule(rounds + 1)
        assert f"will have {reached:.0%} of zeros" in caplog.text


@pytest.mark.parametrize(("rounds", "said"), [(3, 1), (7, 1), (8, 0), (50, 0)])
def test_a_run_of_few_rounds_prunes_nothing_and_says_so(
    caplog: pytest.LogCaptureFixture, rounds: int, said: int
) -> None:
    _say_once.cache_clear()
    policy = Policy.preset("small")
    policy.check_rounds(rounds)
    assert caplog.text.count(f"{rounds} rounds are too few to prune") == said
    assert caplog.text.count("train 8 or more") == said
    reached = policy.pruning(rounds).schedule(rounds + 1)
    assert reached == (0.0 if said else pytest.approx(0.8))


@pytest.mark.parametrize(("end", "said"), [(25, 1), (2, 0)])
def test_a_grid_used_alone_says_it_too(
    federation: Any, caplog: pytest.LogCaptureFixture, end: int, said: int
) -> None:
    """A ServerApp of one's own: how many rounds there are is what `start` is given."""
    _say_once.cache_clear()
    policy = Policy.preset("small", pruning_begin=1, pruning_end=end)
    grid, _, _ = federation(policy, nodes=2)
    FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2
    )
    assert caplog.text.count(f"Pruning ends in round {end}, after the last of 2") == said


def test_lora_alone_is_no_model_to_prune() -> None:
    rng = np.random.default_rng(0)
    factors = {
        "q.lora_A.weight": rng.normal(size=(8, 256)).astype(np.float32) / 16,
        "q.lora_B.weight": rng.normal(size=(256, 8)).astype(np.float32) / 500,
    }
    policy = Policy.preset("small", pruning_begin=0, pruning_end=1)
    with pytest.raises(PolicyError, match=r"a low-rank factor; set prunecast.pruning-adapters ="):
        Publisher(policy, b"s", policy.pruning()).publish(factors)
    unpruned = Policy.preset("small", sparsity=0.0)
    publisher = Publisher(unpruned, b"s", unpruned.pruning())
    sent = publisher.publish(factors).model.arrays()
    a, b = factors.values()
    sent_a, sent_b = sent.values()
    error = np.linalg.norm(sent_b @ sent_a - b @ a) / np.linalg.norm(b @ a)
    assert error < 0.05
    asked = Policy.preset("small", pruning_begin=0, pruning_end=1, pruning_adapters=True)
    model = Publisher(asked, b"s", asked.pruning()).publish(factors).model
    assert model.sparsity() == pytest.approx(0.8, abs=0.01)


# -- what cannot lie on a lattice -----------------------------------------------------------------


def test_averaged_integers_are_integers_again() -> None:
    publisher = Publisher(Policy(), b"s")
    first = {"n": np.int64(0), "m": np.array([True, False]), "k": np.arange(3, dtype=np.uint8)}
    publisher.publish({n: np.asarray(a) for n, a in first.items()})
    averaged = {"n": np.float64(2.6), "m": np.array([0.7, 0.2]), "k": np.array([0.0, 1.4, 254.6])}
    version = publisher.publish({n: np.asarray(a) for n, a in averaged.items()})
    for arrays in (version.model.arrays(), version.master):
        assert [a.dtype.name for a in arrays.values()] == ["int64", "bool", "uint8"]
        assert [a.tolist() for a in arrays.values()] == [3, [True, False], [0, 1, 255]]
    outside = publisher.publish({**first, "k": np.array([0.0, 1.0, 300.0])})
    assert outside.model.arrays()["k"].tolist() == [0.0, 1.0, 300.0]  # rather than another value


@pytest.mark.parametrize("preset", ["lossless", "balanced", "small"])
def test_infinity_that_belongs_there_travels_exactly(preset: str) -> None:
    publisher = Publisher(Policy.preset(preset), b"s")
    mask = np.triu(np.full((16, 16), -np.inf, np.float32), 1)
    master = {
        "fc.weight": np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8),
        "attn.mask": mask,
        "observer.min_val": np.array(np.inf, np.float32),
        "bn.running_var": np.array([1, np.inf], np.float32),
    }
    for step in range(3):
        master = {**master, "fc.weight": master["fc.weight"] + np.float32(0.01 * step)}
        sent = publisher.publish(master).model.arrays()
        for name in ("attn.mask", "observer.min_val", "bn.running_var"):
            assert sent[name].tobytes() == master[name].tobytes()
    master["observer.min_val"] = np.array(-1, np.float32)
    master["attn.mask"] = np.zeros_like(mask)
    publisher.publish(master)
    diverged = {**master, "fc.weight": master["fc.weight"] * np.float32(np.inf)}
    with pytest.raises(NonFiniteModel, match=r"'fc\.weight'.*diverged"):
        publisher.publish(diverged)


@pytest.mark.parametrize(
    "values", [[123456] * 3, [1e12, 1e12], [3e37] * 2, [np.finfo("f4").max] * 2]
)
def test_what_no_lattice_holds_travels_exactly_by_itself(values: list[float]) -> None:
    publisher = Publisher(Policy(), b"s")
    odd = np.array(values, np.float32)
    weight = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    for scale in (1, 0.5):
        sent = publisher.publish({"odd": odd * np.float32(scale), "w": weight}).model
        assert sent.arrays()["odd"].tobytes() == (odd * np.float32(scale)).tobytes()
        assert isinstance(sent["w"], LatticeTensor)


def test_a_tensor_that_leaves_its_lattice_needs_no_keyframe(tmp_path: Path) -> None:
    grid = grid_of(tmp_path)
    for number, value in enumerate((1.0, 1e12, 1.1e12), start=1):
        arrays = {**initial_arrays(), "fc.bias": np.full(64, value, np.float32)}
        content = RecordDict(
            {"arrays": to_record(arrays), "config": ConfigRecord({"server-round": number})}
        )
        (reply,) = grid.send_and_receive([Message(content, 1, "evaluate")])
        assert not reply.has_error()
    down = [e.kind for e in grid.ledger.entries if e.direction == "down"]
    assert down == ["keyframe", "delta", "delta"]


def test_without_a_plan_nothing_is_pruned() -> None:
    publisher = Publisher(Policy.preset("small", pruning_begin=0, pruning_end=1), b"s")
    assert all(not publisher.publish(master).model.masks() for master in masters(2))


def test_taylor_prunes_what_the_last_update_left_alone() -> None:
    policy = Policy.preset(
        "balanced", sparsity=0.5, pruning_criterion="taylor", pruning_begin=0, pruning_end=1
    )
    publisher = Publisher(policy, b"s", policy.pruning())
    first, *_ = masters(1)
    weight = first["fc.weight"] = np.where(first["fc.weight"] == 0, 1.0, first["fc.weight"])
    assert not publisher.publish(first).model.masks()["fc.weight"][np.abs(weight) < 0.1].any()
    small = np.abs(weight) < np.median(np.abs(weight))
    second = {**first, "fc.weight": weight + small}  # only the smaller half moves
    kept = publisher.publish(second).model.masks()["fc.weight"]
    assert np.count_nonzero(kept & small) > 0.95 * np.count_nonzero(small)
    shorter = {**second, "fc.weight": second["fc.weight"][:30]}  # its update is not known
    assert publisher.publish(shorter).model.masks()["fc.weight"].shape == (30, 64)


def test_fisher_prunes_by_the_last_statistics_that_nodes_sent() -> None:
    policy = Policy.preset(
        "balanced", sparsity=0.5, pruning_criterion="fisher", pruning_begin=1, pruning_end=2
    )
    publisher = Publisher(policy, b"s", policy.pruning())
    (master,) = masters(1)
    publisher.publish(master)
    assert publisher.wanted == ("gradient",)
    left = {
        n: np.zeros(a.shape, np.float32) for n, a in publisher.pruner.plan.prunable(master).items()
    }
    for array in left.values():
        array[:, : array.shape[1] // 2] = 1.0
    for statistics in ({"gradient": left}, None):
        kept = publisher.publish(master, statistics).model.masks()["fc.weight"]
        assert kept[:, :32].sum() > 0.95 * 40 * 32
        assert not kept[:, 32:].any()
        assert publisher.wanted == ()
    shorter = {**master, "fc.weight": master["fc.weight"][:30]}  # its statistics are not known
    assert publisher.publish(shorter).model.masks()["fc.weight"].shape == (30, 64)


def weights_of(*shapes: tuple[int, ...], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {f"{at}": rng.normal(size=s).astype(np.float32) for at, s in enumerate(shapes)}


def drifting(start: dict[str, np.ndarray], count: int) -> Iterator[dict[str, np.ndarray]]:
    for version in range(count):
        yield {n: a + np.float32(0.2 * version) * np.sign(a[::-1]) for n, a in start.items()}


@pytest.mark.parametrize("masks", ["dpf", "held"])
@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_published_integers_obey_a_pattern(criterion: str, masks: str) -> None:
    knobs = {"pruning_begin": 1, "pruning_end": 4, "pruning_masks": masks}
    policy = Policy(pruning_pattern="2:4", pruning_criterion=criterion, **knobs)
    assert policy.target == 0.5
    publisher = Publisher(policy, b"s", policy.pruning())
    for master in drifting(weights_of((64, 32), (32, 16, 3, 3)), 6):
        model = publisher.publish(master).model
    for mask in model.masks().values():
        groups = np.moveaxis(mask, 1, -1).reshape(-1, 4).sum(1)
        assert groups.max() == 2  # a kept weight may round to zero, unless masks are held
        assert groups.mean() > 1.9 if masks == "dpf" else (groups == 2).all()


def test_published_integers_obey_blocks() -> None:
    knobs = {"sparsity": 0.75, "pruning_begin": 1, "pruning_end": 3, "pruning_scope": "erk"}
    policy = Policy(pruning_pattern="4x4", **knobs)
    publisher = Publisher(policy, b"s", policy.pruning())
    for master in drifting(weights_of((64, 32), (32, 16, 3, 3)), 4):
        model = publisher.publish(master).model
    found = [mask.reshape(*[n for s in mask.shape[:2] for n in (s // 4, 4)], -1)
             for mask in model.masks().values()]  # fmt: skip
    whole = np.concatenate([blocks.any((1, 3)).ravel() for blocks in found])
    assert whole.mean() == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"pruning_pattern": "2:4"}, "does not divide '1' .*30 input channels .*exclude"),
        ({"sparsity": 0.999, "pruning_scope": "erk", "pruning_min_size": 1}, "would vanish"),
    ],
)
def test_a_model_that_cannot_be_pruned_is_refused_before_anything_is_sent(
    federation: Any, knobs: dict[str, Any], words: str
) -> None:
    grid, _, seen = federation(Policy(pruning_begin=8, pruning_end=9, **knobs))
    shapes = ((64, 32), (64, 30), *[(4, 4)] * 20)
    with pytest.raises(PolicyError, match=f"cannot be pruned as the policy says: .*{words}"):
        list(grid.send_and_receive([Message(
            RecordDict({"arrays": to_record(weights_of(*shapes))}), 1, "train"
        )]))  # fmt: skip
    assert seen == []


def test_tied_weights_that_are_pruned_apart_are_refused_once_they_were_trained() -> None:
    policy = Policy(sparsity=0.5, pruning_end=9, pruning_exclude=("1",))
    for tied in (True, False):
        publisher = Publisher(policy, b"s", policy.pruning())
        first = weights_of((40, 40))
        publisher.publish({**first, "1": first["0"]})  # layers may begin as copies
        moved = {"0": first["0"] + 1, "1": first["0"] + (1 if tied else 2)}
        if tied:
            with pytest.raises(
                PolicyError, match="tied weights would be pruned apart: '1' and '0'"
            ):
                publisher.publish(moved)
        else:
            publisher.publish(moved)


def test_movement_is_summed_over_versions() -> None:
    knobs = {"sparsity": 0.5, "pruning_begin": 3, "pruning_end": 4, "pruning_criterion": "movement"}
    policy = Policy(**knobs)
    publisher = Publisher(policy, b"s", policy.pruning())
    master = weights_of((40, 40))
    up = np.random.default_rng(1).random((40, 40)) < 0.5  # which half moves away from zero
    for _ in range(4):
        model = publisher.publish(master).model
        moved = np.where(up, 1.1, 0.9).astype(np.float32)
        master = {"0": master["0"] * moved}
    kept = model.masks()["0"]
    assert kept[up].mean() > 0.95
    assert kept[~up].mean() < 0.05


def test_snip_asks_once_is_dense_until_then_and_never_changes_its_mind() -> None:
    knobs = {"sparsity": 0.5, "pruning_schedule": "static", "pruning_masks": "dpf"}
    policy = Policy(pruning_criterion="snip", **knobs)
    publisher = Publisher(policy, b"s", policy.pruning())
    master, wanted = weights_of((40, 40)), []
    first, later = (np.random.default_rng(s).normal(size=(40, 40)) for s in (1, 2))
    statistics = [None, first, later, None]
    for found in statistics:
        model = publisher.publish(
            master, {"sensitivity": {"0": found}} if found is not None else {}
        )
        wanted.append(publisher.wanted)
        masks = model.model.masks()
        if not wanted[:-1]:
            assert masks == {}
            continue
        expected = np.abs(first) > np.median(np.abs(first))
        assert (masks["0"] == expected).mean() > 0.98  # a weight near zero may round to it
        master = {"0": master["0"] * 1.5}
    assert wanted == [("sensitivity",), (), (), ()]
    silent = Publisher(policy, b"s", policy.pruning())  # of nodes whose app gives none
    assert not silent.publish(master).model.masks()
    kept = silent.publish(master).model.masks()["0"]
    assert np.abs(master["0"])[kept].min() >= np.abs(master["0"])[~kept].max()


def test_the_documentation_adds_a_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[5] / "docs/pruning.md").read_text(encoding="utf-8")
    monkeypatch.setitem(CRITERIA, "chance", CRITERIA["magnitude"])  # taken away afterwards
    scope: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        exec(block, scope)
    publisher = Publisher(scope["policy"], b"s", scope["policy"].pruning())
    for master in masters(4):
        model = publisher.publish(master).model
    assert 0 < model.sparsity() < 0.1 + publisher.pruner.plan.schedule(4)


def fisher_app(store: Path) -> ClientApp:
    """Trains a little, and measures that the first half of every row is what matters."""
    app = ClientApp(mods=[compression_mod(store)])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = to_arrays(message.content["arrays"])
        asked = wanted_statistics()
        content = RecordDict({"metrics": MetricRecord({"num-examples": context.node_id})})
        content["arrays"] = to_record(local_step(arrays, seed_of(message, context)))
        content["asked"] = ConfigRecord({"names": list(asked)})
        found = {n: np.full(a.shape, 1e-6) for n, a in arrays.items() if a.ndim > 1}
        for array in found.values():
            array[..., : array.shape[-1] // 2] = context.node_id
        contribute_statistics("gradient", found)
        return Message(content, reply_to=message)

    return app


def test_nodes_contribute_what_the_criterion_asks_for(federation, tmp_path):
    policy = Policy.preset(
        "balanced", sparsity=0.5, pruning_criterion="fisher", pruning_begin=1, pruning_end=3
    )
    grid, _, _ = federation(policy, app=fisher_app(tmp_path / "fisher"))
    asked, replies = [], grid.send_and_receive

    def observed(messages, **options):
        found = list(replies(messages, **options))
        asked.extend(list(reply.content["asked"]["names"]) for reply in found)
        assert all("prunecast-statistics" not in reply.content for reply in found)
        return found

    grid.send_and_receive = observed
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=4)
    # while the sparsity of the next version is higher, in versions 1 and 2
    assert asked == [["gradient"]] * 6 + [[]] * 6
    mask = grid.published(result.arrays).masks()["fc.weight"]
    assert mask[:, :20].mean() > 0.9  # the rest lies at zero on the lattice
    assert mask[:, 20:].mean() < 0.05
    (mean,) = grid._streams.stream(RUN_ID, "arrays").pruner._known.values()
    assert mean["fc.weight"][0, 0] == pytest.approx((1 + 4 + 9) / 6, rel=0.1)  # by examples
    replied = [e.dense_bytes for e in grid.ledger.entries if e.direction == "up"]
    assert max(replied) - min(replied) < 100  # plain Flower has no such record


@pytest.mark.parametrize("hostile", ["damaged", "foreign"])
def test_statistics_that_are_none_are_refused_with_their_reply_alone(federation, tmp_path, hostile):
    policy = Policy.preset(
        "balanced", sparsity=0.5, pruning_criterion="fisher", pruning_begin=0, pruning_end=3
    )
    grid, inner, _ = federation(policy, app=fisher_app(tmp_path / "fisher"))

    def spoil(reply):
        if reply.metadata.src_node_id == 2:
            payload = payload_of(reply.content["prunecast-statistics"])[:-20] + bytes(20)
            if hostile == "foreign":
                other = {"gradient": {"fc.weight": np.ones((1 << 11, 1 << 11))}}
                payload = pack_statistics(other)
            reply.content["prunecast-statistics"] = payload_record(payload)
        return reply

    inner.on_reply = spoil
    content = RecordDict({"arrays": to_record(initial_arrays())})
    replies = grid.send_and_receive(
        [Message(content, dst_node_id=node, message_type="train") for node in (1, 2, 3)]
    )
    assert [reply.has_error() for reply in replies] == [False, True, False]
    taken = grid._streams.stream(RUN_ID, "arrays").pruner.statistics.take()
    assert taken["gradient"]["fc.weight"][0, 0] == pytest.approx((1 + 9) / 4, rel=0.1)

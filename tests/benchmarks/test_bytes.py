"""The account of a federation's bytes: sums are exact, seeds are summed up, and runs are kept."""

from __future__ import annotations

import doctest
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bytes as command
from benchmarks.harness import spread, wire
from benchmarks.harness.federation import DataMissing, digest_of, read_images
from benchmarks.loopback.relay import Exchange
from prunecast.simulations.data.mnist_5k import Mnist5k

SMALL = {"kind": "prunecast", "preset": "small", "policy": {}}
DENSE = {"kind": "dense"}
UNSEEN, SEEN = 40, 3


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an mnist.npz of noise, and of images that some client may train on."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (UNSEEN, 28, 28), dtype=np.uint8)
    known = np.rint(255 * Mnist5k(held_out=1000).read().inputs["x"][:, 0]).astype(np.uint8)
    labels = rng.integers(0, 10, UNSEEN + len(known), dtype=np.uint8)
    np.savez(folder / "mnist.npz", x_test=np.concatenate([noise, known]), y_test=labels)
    return folder


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two rounds of the smallest network, measured on the images of the folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRUNECAST_DATA", str(images))
        document = command.scenario("lenet", 2, 1, SMALL)
        return command.train(document, tmp_path_factory.mktemp("run"))


def test_tensors_headers_and_envelopes_sum_to_the_ledger(run: dict[str, Any]) -> None:
    ledger: Counter[tuple[str, str, str]] = Counter()
    for row in run["messages"]:
        ledger[row["direction"], row["kind"], "messages"] += row["messages"]
        ledger[row["direction"], row["kind"], "bytes"] += row["bytes"]
    account: Counter[tuple[str, str, str]] = Counter()
    for part in run["account"]:
        of_tensors = sum(part["tensors"].values())
        account[part["direction"], part["kind"], "messages"] += part["messages"]
        account[part["direction"], part["kind"], "bytes"] += (
            of_tensors + part["headers"] + part["envelope"]
        )
        assert part["payload"] == of_tensors + part["headers"]
        assert min(part["headers"], part["envelope"]) > 0
    assert account == ledger
    assert {(way, kind) for way, kind, _ in account} == {
        ("down", "keyframe"), ("down", "delta"), ("up", "update")
    }  # fmt: skip


def test_every_tensor_of_the_network_is_accounted(run: dict[str, Any]) -> None:
    found = {part["kind"]: part["tensors"] for part in run["account"]}
    layers = {f"{at}.{what}" for at in (0, 3, 7, 9, 11) for what in ("weight", "bias")}
    assert found["keyframe"] == {}
    assert set(found["delta"]) == layers
    assert set(found["update"]) <= layers
    for kind in ("delta", "update"):
        assert max(found[kind], key=lambda name: found[kind][name]) == "7.weight"  # the largest


def test_accuracy_is_that_on_images_nobody_trains_on(run: dict[str, Any]) -> None:
    held_out = 1000  # images of the data that are not trained on, and thus unseen as well
    assert run["examples"] == UNSEEN + held_out
    for row in run["rounds"]:
        right = row["accuracy"] * (UNSEEN + held_out)
        assert right == pytest.approx(round(right), abs=1e-9)


ARRAYS = {"x_test": np.zeros((2, 28, 28), np.uint8), "y_test": np.zeros(2, np.int64)}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"y_test": None}, "no array 'y_test', it holds 'x_test'"),
        ({"x_test": np.zeros((2, 784), np.uint8)}, r"uint8 of shape \[2, 784\], wanted is uint8"),
        ({"x_test": np.zeros((2, 28, 28), np.float32)}, "x_test is float32"),
        ({"y_test": np.zeros(3, np.int64)}, "an integer for each of the 2 images"),
        ({"y_test": np.zeros(2)}, "y_test is float64"),
        ({"y_test": np.array([0, 10])}, "labels, each 0 to 9"),
        ({"x_test": ARRAYS["x_test"][:0], "y_test": ARRAYS["y_test"][:0]}, "must hold labels"),
    ],
)
def test_files_that_do_not_fit_are_named(
    changed: dict[str, Any], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mnist.npz"
    np.savez(path, **{k: v for k, v in {**ARRAYS, **changed}.items() if v is not None})
    with pytest.raises(DataMissing, match=told) as raised:
        read_images(path)
    assert str(path) in str(raised.value)
    monkeypatch.setenv("PRUNECAST_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=told):
        invoke(monkeypatch, "--smoke")


def test_files_that_are_none_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRUNECAST_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"holds no mnist\.npz"):
        invoke(monkeypatch, "--smoke")
    (tmp_path / "mnist.npz").write_bytes(b"PK no archive")
    with pytest.raises(DataMissing, match="cannot be read"):
        read_images(tmp_path / "mnist.npz")


def test_what_decides_a_run_decides_its_name(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> list[str]:
        arms = (DENSE, SMALL, {**SMALL, "policy": {"sparsity": 0.5}})
        return [digest_of(command.scenario("lenet", 2, 1, arm)) for arm in arms]

    held_out = names()
    assert names() == held_out
    monkeypatch.setenv("PRUNECAST_DATA", str(images))
    assert len({*names(), *held_out}) == 6


def invoke(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    patch.setattr(sys, "argv", ["bytes.py", *arguments])
    return command.main()


def test_finished_runs_are_not_run_again(
    run: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed, gained in ((1, 0.1), (2, 0.3)):
        better = [{**row, "accuracy": row["accuracy"] + gained} for row in run["rounds"]]
        kept = {"dense": (DENSE, run["rounds"]), "small": (SMALL, better)}
        for arm, rounds in kept.values():
            name = digest_of(command.scenario("lenet", 2, seed, arm))
            (tmp_path / f"{name}.json").write_text(json.dumps({**run, "rounds": rounds}))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))  # nothing can be started
    saved, chart = tmp_path / "saved.json", tmp_path / "chart.png"
    chosen = ("--smoke", "--rounds", "2", "--seeds", "1", "2", "--presets", "small")
    files = ("--cache", str(tmp_path), "--json", str(saved), "--chart", str(chart))
    assert invoke(monkeypatch, *chosen, *files) == 0

    assert chart.read_bytes().startswith(b"\x89PNG")
    document = json.loads(saved.read_text())
    assert [(row["preset"], row["seed"]) for row in document["rows"]] == [
        ("dense", 1), ("small", 1), ("dense", 2), ("small", 2)
    ]  # fmt: skip
    (entry,) = document["summary"]
    assert entry["against_dense"] == {"mean": 20.0, "min": 10.0, "max": 30.0, "error": 10.0}
    assert entry["ratio"]["error"] == 0.0
    parts = {(part["direction"], part["kind"]): part["bytes"] for part in entry["parts"]}
    assert sum(parts.values()) == sum(row["bytes"] for row in run["messages"])
    told = capsys.readouterr().out
    assert "| +20.00 (+10.00 to +30.00, ± 10.00) |" in told
    assert "| 7.weight |" in told
    assert "| (envelope) |" in told


def test_spread_of_one_seed_has_no_error() -> None:
    assert spread.spread([2.5]) == {"mean": 2.5, "min": 2.5, "max": 2.5, "error": None}
    assert doctest.testmod(spread).failed == 0


def test_polling_is_apart_from_what_is_done_for_messages() -> None:
    exchanges = [
        Exchange("/v1/fleet/get-fab", 900, 14000),
        Exchange("/begin/small", 50, 60),
        Exchange("/v1/fleet/pull-messages", 100, 128),
        Exchange("/v1/fleet/pull-messages", 100, 468),
        Exchange("/v1/fleet/pull-object", 90, 3000),
        Exchange("/v1/fleet/send-node-heartbeat", 80, 130),
        Exchange("/end/", 50, 60),
        Exchange("/v1/fleet/pull-messages", 100, 128),
        Exchange("/begin/tiny", 50, 60),
        Exchange("", 1, 2),
    ]
    small, tiny = wire.by_arm(exchanges).values()
    assert wire.sum_exchanges(small) == {
        "messages": {"requests": 2, "down": 3468, "up": 190},
        "polling": {"requests": 2, "down": 258, "up": 180},
    }
    assert wire.sum_exchanges(tiny) == {
        "messages": {"requests": 1, "down": 2, "up": 1},
        "polling": {},
    }


@pytest.mark.engine
def test_a_real_superlink_carries_what_the_ledger_says_and_more() -> None:
    (row,) = wire.measure_wire("lenet", 1, 1, {"small": SMALL})
    assert row["ledger"]["messages"] == 2 * wire.NODES
    for way in ("down", "up"):
        assert row["ledger"][way] < row["messages"][way] < 10 * row["ledger"][way]
    assert row["polling"]["up"] > 0
    (table,) = list(wire.wire_table([row]))[2:]
    assert f"| {row['ledger']['down']:,} | {row['messages']['down']:,} |" in table


@pytest.mark.parametrize(
    ("chosen", "told"), [((), "choose --smoke"), (("--smoke", "--full"), "--smoke or --full")]
)
def test_hours_are_not_spent_by_accident(
    chosen: tuple[str, ...],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        invoke(monkeypatch, *chosen)
    assert told in capsys.readouterr().err

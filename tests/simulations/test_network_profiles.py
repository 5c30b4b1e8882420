"""Simulated time: links and their arithmetic, traces, the virtual clock, and where it is shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from prunecast.server.federation.reporting.ledger import Entry
from prunecast.simulations.comparison import compared_rows
from prunecast.simulations.network_profiles import (
    ClassSpec,
    Link,
    NetworkSpec,
    airtime,
    profiles,
    trace_of,
)
from prunecast.simulations.network_profiles.clock import classes_of, simulated_time
from prunecast.simulations.network_profiles.results import add_simulated_time
from prunecast.simulations.report import arm_rows
from prunecast.simulations.runner.federate import run_arms, simulated_client
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.prepared import prepare
from prunecast.simulations.runner.run import build_arms
from prunecast.simulations.scenarios import ScenarioError, load_scenario, scenario_from_mapping

ROOT = Path(__file__).parents[2]


def entry(number: int, node: int, direction: Any, size: int) -> Entry:
    return Entry(number, node, direction, "delta", "train", size, size)


# --- links ---------------------------------------------------------------------------------------


def test_a_message_takes_half_a_round_trip_and_its_bits() -> None:
    link = profiles()["slow-4g"]
    assert link.seconds(200_000, "down") == pytest.approx(0.075 + 1.0)
    assert link.seconds(750_000 // 8, "up") == pytest.approx(0.075 + 1.0)
    assert link.joules(1000, "up") == 0  # nobody states it


def test_loss_repeats_and_slows_as_mathis_has_it() -> None:
    lossy = Link(down=1e9, up=1e6, latency=100, loss=0.01)
    rate = 8 * 1460 / 0.1 * math.sqrt(1.5) / 0.1  # 1.43 Mbit/s, whatever the link has
    assert lossy.seconds(10**6, "down") == pytest.approx(0.05 + 8e6 / 0.99 / rate)
    assert lossy.seconds(10**6, "up") == pytest.approx(0.05 + 8e6 / 0.99 / 1e6)


@pytest.mark.parametrize(
    ("factor", "rate"), [(12, 250), (11, 440), (10, 980), (9, 1760), (7, 5470)]
)
def test_frames_on_air_come_to_the_rates_of_the_regional_parameters(factor: int, rate: int) -> None:
    """Beyond its preamble and header, a frame has the indicative bit rate of the table."""
    more = airtime(213, factor) - airtime(13, factor)
    assert more == pytest.approx(8 * 200 / rate, rel=0.04)


def test_a_duty_cycle_makes_frames_wait_but_for_the_last() -> None:
    link = profiles()["lora-eu868-dr0"]
    frame = airtime(51 + 13, 12)
    assert link.seconds(51, "up") == pytest.approx(frame)
    assert link.seconds(3 * 51, "up") == pytest.approx(2 * frame / 0.01 + frame)
    assert link.seconds(3 * 51, "down") == pytest.approx(2 * frame / 0.1 + frame)
    assert link.joules(3 * 51, "up") == pytest.approx(3 * frame * 0.0957)
    assert link.on_air(52, "up") == pytest.approx(frame + airtime(1 + 13, 12))


def test_every_profile_can_be_crossed_and_names_its_source() -> None:
    text = (ROOT / "simulations/network_profiles/profiles.toml").read_text(encoding="utf-8")
    found = profiles()
    assert {"slow-4g", "3g", "us-mobile-median", "us-fixed-median", "5g", "fcc-minimum"} < set(
        found
    )
    assert {f"lora-eu868-dr{rate}" for rate in range(6)} < set(found)
    for name, link in found.items():
        link.check(name)
        assert link.seconds(1000, "down") > 0
    blocks = text.split("\n\n")
    assert all(block.startswith("#") for block in blocks if "lora" not in block)
    assert "RP002" in text
    documented = (ROOT / "docs/networks.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in documented for name in found if "lora" not in name)


# --- traces --------------------------------------------------------------------------------------


def test_a_trace_changes_by_the_second_and_by_class(tmp_path: Path) -> None:
    path = tmp_path / "day.csv"
    path.write_text(
        "class,seconds,down_bps,up_bps,latency_ms,loss,availability,examples_per_second\n"
        "phone,0,1000,500,20,0,0.5,10\nphone,60,2000,500,20,0,1,10\ngateway,0,9000,9000,,,,\n"
    )
    found = trace_of(str(path), "network.profile")
    assert found["phone"].at(59.9) == Link(1000, 500, 20, 0, 0.5, 10)
    assert found["phone"].at(60).down == 2000
    assert found["gateway"].at(1e9) == Link(9000, 9000)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("down_bps\n1\n", "needs rows and the columns"),
        ("down_bps,up_bps,speed\n1,1,1\n", "it may have"),
        ("down_bps,up_bps\n1,fast\n", "line 2.*is no number"),
        ("down_bps,up_bps,loss\n1,1,2\n", "at most 0.99"),
        ("down_bps,up_bps\n1,0\n", "has no rate"),
        ("seconds,down_bps,up_bps\n5,1,1\n", "ascend from 0"),
        ("down_bps,up_bps\nnan,1\n", "finite"),
    ],
)
def test_traces_that_cannot_be_used_say_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ScenarioError, match=says):
        trace_of(str(path), "network.profile")
    with pytest.raises(ScenarioError, match="cannot read"):
        trace_of(str(tmp_path / "none.csv"), "network.profile")


# --- the clock -----------------------------------------------------------------------------------


def test_a_round_takes_as_long_as_its_slowest_client() -> None:
    classes = {"fast": ClassSpec(1, "", None, 100.0), "slow": ClassSpec(1, "", None, 10.0)}
    network = NetworkSpec("us-fixed-median", classes=classes)
    examples, nodes = [100, 200], {71: 0, 72: 1}
    entries = [entry(n, node, d, 10_000) for n in (1, 2) for node in nodes for d in ("down", "up")]
    timeline = simulated_time(entries, network, clients=nodes, examples=examples, epochs=2, seed=3)
    link = profiles()["us-fixed-median"]
    wire = link.seconds(10_000, "down") + link.seconds(10_000, "up")
    names = classes_of({"fast": 1, "slow": 1}, 2, seed=3)
    slow = names.index("slow")
    assert timeline.rounds[0].seconds == pytest.approx(wire + 2 * examples[slow] / 10)
    assert timeline.seconds == pytest.approx(2 * timeline.rounds[0].seconds)
    assert timeline.seconds_at(1) == timeline.rounds[0].ended
    assert timeline.seconds_at(0) == 0


def test_who_is_away_or_late_is_counted_and_not_waited_for_beyond_the_deadline() -> None:
    nodes = {node: node for node in range(400)}
    entries = [entry(1, node, d, 1_000_000) for node in nodes for d in ("down", "up")]
    away = NetworkSpec("slow-4g", classes={"all": ClassSpec(availability=0.75)})
    known = {"clients": nodes, "examples": [1] * 400, "seed": 5}
    timeline = simulated_time(entries, away, **known)
    assert timeline == simulated_time(entries, away, **known)
    assert 70 < timeline.rounds[0].away < 130
    link = profiles()["slow-4g"]
    assert timeline.seconds == pytest.approx(
        link.seconds(10**6, "down") + link.seconds(10**6, "up")
    )
    late = simulated_time(entries, NetworkSpec("slow-4g", deadline=2.0), **known)
    assert (late.rounds[0].late, late.seconds) == (400, 2.0)


def test_classes_have_their_shares() -> None:
    names = classes_of({"phone": 3, "gateway": 1}, 100, seed=2)
    assert names.count("gateway") == 25
    assert names != sorted(names)


# --- where it is shown ---------------------------------------------------------------------------


def test_a_result_says_what_is_simulated(tiny: dict[str, Any], tmp_path: Path) -> None:
    network = {"profile": "lora-eu868-dr5", "target": 0.0}
    scenario = scenario_from_mapping({**tiny, "rounds": 2, "network": network})
    assert scenario_from_mapping(scenario.to_mapping()) == scenario
    prepared = prepare(scenario, tmp_path)
    grid = InProcessGrid(simulated_client(prepared), num_nodes=3)
    outcomes = run_arms(grid, prepared, lambda event: None)
    task = {k: getattr(scenario.task, k) for k in ("metric", "percent", "lower_is_better", "verb")}
    result: dict[str, Any] = {
        "scenario": scenario.to_mapping(),
        "task": task,
        "data": {"per_client": list(prepared.sizes), "held_out": 60},
        "arms": build_arms(prepared, outcomes),
        "release": None,
    }
    result = json.loads(json.dumps(result))
    assert "simulated time" not in arm_rows(result)[0]
    assert scenario.network is not None
    add_simulated_time(result, tmp_path, scenario.network)
    dense, zstd, ours = (result["arms"][n] for n in ("dense", "dense-zstd", "prunecast"))
    assert (
        dense["simulated"]["seconds"] > zstd["simulated"]["seconds"] > ours["simulated"]["seconds"]
    )
    assert dense["simulated"]["joules"] > ours["simulated"]["joules"] > 0
    assert ours["rounds"][0]["simulated_seconds"] == 0
    assert ours["rounds"][-1]["simulated_seconds"] == ours["simulated"]["seconds"]
    assert ours["simulated"]["seconds_to_target"] == ours["rounds"][1]["simulated_seconds"]
    # a round takes what its slowest client does: three equal ones, one message each way
    assert dense["simulated"]["seconds"] < 1.01 * sum(
        profiles()["lora-eu868-dr5"].seconds(dense[f"bytes_{way}"] // 6, way) * 2
        for way in ("down", "up")
    )
    header, rows = arm_rows(result)
    assert header[-1] == "simulated time"
    assert rows[0][-1].endswith(" d")
    documented = (ROOT / "docs/result.md").read_text(encoding="utf-8")
    for key in [*dense["simulated"], "simulated_seconds", "nodes"]:
        assert f"`{key}" in documented, key


def test_a_scenario_refuses_networks_before_anything_is_read(tiny: dict[str, Any]) -> None:
    for network, says in (
        ({"profile": "6g"}, "network.profile.*choose one of 3g"),
        ({"speed": 1}, "network.speed.*unknown key"),
        ({"classes": {"a": {"profile": "6g"}}}, "network.classes.a.profile"),
        ({"classes": {"a": {"availability": 2}}}, "at most 1"),
    ):
        with pytest.raises(ScenarioError, match=says):
            scenario_from_mapping({**tiny, "network": network})


def test_a_trace_lies_beside_its_scenario(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("down_bps,up_bps\n1000,1000\n")
    path = tmp_path / "mine.toml"
    path.write_text('schema = 1\n[network]\nprofile = "mine.csv"\n')
    network = load_scenario(path).network
    assert network is not None
    assert network.links()[str(tmp_path / "mine.csv")][1].at(0) == Link(1000, 1000)


def test_a_comparison_shows_simulated_time_and_the_time_to_a_target() -> None:
    arm = {"bytes_down": 1, "bytes_up": 1, "ratio": 1.0, "accuracy": 0.5, "spread": None}
    simulated = {"seconds": 7200.0, "seconds_to_target": None}
    document = {
        "task": {"metric": "accuracy", "percent": True},
        "network": {"profile": "3g", "target": 0.9},
        "arms": {"dense": {**arm, "seconds": 1.0, "simulated": simulated}},
    }
    header, [row] = compared_rows(document)
    assert header[-2:] == ["simulated", "to target"]
    assert row[-2:] == ["2 h", "–"]

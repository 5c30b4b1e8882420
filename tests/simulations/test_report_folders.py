"""Reports put together from folders: several seeds and arms, comparisons, ServerApps' runs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import shutil
import statistics

import pytest
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAvg

from prunecast.common.text import bytes_text
from prunecast.server.federation import Ledger, Run, Tally
from prunecast.simulations.network_profiles import NetworkSpec
from prunecast.simulations.report import (
    csv_of,
    gather,
    markdown_of,
    render_page,
    sections_of,
    write_studies,
)
from prunecast.simulations.report.messages import layer_bytes, sparsity_by_layer
from prunecast.simulations.report.tables import unit_of
from prunecast.simulations.runner import ResultError
from prunecast.simulations.runner.inprocess import InProcessGrid
from prunecast.simulations.runner.run import SCENARIO
from prunecast.simulations.scenarios import (
    load_scenario,
    save_scenario,
)
from support.federation import RUN_ID, initial_arrays, make_app, to_record

SEEDS = (3, 4)


def numbers(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_seeds_are_put_together_with_mean_and_spread(folders) -> None:
    [study] = gather(folders)
    assert study.seeds == list(SEEDS)
    assert list(study.arms) == ["dense", "dense-zstd", "ours"]
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    reached = [result["arms"]["ours"]["accuracy"] for result in results]
    ours = study.arms["ours"].reached("accuracy")
    assert ours.mean == pytest.approx(statistics.fmean(reached))
    assert ours.deviation == pytest.approx(statistics.stdev(reached))
    totals = [
        Tally(Ledger.read(folder / "ledger.jsonl")).totals().payload_bytes for folder in folders
    ]
    assert study.arms["ours"].total().mean == statistics.fmean(totals)
    ratio = study.arms["dense"].total().mean / statistics.fmean(totals)
    assert study.ratio(study.arms["ours"]) == pytest.approx(ratio)
    curve = study.arms["ours"].curve("accuracy")
    assert curve.rounds == (0, 1, 2, 3, 4)
    assert curve.spent[-1] == statistics.fmean(totals)
    assert curve.seconds is None


def test_the_csv_has_what_the_ledger_has(folders) -> None:
    rows = numbers(csv_of(gather(folders)))
    for seed, folder in zip(SEEDS, folders, strict=True):
        entries = list(Ledger.read(folder / "ledger.jsonl"))
        kinds = {(e.round, e.direction, e.kind) for e in entries}
        told = {
            (int(row["round"]), row["direction"], row["kind"]): float(row["value"])
            for row in rows
            if row["quantity"] == "bytes" and row["seed"] == str(seed) and row["arm"] == "ours"
        }
        assert set(told) == kinds
        for key, value in told.items():
            found = [e.payload_bytes for e in entries if (e.round, e.direction, e.kind) == key]
            assert value == sum(found)
    bases = {row["quantity"]: row["basis"] for row in rows}
    assert bases["wire_bytes_up"] == "estimated"
    assert bases["bytes_up"] == "measured"
    assert bases["bytes_of_one_message"] in ("estimated", "measured")
    [wire] = [r for r in rows if (r["arm"], r["quantity"]) == ("ours", "wire_bytes_up")]
    estimates = [Tally(Ledger.read(f / "ledger.jsonl")).totals().wire_up for f in folders]
    assert float(wire["value"]) == statistics.fmean(e or 0 for e in estimates)
    [tls] = [r for r in rows if (r["arm"], r["quantity"]) == ("ours", "wire_bytes_tls_up")]
    assert (tls["unit"], tls["basis"]) == ("B", "estimated")
    assert float(tls["value"]) > float(wire["value"])


def test_tensors_add_up_to_the_bytes_of_a_run(folders) -> None:
    [study] = gather(folders)
    for name in ("dense", "ours"):
        run = study.arms[name].runs[0]
        costs = layer_bytes(run)
        assert costs is not None
        assert costs.covered > 0.95
        for way in ("down", "up"):
            whole = run.tally.totals(direction=way).payload_bytes
            assert sum(getattr(costs, way).values()) == pytest.approx(whole, rel=0.05)
    zeros = sparsity_by_layer(study.arms["ours"].runs[0])
    sizes = [rounds[4] for rounds in zeros.values()]
    total, none = (sum(column) for column in zip(*sizes, strict=True))
    assert none / total == pytest.approx(study.arms["ours"].first["sparsity"], abs=0.05)


def test_page_and_markdown_show_the_same_tables(folders) -> None:
    studies = gather(folders)
    page, text = render_page(studies), markdown_of(studies)
    titles = [section.title for section in sections_of(studies[0])]
    for wanted in (
        *("Arms", "Accuracy against bytes", "Pareto front", "Bytes to a target"),
        *("Bytes in every round", "Message bytes and wire bytes", "Joining and coming back"),
        *("Codec seconds", "Where the bytes went", "Layer by layer", "Pruning", "Every round"),
        "Zeros in every layer, round by round",
    ):
        assert wanted in titles
        assert wanted in page
        assert f"## {wanted} (" in text
    for section in sections_of(studies[0]):
        for table in section.tables:
            assert all(len(row) == len(table.header) for row in table.rows)
            for row in table.rows:
                assert f"| {' | '.join(row[1:])} |" in text
    assert "simulated" not in titles
    assert f"prunecast simulate {folders[0] / SCENARIO}" in page
    assert f"prunecast simulate {folders[0] / SCENARIO}" in text


def test_what_pruning_did_is_told_with_its_basis(folders) -> None:
    [study] = gather(folders)
    found = {section.title: section for section in sections_of(study)}
    did = found["What pruning did"]
    assert did.basis == "measured, estimated"
    sizes, recovered, inference = did.tables
    rows = {row[0]: dict(zip(sizes.header, row, strict=True)) for row in sizes.rows}
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    ours = [result["arms"]["ours"]["pruning"] for result in results]
    kept = statistics.fmean(figures["parameters"]["nonzero"] for figures in ours)
    assert rows[study.arms["ours"].label]["kept"] == f"{kept:,.0f}"
    assert rows[study.arms["dense"].label]["MACs"] == "1,420,032"
    assert [row[0] for row in recovered.rows] == [study.arms["ours"].label]  # others prune nothing
    assert "≈ energy, int8" in inference.header
    # a bar for each tensor: the share of it that is zero
    [layers] = found["What is left of every layer"].tables
    matrix = next(i for i, row in enumerate(layers.rows) if row[0] == "7.weight")
    layer = ours[0]["layers"]["7.weight"]
    assert layers.bars[3][matrix] == 1 - layer["nonzero"] / layer["parameters"]
    lines = {(r["arm"], r["quantity"]): r for r in numbers(csv_of([study])) if not r["seed"]}
    ratio = lines["ours", "compression_ratio"]
    assert (ratio["unit"], ratio["basis"]) == ("", "measured")
    energy = lines["ours", "estimated_joules_int8"]
    assert (energy["unit"], energy["basis"]) == ("J", "estimated")
    assert lines["ours", "mask_peak_bytes"]["unit"] == "B"
    assert ("dense", "pruning_loss") not in lines
    scores = ("accuracy", "accuracy_before_pruning", "pruning_loss")
    assert [unit_of(name, study) for name in scores] == ["fraction"] * 3
    study.result = {**study.result, "task": {**study.result["task"], "percent": False}}
    assert [unit_of(name, study) for name in scores] == [""] * 3
    assert unit_of("sparsity", study) == "fraction"


def test_what_nodes_measure_is_told_over_nodes(tiny, tmp_path, finished_run) -> None:
    tiny["strategy"] = {"name": "fedavg", "options": {"fraction_evaluate": 1.0}}
    [study] = gather([finished_run(tiny, tmp_path / "run")])
    did = next(s for s in sections_of(study) if s.title == "What pruning did")
    table = next(table for table in did.tables if table.caption.startswith("eval-accuracy"))
    [ours] = [row for row in table.rows if row[0] == study.arms["prunecast"].label]
    assert ours[1] == "–"  # pruned from the second version on: never dense
    assert ours[2].endswith("(3 nodes)")


def test_what_a_client_costs_that_joins_or_comes_back(folders) -> None:
    [study] = gather(folders)
    [section] = [s for s in sections_of(study) if s.title == "Joining and coming back"]
    rows = {row[0]: row[1:] for row in section.tables[0].rows}
    entries = list(Ledger.read(folders[0] / "ledger.jsonl"))
    nodes = {e.node: e for e in reversed(entries) if e.direction == "down"}
    other = list(Ledger.read(folders[1] / "ledger.jsonl"))
    others = {e.node: e for e in reversed(other) if e.direction == "down"}
    first = [statistics.fmean(e.payload_bytes for e in n.values()) for n in (nodes, others)]
    assert rows["ours"][0] == bytes_text(statistics.fmean(first))
    assert "times)" in rows["ours"][2]
    assert rows["dense"][3] == "as a join"
    assert rows["dense-zstd (level 3)"][1] == "not recorded"  # nothing was encoded for it


def test_what_was_not_recorded_is_said_to_be_missing(folders, tmp_path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(folders[0] / "result.json", bare)
    [study] = gather([bare])
    found = {section.title: section for section in sections_of(study)}
    wire = found["Message bytes and wire bytes"].tables[0].rows
    assert all(row[2] == row[4] == row[5] == "not recorded" for row in wire)
    assert all(
        cell == "not recorded" for row in found["Codec seconds"].tables[0].rows for cell in row[1:]
    )
    for title in ("Joining and coming back", "Pruning", "Layer by layer"):
        cells = {cell for row in found[title].tables[-1].rows for cell in row[1:]}
        assert cells == {"not recorded"}
    assert "was not recorded" in render_page([study])
    rows = numbers(csv_of([study]))
    assert not [row for row in rows if row["quantity"].startswith(("wire", "codec", "first_join"))]


def test_ledgers_of_before_objects_were_counted_have_no_wire_bytes(folders, tmp_path) -> None:
    old = shutil.copytree(folders[0], tmp_path / "old")
    for path in old.glob("ledger*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line.pop("objects", None)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [study] = gather([old])
    [wire] = [s for s in sections_of(study) if s.title == "Message bytes and wire bytes"]
    assert {row[2] for row in wire.tables[0].rows} == {"not recorded"}
    assert {row[5] for row in wire.tables[0].rows} == {"not recorded"}
    assert {row[8] for row in wire.tables[0].rows} == {"not recorded"}


def test_simulated_time_is_marked_wherever_it_is_shown(folders) -> None:
    [study] = gather(folders, NetworkSpec("slow-4g"))
    found = {section.title: section for section in sections_of(study)}
    assert found["Accuracy against simulated time"].basis == "simulated"
    assert found["Arms"].tables[0].header[-3] == "simulated time"
    assert "it was not measured" in found["Arms"].note
    rows = numbers(csv_of([study]))
    simulated = {row["quantity"] for row in rows if row["basis"] == "simulated"}
    assert simulated >= {"simulated_seconds"}
    assert not [r for r in rows if "simulated" in r["quantity"] and r["basis"] != "simulated"]


def test_bytes_to_a_target_are_those_of_the_first_round_that_reaches_it(folders) -> None:
    [study] = gather(folders)
    rounds = [run.rounds for run in study.arms["ours"].runs]
    target = min(max(row["accuracy"] for row in rows[1:]) for rows in rounds)
    [section] = [s for s in sections_of(study, [target]) if s.title == "Bytes to a target"]
    [table] = section.tables
    row = next(row for row in table.rows if row[0] == "ours")
    spent = []
    for rows in rounds:
        first = next(r for r in rows[1:] if r["accuracy"] >= target)
        spent.append(first["bytes_up"] + first["bytes_down"])
    assert row[1].startswith(bytes_text(statistics.fmean(spent)).split()[0])
    assert row[-1] == "2 of 2"
    [section] = [s for s in sections_of(study, [1.01]) if s.title == "Bytes to a target"]
    assert {tuple(row[1:]) for row in section.tables[0].rows} == {("not reached", "–", "0 of 2")}


def test_the_front_is_what_no_other_arm_beats(folders) -> None:
    [study] = gather(folders)
    front = study.front()
    assert "ours" in front  # the fewest bytes
    assert "dense" not in front  # the same accuracy for more bytes than with zstd
    assert "dense-zstd" in front or study.arms["ours"].reached("accuracy").mean >= (
        study.arms["dense"].reached("accuracy").mean
    )


def test_arms_of_one_name_and_other_settings_stay_apart(folders, tmp_path) -> None:
    other = shutil.copytree(folders[0], tmp_path / "other")
    document = json.loads((other / "result.json").read_text())
    document["arms"]["ours"] |= {"text": "preset tiny", "preset": "tiny"}
    (other / "result.json").write_text(json.dumps(document))
    [study] = gather([folders[0], other])
    assert {"ours", "ours-2"} <= set(study.arms)
    assert study.arms["ours-2"].label == "ours (2)"
    assert [note for note in study.notes if "dense was run twice with seed 3" in note]


def test_runs_of_other_scenarios_are_studies_of_their_own(folders, tmp_path) -> None:
    other = shutil.copytree(folders[0], tmp_path / "other")
    document = json.loads((other / "result.json").read_text())
    document["scenario"] |= {"name": "another"}
    (other / "result.json").write_text(json.dumps(document))
    studies = gather([folders[0], other])
    assert [study.scenario["name"] for study in studies] == ["tiny", "another"]
    written = write_studies(other, studies)
    assert "<h1>another</h1>" in written["page"].read_text()
    assert (other / "accuracy-2.png").is_file()


def test_runs_of_before_a_key_was_known_go_with_those_after(folders, tmp_path) -> None:
    old = shutil.copytree(folders[0], tmp_path / "old")
    document = json.loads((old / "result.json").read_text())
    del document["scenario"]["training"]["weight_decay"]  # 0.0 where it is not given
    (old / "result.json").write_text(json.dumps(document))
    assert [study.seeds for study in gather([old, folders[1]])] == [list(SEEDS)]


def test_a_comparison_is_reported_from_its_folder(folders, tmp_path) -> None:
    place = tmp_path / "compare-tiny"
    for seed, folder in zip(SEEDS, folders, strict=True):
        for arm in ("dense", "ours"):
            run = shutil.copytree(folder, place / f"seed-{seed}" / arm)
            document = json.loads((run / "result.json").read_text())
            kept = ("dense", "dense-zstd") if arm == "dense" else ("ours",)
            document["arms"] = {name: document["arms"][name] for name in kept}
            (run / "result.json").write_text(json.dumps(document))
    shutil.copy(folders[0] / SCENARIO, place)
    arms = {"dense": {"kind": "dense"}, "ours": {"kind": "prunecast"}}
    figure = {"theirs": {"value": 0.5, "spread": 0.01, "source": "a paper", "arm": "ours"}}
    document = {"arms": arms, "seeds": list(SEEDS), "network": None, "published": figure}
    (place / "comparison.json").write_text(json.dumps(document))
    [study] = gather([place])
    assert list(study.arms) == ["dense", "ours"]  # those of the document alone
    assert study.seeds == list(SEEDS)
    assert study.command == f"prunecast compare {place / SCENARIO} --arms dense,ours --seeds 3,4"
    found = {section.title: section for section in sections_of(study)}
    [row] = found["Published figures beside these"].tables[0].rows
    assert row[:2] == ["theirs", "50.0 ± 1.0 %"]
    assert row[-1] == "a paper"
    # and so is a folder of folders
    assert [s.command for s in gather([tmp_path])] == [study.command]
    (place / "comparison.json").write_text("{")
    with pytest.raises(ResultError, match=r"damaged .*: run the comparison again"):
        gather([place])


def test_the_run_of_a_serverapp_is_reported_from_its_events(tmp_path) -> None:
    folder = tmp_path / "digits"
    inner = InProcessGrid(make_app(tmp_path / "store"), 3, run_id=RUN_ID)
    measured = iter([0.1, 0.4, 0.8])
    run = Run(
        inner, FedAvg(), policy="small", folder=folder, name="digits",
        evaluate_fn=lambda number, arrays: MetricRecord({"accuracy": next(measured), "loss": 1.0}),
    )  # fmt: skip
    run.start(to_record(initial_arrays()), num_rounds=2)
    [study] = gather([folder])
    assert study.metric == "accuracy"
    arm = study.arms["digits"]
    totals = Tally(Ledger.read(folder / "ledger.jsonl")).totals()
    assert arm.total().mean == totals.payload_bytes
    assert study.ratio(arm) == pytest.approx(totals.dense_bytes / totals.payload_bytes)
    assert arm.reached("accuracy").mean == 0.8
    page = render_page([study])
    assert "80.0 %" in page
    assert "Layer by layer" in page
    # a run without a metric says so
    bare = tmp_path / "bare"
    Run(inner, FedAvg(fraction_evaluate=0.0), policy="small", folder=bare).start(
        to_record(initial_arrays()), num_rounds=1
    )
    with pytest.raises(ResultError, match="no metric: give the run an evaluate_fn"):
        gather([bare])


def test_folders_without_a_run_are_named(tmp_path) -> None:
    with pytest.raises(ResultError, match="give the folder of a finished run or comparison"):
        gather([tmp_path])
    with pytest.raises(ResultError, match="give the folder of a finished run"):
        gather([tmp_path / "none"])


def test_the_kept_scenario_runs_from_anywhere(folders, tmp_path, monkeypatch, digits) -> None:
    kept = load_scenario(folders[0] / SCENARIO)
    result = json.loads((folders[0] / "result.json").read_text())
    assert json.loads(json.dumps(kept.to_mapping())) == result["scenario"]
    monkeypatch.chdir(digits.parent)
    relative = dataclasses.replace(kept, data=dataclasses.replace(kept.data, path=digits.name))
    save_scenario(relative, tmp_path / SCENARIO)
    assert load_scenario(tmp_path / SCENARIO).data.path == str(digits)

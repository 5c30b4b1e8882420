"""Jobs: what streams and node stores belong to, whichever run of Flower goes on with it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import capabilities as stating
from prunecast.client.training.store import ModError, NodeStore, StoreError
from prunecast.compression.flower import job_id, stream_id
from prunecast.compression.flower.envelope import unpack
from prunecast.compression.versions import (
    BadPayload,
    Instruction,
    PublishedModel,
    UpdateRule,
    control,
)
from prunecast.compression.versions.frame import stream_tag
from prunecast.compression.versions.model import RawTensor
from prunecast.server.federation import CompressedGrid, FederationError, Ledger, Run
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import initial_arrays, make_app, reason_of, to_record

HOSTILE = (
    "../../etc/passwd",
    "/etc/passwd",
    "a/b",
    "..",
    ".",
    "",
    "\0",
    "x" * 10_000,
    "nul\n",
    "é",
)
DROPPED = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}


def train(grid: CompressedGrid, rounds: int = 2) -> Any:
    random.seed(0)
    strategy = FedAvg(fraction_evaluate=0.0)
    arrays = to_record(initial_arrays())
    return strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds).arrays


def grid_of(store: Path, run_id: int, job: str = "", **options: Any) -> CompressedGrid:
    inner = InProcessGrid(make_app(store), 2, run_id=run_id)
    kept = Ledger(keep=1000)
    return CompressedGrid(inner, "balanced", job=job, ledger=kept, poll_interval=0.01, **options)


def kinds(grid: CompressedGrid, direction: str) -> list[str]:
    return [entry.kind for entry in grid.ledger.entries if entry.direction == direction]


def test_two_runs_of_a_job_share_a_nodes_store_and_two_jobs_do_not(tmp_path: Path) -> None:
    store = tmp_path / "store"
    train(grid_of(store, 1, "digits"))
    kept = NodeStore(store, "digits", 1)
    held = kept.held("arrays")
    assert held is not None
    assert NodeStore(store, 1, 1).held("arrays") is None
    assert NodeStore(store, "letters", 1).held("arrays") is None

    again = grid_of(store, 2, "digits")
    train(again, rounds=1)
    assert set(kinds(again, "up")) == {"update"}  # the stream is the same in another run of Flower
    assert (store / job_id("digits") / "name").read_text() == "digits"


def test_a_job_without_a_name_is_of_its_run_alone_and_costs_no_byte(tmp_path: Path) -> None:
    alone, named = grid_of(tmp_path / "a", 1), grid_of(tmp_path / "b", 1, "digits")
    train(alone)
    train(named)
    assert (tmp_path / "a" / "1" / "1").is_dir()
    assert alone.job == "1"
    down = [
        sum(e.payload_bytes for e in grid.ledger.entries if e.direction == "down")
        for grid in (alone, named)
    ]
    # the name, its length and the attempt, in each of two messages to each of two nodes
    assert down[1] - down[0] == 4 * (len("digits") + 2)


def test_a_node_whose_store_is_of_another_job_says_that_the_base_is_missing(tmp_path: Path) -> None:
    first = grid_of(tmp_path / "store", 1, "digits")
    arrays = train(first)
    other = grid_of(tmp_path / "store", 2, "letters")
    model = other.published(arrays)
    for node in (1, 2):  # as if they held it
        other._streams.node(node).held["arrays"] = model.digest[:16]
    FedAvg(fraction_evaluate=0.0).start(grid=other, initial_arrays=arrays, num_rounds=1)
    assert sorted(kinds(other, "up")) == ["base-missing"] * 2 + ["update"] * 2
    assert sorted(kinds(other, "down")) == ["keyframe"] * 2 + ["reuse"] * 2


def test_a_payload_of_one_job_is_refused_in_another(tmp_path: Path) -> None:
    sent: list[Message] = []

    class Watching(InProcessGrid):
        def push_messages(self, messages: Any) -> Any:
            sent.extend(messages)
            return super().push_messages(list(sent)[-2:])

    inner = Watching(make_app(tmp_path / "store"), 2, run_id=1)
    train(CompressedGrid(inner, "balanced", job="digits", poll_interval=0.01), rounds=1)
    content = unpack(sent[0].content)
    control = content.config_records["prunecast"]
    told = Instruction.from_bytes(control["instruction"])
    assert told.job == "digits"
    changed = Instruction(told.rule, tag=told.tag, job="letters")
    content["prunecast"] = ConfigRecord({"instruction": changed.to_bytes()})
    app = inner._apps[1]
    forged = Message(content, 1, "train")
    forged.metadata.__dict__["_run_id"] = 1
    reason = reason_of(app(forged, inner._contexts[1]))
    assert "ModError" in reason
    assert "refused" in reason


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    root = tmp_path / "deep" / "store"
    store = NodeStore(root, name, 7)
    store.keep("arrays", PublishedModel({"w": RawTensor(np.ones(3))}, 1))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert all(path.is_relative_to(root / job_id(name)) for path in files)
    assert {path.name for path in root.iterdir()} == {job_id(name)}
    assert job_id(name).startswith("job-")
    assert job_id(name)[4:].isalnum()


def test_streams_of_jobs_and_keys_are_all_different() -> None:
    found = {
        stream_tag(stream_id(job, key))
        for job in (1, 11, "a", "a/b", "b", "job-", "1/1")
        for key in ("b", "1/b", "b/b", "/b")
    }
    assert len(found) == 7 * 4
    assert stream_id(11, "arrays") == stream_id("11", "arrays") == b"11/arrays"


@pytest.mark.parametrize("name", ["x" * 201, "two\nlines", " digits", "\0"])
def test_a_name_that_is_none_is_refused_on_the_server(tmp_path: Path, name: str) -> None:
    with pytest.raises(FederationError, match="printable characters"):
        grid_of(tmp_path, 1, name)


def test_the_job_travels_in_the_instruction() -> None:
    for told in (
        Instruction(UpdateRule(3.0), job="digits", attempt=300),
        Instruction(None, job="x", channels={"arrays": b"plan"}),
    ):
        assert Instruction.from_bytes(told.to_bytes()) == told
    whole = Instruction(None, job="digits", attempt=3).to_bytes()
    for cut in range(1, len(whole)):
        with pytest.raises(BadPayload):
            Instruction.from_bytes(whole[:-cut])


# -- attempts: a job that is resumed --------------------------------------------------------------


def test_with_a_new_attempt_all_that_is_not_accepted_is_given_up(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, "digits", 1)
    store.go_on(0)
    store.stage("arrays", "aa", DROPPED)
    store.settle(["aa"])
    store.stage("arrays", "bb", {"w": DROPPED["w"] + 100})  # takes what aa dropped along
    store.stage("other", "cc", {"w": DROPPED["w"] + 7})

    again = NodeStore(tmp_path, "digits", 1)
    again.settle(["cc"])
    again.go_on(1)
    assert again.residual("arrays")["w"].tobytes() == DROPPED["w"].tobytes()
    assert again.residual("other")["w"].tolist() == (DROPPED["w"] + 7).tolist()
    assert again._staged() == []

    again.stage("arrays", "dd", DROPPED)
    later = NodeStore(tmp_path, "digits", 1)
    later.go_on(1)  # of the same attempt: what is under way stays so
    assert len(later._staged()) == 2


def test_what_an_earlier_attempt_has_under_way_leaves_nothing(tmp_path: Path) -> None:
    old = NodeStore(tmp_path, "digits", 1)
    old.go_on(0)
    old.stage("arrays", "aa", DROPPED)
    old.settle(["aa"])
    NodeStore(tmp_path, "digits", 1).go_on(2)
    with pytest.raises(StoreError, match="resumed while"):
        old.stage("arrays", "bb", DROPPED)
    assert old.residual("arrays")["w"].tobytes() == DROPPED["w"].tobytes()
    with pytest.raises(ModError, match="attempt 1, and 2 goes on"):
        NodeStore(tmp_path, "digits", 1).go_on(1)


def test_a_node_that_was_updated_as_it_was_told_takes_part_when_the_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = make_app(tmp_path / "store")

    def earlier(message: Message, context: Context) -> Message:
        with monkeypatch.context() as patch:
            patch.setattr(control, "INSTRUCTION_FORMAT", 0)
            patch.setattr(stating, "INSTRUCTION_FORMAT", 0)
            return app(message, context)

    def trained(second: Any, rounds: int) -> set[int]:
        inner = InProcessGrid({1: app, 2: second, 3: app}, 3, run_id=rounds)
        run = Run(inner, FedAvg(min_available_nodes=2), folder=tmp_path / "run", resume="auto")
        run.start(to_record(initial_arrays()), num_rounds=rounds)
        entries = Ledger.read(tmp_path / "run" / "ledger.jsonl", whole=False)
        return {entry.node for entry in entries if entry.kind == "update"}

    assert trained(earlier, 2) == {1, 3}
    assert trained(earlier, 3) == {1, 3}
    assert trained(app, 4) == {1, 2, 3}

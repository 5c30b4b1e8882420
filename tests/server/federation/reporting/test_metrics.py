"""What of a run Prometheus reads, and what is told of each node."""

from __future__ import annotations

import json
import logging
import re
import signal
import subprocess
import sys
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.client import compression_mod
from prunecast.common.files import lock_open
from prunecast.server.federation import (
    Deadlines,
    FederationError,
    Ledger,
    Run,
    read_events,
    server_app,
)
from prunecast.server.federation.reporting.events import EventTail
from prunecast.server.federation.reporting.metrics import MetricsServer, RunMetrics
from prunecast.server.federation.reporting.nodes import status_of
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, initial_arrays, make_app, to_record

STARTED = {"event": "run-started", "time": "2026-01-01T00:00:00+00:00", "schema": 1, "run": "r"}
STARTED |= {"name": "n", "strategy": "FedAvg", "rounds": 3}


def fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and by the values of the labels, in the order of the labels' names."""
    return {
        (sample.name, tuple(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def run_of(inner: InProcessGrid, rounds: int = 2, **more: Any) -> Run:
    run = Run(inner, FedAvg(min_available_nodes=1, min_train_nodes=1), policy="small", **more)
    run.start(to_record(initial_arrays()), num_rounds=rounds, timeout=5)
    return run


def round_finished(number: int, nodes: int, **more: Any) -> dict[str, Any]:
    told = [
        {"node": str(n), "state": "answered", "seen": STARTED["time"], "version": number,
         "digest": "", "errors": 0}
        for n in range(nodes)
    ]  # fmt: skip
    event = {**STARTED, "event": "round-finished", "round": number, "seconds": 1.5, "metrics": {}}
    event |= {"dense_bytes_down": 8, "dense_bytes_up": 9, "status": {"nodes": told, "states": {}}}
    return {**event, **more}


def test_prometheus_reads_what_ledger_and_events_say(tmp_path: Path) -> None:
    metrics = RunMetrics()
    inner = InProcessGrid(make_app(tmp_path / "store"), 3, run_id=RUN_ID)
    measured = {0: 0.1, 1: 0.5, 2: 0.75}
    with MetricsServer(metrics.text) as server:
        assert samples(fetched(server.url))["prunecast_run_state", ()] == 0
        run = run_of(
            inner,
            folder=tmp_path / "run",
            name="digits",
            on_event=metrics,
            evaluate_fn=lambda n, _: MetricRecord({"accuracy": measured[n]}),
        )
        text = fetched(server.url)
        assert fetched(server.url.replace("/metrics", "/healthz")) == "ready\n"
        with pytest.raises(HTTPError, match="404"):
            fetched(server.url.replace("/metrics", "/secrets"))
    found = samples(text)

    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    last = [event for event in events if event["event"] == "round-finished"][-1]
    entries = list(Ledger.read(tmp_path / "run" / "ledger.jsonl"))
    sums, messages = Counter(), Counter()
    for entry in entries:
        sums[entry.direction, entry.kind] += entry.payload_bytes
        messages[entry.direction, entry.kind] += 1
    assert len(sums) >= 5
    for key, nbytes in sums.items():
        assert found["prunecast_run_message_bytes_total", key] == nbytes
        assert found["prunecast_run_messages_total", key] == messages[key]
    counted = [key for name, key in found if name == "prunecast_run_message_bytes_total"]
    assert set(counted) == set(sums)
    for way in ("down", "up"):
        dense = last[f"dense_bytes_{way}"]
        assert found["prunecast_run_dense_bytes_total", (way,)] == dense
    assert found["prunecast_run_info", ("digits", events[0]["run"], "FedAvg")] == 1
    assert found["prunecast_run_state", ()] == 2
    assert (found["prunecast_run_round", ()], found["prunecast_run_rounds", ()]) == (2, 2)
    assert found["prunecast_run_metric", ("server", "accuracy")] == 0.75
    evaluated = {key[1] for name, key in found if name == "prunecast_run_metric"} - {"accuracy"}
    assert evaluated >= set(last["client_metrics"]["evaluate"])
    assert found["prunecast_run_nodes", ("answered",)] == 3
    assert found["prunecast_run_connected_nodes", ()] == 3
    assert found["prunecast_run_sparsity", ()] == pytest.approx(last["sparsity"])
    assert found["prunecast_run_node_failures_total", ("failed",)] == 0
    assert run.published is not None
    for node in ("1", "2", "3"):
        assert found["prunecast_run_node_version", (node,)] == run.published.counter
        assert found["prunecast_run_node_errors_total", (node,)] == 0
        assert found["prunecast_run_node_seen_seconds", (node,)] > 1.7e9


def test_of_each_node_it_is_told_when_it_answered_what_it_holds_and_why_it_failed(
    tmp_path: Path,
) -> None:
    apps: dict[int, ClientApp] = {
        **dict.fromkeys((1, 3, 4), make_app(tmp_path / "store")),
        2: ClientApp(),  # of another app
    }
    inner = InProcessGrid(apps, 4, run_id=RUN_ID)
    # the third is never heard of, and the fourth leaves after the first round
    inner.on_reply = lambda reply: None if reply.metadata.src_node_id == 3 else reply
    metrics, heard = RunMetrics(), []

    def listen(event: Any) -> None:
        heard.append(event)
        metrics(event)
        if event["event"] == "round-finished" and event["round"] == 1:
            inner.online.remove(4)

    run = Run(inner, FedAvg(), policy="small", on_event=listen)
    run.start(to_record(initial_arrays()), num_rounds=2, timeout=0.5)

    rounds = [event["status"] for event in heard if event["event"] == "round-finished"]
    assert rounds[0]["states"] == {}
    assert rounds[1]["states"] == {"answered": 2, "failed": 1, "silent": 1}
    assert rounds[2]["states"] == {"answered": 1, "failed": 1, "silent": 1, "gone": 1}
    assert (rounds[1]["connected"], rounds[2]["connected"]) == (4, 3)
    assert [node["node"] for node in rounds[2]["nodes"][:2]] == ["2", "3"]  # who failed is first
    assert {node["node"] for node in rounds[2]["nodes"]} == {"1", "2", "3"}

    status = status_of(heard)
    assert (status["state"], status["round"], status["rounds"]) == ("finished", 2, 2)
    nodes = {node["node"]: node for node in status["nodes"]}
    assert run.published is not None
    assert (nodes["1"]["version"], nodes["1"]["behind"]) == (run.published.counter, 0)
    assert nodes["1"]["digest"] == run.published.digest.hex()[: len(nodes["1"]["digest"])] != ""
    assert (nodes["1"]["errors"], "reason" in nodes["1"]) == (0, False)
    assert (nodes["2"]["state"], nodes["2"]["errors"], nodes["2"]["version"]) == ("failed", 4, None)
    assert nodes["2"]["reason"].startswith("ValueError: No evaluate function registered")
    assert (nodes["3"]["state"], nodes["3"]["seen"]) == ("silent", None)
    assert nodes["3"]["reason"] == "no reply in time"
    assert nodes["4"]["behind"] > 0
    found = samples(metrics.text().decode())
    assert found["prunecast_run_node_failures_total", ("failed",)] == 2
    assert found["prunecast_run_node_failures_total", ("silent",)] == 2
    assert found["prunecast_run_nodes", ("gone",)] == 1
    assert ("prunecast_run_node_seen_seconds", ("3",)) not in found
    assert found["prunecast_run_node_errors_total", ("3",)] == 4


def test_a_node_that_is_not_waited_for_is_late_and_no_failure(tmp_path: Path) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 3, run_id=RUN_ID)
    inner.busy.add(2)
    heard: list[Any] = []

    def listen(event: Any) -> None:
        heard.append(event)
        if event["event"] == "round-finished" and event["round"] == 1:
            inner.busy.clear()
            inner.serve(2)

    run = Run(inner, FedAvg(), on_event=listen, deadlines=Deadlines(replies=2))
    run.start(to_record(initial_arrays()), num_rounds=2, timeout=60)
    rounds = [event["status"] for event in heard if event["event"] == "round-finished"]
    assert rounds[1]["states"] == {"answered": 2, "late": 1}
    told = {node["node"]: node for node in rounds[1]["nodes"]}
    assert (told["2"]["state"], told["2"]["errors"], told["2"]["seen"]) == ("late", 0, None)
    last = {node["node"]: node for node in status_of(heard)["nodes"]}
    assert all(node["errors"] == 0 for node in last.values())
    assert last["2"]["seen"] is not None


def test_labels_are_bounded_whatever_comes() -> None:
    metrics = RunMetrics(most_nodes=10)
    metrics(STARTED)
    many = {f"metric-{n}": n for n in range(5000)}
    metrics(round_finished(1, 10, metrics=many, client_metrics={"train": many}))
    found = samples(metrics.text().decode())
    assert sum(name == "prunecast_run_metric" for name, _ in found) == 64
    assert sum(name == "prunecast_run_node_version" for name, _ in found) == 10

    metrics(round_finished(2, 11))
    metrics(round_finished(3, 2))
    found = samples(metrics.text().decode())
    assert not any(name.startswith("prunecast_run_node_v") for name, _ in found)
    assert found["prunecast_run_round", ()] == 3
    ledger = Ledger()
    for number in range(100):
        ledger._tally.add(_entry(f"kind-{number}"))
    kinds = ledger.by_kind()["up"]
    assert len(kinds) == 25
    assert kinds["others"] == {"messages": 76, "bytes": 760}


def _entry(kind: str) -> Any:
    from prunecast.server.federation import Entry

    return Entry(1, 1, "up", kind, "train", 10, 20)


def test_events_name_a_bounded_number_of_nodes(tmp_path: Path) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 120, run_id=RUN_ID)
    heard: list[Any] = []
    run = Run(inner, FedAvg(fraction_evaluate=0.0), policy="small", on_event=heard.append)
    run.start(to_record(initial_arrays()), num_rounds=1, timeout=60)
    status = next(e for e in heard if e["event"] == "round-finished" and e["round"])["status"]
    assert (len(status["nodes"]), status["others"]) == (100, 20)
    assert status["states"] == {"answered": 120}
    assert len(json.dumps(status)) < 20_000


def test_a_node_that_failed_in_a_round_counts_however_many_did_and_whatever_it_answered_then(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    trains, fails = make_app(store), ClientApp(mods=[compression_mod(store)])

    @fails.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        content = RecordDict({"metrics": MetricRecord({"num-examples": 1})})
        return Message(content, reply_to=message)

    apps = {node: trains if node < 3 else fails for node in range(1, 121)}
    heard: list[Any] = []
    metrics = RunMetrics()

    def listen(event: Any) -> None:
        heard.append(event)
        metrics(event)

    run = Run(InProcessGrid(apps, 120, run_id=RUN_ID), FedAvg(), on_event=listen)
    run.start(to_record(initial_arrays()), num_rounds=2, timeout=60)
    last = [event for event in heard if event["event"] == "round-finished"][-1]
    assert last["nodes"]["failures"] == 118
    assert last["status"]["states"] == {"answered": 120}  # its last message, of the evaluation
    named = {node["node"] for node in last["status"]["nodes"]}
    assert not {"1", "2"} & named  # who failed is first
    found = samples(metrics.text().decode())
    assert found["prunecast_run_node_failures_total", ("failed",)] == 2 * 118


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event": "round-finished"},
        {"event": "round-finished", "time": "yesterday"},
        round_finished(2, 1, status={"nodes": [{}]}),
        round_finished(2, 1, seconds=None),
        {**STARTED, "event": "of-tomorrow"},
    ],
)
def test_an_event_that_is_not_understood_ends_nothing(event: dict[str, Any]) -> None:
    metrics = RunMetrics()
    metrics(STARTED)
    metrics(event)
    assert samples(metrics.text().decode())["prunecast_run_rounds", ()] == 3


def test_a_new_run_begins_to_count_anew() -> None:
    metrics = RunMetrics()
    metrics(STARTED)
    metrics(round_finished(1, 2))
    metrics({**STARTED, "event": "run-failed", "reason": "x"})
    found = samples(metrics.text().decode())
    assert found["prunecast_run_state", ()] == 3
    metrics({**STARTED, "run": "s"})
    found = samples(metrics.text().decode())
    assert found["prunecast_run_round", ()] == 0
    assert ("prunecast_run_info", ("n", "s", "FedAvg")) in found
    assert ("prunecast_run_info", ("n", "r", "FedAvg")) not in found


def test_an_address_that_is_taken_is_named() -> None:
    with (
        MetricsServer(lambda: b"") as server,
        pytest.raises(FederationError, match=rf"cannot bind 127\.0\.0\.1:{server.port}"),
    ):
        MetricsServer(lambda: b"", port=server.port)


def test_the_code_of_the_documentation_runs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[4] / "docs/deploy.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inner = InProcessGrid(make_app(tmp_path / "store"), 2, run_id=RUN_ID)
    scope: dict[str, Any] = {"grid": inner, "strategy": FedAvg()}
    exec(compile(code, "docs/deploy.md", "exec"), scope)
    scope["run"].start(to_record(initial_arrays()), num_rounds=1)
    assert samples(scope["metrics"].text().decode())["prunecast_run_state", ()] == 2


def test_the_ready_server_app_serves_metrics_while_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import support.torch_classifier as classifier

    said, read = [], []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    def measure(model: Any, context: Context) -> dict[str, float]:
        url = next(text for text in said if text.startswith("Metrics at ")).split()[-1]
        read.append(samples(fetched(url)))
        return {"accuracy": 0.5}

    monkeypatch.setattr(classifier, "spread", measure)
    inner = InProcessGrid(make_app(tmp_path / "store"), 2, run_id=RUN_ID)
    config = {
        "model": "support.torch_classifier:Classifier",
        "evaluate": "support.torch_classifier:spread",
        "num-server-rounds": 2,
        "timeout": 60.5,
        "metrics-port": 0,
    }
    handler = Listening()
    logging.getLogger("flwr").addHandler(handler)
    try:
        server_app.app(inner, Context(RUN_ID, 0, {}, RecordDict(), config))
    finally:
        logging.getLogger("flwr").removeHandler(handler)
    assert [found["prunecast_run_round", ()] for found in read] == [0, 0, 1]
    assert read[2]["prunecast_run_metric", ("server", "accuracy")] == 0.5
    assert read[2]["prunecast_run_state", ()] == 1


# -- files ----------------------------------------------------------------------------------------


def test_a_tail_reads_what_comes_and_begins_again_with_another_file(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert list(tail.read()) == []
    path.write_text('{"a": 1}\nno JSON\n[]\n{"a": ')
    assert list(tail.read()) == [{"a": 1}]
    assert list(tail.read()) == []
    with path.open("a") as file:
        file.write('2}\n{"a": 3}\n')
    assert list(tail.read()) == [{"a": 2}, {"a": 3}]
    other = tmp_path / "other"
    other.write_text('{"b": 1}\n')
    other.replace(path)
    assert list(tail.read()) == [{"b": 1}]


def test_the_status_of_a_folder(tmp_path: Path) -> None:
    apps = {1: make_app(tmp_path / "store"), 2: ClientApp()}
    run_of(InProcessGrid(apps, 2, run_id=RUN_ID), folder=tmp_path / "run", name="digits")
    result = CliRunner().invoke(app, ["federation", "status", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("digits: finished, round 2 of 2")
    assert "1 answered, 1 failed" in lines[1]
    row = next(line for line in lines if line.startswith(" 2 "))
    assert "failed" in row
    assert "ValueError: No evaluate function registered" in row

    path = tmp_path / "run" / "events.jsonl"
    result = CliRunner().invoke(app, ["federation", "status", str(path), "--json"])
    found = json.loads(result.output)
    assert {node["node"]: node["errors"] for node in found["nodes"]} == {"1": 0, "2": 4}
    # of one that was killed the file ends, and nobody holds it any more
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:-1]))
    result = CliRunner().invoke(app, ["federation", "status", str(path), "--json"])
    assert json.loads(result.output)["state"] == "cut off"
    with lock_open(path.open("a")):
        result = CliRunner().invoke(app, ["federation", "status", str(path), "--json"])
    assert json.loads(result.output)["state"] == "running"
    result = CliRunner().invoke(app, ["federation", "status", str(tmp_path), "--json"])
    assert result.exit_code == 1
    assert "cannot read" in result.output


def test_metrics_of_a_folder_are_served_between_runs(tmp_path: Path) -> None:
    run_of(InProcessGrid(make_app(tmp_path / "s"), 2, run_id=RUN_ID), folder=tmp_path / "run")
    command = [sys.executable, "-m", "prunecast.cli", "federation", "metrics", "--port", "0"]
    with subprocess.Popen(
        [*command, "--json", str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            url = json.loads(process.stdout.readline())["url"]
            before = samples(fetched(url))
            run_of(
                InProcessGrid(make_app(tmp_path / "t"), 2, run_id=RUN_ID + 1),
                1,
                folder=tmp_path / "run",
            )
            after = samples(fetched(url))
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    assert (before["prunecast_run_round", ()], before["prunecast_run_state", ()]) == (2, 2)
    assert (after["prunecast_run_round", ()], after["prunecast_run_rounds", ()]) == (1, 1)
    assert process.returncode == 128 + signal.SIGTERM

"""`prunecast fleet`, command by command, on a real repository and SQLite."""

from __future__ import annotations

import json
import os
import pwd
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app
from prunecast.compression.onnx.graph import save_graph
from prunecast.compression.versions import save_model
from prunecast.server.fleet.model import Outcome, Release
from prunecast.server.fleet.reports import DeviceReport, DeviceState, Health
from prunecast.server.fleet.service import FleetService
from prunecast.server.repository import KeyRing, Repository
from support.classifier import classifier, classifier_graph, classifier_inputs
from support.fleet import report
from support.releases import publish_model


def make_repository(folder: Path, versions: int) -> Path:
    """A repository with some releases; its keys lie beside it."""
    made = Repository.create(folder / "repository", KeyRing.create(folder / "keys"))
    for version in range(1, versions + 1):
        publish_model(
            made,
            "digits",
            classifier(version),
            classifier_graph(),
            selftest_inputs=classifier_inputs(),
        )
    return made.path


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with releases 1 and 2."""
    return make_repository(tmp_path_factory.mktemp("releases"), 2)


def run(*command: object, code: int = 0) -> str:
    """A command of `prunecast`; what it said, on both channels."""
    result = CliRunner().invoke(app, [*map(str, command)], prog_name="prunecast")
    assert result.exit_code == code, result.output
    return result.output


class Fleet:
    """Runs `prunecast fleet` on a database."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, *arguments: object, code: int = 0) -> str:
        return run("fleet", *arguments, "--database", self.url, code=code)

    def json(self, *arguments: object):
        command = ["fleet", *map(str, arguments), "--database", self.url, "--json"]
        result = CliRunner().invoke(app, command, prog_name="prunecast")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture
def empty(tmp_path: Path) -> Fleet:
    return Fleet(f"sqlite:///{tmp_path / 'fleet.db'}")


@pytest.fixture
def fleet(empty: Fleet, repository: Path) -> Fleet:
    empty("init", "--repository", repository)
    empty("group", "add", "lab", "--release", "digits", "--stable", 1)
    return empty


def test_a_rollout_from_enrolment_to_the_stable_release(fleet: Fleet) -> None:
    tokens = [fleet("device", "add", f"cam-{i}", "--group", "lab").strip() for i in range(4)]
    assert len(set(tokens)) == 4
    options = (
        "--group",
        "lab",
        "--stages",
        "25,100",
        "--name",
        "r",
        "--deadline",
        "10m",
        "--soak",
        "0s",
    )
    assert fleet("rollout", "start", "digits", 2, *options) == "started r: 1 of 4 devices first\n"
    releases = [Release("digits", 1), Release("digits", 2)]
    with FleetService(fleet.url, lambda: releases) as service:
        for now in (1.0, 2.0):
            for token in tokens:
                directive = service.poll(token, DeviceState(1, "0.1.0"), now)
                if directive.release == releases[1]:
                    report(
                        service,
                        token,
                        serial=directive.serial,
                        version=2,
                        outcome=Outcome.CONFIRMED,
                        now=now,
                    )
    assert [row["told"] for row in fleet.json("device", "list")] == [2, 2, 2, 2]
    (rollout,) = fleet.json("rollout", "list")
    assert (rollout["status"], rollout["confirmed"]) == ("completed", 3)
    (group,) = fleet.json("group", "list")
    assert group == {
        "group": "lab",
        "release": "digits",
        "stable": 2,
        "pin": None,
        "last_rollout": "r",
        "devices": 4,
        "problem": "",
    }
    shown = fleet.json("rollout", "show", "r")
    assert sorted(d["stage"] for d in shown["members"]) == [1, 2, 2, 2]
    entries = fleet.json("audit", "--subject", "r")
    actions = [entry["action"] for entry in entries]
    assert actions == ["rollout started", "rollout promoted", "rollout completed"]
    assert [e["kind"] for e in entries] == [action.replace(" ", "_") for action in actions]
    assert entries[0]["detail"] == "digits 2 to lab: 25 %, 100 %"
    assert entries[1]["detail"] == "to 100 %: 1 confirmed, 0 failed, 0 silent of 1"
    assert (entries[1]["fields"]["cause"], entries[1]["fields"]["percent"]) == ("settled", 100)
    first, after = entries[0]["number"], ("--subject", "r", "--after", entries[0]["number"])
    assert [e["number"] > first for e in fleet.json("audit", *after)] == [True, True]
    assert fleet.json("audit", *after, "--limit", 1) == entries[1:2]
    page = fleet.json("device", "list", "--after", "cam-0", "--limit", 2)
    assert [row["device"] for row in page] == ["cam-1", "cam-2"]
    assert len(fleet.json("rollout", "show", "r", "--limit", 3)["members"]) == 3
    for command in (("device", "list"), ("rollout", "list"), ("rollout", "show", "r"), ("audit",)):
        assert "cam-" in fleet(*command) or "digits" in fleet(*command)


def test_an_operator_steers(fleet: Fleet) -> None:
    for i in range(10):
        fleet("device", "add", f"d{i}", "--group", "lab")
    started = fleet.json("rollout", "start", "digits", 2, "--group", "lab", "--manual")
    name = started["rollout"]
    assert name.startswith("digits-2-")
    assert fleet("pause", name, "--reason", "holidays") == f"{name} (digits 2) is paused at 5 %\n"
    assert fleet.json("rollout", "show", name)["reason"] == "holidays"
    assert fleet("resume", name) == f"{name} (digits 2) is running at 5 %\n"
    assert fleet("promote", name) == f"{name} (digits 2) is running at 25 %\n"
    again = fleet("rollout", "start", "digits", 2, "--group", "lab", code=1)
    assert again == (
        f"error: rollout {name} (digits 2) is running in group lab: wait for it, or end it with "
        f"`prunecast fleet abort {name}`\n"
    )
    assert fleet("abort", name) == f"{name} (digits 2) is aborted at 25 %\n"
    assert "aborted, which is final" in fleet("promote", name, code=1)


def test_what_a_rollout_waits_for_and_why_devices_failed(fleet: Fleet) -> None:
    token = fleet("device", "add", "cam", "--group", "lab").strip()
    fleet("device", "add", "cam2", "--group", "lab")
    options = ("--group", "lab", "--stages", "100", "--name", "r", "--manual")
    fleet("rollout", "start", "digits", 2, *options)
    live = [Release("digits", 1), Release("digits", 2)]

    def say(service: FleetService, outcome: Outcome, now: float, detail: str = "") -> None:
        serial = service.poll(token, DeviceState(1), now).serial
        answer = {"serial": serial, "version": 2, "outcome": outcome, "detail": detail}
        assert report(service, token, **answer, now=now)

    now = time.time()
    with FleetService(fleet.url, lambda: live) as service:
        say(service, Outcome.ACTIVATED, now)
    (shown,) = fleet.json("rollout", "list")
    assert shown["next"].startswith("waits for 2 of 2 devices to confirm or to fail, then for ")
    assert "until when the stage soaks" in shown["next"]
    assert shown["next"].endswith("an operator: `prunecast fleet promote r`")
    for command in (("rollout", "list"), ("rollout", "show", "r")):
        assert "prunecast fleet promote r" in fleet(*command)
    assert "activated" in fleet("rollout", "show", "r")
    reason = "release 2: not confirmed after 3 starts (ended: killed, killed, killed)"
    with FleetService(fleet.url, lambda: live) as service:
        say(service, Outcome.CRASH_LOOP, now + 1, reason)
    (shown, _) = fleet.json("device", "list")
    assert shown["failure"] == f"2: crash loop: {reason}"
    for command in (("device", "list"), ("device", "show", "cam"), ("rollout", "show", "r")):
        assert f"crash loop: {reason}" in fleet(*command)
    (failed,) = fleet.json("device", "show", "cam")["failures"]
    assert (failed["version"], failed["outcome"], failed["detail"]) == (2, "crash loop", reason)
    paused = fleet.json("rollout", "show", "r")
    assert paused["status"] == "paused"
    assert paused["next"] == (
        "waits for `prunecast fleet resume r`, `prunecast fleet promote r`, "
        "`prunecast fleet abort r`"
    )
    fleet("abort", "r")
    again = fleet("rollout", "start", "digits", 2, "--group", "lab", "--name", "r2")
    assert again.startswith("warning: digits 2 failed before on 1 devices, which do not try it ")
    assert again.endswith("started r2: 1 of 1 devices first\n")
    fleet("abort", "r2")
    again = fleet.json("rollout", "start", "digits", 2, "--group", "lab", "--name", "r3")
    assert reason in again["warnings"][0]


def test_pins_moves_revocation_and_tokens(fleet: Fleet) -> None:
    token = fleet.json("device", "add", "cam", "--group", "lab")["token"]
    assert fleet("pin", 2, "--device", "cam") == "cam stays on version 2\n"
    assert fleet.json("device", "list", "--group", "lab")[0]["pin"] == 2
    assert fleet("unpin", "--device", "cam") == "cam follows rollouts again\n"
    assert "device cam is not pinned" in fleet("unpin", "--device", "cam", code=1)
    assert fleet("pin", 1, "--group", "lab") == "lab stays on version 1\n"
    assert "unpin --group lab" in fleet("rollout", "start", "digits", 2, "--group", "lab", code=1)
    fleet("pin", 1, code=2)
    fleet("pin", 1, "--device", "cam", "--group", "lab", code=2)
    fleet("group", "add", "field", "--release", "digits")
    assert fleet("device", "move", "cam", "--group", "field") == "cam is in group field\n"
    assert fleet("device", "token", "cam").strip() != token
    assert "revoked cam" in fleet("device", "revoke", "cam")
    assert fleet.json("device", "list")[0]["answer"] == "revoked"
    assert "is revoked, which is final" in fleet("device", "revoke", "cam", code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("device", "add", "a b", "--group", "lab"), "device name 'a b' is not usable"),
        (("device", "add", "a", "--group", "attic"), "no group named 'attic': list them with"),
        (("group", "add", "lab", "--release", "digits"), "there is a group lab already"),
        (("group", "add", "x", "--release", "cats"), "no live release named 'cats' (it has: d"),
        (("rollout", "start", "digits", "9", "--group", "lab"), "(live: 1, 2): publish it first"),
        (("rollout", "start", "digits", "2", "--group", "lab", "--stages", "9"), "end at 100"),
        (("rollout", "show", "r7"), "no rollout named 'r7'"),
        (("pin", "1", "--device", "ghost"), "no device named 'ghost'"),
    ],
)
def test_errors_say_what_to_do(fleet: Fleet, arguments: tuple[str, ...], message: str) -> None:
    output = fleet(*arguments, code=1)
    assert output.startswith("error: ")
    assert output.count("\n") == 1
    assert message in output


@pytest.mark.parametrize("wrong", [("--deadline", "soon"), ("--stages", "a,b")])
def test_wrong_options_are_usage_errors(fleet: Fleet, wrong: tuple[str, str]) -> None:
    fleet("rollout", "start", "digits", 2, "--group", "lab", *wrong, code=2)


def test_a_fleet_is_made_once(empty: Fleet, repository: Path, tmp_path: Path) -> None:
    assert "holds no fleet: make one with `prunecast fleet init`" in empty("device", "list", code=1)
    assert not (tmp_path / "fleet.db").exists()
    assert "is not a release repository" in empty("init", "--repository", tmp_path, code=1)
    empty("init", "--repository", repository)
    assert "holds a fleet already" in empty("init", "--repository", repository, code=1)


def test_what_a_device_says_is_shown(fleet: Fleet) -> None:
    token = fleet.json("device", "add", "cam", "--group", "lab")["token"]
    shown = fleet.json("device", "show", "cam")
    assert (shown["device"], shown["runs"], "figures" in shown) == ("cam", None, False)
    with FleetService(fleet.url, lambda: [Release("digits", 1)]) as service:
        health = Health("disk full", {"celsius": 71.5, "resident_bytes": 111_833_088.0})
        service.receive(token, DeviceReport("report01", DeviceState(1), None, health), 0)
    shown = fleet.json("device", "show", "cam")
    assert (shown["runs"], shown["problem"], shown["figures"]) == (
        1,
        "disk full",
        {"celsius": 71.5, "resident_bytes": 111_833_088.0},
    )
    table = fleet("device", "show", "cam")
    assert "71.5" in table
    assert "111833088" in table
    assert "no device named 'other'" in fleet("device", "show", "other", code=1)
    assert "is up to date" in fleet("upgrade")


def test_a_server_needs_tls_files_that_work(fleet: Fleet, tmp_path: Path) -> None:
    fleet("serve", code=2)
    absent = ("--certificate", tmp_path / "c.pem", "--key", tmp_path / "k.pem")
    assert "a TLS file is unusable" in fleet("serve", *absent, code=1)


def test_what_a_fleet_stands_on_stays_live_until_it_is_forced(empty: Fleet, tmp_path: Path) -> None:
    repository, keys = make_repository(tmp_path, 3), ("--keys", tmp_path / "keys")
    empty("init", "--repository", repository)
    assert run("release", "fleets", repository) == f"{empty.url}\n"
    empty("group", "add", "field", "--release", "digits", "--stable", 2)
    token = empty("device", "add", "cam", "--group", "field").strip()
    options = ("--group", "field", "--stages", "100", "--manual", "--name", "go3")
    empty("rollout", "start", "digits", 3, *options)
    live = [Release("digits", version) for version in (1, 2, 3)]
    with FleetService(empty.url, lambda: live) as service:
        assert service.poll(token, DeviceState(2), 1).release == live[2]
    said = run("release", "retire", repository, "digits", 2, *keys, code=1)
    assert said.startswith("error: digits 2 stays live: rollout go3 goes back to it in group field")
    assert "wait until rollout go3 has completed" in said
    assert "brings it to devices" in run(
        "release", "retire", repository, "digits", 3, *keys, code=1
    )
    assert "retired digits 1" in run("release", "retire", repository, "digits", 1, *keys)
    run("release", "retire", repository, "digits", 2, *keys, "--force")
    assert "stable 2 is retired" in empty("group", "list")
    assert empty.json("group", "list")[0]["problem"] == "stable 2 is retired"
    said = run("release", "doctor", repository, *keys, code=1)
    assert f"problem: rollout go3 (fleet {empty.url}): goes back to it in group field" in said
    said = empty("abort", "go3", "--reason", "want back to 2", code=1)
    assert said.startswith("go3 (digits 3) is aborted at 100 %\nwarning: nothing is rolled back")
    lost = "want back to 2; group field cannot go back: digits 2, its stable release, is retired"
    assert empty.json("rollout", "show", "go3")["reason"] == lost
    assert lost in empty("audit", "--subject", "go3")
    run("release", "fleets", repository, "--forget", empty.url)
    assert run("release", "fleets", repository) == "no fleet follows this repository\n"
    assert "is up to date" in empty("upgrade")
    assert run("release", "fleets", repository) == f"{empty.url}\n"


def test_a_publication_says_what_its_window_keeps(empty: Fleet, tmp_path: Path) -> None:
    repository, keys = make_repository(tmp_path, 2), ("--keys", tmp_path / "keys")
    empty("init", "--repository", repository)
    empty("group", "add", "field", "--release", "digits", "--stable", 1)
    save_graph(classifier_graph(), tmp_path / "toy.graph")
    save_model(classifier(3), tmp_path / "3.model")
    np.savez(tmp_path / "x.npz", input=classifier_inputs())
    said = run(
        *("release", "create", repository, "digits", *keys, "--window", 1),
        *("--model", tmp_path / "3.model", "--graph", tmp_path / "toy.graph"),
        *("--selftest", tmp_path / "x.npz"),
    )
    assert "retired 2: outside the window\n" in said
    assert "kept 1 outside the window: group field has it as its stable release" in said
    listed = json.loads(run("release", "list", repository, "--json"))["releases"]
    assert [release["version"] for release in listed] == [1, 3]


def test_the_audit_log_names_who_calls_and_not_what_the_environment_says(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "mallory")
    me = f"user:{pwd.getpwuid(os.getuid()).pw_name}"
    fleet("device", "add", "cam", "--group", "lab")
    fleet("pin", 1, "--device", "cam")
    assert {entry["actor"] for entry in fleet.json("audit")[-2:]} == {me}
    token = tmp_path / "ada.token"
    token.write_text(fleet("operator", "add", "ada"))
    token.chmod(0o600)
    assert fleet.json("operator", "list") == ["ada"]
    said = fleet("pin", 2, "--device", "cam", code=1)
    assert "this fleet has operators: let PRUNECAST_OPERATOR name the file" in said
    monkeypatch.setenv("PRUNECAST_OPERATOR", str(token))
    fleet("pin", 2, "--device", "cam")
    assert fleet.json("audit")[-1]["actor"] == "operator:ada"
    fleet("operator", "remove", "ada")
    assert "no operators" in fleet("operator", "list")

"""Units, nginx and the dashboard: valid, confined, and of commands and metrics that exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.loopback.engine import executable
from prunecast.cli.main import app
from prunecast.server.federation.operating.credentials import make_credentials
from prunecast.server.federation.reporting.metrics import RunMetrics

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy/systemd"
SERVICES = {
    "prunecast-superlink.service": 15,  # tenths that `systemd-analyze security` may give
    "prunecast-supernode@.service": 15,
    "prunecast-releases.service": 12,
    "prunecast-fleet.service": 12,
    "prunecast-superlink-backup.service": 5,
}
KEYS = {"ca.crt", "server.crt", "server.key", "node-%i"}


def text_of(unit: str) -> str:
    return (UNITS / unit).read_text().replace("\\\n", " ")


def settings(unit: str, name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", text_of(unit), re.MULTILINE)


def check_command(words: list[str], flower: dict[str, str]) -> None:
    """Whether a command names options that exist, and one below a watch too."""
    program = words[0].rpartition("/")[2]
    own = words[: words.index("--")] if "--" in words else words
    if program == "prunecast":
        names = []
        for word in own[1:]:
            if not re.fullmatch("[a-z]+", word):
                break
            names.append(word)
        while names:
            result = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": "200"})
            if result.exit_code == 0:
                break
            names.pop()  # the last one was an argument
        shown = result.output
    else:
        shown = flower[program]
    for word in own[1:]:
        if word.startswith("--"):
            assert word.partition("=")[0] in shown, f"{program} has no {word}"
    if len(own) < len(words):
        check_command(words[len(own) + 1 :], flower)


@pytest.fixture(scope="session")
def flower() -> dict[str, str]:
    """What Flower's commands say of their options."""
    env = {**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    return {
        name: subprocess.run(
            [executable(name), "--help"],
            capture_output=True, text=True, check=True, timeout=120, env=env,
        ).stdout
        for name in ("flower-superlink", "flower-supernode")
    }  # fmt: skip


@pytest.mark.parametrize("unit", SERVICES)
def test_commands_and_options_exist(unit: str, flower: dict[str, str]) -> None:
    (line,) = settings(unit, "ExecStart")
    words = [word for word in line.split() if not word.startswith("$")]
    check_command(words, flower)
    known = set(re.findall(r"(\w+)=", " ".join(settings(unit, "Environment"))))
    for name in re.findall(r"\$\{(\w+)\}", line):
        assert name in known or name == "SUPERNODE_SUPERLINK"
    credentials = dict(one.split(":") for one in settings(unit, "LoadCredential"))
    assert {path.rpartition("/")[2] for path in credentials.values()} <= KEYS
    assert set(re.findall(r"%d/([\w.]+)", line)) == set(credentials)


@pytest.mark.parametrize("unit", [unit for unit in SERVICES if "backup" not in unit])
def test_services_come_back_whatever_their_exit_status(unit: str) -> None:
    assert settings(unit, "Restart") == ["always"]
    assert settings(unit, "StartLimitIntervalSec") == ["0"]
    (line,) = settings(unit, "ExecStart")
    drains = re.search(r"--drain (\d+)", line)
    assert settings(unit, "Type") == ["notify"]
    assert settings(unit, "WatchdogSec")
    if "federation watch" in line:
        # the watch passes the signal on when it is time
        assert settings(unit, "KillMode") == ["mixed"]
        assert "AF_NETLINK" in settings(unit, "RestrictAddressFamilies")[0]
    if drains:
        assert int(settings(unit, "TimeoutStopSec")[0]) > int(drains[1]) + 30


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
@pytest.mark.parametrize("unit", SERVICES)
def test_units_are_valid_and_confined(unit: str, tmp_path: Path) -> None:
    path = tmp_path / unit.replace("@", "@1")
    path.write_text(re.sub(r"/opt/prunecast/bin/[a-z-]+", "/bin/true", (UNITS / unit).read_text()))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=120
    )
    assert [line for line in done.stderr.splitlines() if "prunecast" in line] == []
    security = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={SERVICES[unit]}", path],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "SYSTEMD_COLORS": "0"},
    )
    assert security.returncode == 0, security.stdout


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_the_drop_in_for_gpus_is_valid_and_opens_nothing_else(tmp_path: Path) -> None:
    unit = tmp_path / "prunecast-supernode@1.service"
    text = (UNITS / "prunecast-supernode@.service").read_text()
    unit.write_text(re.sub(r"/opt/prunecast/bin/[a-z-]+", "/bin/true", text))
    folder = tmp_path / "prunecast-supernode@1.service.d"
    folder.mkdir()
    shutil.copy(UNITS / "supernode-gpu.conf", folder / "gpu.conf")
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=120
    )
    assert [line for line in done.stderr.splitlines() if "prunecast" in line] == []
    allowed = re.findall(r"^(?!#)(\w+)=", (folder / "gpu.conf").read_text(), re.MULTILINE)
    assert set(allowed) == {
        *("Wants", "After", "PrivateDevices", "DevicePolicy", "DeviceAllow"),
        *("LimitMEMLOCK", "Environment"),
    }


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_timer_and_users_are_valid(tmp_path: Path) -> None:
    for unit in UNITS.glob("prunecast-superlink-backup.*"):
        text = unit.read_text().replace("/opt/prunecast/bin/prunecast", "/bin/true")
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "prunecast-superlink-backup.timer")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [line for line in done.stderr.splitlines() if "prunecast" in line] == []
    made = (UNITS / "prunecast-federation.sysusers.conf").read_text()
    users = re.findall(r"^u (\S+)", made, re.MULTILINE)
    for unit in SERVICES:
        assert settings(unit, "User")[0] in users
    if shutil.which("systemd-sysusers"):
        subprocess.run(
            ["systemd-sysusers", "--dry-run", str(UNITS / "prunecast-federation.sysusers.conf")],
            check=True,
            capture_output=True,
            timeout=60,
        )


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="needs nginx")
@pytest.mark.parametrize(
    "path",
    ["nginx/superlink.conf", "containers/gate.conf", "kubernetes/server/gate.conf"],
)
def test_nginx_takes_the_configurations(path: str, tmp_path: Path) -> None:
    make_credentials(tmp_path / "keys", hosts=["superlink"])
    text = (ROOT / "deploy" / path).read_text().replace("/tmp/", f"{tmp_path}/")
    for place in ("/etc/prunecast/keys", "/run/secrets/superlink", "/run/secrets"):
        text = text.replace(place, str(tmp_path / "keys"))
    text = text.replace("//superlink:8000", "//127.0.0.1:8000")
    if path.startswith("nginx/"):
        text = f"events {{}} http {{ {text} }}"
        text = f"pid {tmp_path}/nginx.pid; {text}"
    config = tmp_path / "nginx.conf"
    config.write_text(text)
    done = subprocess.run(
        [str(NGINX), "-t", "-q", "-c", str(config), "-e", "stderr"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    # nothing but what nodes need goes on to the SuperLink
    locations = re.findall(r"location ([^{]+?) ?\{([^}]*)\}", text)
    passed = {where for where, what in locations if "proxy_pass" in what}
    assert passed == {"/v1/fleet/", "= /health"}
    assert {where for where, what in locations if "return 404" in what} == {"/"}


def test_the_dashboard_and_the_documentation_name_metrics_that_exist() -> None:
    metrics = RunMetrics()
    node = {"node": "1", "state": "answered", "seen": "2026-01-01T00:00:00+00:00"}
    node |= {"version": 1, "errors": 0}
    kinds = {"down": {"delta": {"messages": 1, "bytes": 1}}, "up": {}}
    basis = {"time": "2026-01-01T00:00:00+00:00", "run": "r", "rounds": 3, "round": 1}
    metrics({**basis, "event": "run-started"})
    metrics(
        {
            **basis,
            "event": "round-finished",
            "seconds": 1.0,
            "metrics": {"a": 1.0},
            "dense_bytes_down": 1,
            "dense_bytes_up": 1,
            "kinds": kinds,
            "status": {"nodes": [node], "states": {"answered": 1}},
        }
    )
    lines = [line for line in metrics.text().decode().splitlines() if not line.startswith("#")]
    exist = {re.split(r"[{ ]", line)[0] for line in lines}

    dashboard = json.loads((ROOT / "deploy/grafana/federation.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"prunecast_run_\w+", target["expr"])
    }
    assert len(asked) > 12
    assert asked <= exist
    text = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    table = text.split("| `prunecast_run_...` |")[1].split("\n\n")[0]
    named = {
        f"prunecast_run_{name}"
        for row in table.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert named == exist

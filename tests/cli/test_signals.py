"""Commands that are asked to end: nothing half-written stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from prunecast.cli.main import app

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("signals_end")]  # processes

SIGNALS = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]


def start(*command: object, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "prunecast.cli", *map(str, command)],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def until(true: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert process.poll() is None, "it ended before the signal"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that takes seconds, and the same compressed."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("weights")
    arrays = {f"t{i}": rng.normal(size=500_000).astype(np.float32) for i in range(24)}
    np.savez(folder / "a.npz", **arrays)
    done = start("compress", folder / "a.npz", "-o", folder / "a.pcc", folder=folder)
    assert done.wait(timeout=300) == 0
    return folder


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("command", ["compress", "decompress"])
def test_a_command_that_is_ended_leaves_no_temporary(
    weights: Path, tmp_path: Path, command: str, number: signal.Signals
) -> None:
    source, made = ("a.npz", "b.pcc") if command == "compress" else ("a.pcc", "b.npz")
    process = start(command, weights / source, "-o", tmp_path / made, folder=tmp_path)
    until(lambda: list(tmp_path.glob(f".{made}.*")), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode in (128 + number, -number), said.decode()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_pruning_that_is_ended_leaves_no_temporary(tmp_path: Path, number: signal.Signals) -> None:
    size = 300_000_000  # zeros, which the file system need not hold
    header = json.dumps(
        {"w": {"dtype": "F32", "shape": [size // 400, 100], "data_offsets": [0, size]}}
    ).encode()
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    process = start("prune", "a.safetensors", "--sparsity", 0.5, folder=tmp_path)
    until(lambda: list(tmp_path.glob(".a.pruned.*")), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=300)
    assert process.returncode in (128 + number, -number), said.decode()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(("raised", "status"), [(SystemExit(143), 143), (KeyboardInterrupt(), 130)])
def test_an_error_of_the_cleaning_up_does_not_hide_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: BaseException, status: int
) -> None:
    np.savez(tmp_path / "a.npz", a=np.arange(9))
    compress = ["compress", tmp_path / "a.npz", "-o", tmp_path / "a.pcc"]
    assert CliRunner().invoke(app, list(map(str, compress))).exit_code == 0

    def interrupted(*arguments: object, **named: object) -> None:
        raise raised  # the archive believes that a member is open, and refuses to be closed

    monkeypatch.setattr("zipfile._ZipWriteFile.__init__", interrupted)
    decompress = ["decompress", tmp_path / "a.pcc", "-o", tmp_path / "b.npz"]
    assert CliRunner().invoke(app, list(map(str, decompress))).exit_code == status
    assert {path.name for path in tmp_path.iterdir()} == {"a.npz", "a.pcc"}


def test_a_signal_that_is_ignored_stays_so(weights: Path, tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from prunecast.cli.signals import end_cleanly; end_cleanly()\n"
        "assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN\n"
        "signal.raise_signal(signal.SIGHUP); signal.raise_signal(signal.SIGTERM)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 143


def test_a_computation_outside_python_does_not_hold_the_end(tmp_path: Path) -> None:
    code = (
        "import hashlib; from prunecast.cli.signals import end_cleanly; end_cleanly(0.1)\n"
        "print('begun', flush=True); hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"begun\n"
        until(lambda: computes(process.pid), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=300) == 143


def computes(pid: int) -> bool:
    """Whether a process has been busy for longer than it takes to start."""
    busy = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11]
    return int(busy) > 2 * os.sysconf("SC_CLK_TCK")

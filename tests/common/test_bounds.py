"""What a file from elsewhere may ask for."""

from __future__ import annotations

import os
from pathlib import Path

from prunecast.common.bounds import byte_limit, disk_bytes

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

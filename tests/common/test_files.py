"""Files that survive a power cut, and locks between processes."""

import os
import subprocess
import sys

import pytest

from prunecast.common.files import (
    StorageError,
    cache_folder,
    file_digest,
    folder_bytes,
    is_locked,
    keep_only,
    lock_file,
    make_folder,
    replacing,
    replacing_all,
    write_atomically,
    write_new,
    write_synced,
)
from support.powercut import VARIANTS, Recorder


def test_written_files_have_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    write_atomically(tmp_path / "file", b"x")
    assert (tmp_path / "file").stat().st_mode == plain.stat().st_mode


def test_a_failed_write_leaves_the_old_file_and_no_debris(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_exception_in_the_block_leaves_the_old_file(tmp_path):
    write_atomically(tmp_path / "file", b"old")

    def half() -> None:
        with replacing(tmp_path / "file") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_power_cut_leaves_the_old_file_or_the_new_one(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_atomically(folder / "file", b"old" * 1000)
    recorder, found = Recorder(folder), set()
    with pytest.MonkeyPatch.context() as patch:
        recorder.install(patch)
        write_atomically(folder / "file", b"new" * 1000)
    recorder.close()
    for number, disk in enumerate(recorder.moments):
        for variant in VARIANTS:
            (target := tmp_path / f"{number} {variant}").mkdir()
            disk.restore(target, variant)
            found.add((target / "file").read_bytes())
    assert found == {b"old" * 1000, b"new" * 1000}


def test_a_new_file_is_private_and_never_replaces_another(tmp_path):
    write_new(tmp_path / "key", b"secret")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "key").read_bytes() == b"secret"
    with pytest.raises(FileExistsError):
        write_new(tmp_path / "key", b"other")
    assert (tmp_path / "key").read_bytes() == b"secret"


def test_folders(tmp_path):
    folder = tmp_path / "a" / "b"
    assert folder_bytes(folder) == 0
    keep_only(folder, ())
    make_folder(folder)
    make_folder(folder)
    for name in ("one", "two"):
        write_synced(folder / name, b"x" * 10)
    assert folder_bytes(tmp_path) == 20
    assert file_digest(folder / "one") == file_digest(folder / "two")
    keep_only(folder, {"two"})
    assert os.listdir(folder) == ["two"]


def test_the_cache_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("graphs") == tmp_path / "prunecast" / "graphs"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/me")
    assert str(cache_folder("nodes")) == "/home/me/.cache/prunecast/nodes"


def test_a_lock_excludes_others_until_its_holder_ends(tmp_path):
    path = tmp_path / ".lock"
    assert not is_locked(path)
    with lock_file(path):
        assert is_locked(path)
        with pytest.raises(BlockingIOError):
            lock_file(path)
    assert not is_locked(path)
    program = (
        "import os, pathlib, sys\n"
        "from prunecast.common.files import is_locked, lock_file\n"
        "held = lock_file(pathlib.Path(sys.argv[1]))\n"
        "os._exit(3 if is_locked(pathlib.Path(sys.argv[1])) else 4)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, path], timeout=300).returncode == 3
    assert not is_locked(path)


def test_a_signal_as_a_temporary_is_made_leaves_none(tmp_path, monkeypatch):
    real, opened = os.open, []

    def ended(path, flags, mode=0o777):
        handle = real(path, flags, mode)
        if flags & os.O_EXCL:
            opened.append(handle)
            if len(opened) == 2:
                raise SystemExit(143)
        return handle

    monkeypatch.setattr(os, "open", ended)
    with pytest.raises(SystemExit), replacing_all([tmp_path / "one", tmp_path / "two"]):
        pass
    os.close(opened[1])
    assert os.listdir(tmp_path) == []


def test_a_power_cut_leaves_no_mixture_of_files_that_belong_together(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    names = ("one", "two", "index")

    def write(content: bytes) -> None:
        paths = [folder / name for name in names]
        with replacing_all(paths, outdated=[paths[-1]]) as temporaries:
            for temporary in temporaries:
                temporary.write_bytes(content)

    write(b"old" * 1000)
    recorder, found = Recorder(folder), set()
    with pytest.MonkeyPatch.context() as patch:
        recorder.install(patch)
        write(b"new" * 1000)
    recorder.close()
    for number, disk in enumerate(recorder.moments):
        for variant in VARIANTS:
            (target := tmp_path / f"{number} {variant}").mkdir()
            disk.restore(target, variant)
            if (target / "index").exists():
                found.add(tuple((target / name).read_bytes() for name in names))
    assert found == {(b"old" * 1000,) * 3, (b"new" * 1000,) * 3}

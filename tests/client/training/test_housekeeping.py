"""What the nodes of a machine keep: aged by use, bounded, shared by processes, gone at the end."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from prunecast.client.training import store as store_module
from prunecast.client.training.housekeeping import (
    STALE_SECONDS,
    Kept,
    kept_in,
    make_room,
    remove,
    tidy,
)
from prunecast.client.training.store import NodeStore, StoreError
from prunecast.common.files import StorageError
from prunecast.compression.versions import Instruction, PublishedModel, UpdateRule
from prunecast.compression.versions.model import RawTensor
from prunecast.server.federation import CompressedGrid, Ledger
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import initial_arrays, make_app, to_record

MODEL = PublishedModel({"w": RawTensor(np.arange(4096, dtype=np.float32))}, 1)
MONTH = STALE_SECONDS + 86400


def keep(root: Path, job: int | str, node: int = 1, *, last: bool = False) -> Path:
    """A folder with a model of 16 kB."""
    store = NodeStore(root, job, node)
    store.keep("arrays", MODEL)
    store.note_end(last=last)
    store.close()
    return store._folder


def age(folder: Path, ago: float = MONTH) -> None:
    """Let a node's folder be used so many seconds ago, and not since."""
    then = time.time() - ago
    for path in (*folder.rglob("*"), folder, folder.parent):
        os.utime(path, (then, then))


def jobs(root: Path) -> set[str]:
    return {kept.job for kept in kept_in(root)}


# -- age ------------------------------------------------------------------------------------------


def closes(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody list a folder, not even root, who may run these tests."""
    iterdir = Path.iterdir

    def refuse(folder: Path) -> Any:
        if folder == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return iterdir(folder)

    monkeypatch.setattr(Path, "iterdir", refuse)


def test_a_run_that_goes_on_for_a_month_keeps_its_files(tmp_path: Path) -> None:
    """Its folders are old, and so are the files where messages only name what is held."""
    folders = [keep(tmp_path, job) for job in (1, 2)]
    for folder in folders:
        age(folder)
    NodeStore(tmp_path, 1, 1).close()  # a message that writes nothing
    NodeStore(tmp_path, 3, 1)
    assert len(list(folders[0].glob("*.model"))) == 1
    assert jobs(tmp_path) == {"1", "3"}


def test_one_node_of_a_job_goes_where_another_goes_on(tmp_path: Path) -> None:
    first = keep(tmp_path, "digits", 1)
    keep(tmp_path, "digits", 2)
    age(first)
    NodeStore(tmp_path, "letters", 1)
    assert {(kept.job, kept.node) for kept in kept_in(tmp_path)} == {
        ("digits", "2"),
        ("letters", "1"),
    }


def test_what_a_message_uses_stays_however_old_it_is(tmp_path: Path) -> None:
    keep(tmp_path, 1)
    store = NodeStore(tmp_path, 1, 1)  # training for a month
    age(store._folder)
    NodeStore(tmp_path, 2, 1)
    assert store.held("arrays") is not None
    (kept,) = (kept for kept in kept_in(tmp_path) if kept.job == "1")
    assert kept.in_use
    assert not remove(kept)
    store.close()
    NodeStore(tmp_path, 3, 1)
    assert jobs(tmp_path) == {"2", "3"}


def test_what_was_used_since_it_was_looked_at_stays(tmp_path: Path) -> None:
    age(keep(tmp_path, 1))
    (kept,) = kept_in(tmp_path)
    NodeStore(tmp_path, 1, 1).close()
    assert not remove(kept)
    assert jobs(tmp_path) == {"1"}


def test_a_link_is_not_followed_by_who_removes(tmp_path: Path) -> None:
    """One store may be of several users: each could have another's folders removed."""
    store, outside = tmp_path / "store", tmp_path / "books" / "2019"
    outside.mkdir(parents=True)
    (outside / "january").write_text("kept for ten years")
    store.mkdir()
    (store / "555").symlink_to(outside.parent)
    (store / "666").mkdir()
    (store / "666" / "9").symlink_to(outside)
    age(outside)
    NodeStore(store, 1, 1)
    assert jobs(store) == {"1"}
    assert (outside / "january").exists()


@pytest.mark.parametrize("closed", ["unreadable", "loop"])
def test_a_job_that_cannot_be_read_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    """In a store of several users: the others' jobs may be theirs alone."""
    age(keep(tmp_path, 10))
    theirs = tmp_path / "1"
    if closed == "loop":
        theirs.symlink_to(theirs)
    else:
        theirs.mkdir()
        closes(theirs, monkeypatch)
        os.utime(theirs, (0, 0))
    assert jobs(tmp_path) == {"10"}
    assert not make_room(tmp_path, tmp_path / "20", most=100, more=200)
    assert jobs(tmp_path) == set(), "it made room"
    age(keep(tmp_path, 10))
    NodeStore(tmp_path, 20, 1)
    assert jobs(tmp_path) == {"20"}


def test_a_quota_holds_where_nobody_may_list_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = keep(tmp_path, 1)
    closes(tmp_path, monkeypatch)
    assert make_room(tmp_path, folder.parent, most=20_000, more=100)
    assert not make_room(tmp_path, folder.parent, most=20_000, more=10_000)


def test_temporaries_of_killed_processes_go_with_the_next_job(tmp_path: Path) -> None:
    folder = keep(tmp_path, "digits")
    half = folder.parent / ".gone-0123456789abcdef"
    half.mkdir()
    (half / "a.model").write_bytes(b"half removed")
    (folder.parent / f".name.{'ab' * 8}").write_bytes(b"half written")
    empty = tmp_path / "77"
    empty.mkdir()
    os.utime(empty, (0, 0))
    NodeStore(tmp_path, 2, 1)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["1", "name"]
    assert not empty.exists()


def test_what_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "notes").mkdir()
    (tmp_path / "photos" / "5").mkdir(parents=True)
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    keep(tmp_path, 2)
    tidy(tmp_path, tmp_path / "none")
    assert (tmp_path / "1" / "notes").is_dir()
    assert (tmp_path / "photos" / "5").is_dir()


# -- many processes -------------------------------------------------------------------------------


def churn(root: Path, seed: int, rounds: int) -> None:
    """As nodes do that begin and end jobs while others do the same."""
    choices = random.Random(seed)
    for _ in range(rounds):
        job, node = choices.randrange(3), choices.randrange(2)
        store = NodeStore(root, job, node, quota=60_000)
        try:
            store.keep("arrays", MODEL)
        except StoreError:  # two of its nodes do not fit beside others that are in use
            store.close()
            continue
        assert store.held("arrays") is not None  # nobody took it away meanwhile
        store.note_end(last=choices.random() < 0.5)
        store.close()
        tidy(root, root / "none")


def test_processes_that_start_together_neither_fail_nor_lose_anything(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    several = [context.Process(target=churn, args=(tmp_path, n, 25)) for n in range(4)]
    for process in several:
        process.start()
    for process in several:
        process.join(120)
    assert [process.exitcode for process in several] == [0] * 4
    assert not list(tmp_path.rglob(".gone-*"))


def test_threads_as_well(tmp_path: Path) -> None:
    failed: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            churn(tmp_path, seed, 10)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed


# -- a quota --------------------------------------------------------------------------------------


def test_jobs_used_longest_ago_make_room_and_finished_ones_first(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, 4, 1)
    folders = {job: keep(tmp_path, job, last=job == 3) for job in (1, 2, 3)}
    size = sum(p.stat().st_size for p in folders[1].iterdir())
    for job, folder in folders.items():
        age(folder, ago=400 - 100 * job)
    store = NodeStore(tmp_path, 4, 1, quota=int(2.5 * size))
    store.keep("arrays", MODEL)
    assert jobs(tmp_path) == {"2", "4"}
    store.keep("arrays", MODEL)  # in place of itself
    assert jobs(tmp_path) == {"2", "4"}
    store.keep("control", MODEL)
    assert jobs(tmp_path) == {"4"}


def test_the_job_that_is_handled_never_makes_room(tmp_path: Path) -> None:
    """Not its other nodes, either; where it needs more alone, that is said, and all else goes."""
    size = sum(p.stat().st_size for p in keep(tmp_path, 1, node=1).iterdir())
    age(keep(tmp_path, 2), ago=50)
    store = NodeStore(tmp_path, 1, 2, quota=int(1.5 * size))
    with pytest.raises(StoreError, match=r"prunecast-store-quota.*four models"):
        store.keep("arrays", MODEL)
    assert {(kept.job, kept.size > 0) for kept in kept_in(tmp_path)} == {("1", True), ("1", False)}


def test_what_another_process_uses_never_makes_room(tmp_path: Path) -> None:
    folder = keep(tmp_path, 1)
    other = NodeStore(tmp_path, 1, 1)
    assert not make_room(tmp_path, tmp_path / "2", 10, 100)
    assert list(folder.glob("*.model"))
    other.close()
    assert not make_room(tmp_path, tmp_path / "2", 10, 100)  # more than there may be at all
    assert not folder.exists()


@pytest.mark.parametrize("quota", [0, -1, "lots", True])
def test_a_quota_that_is_none_is_refused_by_name(tmp_path: Path, quota: Any) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 1)
    inner._contexts[1].node_config["prunecast-store-quota"] = quota
    grid = CompressedGrid(inner, "balanced", poll_interval=0.01)
    content = RecordDict({"arrays": to_record(initial_arrays())})
    (reply,) = grid.send_and_receive([Message(content, 1, "train")])
    assert "prunecast-store-quota" in reply.error.reason


def test_under_a_quota_too_small_updates_are_sent_and_said_not_to_be_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 1)
    inner._contexts[1].node_config["prunecast-store-quota"] = 100
    grid = CompressedGrid(inner, "balanced", ledger=Ledger(keep=100), poll_interval=0.01)
    for number in range(2):
        content = RecordDict({"arrays": to_record(initial_arrays(number))})
        (reply,) = grid.send_and_receive([Message(content, 1, "train")])
        assert not reply.has_error()
    assert [e.kind for e in grid.ledger.entries] == ["keyframe", "update"] * 2
    assert "Node 1 cannot keep" in caplog.text
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) <= 100


# -- the end of a job -----------------------------------------------------------------------------


@pytest.mark.parametrize("job", ["", "digits"])
def test_the_last_round_tells_nodes_and_the_next_job_takes_the_place(
    tmp_path: Path, job: str
) -> None:
    """Unless the job has a name, under which another run may go on with it."""
    store = tmp_path / "store"
    told: list[bool] = []
    for run_id in (21, 22):
        inner = InProcessGrid(make_app(store), 2, run_id=run_id)
        grid = CompressedGrid(inner, "balanced", job=job, poll_interval=0.01)
        if run_id == 22 and job:
            grid = CompressedGrid(inner, "balanced", job="others", poll_interval=0.01)
        FedAvg().start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2)
        told.append(all(kept.finished for kept in kept_in(store)))
    assert told == [not job, not job]
    assert jobs(store) == ({"digits", "others"} if job else {"22"})


def test_a_job_that_goes_on_after_all_is_not_taken_for_finished(tmp_path: Path) -> None:
    inner = InProcessGrid(make_app(tmp_path / "store"), 1)
    grid = CompressedGrid(inner, "balanced", poll_interval=0.01)
    grid.expect_rounds(1)
    found = []
    for number in (1, 2):
        if number == 2:
            grid.expect_rounds(3)
        content = {"arrays": to_record(initial_arrays(number))}
        content["config"] = ConfigRecord({"server-round": number})
        list(grid.send_and_receive([Message(RecordDict(content), 1, "train")]))
        found += [kept.finished for kept in kept_in(tmp_path / "store")]
    assert found == [True, False]


def test_an_instruction_says_that_it_is_of_the_last_round() -> None:
    for job in ("", "digits"):
        for last in (False, True):
            told = Instruction(UpdateRule(1.0), job=job, last=last)
            assert Instruction.from_bytes(told.to_bytes()) == told


# -- a disk that refuses --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO]
)
@pytest.mark.parametrize("refuses", ["all", "folders", "renames"])
def test_whatever_the_disk_refuses_the_update_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, refuses: str
) -> None:
    """The report says why nothing is kept, and no residual is lost."""

    def fail(*given: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    def fail_to_write(*given: Any, **options: Any) -> Any:
        raise StorageError("cannot write") from OSError(number, os.strerror(number))

    inner = InProcessGrid(make_app(tmp_path / "store"), 1)
    grid = CompressedGrid(inner, "balanced", ledger=Ledger(keep=100), poll_interval=0.01)

    def ask(number: int) -> None:
        content = {"arrays": to_record(initial_arrays())}
        content["config"] = ConfigRecord({"server-round": number})
        (reply,) = grid.send_and_receive([Message(RecordDict(content), 1, "train")])
        assert not reply.has_error(), reply.error

    for at in (1, 2):
        ask(at)
    store, node = NodeStore(tmp_path / "store", 1, 1), grid._streams.node(1)
    store.settle(node.accepted, node.given_up)
    before = store.residual("arrays")
    assert before
    with monkeypatch.context() as patch:
        if refuses in ("all", "folders"):
            patch.setattr(store_module, "enter", fail)
            patch.setattr(store_module, "make", fail)
        if refuses == "all":
            patch.setattr(store_module, "write_atomically", fail_to_write)
        if refuses in ("all", "renames"):
            patch.setattr(store_module.os, "replace", fail)
        ask(3)
    assert node.troubled
    assert not list(store._folder.glob("*.pending-*"))
    store.settle(node.accepted, node.given_up)
    after = store.residual("arrays")
    assert {k: v.tobytes() for k, v in after.items()} == {k: v.tobytes() for k, v in before.items()}
    ask(4)
    assert not node.troubled
    assert {e.kind for e in grid.ledger.entries if e.direction == "down"} == {"keyframe", "reuse"}


def test_a_folder_that_cannot_be_locked_is_still_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some network file systems have no locks: only age tells then what may go."""

    def no_locks(*given: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    folders = [keep(tmp_path, job) for job in (1, 2)]
    age(folders[0])
    age(folders[1], ago=86400)
    assert isinstance(next(iter(kept_in(tmp_path))), Kept)
    NodeStore(tmp_path, 3, 1).keep("arrays", MODEL)
    assert jobs(tmp_path) == {"2", "3"}
    assert not make_room(tmp_path, tmp_path / "3", 10, 0)
    assert jobs(tmp_path) == {"2", "3"}

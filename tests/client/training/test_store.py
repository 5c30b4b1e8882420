"""What a node's store does where its disk fails: nothing is lost, nothing counts twice."""

from __future__ import annotations

import errno
import io
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from prunecast.client.training import compression_mod
from prunecast.client.training.store import NodeStore, StoreError
from prunecast.common.files import StorageError
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.server.federation import CompressedGrid, Policy
from prunecast.simulations.runner.inprocess import InProcessGrid

RUN_ID = 11
DROPPED = {"w": np.arange(12, dtype=np.float32).reshape(3, 4)}
PLAN = ChannelPlan({"w": (np.array([True, False, True]), None)}, share=0.5)


@pytest.fixture
def store(tmp_path: Path) -> NodeStore:
    made = NodeStore(tmp_path, 1, 2)
    made.stage("arrays", "aa", DROPPED)
    made.settle(["aa"])
    return made


def failing(number: int | None) -> Callable[..., Any]:
    def load(*given: Any, **options: Any) -> Any:
        raise OSError(number, "cannot be told") if number else OSError("no such format")

    return load


@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.EACCES])
def test_a_residual_that_cannot_be_read_for_now_stays(
    store: NodeStore, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    store.stage("arrays", "bb", DROPPED)  # takes the residual along
    store.settle((), ["bb"])
    store.stage("other", "cc", DROPPED)
    store.settle(["cc"])
    store.stage("other", "dd", DROPPED)
    store.settle(["dd"])
    store.stage("arrays", "ee", DROPPED)
    store.settle((), ["ee"])
    monkeypatch.setattr(np, "load", failing(number))
    for use in (
        lambda: store.remove("arrays", PLAN),
        lambda: store.residual("arrays"),
    ):
        with pytest.raises(StoreError, match=r"cannot be read .*left as it is"):
            use()
    monkeypatch.undo()
    assert np.array_equal(store.residual("arrays")["w"], DROPPED["w"])
    store.remove("arrays", PLAN)
    assert np.array_equal(store.residual("arrays")["w"], DROPPED["w"][[0, 2]])


def test_a_sum_is_not_begun_anew_where_a_file_cannot_be_read(
    store: NodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    residual, kept = next(store._folder.glob("*.residual")), tuple(DROPPED)
    before = residual.read_bytes()
    store.stage("arrays", "bb", DROPPED)
    residual.write_bytes(before)  # of another reply
    monkeypatch.setattr(np, "load", failing(errno.EIO))
    with pytest.raises(StoreError):
        store.settle(["bb"])
    assert residual.read_bytes() == before
    monkeypatch.undo()
    store.settle(["bb"])
    found = store.residual("arrays")
    assert tuple(found) == kept
    assert np.array_equal(found["w"], 2 * DROPPED["w"])


@pytest.mark.parametrize("damaged", ["empty", "cut", "no archive", "misplaced", "unknown"])
def test_what_is_truly_damaged_is_replaced(
    store: NodeStore, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    residual = next(store._folder.glob("*.residual"))
    data = residual.read_bytes()
    if damaged == "unknown":
        monkeypatch.setattr(np, "load", failing(None))
    elif damaged == "misplaced":
        monkeypatch.setattr(np, "load", failing(errno.EINVAL))
    else:
        residual.write_bytes({"empty": b"", "cut": data[:-30], "no archive": b"x" * 99}[damaged])
    assert store.residual("arrays") == {}
    store.remove("arrays", PLAN)
    store.stage("arrays", "bb", DROPPED)
    monkeypatch.undo()
    store.settle(["bb"])
    assert np.array_equal(store.residual("arrays")["w"], DROPPED["w"])


def test_one_residual_goes_with_one_reply_where_two_are_made_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a simulation that goes on without a slow node, and asks it again."""
    loop = Loop(tmp_path, Policy())
    arrays = loop.ask(loop.ask(first()))
    loop.inner.busy.add(1)
    content = RecordDict({"arrays": arrays})
    asked = [loop.grid.create_message(content, "train", 1, "0") for _ in range(2)]
    loop.grid.push_messages(asked)
    both, read = threading.Barrier(2), list[bool]()
    residual = NodeStore.residual

    def reading(self: NodeStore, *given: Any) -> Any:
        found = residual(self, *given)
        read.append(bool(found))
        with suppress(threading.BrokenBarrierError):  # the other one waits for its turn
            both.wait(1)
        return found

    monkeypatch.setattr(NodeStore, "residual", reading)
    queued = list(loop.inner._queued)
    made = [threading.Thread(target=loop.inner._deliver, args=(one,)) for one in queued]
    for thread in made:
        thread.start()
    for thread in made:
        thread.join(60)
    assert sorted(read) == [False, True]


def test_what_cannot_be_settled_of_a_new_attempt_stages_nothing(
    store: NodeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next message would give it up, though its server accepts it."""
    store.stage("arrays", "bb", DROPPED)
    with monkeypatch.context() as patch:
        patch.setattr(np, "load", failing(errno.EIO))
        store._path("arrays", "residual").write_bytes(b"of another reply")
        with pytest.raises(StoreError):
            store.go_on(1, ["bb"])
    with pytest.raises(StoreError, match="resumed"):
        store.stage("arrays", "cc", DROPPED)
    assert not list(store._folder.glob("*-cc"))


class Loop:
    """One node, asked round by round."""

    def __init__(self, folder: Path, policy: Policy) -> None:
        self.folder = folder
        app = ClientApp(mods=[compression_mod(folder)])

        @app.train()
        def train(message: Message, context: Context) -> Message:
            rng = np.random.default_rng(1)
            arrays = {n: a.numpy() for n, a in message.content["arrays"].items()}
            moved = {
                n: Array((a + rng.normal(size=a.shape) * 0.1).astype(np.float32))
                for n, a in arrays.items()
            }
            return Message(RecordDict({"arrays": ArrayRecord(moved)}), reply_to=message)

        self.inner = InProcessGrid(app, 1, run_id=RUN_ID)
        self.grid = CompressedGrid(self.inner, policy, poll_interval=0.01)

    def ask(self, arrays: ArrayRecord) -> ArrayRecord:
        content = RecordDict({"arrays": arrays})
        (reply,) = self.grid.send_and_receive([self.grid.create_message(content, "train", 1, "0")])
        assert not reply.has_error(), reply.error
        return ArrayRecord({n: Array(a.numpy()) for n, a in reply.content["arrays"].items()})

    def files(self) -> dict[str, bytes]:
        found = (p for p in self.folder.rglob("*") if p.is_file() and p.suffix != ".model")
        return {path.name: path.read_bytes() for path in found}


def first() -> ArrayRecord:
    rng = np.random.default_rng(0)
    return ArrayRecord(
        {
            "w": Array(rng.normal(size=(64, 32)).astype(np.float32)),
            "v": Array(rng.normal(size=(32, 64)).astype(np.float32)),
        }
    )


RULES = {"lattice": Policy(), "scheme": Policy(up="topk")}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("trouble", ["full", "unreadable"])
def test_a_reply_is_sent_though_its_residual_cannot_be_had(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    rule: str,
    trouble: str,
) -> None:
    loop = Loop(tmp_path, RULES[rule])
    arrays = loop.ask(loop.ask(first()))
    plan = ChannelPlan(
        {"w": (np.arange(64) < 32, None), "v": (None, np.arange(64) < 32)}, share=0.5
    )
    narrow = loop.grid.remove_channels(arrays, plan)
    before: dict[str, bytes] = {}
    remove = NodeStore.remove

    def fails(self: NodeStore, key: str, plan: ChannelPlan) -> None:
        """As `remove` where the disk is full, or its files cannot be opened."""

        def full(*given: Any) -> None:
            raise StorageError("the disk is full")

        before.update(loop.files())
        with monkeypatch.context() as patch:
            if trouble == "full":
                patch.setattr("prunecast.client.training.store.write_atomically", full)
            else:
                patch.setattr(np, "load", failing(errno.EMFILE))
            remove(self, key, plan)

    with monkeypatch.context() as patch:
        patch.setattr(NodeStore, "remove", fails)
        found = loop.ask(narrow)
    assert found["w"].numpy().shape == (32, 32)
    assert "The reply is sent, but nothing was kept for the next one" in caplog.text
    assert before
    assert loop.files() == before  # nothing staged, nothing taken along, nothing narrowed twice
    loop.ask(found)
    stages = [name for name in loop.files() if ".pending-" in name]
    assert stages


def test_a_federation_that_removes_nothing_opens_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path, Policy())
    arrays = loop.ask(loop.ask(loop.ask(first())))
    opened: list[str] = []
    load = np.load

    def counting(file: Any, *given: Any, **options: Any) -> Any:
        if not isinstance(file, io.BytesIO):
            opened.append(Path(file).suffix.partition("-")[0])
        return load(file, *given, **options)

    monkeypatch.setattr(np, "load", counting)
    loop.ask(arrays)
    assert opened == [".model", ".residual"]


def test_what_was_dropped_of_a_layer_that_went_is_dropped(tmp_path: Path) -> None:
    store, plan = NodeStore(tmp_path, 1, 2), ChannelPlan({}, gone=("a.b",), layers_share=0.5)
    names = ("a.b.w", "a.bc.w", "a.b.w\0values", "residual/a.b.w", "residual/a.bc.w")
    store.stage("arrays", "aa", {name: np.ones(3, np.float32) for name in names})
    store.settle(["aa"])
    store.remove("arrays", plan)
    assert sorted(store.residual("arrays")) == ["a.bc.w", "residual/a.bc.w"]
    store.stage("arrays", "bb", {"a.b.w": np.ones(3, np.float32)})  # of a reply from before
    store.settle(["bb"])
    store.remove("arrays", plan)
    assert "a.b.w" not in store.residual("arrays")

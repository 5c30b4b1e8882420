"""Capability classes: what nodes say of themselves, and what becomes of them for it."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from numpy.lib import format as npy

from prunecast.client.training import capabilities as stating
from prunecast.compression.versions import BadPayload, Capabilities, NodeReport, control
from prunecast.server.federation import (
    CompressedGrid,
    FederationError,
    Ledger,
    Policy,
    PolicyError,
)
from prunecast.server.federation.publishing.classes import class_of, foreign_format, parse_classes
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import initial_arrays, make_app, to_record

ABLE = Capabilities("0.1.0", (1, 1), 5 * 10**9, 2 * 10**9, 10.0)
ROUNDS = 3


# -- what is stated -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "able",
    [ABLE, Capabilities(), Capabilities("1" * 32, (0, 9), link=0.05), Capabilities(link=1e308)],
)
def test_what_a_node_says_of_itself_arrives(able: Capabilities) -> None:
    assert Capabilities.from_bytes(able.to_bytes()) == able
    report = NodeReport({"arrays": bytes(16)}, trouble="full", width="small", able=able)
    assert NodeReport.from_bytes(report.to_bytes()) == report
    assert len(able.to_bytes()) <= 60


def test_what_a_later_version_adds_is_passed_over() -> None:
    assert Capabilities.from_bytes(ABLE.to_bytes() + b"more") == ABLE


def test_hostile_statements_are_refused_or_harmless() -> None:
    data = ABLE.to_bytes()
    rng = random.Random(0)
    tried = [data[:n] for n in range(len(data))]
    tried += [bytes(rng.randrange(256) for _ in range(rng.randrange(300))) for _ in range(500)]
    tried += [b"\x01" + bytes(rng.randrange(256) for _ in range(40)) for _ in range(500)]
    tried += [data + bytes(300), b"\x01\x02\x1b[\x01\x01\x05\x05\x02", b"\x02" + data[1:]]
    for one in tried:
        try:
            found = Capabilities.from_bytes(one)
        except BadPayload:
            continue
        assert found.package.isprintable()
        assert len(found.package) <= 32
        assert 0 <= found.link < float("inf")
        class_of(parse_classes({"a": "version<0.2&link<2:dense", "b": "foreign:dense"}), found)


def test_a_node_knows_its_disk_memory_version_and_what_its_config_says(tmp_path: Path) -> None:
    found = stating.capabilities(tmp_path / "not" / "there", {"prunecast-link": 2.5})
    assert found.package == "0.1.0"
    assert found.formats == (control.INSTRUCTION_FORMAT,) * 2
    assert found.disk > 0
    assert found.memory > 10**8
    assert found.link == 2.5
    for odd in ("fast", -1, float("nan"), True):
        assert stating.capabilities(tmp_path, {"prunecast-link": odd}).link in (0.0, 1.0)


# -- which class ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("link<10.5:dense", "it"),
        ("link<10:dense", ""),
        ("link>=10:dense", "it"),
        ("memory<2001&disk>=5000:dense", "it"),
        ("memory<2001 & disk<5000:dense", ""),
        ("version<0.1.1:dense", "it"),
        ("version<0.1:dense", ""),
        ("version>=0.1:dense", "it"),
        ("version<0.10:dense", "it"),
        ("foreign:dense", ""),
    ],
)
def test_a_node_is_of_the_first_class_whose_conditions_it_meets(text: str, name: str) -> None:
    assert class_of(parse_classes({"it": text, "rest": "version>=9:dense"}), ABLE).name == name


def test_what_a_node_does_not_know_meets_no_condition() -> None:
    unknown = Capabilities(formats=(1, 1))
    for text in ("disk<1", "memory<1", "link<1", "version<9", "link>=0", "version>=0"):
        assert not class_of(parse_classes({"it": f"{text}:dense"}), unknown).name


def test_formats_say_which_side_is_to_be_updated() -> None:
    assert not foreign_format(ABLE)
    old, new = Capabilities("0.0.1", (0, 0)), Capabilities("7.1", (5, 9))
    assert "0.0.1" in foreign_format(old)
    assert foreign_format(old).endswith("update the node")
    assert foreign_format(new).endswith("update the server")
    assert class_of(parse_classes({"it": "foreign:dense"}), new).dense
    assert not class_of(parse_classes({"it": "link<99:dense"}), old).name


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"classes": "thin"}, "name=value"),
        ({"classes": "thin=2"}, "give conditions"),
        ({"classes": "thin=speed<2:dense"}, "'speed<2' is no condition"),
        ({"classes": "thin=link<1.2.3:dense"}, "no condition"),
        ({"classes": "thin=link<2:tiny"}, "'tiny' is no treatment"),
        ({"classes": "thin=link<2:steps*0.5"}, "no treatment"),
        ({"classes": "it=foreign:keyframes"}, "nothing but what is dense"),
        ({"classes": "Thin=link<2:dense"}, "a-z 0-9"),
        ({"classes": "others=link<2:dense"}, "none 'others'"),
        ({"classes": "a=link<2:dense", "down": "dense", "up": "dense"}, "down = 'lattice'"),
        ({"classes": "a=link<2:steps*2", "up": "stc"}, "up = 'lattice'"),
        ({"classes": "a=link<2:dense", "widths": "small=0.5"}, "keep them all"),
    ],
)
def test_classes_that_cannot_be_name_their_key_and_the_remedy(
    knobs: dict[str, str], words: str
) -> None:
    with pytest.raises(PolicyError, match=r"prunecast\.classes") as found:
        Policy.from_run_config({f"prunecast.{k}": v for k, v in knobs.items()})
    assert words in str(found.value)


# -- what becomes of them -------------------------------------------------------------------------


class Federation:
    """Three nodes, of which the second says something else of itself."""

    def __init__(self, store: Path, classes: str, *, second: ClientApp | None = None) -> None:
        self.seen: list[tuple[int, str, dict[str, np.ndarray]]] = []
        self.store, app = store, make_app(store, self.seen)
        apps = {1: app, 2: second or app, 3: app}
        self.inner = InProcessGrid(apps, 3, run_id=7)
        self.inner._contexts[2].node_config["prunecast-link"] = 0.5
        config = {"prunecast.classes": classes} if classes else {}
        policy = Policy.from_run_config(config)
        kept = Ledger(keep=1000)
        self.grid = CompressedGrid(self.inner, policy, ledger=kept, poll_interval=0.01)

    def run(self, rounds: int = ROUNDS, **options: Any) -> Any:
        random.seed(0)
        strategy = FedAvg(**{"fraction_evaluate": 0.0, "min_available_nodes": 2, **options})
        arrays = to_record(initial_arrays())
        return strategy.start(grid=self.grid, initial_arrays=arrays, num_rounds=rounds).arrays

    def kinds(self, node: int, direction: str = "down") -> list[str]:
        entries = self.grid.ledger.entries
        return [e.kind for e in entries if e.node == node and e.direction == direction]

    def bytes(self, node: int, direction: str) -> int:
        entries = self.grid.ledger.entries
        return sum(e.payload_bytes for e in entries if (e.node, e.direction) == (node, direction))

    def files(self, node: int) -> list[str]:
        return [p.suffix for p in (self.store / "7" / str(node)).iterdir() if p.suffix]

    def agree(self) -> bool:
        """Whether all nodes read the same bits in every round."""
        read: dict[int, list[Any]] = {}
        for node, _, arrays in self.seen:
            read.setdefault(node, []).append({n: a.tobytes() for n, a in arrays.items()})
        return read[1] == read[2] == read[3]


def test_without_classes_nothing_is_asked(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "")
    federation.run()
    assert all(federation.grid._streams.node(n).able is None for n in (1, 2, 3))
    assert federation.grid.classes() == {}


def test_a_node_of_keyframes_without_residual_keeps_nothing(tmp_path: Path) -> None:
    federation = Federation(tmp_path, "poor=link<1:keyframes+no-residual")
    federation.run()
    assert federation.agree()
    assert federation.kinds(1) == ["keyframe", "delta", "delta"]
    assert federation.kinds(2) == ["keyframe"] * ROUNDS
    assert federation.kinds(2, "up") == ["update"] * ROUNDS
    assert federation.files(1)
    assert federation.files(2) == []
    assert federation.grid._streams.node(2).treatment.name == "poor"
    told = federation.grid.classes()  # and whose every byte is
    assert {name: part["nodes"] for name, part in told.items()} == {"poor": 1, "others": 2}
    for way in ("down", "up"):
        assert told["poor"][f"bytes_{way}"] == federation.bytes(2, way)
        both = federation.bytes(1, way) + federation.bytes(3, way)
        assert told["others"][f"bytes_{way}"] == both
    assert not federation.grid._streams.node(1).treatment.name


def test_a_thin_link_takes_coarser_updates_and_error_feedback_keeps_the_rest(
    tmp_path: Path,
) -> None:
    federation = Federation(tmp_path, "thin=link<1:steps*4")
    result = federation.run(6)
    assert federation.agree()
    assert federation.bytes(2, "up") < 0.8 * federation.bytes(1, "up")
    plain = Federation(tmp_path / "plain", "").run(6)
    for name, array in result.items():
        moved = plain[name].numpy() - initial_arrays()[name]
        if np.linalg.norm(moved) and array.numpy().ndim > 1:
            apart = np.linalg.norm(array.numpy() - plain[name].numpy())
            assert apart < np.linalg.norm(moved), name


def test_dense_nodes_read_the_version_and_their_changes_count_as_those_of_others(
    tmp_path: Path,
) -> None:
    """They have no mod at all: what they train counts as a change of the master."""
    seen: list[tuple[int, str, dict[str, np.ndarray]]] = []
    plain = make_app(None, seen)
    first = make_app(tmp_path / "first")
    asked: list[int] = []

    def second(message: Message, context: Context) -> Message:
        asked.append(1)  # with the mod until its class is known
        return (first if len(asked) == 1 else plain)(message, context)

    federation = Federation(tmp_path / "s", "old=version<9&link<1:dense", second=second)  # type: ignore[arg-type]
    federation.run()
    assert federation.kinds(2) == ["keyframe", "dense", "dense"]
    assert federation.kinds(2, "up") == ["update", "dense", "dense"]
    assert [e.payload_bytes for e in federation.grid.ledger.entries if e.kind == "dense"]
    read = [arrays for node, _, arrays in federation.seen if node == 1][1:]
    for mine, theirs in zip((arrays for _, _, arrays in seen), read, strict=True):
        assert {n: a.tobytes() for n, a in mine.items()} == {
            n: a.tobytes() for n, a in theirs.items()
        }
    assert not [e for e in federation.grid.ledger.entries if e.kind == "error"]


def test_small_messages_to_a_dense_node_travel_as_they_are(tmp_path: Path) -> None:
    """What is packed into one record only the mod opens."""
    plain = ClientApp()

    @plain.query()
    def query(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    federation = Federation(tmp_path, "old=link<1:dense", second=plain)
    node = federation.grid._streams.node(2)
    node.able = ABLE
    node.treatment = parse_classes(federation.grid.policy.classes)[0].treatment
    said = _content({"a": ConfigRecord({"x": 1}), "b": ConfigRecord({"y": 2.0})})
    message = federation.grid.create_message(said, "query", 2, "0")
    (reply,) = federation.grid.send_and_receive([message])
    assert not reply.has_error(), reply.error
    assert reply.content == said


def test_what_rounding_dropped_is_not_lost_by_a_dense_reply(tmp_path: Path) -> None:
    """A node that does not train leaves the master as it is, and not as it was published."""
    idle = ClientApp()

    @idle.train()
    def train(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    federation = Federation(tmp_path, "old=link<1:dense", second=idle)
    node = federation.grid._streams.node(2)
    node.able = ABLE
    node.treatment = parse_classes(federation.grid.policy.classes)[0].treatment
    content = {"arrays": to_record(initial_arrays())}
    message = federation.grid.create_message(_content(content), "train", 2, "0")
    (reply,) = federation.grid.send_and_receive([message])
    assert not reply.has_error(), reply.error
    for name, array in reply.content["arrays"].items():
        np.testing.assert_allclose(array.numpy(), initial_arrays()[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["no array", "objects", "more than came"])
def test_what_a_dense_node_sends_is_looked_at_before_it_is_read(tmp_path: Path, kind: str) -> None:
    """It is refused alone: neither unpickled nor given the memory that it states."""

    def odd(dtype: str, shape: tuple[int, ...]) -> Array:
        if kind == "more than came":
            shape = (1 << 40,)
        head = io.BytesIO()
        descr = "|O" if kind == "objects" else "<f4"
        npy.write_array_header_1_0(head, {"descr": descr, "fortran_order": False, "shape": shape})
        data = b"no array" if kind == "no array" else head.getvalue()
        return Array(dtype=dtype, shape=shape, stype="numpy.ndarray", data=data)

    def change(reply: Message) -> Message:
        if reply.metadata.src_node_id == 2 and "arrays" in reply.content:
            record = reply.content["arrays"]
            array = record["fc.weight"]
            record["fc.weight"] = odd(array.dtype, tuple(array.shape))
        return reply

    federation = Federation(tmp_path, "old=link<1:dense", second=make_app(None))
    node = federation.grid._streams.node(2)
    node.able = ABLE
    node.treatment = parse_classes(federation.grid.policy.classes)[0].treatment
    federation.inner.on_reply = change
    federation.run()
    assert federation.kinds(2, "up") == ["error"] * ROUNDS
    assert federation.kinds(1, "up") == ["update"] * ROUNDS
    reasons = [e.reason for e in federation.grid.ledger.entries if e.kind == "error"]
    assert all("'fc.weight'" in reason for reason in reasons)


def _content(records: dict[str, Any]) -> Any:
    from flwr.app import RecordDict

    return RecordDict(records)


# -- another format -------------------------------------------------------------------------------


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Callable[[ClientApp], Any]:
    """Make an app one of a node whose package understands an earlier format only."""

    def make(app: ClientApp) -> Any:
        def handle(message: Message, context: Context) -> Message:
            with monkeypatch.context() as patch:
                patch.setattr(control, "INSTRUCTION_FORMAT", 0)
                patch.setattr(stating, "INSTRUCTION_FORMAT", 0)
                return app(message, context)

        return handle

    return make


def test_a_node_of_another_format_is_told_once_and_left_out(
    tmp_path: Path, foreign: Callable[[ClientApp], Any], caplog: pytest.LogCaptureFixture
) -> None:
    second = foreign(make_app(tmp_path / "second"))
    federation = Federation(tmp_path / "store", "", second=second)
    result = federation.run()
    assert list(result) == list(initial_arrays())
    assert federation.kinds(2) == ["keyframe"]
    assert federation.kinds(2, "up") == ["error"]
    assert federation.kinds(1) == federation.kinds(3) == ["keyframe", "delta", "delta"]
    said = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert len(said) == 1
    assert "Node 2" in said[0]
    assert "formats 0 to 0, and this server writes 1: update the node" in said[0]
    assert list(federation.grid.get_node_ids()) == [1, 3]
    assert not list((tmp_path / "second").rglob("*.model"))


def test_it_trains_all_the_same_where_the_policy_has_it_dense(
    tmp_path: Path, foreign: Callable[[ClientApp], Any]
) -> None:
    """In the same round, too."""
    second = foreign(make_app(tmp_path / "second"))
    federation = Federation(tmp_path / "store", "other=foreign:dense", second=second)
    federation.run()
    assert federation.kinds(2) == ["keyframe", *["dense"] * ROUNDS]
    assert federation.kinds(2, "up") == ["error", *["dense"] * ROUNDS]
    assert list(federation.grid.get_node_ids()) == [1, 2, 3]


def test_a_node_of_another_format_ends_no_run_while_the_others_are_away(
    tmp_path: Path, foreign: Callable[[ClientApp], Any]
) -> None:
    federation = Federation(tmp_path, "", second=foreign(make_app(tmp_path / "second")))
    federation.run(1)
    federation.inner.online = {2}
    assert list(federation.grid.get_node_ids()) == []
    federation.inner.online = {1, 2, 3}
    assert list(federation.grid.get_node_ids()) == [1, 3]


def test_where_no_node_is_left_that_is_said_instead_of_waiting(
    tmp_path: Path, foreign: Callable[[ClientApp], Any]
) -> None:
    inner = InProcessGrid(foreign(make_app(tmp_path)), 2)
    grid = CompressedGrid(inner, "balanced", poll_interval=0.01)
    with pytest.raises(FederationError, match=r"no node understands this server.*update the node"):
        FedAvg().start(grid=grid, initial_arrays=to_record(initial_arrays()), num_rounds=2)


def test_a_single_number_that_a_dense_node_trained_counts_as_a_change(tmp_path: Path) -> None:
    """A learned temperature, say: NumPy makes no array of what it adds to one."""
    inner = InProcessGrid(make_app(tmp_path / "store"), 2, run_id=5)
    grid = CompressedGrid(inner, Policy(classes={"all": "version>=0:dense"}))
    arrays = {**initial_arrays(), "logit_scale": np.asarray(2.0, np.float32)}
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=to_record(arrays), num_rounds=2
    )
    found = result.arrays["logit_scale"].numpy()
    assert (found.shape, found.dtype) == ((), np.float32)
    assert found != 2.0

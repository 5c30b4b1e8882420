"""Server and nodes under every order of losses, duplicates, restarts, resumes and lost stores.

A node that answers has trained from a published version, bit for bit; no update counts twice; what
was trained is what the server got and what the node keeps, for as long as its disk is whole; and
the trouble of one node is that node's alone.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from prunecast.client.training import compression_mod
from prunecast.client.training.store import NodeStore
from prunecast.compression.flower.internals import make_message
from prunecast.compression.pruning.structure.channels import ChannelPlan
from prunecast.compression.versions import short
from prunecast.server.federation import Checkpoint, CompressedGrid, Deadlines, Ledger, Policy
from prunecast.simulations.runner.inprocess import InProcessGrid
from support.federation import RUN_ID, initial_arrays, local_step, to_arrays, to_record

NODES = (1, 2, 3)
SUMMED = ("conv.weight", "fc.weight")
Arrays = dict[str, NDArray[Any]]


class Killed(BaseException):
    """The process of a ClientApp ends: no reply, and nothing after it."""


class Mail(InProcessGrid):
    """A grid whose nodes can be killed, and whose replies can be held up, doubled and reversed.

    Attributes:
        held_up: nodes whose replies are not delivered yet.
        doubled: deliver every reply twice, and once more with the next ones.
    """

    def __init__(self, app: ClientApp) -> None:
        super().__init__(app, len(NODES), run_id=RUN_ID)
        self.held_up: set[int] = set()
        self.doubled = False
        self._copies: list[Message] = []

    def _run_client(self, message: Message) -> Any:
        try:
            return super()._run_client(message)
        except Killed:
            return None

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        late = {
            i for i, reply in self._replies.items() if reply.metadata.src_node_id in self.held_up
        }
        found = list(super().pull_messages([i for i in message_ids if i not in late]))
        found.reverse()
        copies, self._copies = self._copies, []
        if self.doubled:
            again = [make_message(m.metadata, m.content) for m in found if not m.has_error()]
            self._copies = [make_message(m.metadata, m.content) for m in again]
            return [*copies, *found, *again]
        return found

    def lose_messages(self, node: int) -> None:
        """Deliver nothing of what the node has not come to."""
        for message_id, message in list(self._queued.items()):
            if message.metadata.dst_node_id == node:
                del self._queued[message_id]

    def forget(self) -> None:
        """The run of Flower has failed: nothing of it is delivered any more."""
        self._queued.clear()
        self._replies.clear()
        self._waiting.clear()
        self._copies.clear()

    def restart(self, node: int) -> None:
        """The node's process is another one: Flower's state of it is gone."""
        old = self._contexts[node]
        self._contexts[node] = Context(RUN_ID, node, old.node_config, RecordDict(), old.run_config)


@dataclass(frozen=True)
class Saved:
    """What was true when a checkpoint was written."""

    model: Arrays
    taken: set[tuple[int, int]]
    lives: dict[int, int]
    balance: dict[int, Arrays]


class Federation(RuleBasedStateMachine):
    """One server, three nodes, and what happens to them."""

    preset = "balanced"
    modes: tuple[str, ...] = ("discard", "apply")

    @initialize(data=st.data(), history=st.sampled_from([2, 16]), saves=st.booleans())
    def begin(self, data: st.DataObject, history: int, saves: bool) -> None:
        late: Any = data.draw(st.sampled_from(self.modes))
        self.folder = Path(tempfile.mkdtemp())
        self.mail = Mail(self.app())
        self.mail.on_reply = self.on_reply
        self.policy = Policy.preset(self.preset, history=history, **self.options())
        self.deadlines = Deadlines(replies=1, late=late, late_exponent=0.0)
        self.grid = self.server()
        self.sums, self.late = self.preset == "balanced", late
        self.slices: dict[int, Arrays] = {}
        self.prepare()
        self.model = initial_arrays()
        self.number = 0
        self.published: dict[int, Arrays] = {}  # by number of the message
        self.sent: dict[int, Arrays] = {}
        self.waiting: dict[str, int] = {}  # of messages that nobody waits for in a round
        self.fates: dict[int, str] = {}  # what becomes of a node's next training
        self.lost_replies: set[int] = set()
        # by (node, number of the message): what it trained, and in which life of its store
        self.trained: dict[tuple[int, int], tuple[int, Arrays]] = {}
        self.lives = dict.fromkeys(NODES, 0)
        self.taken: set[tuple[int, int]] = set()
        self.zero()
        self.saved: Saved | None = None
        if saves:
            self.saves()

    def server(self) -> CompressedGrid:
        """One that knows nothing yet."""
        options: Any = {"poll_interval": 0.002, "ledger": Ledger(keep=100_000)}
        return CompressedGrid(self.mail, self.policy, deadlines=self.deadlines, **options)

    def options(self) -> dict[str, Any]:
        """Of the policy."""
        return {}

    def zero(self) -> None:
        """Nothing trained, nothing got."""
        shapes = {name: initial_arrays()[name].shape for name in SUMMED}
        self.balance = {n: {k: np.zeros(s) for k, s in shapes.items()} for n in NODES}

    def app(self) -> ClientApp:
        """What nodes run; sees that they hold what was published."""
        app = ClientApp(mods=[compression_mod(self.folder / "store")])

        def received(message: Message, context: Context) -> tuple[int, Arrays]:
            number = int(message.content["config"]["number"])
            arrays = to_arrays(message.content["arrays"])
            for name, expected in self.received_by(int(context.node_id), number).items():
                assert arrays[name].tobytes() == expected.tobytes(), (context.node_id, number, name)
            return number, arrays

        @app.train()
        def train(message: Message, context: Context) -> Message:
            number, arrays = received(message, context)
            node = int(context.node_id)
            fate = self.fates.pop(node, "")
            if fate == "killed":
                raise Killed
            if fate == "raises":
                raise RuntimeError("CUDA out of memory")
            trained = local_step(arrays, node * 1000 + number)
            if fate == "nan":
                trained["fc.weight"][0, 0] = np.nan
            change = {k: trained[k].astype(np.float64) - arrays[k] for k in SUMMED}
            self.trained[node, number] = self.lives[node], change
            metrics = MetricRecord({"num-examples": 1, "number": number})
            content = RecordDict({"arrays": to_record(trained), "metrics": metrics})
            return Message(content, reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            number, _ = received(message, context)
            metrics = MetricRecord({"num-examples": 1, "number": number})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        return app

    def on_reply(self, reply: Message | None) -> Message | None:
        """Lose those of some nodes."""
        if reply is not None and reply.metadata.src_node_id in self.lost_replies:
            self.lost_replies.discard(reply.metadata.src_node_id)
            return None
        return reply

    # -- what the server does ---------------------------------------------------------------------

    def messages(self, nodes: Iterable[int], kind: str) -> list[Message]:
        """One content for all of them, with the model of now."""
        self.number += 1
        config = ConfigRecord({"server-round": self.number, "number": self.number})
        content = RecordDict({"arrays": to_record(self.model), "config": config})
        self.sent[self.number] = {k: a.astype(np.float64) for k, a in self.model.items()}
        made = [Message(content, node, kind) for node in nodes]
        self.note_published(content["arrays"])
        return made

    def note_published(self, arrays: ArrayRecord) -> None:
        """Know what is to arrive of them."""
        self.published[self.number] = self.grid.published(arrays).arrays()

    def received_by(self, node: int, number: int) -> Arrays:
        """What of a message's model arrives at a node."""
        return self.published[number]

    def take(self, replies: Iterable[Message], now: int | None = None) -> list[int]:
        """Count what a strategy is given; in a round with the number of its messages.

        Returns:
            The nodes that answered this round.
        """
        answered = []
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                continue
            number = int(reply.content["metrics"]["number"])
            if now in (None, number):
                answered.append(node)
            if "arrays" not in reply.content:
                continue
            assert (node, number) not in self.taken, "an update counts twice"
            self.taken.add((node, number))
            life, change = self.trained[node, number]
            if life != self.lives[node] or not self.sums:
                continue  # what it dropped was lost with the disk
            base = self.sent[number if now is None else now]
            got = to_arrays(reply.content["arrays"])
            for name in SUMMED:
                self.balance[node][name] += change[name] - (got[name] - base[name])
        return answered

    @rule(
        asked=st.sets(st.sampled_from(NODES), min_size=1),
        kind=st.sampled_from(["train"] * 3 + ["evaluate"]),
    )
    def round(self, asked: set[int], kind: str) -> None:
        """Nodes that are not busy answer; a round waits for one of them."""
        whole = {
            n
            for n in asked
            if n not in (self.mail.busy | self.mail.held_up | self.lost_replies)
            and (kind == "evaluate" or n not in self.fates)
        }
        known = all(map(self.is_known, asked))
        before = len(self.grid.ledger.entries)
        replies = list(self.grid.send_and_receive(self.messages(sorted(asked), kind), timeout=0.01))
        answered = self.take(replies, self.number)
        # a node that has not the base is sent another message, which this round may not wait for
        if whole == asked and known:
            assert set(answered) == whole
        assert set(answered) <= whole
        for entry in self.grid.ledger.entries[before:]:
            if entry.kind == "error":
                assert entry.node not in whole, entry

    def is_known(self, node: int) -> bool:
        """Whether the server is right about what a node holds."""
        held = self.store(node).held("arrays")
        streams = self.grid._streams
        believed = streams.node(node).held.get("arrays")
        believed = streams.in_flight.expected(node).get("arrays", believed)
        return believed is None or (held is not None and short(held.digest) == believed)

    @rule(seed=st.integers(0, 50))
    def go_on(self, seed: int) -> None:
        """The strategy arrives at another model."""
        self.model = local_step(self.model, 10_000 + seed)

    @rule(node=st.sampled_from(NODES), times=st.integers(1, 3))
    def push(self, node: int, times: int) -> None:
        """Messages outside rounds, as an asynchronous loop has them."""
        for _ in range(times):
            (message_id,) = self.grid.push_messages(self.messages([node], "train"))
            self.waiting[message_id] = self.number

    @rule()
    def pull(self) -> None:
        """What has arrived of them."""
        replies = list(self.grid.pull_messages(list(self.waiting)))
        for reply in replies:
            self.waiting.pop(reply.metadata.reply_to_message_id, None)
        for reply in replies:
            self.take([reply])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """The time to live of a message is over."""
        message_id = data.draw(st.sampled_from(sorted(self.waiting)))
        self.give_up(message_id)

    def give_up(self, message_id: str) -> None:
        """As if it had lived for 12 hours, on both sides."""
        live = {origin: retry for retry, origin in self.grid._retries.items()}
        current = live.get(message_id, message_id)
        if (sent := self.grid._sent.get(current)) is not None:
            sent.original.metadata.ttl = 1e-6
        self.mail._waiting[current] = 0.0
        del self.waiting[message_id]

    @precondition(lambda self: self.saved)
    @rule()
    def saves(self) -> None:
        """A checkpoint; nodes are told afterwards which of their replies it has."""
        record = to_record(self.model)
        self.grid.published(record)
        self.grid.checkpoint(record).save(self.folder / "checkpoint.safetensors")
        self.grid.note_saved()
        balance = {n: {k: a.copy() for k, a in b.items()} for n, b in self.balance.items()}
        self.saved = Saved(dict(self.model), set(self.taken), dict(self.lives), balance)

    @precondition(lambda self: self.saved)
    @rule()
    def resumes(self) -> None:
        """The server was killed, and all since its checkpoint is as if it had never been."""
        saved = self.saved
        assert saved is not None
        self.mail.forget()
        self.waiting.clear()
        self.grid = self.server()
        self.prepare()
        arrays = self.grid.go_on(Checkpoint.load(self.folder / "checkpoint.safetensors"))
        self.model = to_arrays(arrays)
        assert {n: a.tobytes() for n, a in self.model.items()} == {
            n: a.tobytes() for n, a in saved.model.items()
        }
        self.taken = set(saved.taken)
        lives, self.balance = self.lives, {}
        self.zero()
        for node, sums in saved.balance.items():
            if lives[node] == saved.lives[node]:
                self.balance[node] = {k: a.copy() for k, a in sums.items()}
        self.saves()  # as `Run` does, so that one that is resumed again is another attempt

    def prepare(self) -> None:
        """What a server is told before its first message."""

    # -- what happens to nodes --------------------------------------------------------------------

    @rule(node=st.sampled_from(NODES))
    def is_busy(self, node: int) -> None:
        """It comes to its messages later."""
        self.mail.busy ^= {node}

    @rule(node=st.sampled_from(NODES), most=st.integers(1, 3))
    def serves(self, node: int, most: int) -> None:
        """It comes to some of them."""
        self.mail.serve(node, most)

    @rule(node=st.sampled_from(NODES))
    def answers_late(self, node: int) -> None:
        """Its replies are on the way."""
        self.mail.held_up ^= {node}

    @rule()
    def doubles(self) -> None:
        """Replies arrive twice, or do no more."""
        self.mail.doubled ^= True

    @rule(node=st.sampled_from(NODES), fate=st.sampled_from(["killed", "raises", "nan"]))
    def fails(self, node: int, fate: str) -> None:
        """Its next training ends so."""
        self.fates[node] = fate

    @rule(node=st.sampled_from(NODES))
    def loses_reply(self, node: int) -> None:
        """Its next reply is lost."""
        self.lost_replies.add(node)

    @rule(node=st.sampled_from(NODES))
    def loses_messages(self, node: int) -> None:
        """What it was sent and has not read is lost."""
        self.mail.lose_messages(node)

    @rule(node=st.sampled_from(NODES))
    def restarts(self, node: int) -> None:
        """With the same store."""
        self.mail.restart(node)

    @rule(node=st.sampled_from(NODES))
    def loses_store(self, node: int) -> None:
        """All of it."""
        shutil.rmtree(self.store(node)._folder, ignore_errors=True)
        self.lives[node] += 1
        for total in self.balance[node].values():
            total[...] = 0.0

    @rule(node=st.sampled_from(NODES), share=st.floats(0, 0.99))
    def loses_part_of_model(self, node: int, share: float) -> None:
        """Of the file that holds the version."""
        for path in self.store(node)._folder.glob("*.model"):
            data = path.read_bytes()
            path.write_bytes(data[: int(share * len(data))])

    def store(self, node: int) -> NodeStore:
        """What a node keeps."""
        return NodeStore(self.folder / "store", RUN_ID, node)

    # -- what must hold ---------------------------------------------------------------------------

    @invariant()
    def little_is_kept(self) -> None:
        """Of messages that somebody waits for."""
        if hasattr(self, "grid"):
            sent = [s for s in self.grid._sent.values() if s.original.metadata.ttl > 1]
            assert len(sent) <= len(self.waiting)

    def teardown(self) -> None:
        """Peace returns: everybody answers, nothing was lost, and nothing is left over."""
        if not hasattr(self, "grid"):
            return
        try:
            self.end()
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)

    def end(self) -> None:
        """As in `teardown`."""
        self.mail.busy, self.mail.held_up, self.mail.doubled = set(), set(), False
        self.fates, self.lost_replies = {}, set()
        for node in NODES:
            self.mail.serve(node)
        self.mail.busy = set()
        for _ in range(2):  # what had no base is there with the second
            self.pull()
        for message_id in list(self.waiting):
            self.give_up(message_id)
        for pending in self.grid._late._pending:
            if pending not in self.mail._replies:
                self.mail._waiting[pending] = 0.0
        answered: list[int] = []
        for _ in range(3):
            self.go_on(self.number)
            if self.saved:
                self.saves()
            replies = self.grid.send_and_receive(self.messages(NODES, "train"), timeout=5.0)
            answered = self.take(replies, self.number)
        assert sorted(answered) == list(NODES)
        last = [e.kind for e in self.grid.ledger.entries[-6:]]
        assert last == ["delta"] * 3 + ["update"] * 3, last
        assert not self.grid._sent
        assert not self.grid._retries
        assert not self.grid._late._pending
        for node in NODES:
            self.check(node)

    def check(self, node: int) -> None:
        """What a node trained is what the server got of it, and what it keeps."""
        store, known = self.store(node), self.grid._streams.node(node)
        held = store.held("arrays")
        assert held is not None
        assert known.held["arrays"] == short(held.digest)
        assert {n: a.tobytes() for n, a in held.arrays().items()} == {
            n: a.tobytes() for n, a in self.received_by(node, self.number).items()
        }
        assert len(known.accepted) == 1
        assert not known.given_up
        store.settle(known.accepted, known.given_up)
        assert not list(store._folder.glob("*.taken-*"))
        assert not list(store._folder.glob("*.pending-*"))
        if self.sums:
            left = store.residual("arrays")
            for name, total in self.balance[node].items():
                np.testing.assert_allclose(left[name], total, atol=2e-5)


class Pruned(Federation):
    """Masks move as the rounds go on; what a pruned weight would have changed is not kept."""

    preset = "small"

    def options(self) -> dict[str, Any]:
        """Pruning in the first rounds."""
        return {"pruning_begin": 1, "pruning_end": 8}


class Sliced(Federation):
    """The third node trains a slice; the channels of its own are half of each layer's."""

    modes = ("discard",)  # late updates of slices are not applied

    def options(self) -> dict[str, Any]:
        """A class for it."""
        return {"widths": {"small": 0.5}}

    def prepare(self) -> None:
        """What the class trains; what slices' updates come to is tested with the widths."""
        self.mail._contexts[NODES[-1]].node_config["prunecast-width"] = "small"
        self.sums = False
        half = {"conv": np.arange(16) < 8, "fc": np.arange(64) < 32}
        kept = {
            "conv.weight": (half["conv"], None, None, None),
            "fc.weight": (half["fc"], None),
            "fc.bias": (half["fc"],),
            "bn.running_mean": (half["conv"],),
            "bn.running_var": (half["conv"],),
        }
        self.grid.use_widths({"small": ChannelPlan(kept, share=0.5)})

    def note_published(self, arrays: ArrayRecord) -> None:
        """The slice, too."""
        super().note_published(arrays)
        self.slices[self.number] = self.grid.sliced(arrays, "small")[0].arrays()

    def received_by(self, node: int, number: int) -> Arrays:
        """The third one gets the slice."""
        return self.slices[number] if node == NODES[-1] else self.published[number]

    def is_known(self, node: int) -> bool:
        """One that has not said its class yet is asked first."""
        return self.grid._streams.node(node).width is not None and super().is_known(node)


@pytest.mark.parametrize(("machine", "examples"), [(Federation, 15), (Pruned, 6), (Sliced, 8)])
def test_nothing_is_lost_or_counted_twice(
    machine: type[Federation], examples: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL", "flwr")
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=15,
            deadline=None,
            derandomize=True,
            suppress_health_check=checks,
        ),
    )

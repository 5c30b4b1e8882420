"""What a federation asks, gets and reaches in each of its rounds, and what is told of it."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from prunecast.compression.flower import array_record, node_reason
from prunecast.compression.flower.internals import function_of
from prunecast.compression.pruning.structure.channels import holding_channels
from prunecast.compression.versions import PublishedModel
from prunecast.server.federation.errors import NodesFailed
from prunecast.server.federation.knobs import WHOLE
from prunecast.server.federation.publishing.participation import trains
from prunecast.server.federation.recalibration import Recalibration
from prunecast.server.federation.recovery import Recoveries
from prunecast.server.federation.reporting.events import EventLog
from prunecast.server.federation.reporting.layers import changed_masks, layers_in, samples_round
from prunecast.server.federation.reporting.nodes import NodeStates
from prunecast.server.federation.shrinking.removals import Removals
from prunecast.server.federation.state.resuming import Continuation, told_state
from prunecast.server.federation.wrapper import GridWrapper

if TYPE_CHECKING:
    from prunecast.server.federation.run import Run

__all__ = ["Rounds"]

_AGGREGATED = ("train", "evaluate")
_NAMED, _LONGEST = 100, 300  # failed nodes in an event, and characters of a reason


class Rounds(GridWrapper):
    """The grid as the strategy of a run sees it: tells what a round asks, gets and reaches."""

    def __init__(
        self,
        run: Run,
        grid: Grid,
        events: EventLog,
        rounds: int,
        removals: Removals,
        recalibration: Recalibration,
        timeout: float,
        going_on: Continuation,
        *,
        before: int,
        anew: bool,
    ) -> None:
        super().__init__(grid)
        self._going_on, self._before, self._anew = going_on, before, anew
        self._listed: list[int] = []
        self._run, self._events, self._rounds = run, events, rounds
        self._removals, self._recalibration, self._timeout = removals, recalibration, timeout
        self._began = time.monotonic()
        self._in_vain: dict[str, str] = {}  # "train" or "other" -> why its first reply failed
        self._used: set[str] = set()  # of these, what had a reply that could be used
        self.recoveries = Recoveries(run.grid.policy.pruning_metric)
        self._nodes = NodeStates(lambda node: run.grid.holds(node, key=run.key))
        self._begin(0)

    def _begin(self, number: int) -> None:
        self._number, self._asked = number, 0
        self._trained: list[int] = []  # ids of nodes
        self._failed: list[dict[str, str]] = []
        self._late = self._applied = 0  # nodes not waited for, and updates of rounds before
        self._metrics: dict[str, dict[str, Any]] = {}
        self._measured: dict[str, list[float]] = {}  # by evaluating nodes, of each metric
        self._run.grid.samples.wanted = samples_round(number, self._rounds)

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the connected nodes, which are noted, in an order that is always the same."""
        self._listed = self._nodes.connected(sorted(super().get_node_ids()))
        return self._listed

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Pass messages on and note who answered.

        Raises:
            NodesFailed: a node did not, and the run stops then.
        """
        batch = list(messages)
        training = sum(map(trains, batch))
        if training and not self._asked:
            self._events.write("round-begun", round=self._number, nodes=training)
        self._asked += training
        replies = list(self._grid.send_and_receive(batch, timeout=timeout))
        answers = {reply.metadata.reply_to_message_id: reply for reply in replies}
        self._nodes.note(batch, answers, early=self._run.grid.deadlines.ends_early)
        late = len(answers.keys() - {message.metadata.message_id for message in batch})
        self._applied += late
        self._used |= {"train"} if late else set()
        failed: list[dict[str, str]] = []
        for message in batch:
            reply = answers.get(message.metadata.message_id)
            kind = "train" if trains(message) else "other"
            if reply is not None and not reply.has_error():
                if trains(message):
                    self._trained.append(message.metadata.dst_node_id)
                self._used.add(kind)
                if function_of(message.metadata.message_type) == MessageType.EVALUATE:
                    for name, value in _numbers(reply).items():
                        self._measured.setdefault(name, []).append(value)
                continue
            node, reason = message.metadata.dst_node_id, "no reply in time"
            if reply is not None:
                reason = node_reason(str(reply.error.reason))[:_LONGEST]
            self._in_vain.setdefault(kind, f"node {node}: {reason}")
            if reply is None and self._run.grid.deadlines.ends_early:
                self._late += 1
                continue
            # as text: JavaScript rounds integers of 64 bits
            failed.append({"node": str(node), "reason": reason})
        self._failed += failed
        if failed and self._run.stop_on_failure:
            raise NodesFailed(
                f"round {self._number}: {len(failed)} clients answered with an error, the first, "
                f"node {failed[0]['node']}: {failed[0]['reason']}"
            )
        return replies

    def check(self) -> None:
        """See that the run was not for nothing: Flower's strategies skip errors in silence.

        Raises:
            NodesFailed: it asked for training, or anything, and no reply could be used.
        """
        in_vain = self._in_vain.get("train", "") if "train" not in self._used else ""
        if in_vain or (self._in_vain and not self._used):
            reason = in_vain or next(iter(self._in_vain.values()))
            raise NodesFailed(f"no reply of the whole run could be used; the first, of {reason}")

    @contextmanager
    def observing(self, strategy: Strategy) -> Iterator[None]:
        """Note the metrics that a strategy aggregates while it runs."""
        before = dict(vars(strategy))
        for kind in _AGGREGATED:
            name = f"aggregate_{kind}"
            vars(strategy)[name] = self._noting(kind, getattr(strategy, name))
        try:
            yield
        finally:
            for name in map("aggregate_{}".format, _AGGREGATED):
                del vars(strategy)[name]
                if name in before:
                    vars(strategy)[name] = before[name]

    def _noting(self, kind: str, aggregate: Callable[..., Any]) -> Callable[..., Any]:
        def noted(server_round: int, replies: Iterable[Message]) -> Any:
            result = aggregate(server_round, replies)
            metrics = result[1] if kind == "train" else result
            self._metrics[kind] = dict(metrics or {})
            self._going_on.note(kind, server_round, metrics)
            if kind == "train" and result[0] is not None:
                return self._left(server_round, result[0]), metrics
            return result

        return noted

    def _left(self, server_round: int, arrays: ArrayRecord) -> ArrayRecord:
        """What a round arrived at, without the channels that go after it."""
        run = self._run
        left, removed = self._removals.after(server_round, run.grid, run.strategy, arrays, run.key)
        if removed is not None:
            self._events.write(
                "channels-removed", round=server_round, **dataclasses.asdict(removed)
            )
            if run.releases is not None and (plan := run.grid.channels(key=run.key)) is not None:
                run.releases.narrow(plan)
        left, done = self._recalibration.after(
            *(server_round, run.grid, self._grid, left, self._trained),
            removed=removed is not None,
            key=run.key,
            timeout=self._timeout,
        )
        if done is not None:
            self._events.write("recalibrated", round=server_round, **dataclasses.asdict(done))
        return left

    def after(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """What Flower calls before the first round (0) and at the end of each."""
        run, going_on = self._run, self._going_on
        server_round += going_on.passed
        if going_on.passed and server_round == going_on.passed:
            return self._again(server_round, arrays)
        run.grid.ledger.flush()
        before = run.published
        published = run.grid.published(arrays, key=run.key) if run.publishes else None
        run.published, measured = published, None
        if run.evaluate_fn is not None:
            given = array_record(published.arrays()) if published else arrays
            measured = run.evaluate_fn(server_round, given)
            run.grid.note_metrics(measured or {}, key=run.key)
        widths = self._of_widths(server_round, arrays, published, measured)
        pruning = run.grid.pruned(key=run.key)
        known = {**self._metrics.get("evaluate", {}), **(measured or {})}
        self.recoveries.note(
            server_round, known, pruned=any(e["what"] == "pruned" for e in pruning)
        )
        self._events.write(
            "round-finished",
            round=server_round,
            metrics=dict(measured or {}),
            client_metrics=self._metrics,
            node_metrics={name: _spread(found) for name, found in self._measured.items()},
            sparsity=published.sparsity() if published else 0.0,
            layers=layers_in(arrays, published),
            masks=changed_masks(before, published),
            pruning=pruning,
            sampled=run.grid.samples.take(),
            **({"widths": widths} if widths else {}),
            **({"classes": classes} if (classes := run.grid.classes()) else {}),
            **({"budget": budget} if (budget := run.grid.budget()) else {}),
            nodes={
                "asked": self._asked,
                "trained": len(self._trained),
                "late": self._late,
                "late_applied": self._applied,
                "failures": len(self._failed),
                "failed": self._failed[:_NAMED],
            },
            status=self._nodes.of_round(published.counter if published else None),
            kinds=run.grid.ledger.by_kind(),
            **self.cost(),
        )
        if run.releases is not None and published is not None:
            numbers = {n: float(v) for n, v in known.items() if isinstance(v, int | float)}
            metrics = {name: value for name, value in numbers.items() if math.isfinite(value)}
            made = run.releases.after_round(server_round, metrics, lambda: published)
            if made is not None:
                self._events.write("release", **dataclasses.asdict(made))
        going_on.note("server", server_round, measured)
        if server_round or not self._anew:
            state = going_on.taken(
                *(server_round, run.grid.policy),
                rounds=self._rounds,
                before=self._before,
                job=run.job,
                connected=self._listed,
                events={"continues": self._events.run, "until": self._events.place},
                spent={k: n for k, n in self.cost().items() if isinstance(n, int | float)},
                told=told_state(self.recoveries, run.releases),
            )
            run.save(arrays, state, first=self._anew and server_round == 1)
        self._begin(server_round + 1)
        return measured

    def _again(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """What `after` said of the round that the run was stopped after; nothing is done twice."""
        run = self._run
        run.published = run.grid.published(arrays, key=run.key) if run.publishes else None
        self._begin(server_round + 1)
        found = self._going_on.results["server"].get(server_round)
        return None if found is None else MetricRecord(found)

    def _of_widths(
        self,
        server_round: int,
        arrays: ArrayRecord,
        published: PublishedModel | None,
        measured: MetricRecord | None,
    ) -> dict[str, dict[str, Any]]:
        """What each width class trains, costs so far, and is worth; empty without classes."""
        run, found = self._run, {}
        policy = run.grid.policy
        if not policy.widths or published is None:
            return {}
        for name, share in {WHOLE: 1.0, **policy.widths}.items():
            model, metrics, width = published, measured, "" if name == WHOLE else name
            if width:
                model, plan = run.grid.sliced(arrays, width, key=run.key)
                metrics = None
                if run.evaluate_fn is not None:
                    with holding_channels(plan):
                        metrics = run.evaluate_fn(server_round, array_record(model.arrays()))
            spent = run.grid.ledger.totals(width=width)
            found[name] = {
                "share": share,
                "nodes": run.grid.nodes_of(width),
                "weights": sum(spec.size for spec in model.specs.values()),
                "metrics": dict(metrics or {}),
                "bytes_down": spent.bytes_down,
                "bytes_up": spent.bytes_up,
            }
        return found

    def cost(self) -> dict[str, Any]:
        """Bytes of the run so far, and its seconds."""
        totals = self._run.grid.ledger.totals()
        names = ("bytes_down", "bytes_up", "dense_bytes_down", "dense_bytes_up")
        sums = {name: float(getattr(totals, name)) for name in names}
        sums["seconds"] = time.monotonic() - self._began
        for name, spent in self._going_on.spent.items():  # before the run was resumed
            sums[name] += spent
        whole = {name: int(sums[name]) for name in names}
        return {**whole, "wire": totals.wire(), "seconds": round(sums["seconds"], 3)}


def _numbers(reply: Message) -> dict[str, float]:
    """The finite metrics of a reply, without what they are weighted by."""
    return {
        name: float(value)
        for record in reply.content.metric_records.values()
        for name, value in record.items()
        if isinstance(value, int | float) and math.isfinite(value) and name != "num-examples"
    }


def _spread(values: list[float]) -> dict[str, float | int | None]:
    """Over nodes, each counting once: mean, standard deviation (None for one), and their number.

    None, too, is what no float can tell: nodes may say 1e308.
    """
    mean = _finite(statistics.fmean, values)
    deviation = _finite(statistics.stdev, values) if len(values) > 1 else None
    return {"mean": mean, "deviation": deviation, "nodes": len(values)}


def _finite(of: Callable[[list[float]], float], values: list[float]) -> float | None:
    try:
        found = of(values)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None

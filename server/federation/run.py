"""One federation from its first weights to the files it leaves."""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from prunecast.common.files import StorageError
from prunecast.compression.flower import array_record, node_reason
from prunecast.compression.flower.internals import keep_random_apart, log
from prunecast.compression.pruning.structure.channels import (
    ChannelPlan,
    channels_beside,
    holding_channels,
)
from prunecast.compression.versions import PublishedModel, save_model
from prunecast.server.federation.errors import FederationError, NodesFailed
from prunecast.server.federation.exchange.deadlines import Deadlines, gather
from prunecast.server.federation.exchange.grid import CompressedGrid
from prunecast.server.federation.policy import WHOLE, Policy
from prunecast.server.federation.publishing.prunable import check_model
from prunecast.server.federation.publishing.widths import SliceChooser, check_strategy
from prunecast.server.federation.recalibration import Recalibration
from prunecast.server.federation.recovery import Recoveries
from prunecast.server.federation.releasing import AutomaticReleases
from prunecast.server.federation.reporting.events import EventLog, OnEvent
from prunecast.server.federation.reporting.layers import changed_masks, layers_in, samples_round
from prunecast.server.federation.reporting.ledger import Ledger
from prunecast.server.federation.reporting.nodes import NodeStates
from prunecast.server.federation.shrinking import ChannelChooser, Removals
from prunecast.server.federation.state.checkpoints import (
    Checkpoint,
    check_model_of,
    forget_earlier,
    save_newest,
)
from prunecast.server.federation.state.resuming import (
    Continuation,
    checkpoint_to_resume,
    put_told,
    told_state,
)
from prunecast.server.federation.state.snapshots import Unstorable
from prunecast.server.federation.wrapper import GridWrapper

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CHECKPOINT", "EVENTS", "LEDGER", "MODEL", "EvaluateFn", "Run", "initial_arrays"]

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
"""From the round (0: before training) and a model's arrays to metrics, if any."""

LEDGER, EVENTS = "ledger.jsonl", "events.jsonl"
CHECKPOINT, MODEL = "checkpoint.safetensors", "final.model"

_AGGREGATED = ("train", "evaluate")
_NAMED, _LONGEST = 100, 300  # failed nodes in an event, and characters of a reason


def initial_arrays(model: Callable[[], nn.Module], *, seed: int) -> tuple[nn.Module, ArrayRecord]:
    """A model with weights drawn from `seed`, and its arrays; generators keep their state."""
    import torch

    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            random.seed(seed)
            module = model()
    finally:
        random.setstate(state)
    return module, ArrayRecord(module.state_dict())


class Run:
    """Trains one federation: any strategy of Flower, compressed, recorded and measured.

    ::

        run = Run(grid, FedAvg(), policy="small", folder="runs/digits", evaluate_fn=evaluate)
        result = run.start(arrays, num_rounds=30)

    What is evaluated and released is the *published* model, which nodes and devices run. The
    folder gets the ledger, the events, a checkpoint after every round and the final model, see
    docs/run.md; what fails to be written while the run goes on is logged and does not end it.

    Args:
        grid: the grid that Flower hands to the ServerApp; or a `CompressedGrid`, which may be
            wrapped again, whose policy is used, and its ledger if no other is named.
        strategy: any strategy.
        policy: how `grid` is wrapped: a `Policy` or the name of a preset.
        folder: of the run; None to leave no files.
        evaluate_fn: (round, published arrays) -> metrics or None, called before the first round
            and after each.
        releases: when the published model is released, and where to.
        seed: of the sampling of nodes, and of a drawn model.
        name: what people call the run.
        ledger: file of the ledger instead of the folder's.
        output: file of the final published model instead of the folder's.
        events: file of the events instead of the folder's.
        on_event: told of every event, see `prunecast.server.federation.reporting.events`.
        stop_on_failure: end the run with `NodesFailed` if a node fails, instead of going on
            without it as Flower does.
        key: key of the model's record in the strategy's messages.
        slices: chooses what the policy's width classes train of the model; see
            `prunecast.server.federation.publishing.widths.leading_slices`. `evaluate_fn` is then
            called for each of them, too, and finds its channels by `current_channels`.
        channels: chooses which channels go, where the policy removes some while the run trains;
            see `prunecast.server.federation.shrinking.module_chooser`.
        deadlines: when rounds end, what becomes of late replies, and how many nodes a start needs.
        checkpoint: file of the newest checkpoint instead of the folder's.
        checkpoints: how many are kept while the run goes on, 1 or more.
        resume: "auto" to go on exactly from the newest usable checkpoint, where there is one;
            `start` is given the same as before, and rounds count on up to its `num_rounds`.
        job: name of what nodes keep their files for, see `CompressedGrid`; a run that begins anew
            is a job of its own, whatever its name.

    Attributes:
        grid: the compressed grid; `grid.ledger.totals()` tells the bytes so far.
        published: the version that was measured last; None before, and where models travel dense.
    """

    def __init__(
        self,
        grid: Grid,
        strategy: Strategy,
        *,
        policy: Policy | str = "balanced",
        folder: Path | str | None = None,
        evaluate_fn: EvaluateFn | None = None,
        releases: AutomaticReleases | None = None,
        seed: int = 0,
        name: str = "",
        ledger: Path | str | None = None,
        output: Path | str | None = None,
        events: Path | str | None = None,
        on_event: OnEvent | None = None,
        stop_on_failure: bool = False,
        key: str = "arrays",
        channels: ChannelChooser | None = None,
        slices: SliceChooser | None = None,
        deadlines: Deadlines | None = None,
        checkpoint: Path | str | None = None,
        checkpoints: int = 2,
        resume: str = "",
        job: str = "",
    ) -> None:
        found: Grid = grid
        while isinstance(found, GridWrapper) and not isinstance(found, CompressedGrid):
            found = found.wrapped
        if isinstance(found, CompressedGrid):
            self.grid, self._outermost = found, grid
        else:
            self.grid = self._outermost = CompressedGrid(grid, policy, seed=seed)
        if deadlines is not None:
            self.grid.use_deadlines(deadlines)
        self.strategy = strategy
        self.folder = None if folder is None else Path(folder)
        self.seed, self.name, self.key = seed, name, key
        self.evaluate_fn, self.releases = evaluate_fn, releases
        self.stop_on_failure = stop_on_failure
        self.choose_channels, self.choose_slices = channels, slices
        self.publishes = self.grid.policy.down != "dense"
        if releases is not None and not self.publishes:
            raise FederationError(
                "where models travel densely nothing is published that could be released: choose "
                "a policy with down = 'lattice'"
            )
        self.published: PublishedModel | None = None
        self._ledger = self._file(LEDGER, ledger)
        self._output = self._file(MODEL, output)
        self._events = self._file(EVENTS, events)
        self._checkpoint = self._file(CHECKPOINT, checkpoint)
        self._kept = max(1, checkpoints)
        self.resume, self.job = resume, job
        self._on_event = on_event

    def start(
        self,
        initial: ArrayRecord | Checkpoint,
        num_rounds: int = 3,
        *,
        drawn: bool = False,
        timeout: float = 3600.0,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
    ) -> Result:
        """Train, and write what the run leaves; what the strategy's own `start` returns.

        Args:
            initial: the first weights, or the checkpoint of a run to go on from.
            num_rounds: how many rounds to train.
            drawn: draw the first weights from the seed, like those given, so that the first
                keyframe takes a few bytes.
            timeout: seconds to wait for the replies of a round.
            train_config: for the nodes' training, as in Flower.
            evaluate_config: for the nodes' evaluation, as in Flower.

        Raises:
            PolicyError: the model cannot be pruned as the policy says; nothing was written.
            FederationError: nodes failed and the run was to stop then, or no reply of the whole
                run could be used; the model diverged; the metric to release by is not measured.
            StorageError: a file cannot be written to begin with, or the final model.
        """
        passed, removed = 0, None
        configs = [ConfigRecord() if c is None else c for c in (train_config, evaluate_config)]
        going_on = Continuation(self.strategy, *configs)
        found = checkpoint_to_resume(self.resume, self._checkpoint)
        if found is None and self.job:
            before = initial.state if isinstance(initial, Checkpoint) else None
            same = before is not None and before.get("run", {}).get("job") == self.job
            fresh = f"{self.job} {self.grid.run.run_id}"
            self.grid.use_job(before["grid"]["job"] if same and before else fresh)
        self._slice()
        if found is not None:
            arrays, removed, passed = self._go_on(found, going_on, initial, num_rounds)
        elif isinstance(initial, Checkpoint):
            if initial.channels is not None and self.grid.policy.widths:
                raise FederationError(
                    "prunecast.widths slices a model that keeps all of its channels, and from that "
                    "of the checkpoint some were removed"
                )
            arrays, removed = self.grid.resume(initial), initial.channels
            passed = max(0, initial.clock - 1)
            self.grid.expect_rounds(num_rounds + passed)
        else:
            self.grid.expect_rounds(num_rounds)
            like = initial
            check_model(self.grid.policy, like, num_rounds, key=self.key)
            arrays = self.grid.draw_initial(like, self.seed, key=self.key) if drawn else like
        schedule = self.grid.policy.pruning().channels
        recalibration = Recalibration(self.grid.policy, self.strategy)
        tries = self.grid.policy.tries_channels
        removals = Removals(schedule, self.choose_channels, passed, tries=tries)
        if self.releases is not None and (schedule.at or tries or removed is not None):
            self.releases.check_narrow()
        if self.releases is not None and removed is not None:
            self.releases.narrow(removed)
        removals.check(
            *(self.grid, arrays, self.strategy, num_rounds, self.key), begun=going_on.passed
        )
        if self._checkpoint is not None:
            self.grid.note_saved()
        keep_random_apart()
        random.seed(self.seed)  # Flower samples nodes with it
        going_on.put_random()
        begins: dict[str, Any] = {}
        if found is not None:
            begins = {"from_round": going_on.passed, **going_on.events}
        events = EventLog(
            self._events,
            self._on_event,
            name=self.name,
            seed=self.seed,
            rounds=num_rounds,
            strategy=type(self.strategy).__name__,
            policy=dataclasses.asdict(self.grid.policy),
            flower_run=str(self.grid.run.run_id),
            resumed=found is not None or isinstance(initial, Checkpoint),
            **begins,
        )
        getLogger("flwr").addHandler(events)
        try:
            if self._ledger is not None:
                self.grid.ledger.close()
                self.grid.ledger = Ledger(
                    *(self._ledger,),
                    run=events.run,
                    name=self.name,
                    seed=self.seed,
                    continues=going_on.events.get("continues", ""),
                )
                if self.grid.ledger.totals().messages:
                    going_on.spent = {"seconds": going_on.spent["seconds"]}
            rounds = _Rounds(
                *(self, self._outermost, events, num_rounds, removals, recalibration, timeout),
                going_on,
                before=passed,
                anew=found is None and not isinstance(initial, Checkpoint),
            )
            gather(self._outermost, self.grid.deadlines)
            if found is not None and found.state is not None:
                put_told(rounds.recoveries, self.releases, found.state["run"]["told"])
            with rounds.observing(self.strategy), going_on.true_rounds():
                result = self.strategy.start(
                    grid=rounds,
                    initial_arrays=arrays,
                    num_rounds=max(0, num_rounds - going_on.passed),
                    timeout=timeout,
                    train_config=configs[0],
                    evaluate_config=configs[1],
                    evaluate_fn=rounds.after,
                )
            result = going_on.whole(result, arrays)
            rounds.check()
            removals.say_owed(num_rounds, self.grid, self.key)
            if self._output is not None and self.publishes and result.arrays:
                save_model(self.grid.published(result.arrays, key=self.key), self._output)
                left, beside = self.grid.channels(key=self.key), channels_beside(self._output)
                if left is not None:
                    left.save(beside)
                else:
                    beside.unlink(missing_ok=True)  # of a run before in the same folder
            self.grid.ledger.flush()
            cost = rounds.cost()
            if result.arrays:
                cost["catching_up"] = self.grid.catching_up(result.arrays, key=self.key)
            if self.grid.policy.target:
                cost["pruning"] = self.grid.mask_cost(key=self.key)
            if self._checkpoint is not None:
                forget_earlier(self._checkpoint)
            events.write("run-finished", recoveries=rounds.recoveries.all(), **cost)
        except BaseException as error:
            events.write("run-failed", reason=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.grid.samples.wanted = False
            self.grid.note_saved(again=False)
            self.grid.ledger.close()
            getLogger("flwr").removeHandler(events)
            events.close()
            self.grid.sum_up()
        sent = "%(bytes_down)d bytes down, %(bytes_up)d up"
        dense = "%(dense_bytes_down)d down, %(dense_bytes_up)d up"
        log(INFO, f"Prunecast: {sent}; plain Flower: {dense}", rounds.cost())
        return result

    def _go_on(
        self,
        found: Checkpoint,
        going_on: Continuation,
        initial: ArrayRecord | Checkpoint,
        num_rounds: int,
    ) -> tuple[ArrayRecord, ChannelPlan | None, int]:
        """Be where a checkpoint was written; its arrays, channels, and the rounds before its run.

        Raises:
            CheckpointError: it is of another model, policy, strategy or job, or is damaged.
            StorageError: it cannot be written again, as of this attempt.
        """
        assert found.state is not None
        assert self._checkpoint is not None
        state = found.state["run"]
        going_on.put(state, self.grid.policy, num_rounds, self.job)
        self.grid.expect_rounds(num_rounds + state["before"])
        arrays = self.grid.go_on(found)
        if isinstance(initial, ArrayRecord):
            check_model_of(found, initial, str(self._checkpoint))
        # so that an attempt which ends before its first checkpoint is known to the next
        state = {**found.state, "grid": {**found.state["grid"], "attempt": self.grid.attempt}}
        save_newest(replace(found, state=state), self._checkpoint, self._kept, instead=True)
        return arrays, found.channels, state["run"]["before"]

    def save(self, arrays: ArrayRecord, run_state: Mapping[str, Any], *, first: bool) -> None:
        """Write a checkpoint; what fails is logged."""
        if self._checkpoint is None:
            return
        number = run_state["round"]
        self.grid.note_saved()  # so that the checkpoint says what nodes are told after it
        try:
            made = self.grid.checkpoint(arrays, key=self.key)
            assert made.state is not None
            made = replace(made, state={**made.state, "run": run_state})
            if first:  # what is there is of another run
                forget_earlier(self._checkpoint)
            save_newest(made, self._checkpoint, self._kept, instead=first)
        except (StorageError, Unstorable) as error:
            log(WARNING, "No checkpoint of round %d: %s", number, error)

    def _slice(self) -> None:
        """Say what the policy's width classes train, and see that the strategy suits them."""
        widths = self.grid.policy.widths
        if not widths:
            return
        if self.choose_slices is None:
            raise FederationError(
                "the policy has width classes and nobody says what they train: give "
                "Run(slices=leading_slices(model, example)), or in the run config of the ready "
                "ServerApp example = 'myapp.task:example', () -> inputs of the model"
            )
        check_strategy(self.strategy)
        plans = {name: self.choose_slices(float(share)) for name, share in widths.items()}
        self.grid.use_widths(plans, key=self.key)

    def _file(self, name: str, instead: Path | str | None = None) -> Path | None:
        if instead is not None:
            return Path(instead)
        return None if self.folder is None else self.folder / name


class _Rounds(GridWrapper):
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
        training = sum(map(_trains, batch))
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
            kind = "train" if _trains(message) else "other"
            if reply is not None and not reply.has_error():
                if _trains(message):
                    self._trained.append(message.metadata.dst_node_id)
                self._used.add(kind)
                if _function(message) == MessageType.EVALUATE:
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


def _function(message: Message) -> str:
    """What a message asks for, by a ClientApp's only function for it or a named one."""
    return message.metadata.message_type.partition(".")[0]


def _trains(message: Message) -> bool:
    return _function(message) == MessageType.TRAIN


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

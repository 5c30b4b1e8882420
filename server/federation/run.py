"""One federation from its first weights to the files it leaves."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from logging import INFO, WARNING, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from prunecast.common.files import StorageError
from prunecast.compression.flower.internals import keep_random_apart, log
from prunecast.compression.pruning.structure.channels import (
    ChannelChooser,
    ChannelPlan,
    channels_beside,
)
from prunecast.compression.versions import PublishedModel, save_model
from prunecast.server.federation.errors import FederationError
from prunecast.server.federation.exchange.deadlines import Deadlines, gather
from prunecast.server.federation.exchange.grid import CompressedGrid
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.publishing.masks.prunable import check_model
from prunecast.server.federation.publishing.widths import SliceChooser, check_strategy
from prunecast.server.federation.recalibration import Recalibration
from prunecast.server.federation.releasing import AutomaticReleases
from prunecast.server.federation.reporting.events import EventLog, OnEvent
from prunecast.server.federation.reporting.ledger import Ledger
from prunecast.server.federation.rounds import Rounds
from prunecast.server.federation.shrinking.removals import Removals
from prunecast.server.federation.state.checkpoints import (
    Checkpoint,
    check_model_of,
    forget_earlier,
    note_attempt,
    save_newest,
)
from prunecast.server.federation.state.resuming import Continuation, checkpoint_to_resume, put_told
from prunecast.server.federation.state.snapshots import Unstorable
from prunecast.server.federation.wrapper import GridWrapper

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CHECKPOINT", "EVENTS", "LEDGER", "MODEL", "EvaluateFn", "Run", "initial_arrays"]

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]
"""From the round (0: before training) and a model's arrays to metrics, if any."""

LEDGER, EVENTS = "ledger.jsonl", "events.jsonl"
CHECKPOINT, MODEL = "checkpoint.safetensors", "final.model"


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
            see `prunecast.server.federation.shrinking.choosing.module_chooser`.
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
        tries = self.grid.policy.tried_structures
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
            rounds = Rounds(
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
        note_attempt(self._checkpoint, self.grid.attempt)
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
            self.grid.note_unsaved()
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

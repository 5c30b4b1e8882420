"""A run that goes on where it was stopped, as if it had not been: what there is beside its grid.

A strategy counts its rounds from 1, and knows nothing of those before. So its methods are called
with the true number of the round, its state and the random states are put back, and the results of
the rounds before are put in front of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from logging import INFO, WARNING
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import Result, Strategy

from prunecast.compression.flower.internals import log
from prunecast.server.federation.errors import CheckpointError, FederationError
from prunecast.server.federation.policy import Policy
from prunecast.server.federation.state.checkpoints import Checkpoint, newest_checkpoint
from prunecast.server.federation.state.strategy_state import StrategyState

if TYPE_CHECKING:
    from prunecast.server.federation.recovery import Recoveries
    from prunecast.server.federation.releasing import AutomaticReleases

__all__ = ["AUTO", "Continuation", "checkpoint_to_resume", "put_told", "told_state"]

AUTO = "auto"
"""Go on from the newest usable checkpoint of the run's folder, if there is one."""

_ROUNDS = ("configure_train", "configure_evaluate", "aggregate_train", "aggregate_evaluate")
_RESULTS = {
    "train": "train_metrics_clientapp",
    "evaluate": "evaluate_metrics_clientapp",
    "server": "evaluate_metrics_serverapp",
}


def checkpoint_to_resume(resume: str, path: Path | None) -> Checkpoint | None:
    """What a run goes on from exactly; None for nothing, so that it begins.

    Args:
        resume: "" or `AUTO`.
        path: of the newest checkpoint of the run's folder; None without a folder.

    Raises:
        FederationError: `resume` is another word, or there is no folder to look into.
        CheckpointError: there are checkpoints, and none is usable.
    """
    if resume == "":
        return None
    if resume != AUTO:
        raise FederationError(f"resume = {resume!r}: give 'auto', or leave it out")
    if path is None:
        raise FederationError("resume = 'auto' needs the folder of the run: give one")
    found = newest_checkpoint(path)
    if found is None:
        log(INFO, "There is no checkpoint in %s: the run begins.", path.parent)
    elif found.state is None or "run" not in found.state:
        raise CheckpointError(
            f"{path} is not of a run, so nothing says where that was: give it to Run.start, or as "
            "resume = '<path>' in the run config, to begin with its weights"
        )
    return found


class Continuation:
    """What goes on from round to round beside the grid.

    Args:
        strategy: as it was made.
        train_config: that is sent with messages to train, and that the strategy may change.
        evaluate_config: likewise, of messages to evaluate.

    Attributes:
        passed: rounds before this run of Flower, which are not trained again.
        events: what the header of the events says of these, see `prunecast.common.journal`.
        spent: bytes and seconds of these.
        results: of each kind, metrics by round.
    """

    def __init__(
        self, strategy: Strategy, train_config: ConfigRecord, evaluate_config: ConfigRecord
    ) -> None:
        self._strategy = strategy
        self._state = StrategyState(strategy)
        self.configs = (train_config, evaluate_config)
        self.passed = 0
        self.events: dict[str, Any] = {}
        self.spent: Mapping[str, float] = {}
        self.results: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in _RESULTS}
        self._random: Any = None

    def note(self, kind: str, number: int, metrics: Mapping[str, Any] | None) -> None:
        """Note the metrics of a round as a result has them."""
        if metrics is not None:
            self.results[kind][number] = dict(metrics)

    def taken(self, number: int, policy: Policy, **more: Any) -> dict[str, Any]:
        """What `put` takes, after a round.

        Args:
            number: of the round.
            policy: of the run.
            more: what else is to be known then.
        """
        return {
            **more,
            "round": number,
            "policy": asdict(policy),
            "strategy": type(self._strategy).__name__,
            "strategy_state": self._state.taken(),
            "configs": [dict(config) for config in self.configs],
            "results": self.results,
            "random": random.getstate(),
            "numpy": np.random.get_state(legacy=True),
        }

    def put(self, state: Mapping[str, Any], policy: Policy, rounds: int, name: str) -> None:
        """Go on where another was; random states follow with `put_random`.

        Args:
            state: of `taken`.
            policy: of this run.
            rounds: that there are to be in all.
            name: of the job; "" for whichever it was.

        Raises:
            CheckpointError: policy, strategy or job are others.
        """
        _check_same(state, policy, self._strategy, name)
        if rounds != state["rounds"]:
            log(
                WARNING,
                "The run was to have %d rounds, and now has %d: what follows the number of rounds, "
                "as pruning may, goes on differently.",
                *(state["rounds"], rounds),
            )
        self._state.put(state["strategy_state"])
        for config, found in zip(self.configs, state["configs"], strict=True):
            config.clear()
            config.update(found)
        self.passed, self.spent = state["round"], state["spent"]
        self.events = dict(state["events"])
        self.results = state["results"]
        self._random = state["random"], state["numpy"]
        log(
            INFO,
            "Resumed after round %d of %d%s.",
            *(self.passed, rounds),
            f": Flower's [ROUND 1/{rounds - self.passed}] is round {self.passed + 1}"
            if 0 < self.passed < rounds
            else "",
        )

    def put_random(self) -> None:
        """Draw on as if the run had not been stopped."""
        if self._random is not None:
            random.setstate(self._random[0])
            np.random.set_state(self._random[1])

    @contextmanager
    def true_rounds(self) -> Iterator[None]:
        """Call the strategy's methods with the number of the round that counts those before."""
        own = vars(self._strategy)
        before = {name: own[name] for name in _ROUNDS if name in own}
        if self.passed:
            for name in _ROUNDS:
                own[name] = self._shifted(getattr(self._strategy, name))
        try:
            yield
        finally:
            for name in _ROUNDS if self.passed else ():
                del own[name]
            own.update(before)

    def _shifted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def shifted(server_round: int, *given: Any, **named: Any) -> Any:
            return method(server_round + self.passed, *given, **named)

        return shifted

    def whole(self, result: Result, arrays: ArrayRecord) -> Result:
        """A result of the rounds from 1, as of a run that was not stopped.

        Args:
            result: what the strategy returned; changed in place.
            arrays: that it began with.
        """
        if not self.passed:
            return result
        for kind, name in _RESULTS.items():
            found: dict[int, MetricRecord] = {
                number: MetricRecord(metrics) for number, metrics in self.results[kind].items()
            }
            found |= {n + self.passed: m for n, m in getattr(result, name).items() if n}
            setattr(result, name, found)
        if not result.arrays:
            result.arrays = arrays
        return result


def _check_same(state: Mapping[str, Any], policy: Policy, strategy: Strategy, name: str) -> None:
    now, then = asdict(policy), state["policy"]
    changed = [knob for knob in now if then.get(knob) != now[knob]]
    if changed:
        knob = changed[0]
        raise CheckpointError(
            f"the run was started with another policy ({knob} = {then.get(knob)!r}, now "
            f"{now[knob]!r}{' and others' if len(changed) > 1 else ''}): a run that is resumed "
            "goes on as it was. Set it back, or begin a new run from its weights, with "
            "resume = '<path of the checkpoint>' and another folder"
        )
    kind = type(strategy).__name__
    if kind != state["strategy"]:
        raise CheckpointError(
            f"the run was started with the strategy {state['strategy']}, and {kind} does not go on "
            "with its state: set it back, or begin a new run from its weights"
        )
    if name and name != state["job"]:
        raise CheckpointError(
            f"the folder is of job {state['job']!r}, and job = {name!r}: give each a folder"
        )


def told_state(recoveries: Recoveries, releases: AutomaticReleases | None) -> dict[str, Any]:
    """What `put_told` takes: what a run tells of itself, and has released."""
    state: dict[str, Any] = {
        "recoveries": [recoveries._found, recoveries._last, recoveries._goes_on]
    }
    if releases is not None:
        watch = releases._watch
        state["releases"] = [watch._held, watch._reached, releases._owed, releases._digest]
    return state


def put_told(
    recoveries: Recoveries, releases: AutomaticReleases | None, state: Mapping[str, Any]
) -> None:
    """Tell of the prunings before, too, and release nothing again that was released."""
    recoveries._found, recoveries._last, recoveries._goes_on = state["recoveries"]
    if releases is not None and "releases" in state:
        watch = releases._watch
        watch._held, watch._reached, releases._owed, releases._digest = state["releases"]

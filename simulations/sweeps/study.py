"""A sweep while it runs: Optuna remembers the points, processes train them."""

from __future__ import annotations

import dataclasses
import json
import os
import selectors
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.common.files import lock_file
from prunecast.common.text import first_line, quiet
from prunecast.simulations.kinds import DataError, ScenarioError, choice
from prunecast.simulations.runner import SimulationError
from prunecast.simulations.scenarios import Scenario, scenario_from_mapping
from prunecast.simulations.sweeps import SweepSpec, applied
from prunecast.simulations.sweeps.drawing import draw, quiet_optuna, trial_of, unfinished
from prunecast.simulations.sweeps.trial import RunningTrial, start_trial

if TYPE_CHECKING:
    from optuna.study import Study

__all__ = ["DATABASE", "Sweep", "jobs_for"]

DATABASE = "study.db"
_BASELINE = -1  # number of the trial that plain Flower is
_PATIENCE = 3  # trials that may fail before a single one was trained
_FIGURES = ("bytes_down", "bytes_up", "spread", "seconds", "reason")

OnEvent = Callable[[Mapping[str, Any]], None]


def jobs_for(scenario: Scenario) -> int:
    """How many trials run at the same time: as the cores of this machine have room for.

    One where the clients of a trial run on a Ray cluster, which is then shared by these.
    """
    engine = scenario.engine
    if engine.backend == "ray" and engine.address:
        return 1
    taken = engine.concurrent * engine.cpus if engine.backend == "ray" else 1
    return max(1, len(os.sched_getaffinity(0)) // taken)


@dataclass(frozen=True)
class Sweep:
    """What is varied, and where it is kept.

    Attributes:
        scenario: with the arm that is varied alone, and a baseline where it has one.
        spec: the table ``[sweep]``.
        arm: that is varied.
        folder: gets the study's database, a folder for each trial, the table and the plot.
    """

    scenario: Scenario
    spec: SweepSpec
    arm: str
    folder: Path

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        *,
        spec: SweepSpec | None = None,
        trials: int | None = None,
        rounds: int | None = None,
        seed: int | None = None,
        folder: Path | None = None,
    ) -> Sweep:
        """Make a sweep, every end of whose space is a scenario and a policy.

        Args:
            scenario: as it was read.
            spec: instead of the scenario's own ``[sweep]``.
            trials: instead of the table's.
            rounds: instead of the scenario's.
            seed: of the sampling, instead of the table's.
            folder: of the sweep; by default ``sweep-<name>`` where the scenario's runs go.

        Raises:
            ScenarioError: there is no ``[sweep]``, or a key of it, or of a point, is unusable.
            FederationError: a point's policy is.
        """
        spec = spec or scenario.sweep
        if spec is None:
            remedy = "add one, or name a file that has one with --space"
            raise ScenarioError("sweep", "the scenario has no such table", remedy)
        spec = dataclasses.replace(
            spec,
            trials=spec.trials if trials is None else trials,
            seed=spec.seed if seed is None else seed,
        )
        spec.check("sweep")
        trained = scenario.trained_arms()
        if spec.arm:
            choice("sweep.arm", spec.arm, trained)
        arm = spec.arm or next(iter([*scenario.publishing_arms(), *trained]))
        base = [name for name, other in trained.items() if other.baseline and name != arm]
        changes: dict[str, Any] = {
            "release": None,
            "network": None,
            "sweep": None,
            "published": {},
            "rounds": rounds or scenario.rounds,
            "arms": {name: scenario.arms[name] for name in [*base[:1], arm]},
        }
        where = folder or Path(scenario.output) / f"sweep-{scenario.name}"
        sweep = cls(dataclasses.replace(scenario, **changes), spec, arm, where)
        for parameter in spec.space():
            tables = parameter.key.split(".")
            if tables[0] == "arms" and tables[1:2] != [arm]:
                raise ScenarioError(
                    parameter.key, f"is no key of the arm {arm!r}", "vary that, or set sweep.arm"
                )
        for point in spec.probes():
            sweep.at(point)
        return sweep

    @property
    def baseline(self) -> str | None:
        """The arm of plain Flower, which is trained once, with the scenario's own keys."""
        return next((name for name in self.scenario.arms if name != self.arm), None)

    def at(self, point: Mapping[str, Any]) -> Scenario:
        """The scenario with the values of a point.

        Raises:
            ScenarioError: it has no such key, or cannot have the value.
            FederationError: its policy cannot.
        """
        table = self.scenario.to_mapping()
        table["arms"] = {self.arm: table["arms"][self.arm]}
        scenario = scenario_from_mapping(applied(table, point))
        scenario.arms[self.arm].grid_policy()
        return scenario

    def check(self) -> None:
        """Find out before anything is trained whether data, model and the ends of the space fit.

        Raises:
            DataError, FederationError, ScenarioError: see `check_scenario`.
        """
        from prunecast.simulations.runner.checks import check_data_and_model
        from prunecast.simulations.runner.federate import strategy_of
        from prunecast.simulations.runner.run import check_scenario

        data = check_scenario(self.scenario)
        for parameter in self.spec.space():
            if parameter.key.partition(".")[0] not in ("clients", "model", "strategy", "training"):
                continue
            for value in parameter.ends():
                scenario = self.at({parameter.key: value})
                scenario.model.network()
                with quiet("flwr"):  # see `check_scenario`
                    strategy_of(scenario)
                try:
                    check_data_and_model(scenario, data)
                except DataError as error:
                    problem = f"is {value!r}, for which {first_line(error)}"
                    raise ScenarioError(parameter.key, problem, "leave that value out") from error

    # -- running --------------------------------------------------------------------------------

    def run(self, on_event: OnEvent = lambda event: None, *, jobs: int = 0) -> dict[str, Any]:
        """Train what is not trained yet, and write the table and the plot.

        Args:
            on_event: told ``trial-started`` (``trial``, ``point``), ``trial-round`` (``trial``,
                ``round``, ``rounds``), ``trial-finished`` (its outcome), and ``step`` (``text``).
            jobs: how many trials at the same time; 0 for `jobs_for`.

        Returns:
            The document, see `results.document_of`.

        Raises:
            DataError, FederationError, ScenarioError: see `check`; or the sweep in the folder is
                another one.
            SimulationError: another process runs it, no trial could be trained, or the folder
                cannot be written.
        """
        from prunecast.simulations.sweeps.results import document_of, write_results

        with self._locked(), quiet_optuna():
            study = self._study()
            if self._left(study):
                on_event({"event": "step", "text": "checking the scenario, its data and the space"})
                self.check()
                self._train(study, on_event, jobs or jobs_for(self.scenario))
            document = document_of(self, study)
            on_event({"event": "step", "text": "drawing the front"})
            write_results(self.folder, document)
        return document

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = lock_file(self.folder / "lock")
        except BlockingIOError:
            raise SimulationError(
                f"another process runs the sweep in {self.folder}: wait for it, or choose another "
                "folder with --out"
            ) from None
        except OSError as error:
            raise SimulationError(
                f"cannot write {self.folder} ({error.strerror or error}): choose another folder "
                "with --out"
            ) from error
        with lock:
            yield

    def _study(self) -> Study:
        """The study in the folder, made if necessary.

        Raises:
            ScenarioError: it is of another sweep; names the first key that differs.
        """
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        path = self.folder / DATABASE
        task = self.scenario.task
        try:
            study = optuna.create_study(
                storage=optuna.storages.RDBStorage(f"sqlite:///{path}"),
                study_name="sweep",
                directions=["minimize", "minimize" if task.lower_is_better else "maximize"],
                sampler=optuna.samplers.RandomSampler(seed=0),
                load_if_exists=True,
            )
        except (SQLAlchemyError, RuntimeError, ValueError) as error:
            raise SimulationError(
                f"{path} cannot be read ({first_line(error)}): choose another folder with --out"
            ) from error
        now = self.definition()
        then = study.user_attrs.get("definition")
        if then is None:
            study.set_user_attr("definition", now)
            return study
        for key in [*now, *then]:
            if now.get(key) != then.get(key):
                was, found = (
                    f"{d[key]!r}" if d.get(key) is not None else "not there" for d in (then, now)
                )
                raise ScenarioError(
                    key,
                    f"is {found}, and was {was} when the sweep in {self.folder} began",
                    "set it back, or choose another folder with --out",
                )
        return study

    def definition(self) -> dict[str, Any]:
        """What a sweep that goes on must have kept, as keys with dots; not how many trials."""
        spec = {k: v for k, v in vars(self.spec).items() if k not in ("parameters", "trials")}
        found = {f"sweep.{key}": value for key, value in {**spec, "arm": self.arm}.items()}
        for parameter in self.spec.space():
            known = dataclasses.asdict(parameter)
            del known["key"]
            kept = {k: v for k, v in known.items() if v not in (None, (), False)}
            if parameter.choices:
                kept = {"choices": list(parameter.choices)}
            found[f"sweep.parameters.{parameter.key}"] = kept
        table = self.scenario.to_mapping()
        for key in ("output", "name", "description", "engine"):
            table.pop(key)  # none of which changes a figure
        found.update(_dotted(table, ""))
        return json.loads(json.dumps(found))  # type: ignore[no-any-return]

    def _left(self, study: Study) -> bool:
        from optuna.trial import TrialState

        trials = study.get_trials(deepcopy=False)
        baseline = self.baseline is not None and "baseline" not in study.user_attrs
        waiting = any(trial.state == TrialState.RUNNING for trial in trials)
        return baseline or waiting or len(trials) < self.spec.count

    def _train(self, study: Study, on_event: OnEvent, jobs: int) -> None:
        """Keep `jobs` processes at work until every trial has ended."""
        waiting = deque(unfinished(study, self.spec))
        running: dict[int, RunningTrial] = {}
        if self.baseline is not None and "baseline" not in study.user_attrs:
            running[_BASELINE] = self._start(_BASELINE, {}, on_event)
        with selectors.DefaultSelector() as selector:
            for begun in running.values():
                selector.register(begun, selectors.EVENT_READ, begun)
            try:
                while True:
                    while len(running) < jobs:
                        waiting.extend(() if waiting else draw(study, self.spec, idle=not running))
                        if not waiting:
                            break
                        number, point = waiting.popleft()
                        if self._known(study, number, point, on_event):
                            continue
                        started = self._start(number, point, on_event)
                        running[number] = started
                        selector.register(started, selectors.EVENT_READ, started)
                    if not running:
                        return
                    for key, _ in selector.select():
                        trial: RunningTrial = key.data
                        events = trial.events()
                        for event in events or ():
                            _pass_on(trial.number, event, on_event)
                        if events is None:
                            selector.unregister(trial)
                            del running[trial.number]
                            trial.end()
                            self._ended(study, trial, on_event)
            finally:
                for left in running.values():
                    left.end()

    def _start(self, number: int, point: Mapping[str, Any], on_event: OnEvent) -> RunningTrial:
        base = number == _BASELINE
        scenario, arm = self.at(point), self.arm
        if base:
            assert self.baseline is not None
            arm = self.baseline
            arms = {arm: self.scenario.arms[arm]}
            scenario = dataclasses.replace(self.scenario, arms=arms)
        on_event({"event": "trial-started", "trial": number, "point": dict(point)})
        return start_trial(number, scenario, arm, self.spec.repeats, self.trial_folder(number))

    def trial_folder(self, number: int) -> Path:
        """Where a trial's runs are kept; that of the baseline for -1."""
        return self.folder / ("baseline" if number == _BASELINE else f"trial-{number:04d}")

    # -- outcomes -------------------------------------------------------------------------------

    def _known(
        self, study: Study, number: int, point: Mapping[str, Any], on_event: OnEvent
    ) -> bool:
        """Whether the same point was trained before: it would come out the same."""
        from optuna.trial import TrialState

        for other in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            if other.params == point:
                outcome = {k: other.user_attrs[k] for k in _FIGURES if k in other.user_attrs}
                outcome["reached"] = other.values[1]
                self._tell(study, number, {**outcome, "same_as": other.number}, on_event)
                return True
        return False

    def _ended(self, study: Study, trial: RunningTrial, on_event: OnEvent) -> None:
        if trial.number != _BASELINE:
            self._tell(study, trial.number, trial.outcome, on_event)
        elif "reason" in trial.outcome:
            raise SimulationError(
                f"the baseline {self.baseline!r} was not trained: {trial.outcome['reason']} "
                f"(see {self.trial_folder(_BASELINE)})"
            )
        else:
            study.set_user_attr("baseline", trial.outcome)
            on_event({**trial.outcome, "event": "trial-finished", "trial": _BASELINE})

    def _tell(
        self, study: Study, number: int, outcome: Mapping[str, Any], on_event: OnEvent
    ) -> None:
        """Write how a trial came out.

        Raises:
            SimulationError: it and those before failed, and none was trained.
        """
        import optuna
        from optuna.trial import TrialState

        made = trial_of(study, study.trials[number])
        for key in (*_FIGURES, "same_as"):
            if outcome.get(key) is not None:
                made.set_user_attr(key, outcome[key])
        study.sampler = optuna.samplers.RandomSampler(seed=0)  # none that ends the study itself
        failed = "reason" in outcome
        if failed:
            study.tell(number, state=TrialState.FAIL)
        else:
            study.tell(number, [outcome["bytes_down"] + outcome["bytes_up"], outcome["reached"]])
        on_event({**outcome, "event": "trial-finished", "trial": number})
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        if (
            failed
            and TrialState.COMPLETE not in states
            and states.count(TrialState.FAIL) >= min(_PATIENCE, self.spec.count)
        ):
            raise SimulationError(
                f"no trial was trained, the last because of: {outcome['reason']} "
                f"(see {self.trial_folder(number)})"
            )


def _pass_on(number: int, event: Mapping[str, Any], on_event: OnEvent) -> None:
    if event["event"] == "round-finished":
        on_event({"event": "trial-round", "trial": number, **_only(event, "round", "score")})
    elif event["event"] == "run-started":
        on_event({"event": "trial-round", "trial": number, "round": 0, **_only(event, "rounds")})


def _only(event: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: event[key] for key in keys if key in event}


def _dotted(table: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        key = f"{path}.{name}" if path else name
        if isinstance(value, Mapping):
            yield from _dotted(value, key)
        else:
            yield key, value

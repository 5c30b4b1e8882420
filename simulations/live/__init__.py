"""Runs told to other tools while they go on: TensorBoard, Weights & Biases, MLflow.

`Told` is a listener of the events of docs/run.md, like any other: it passes what each round reached
and cost on to the tools that were named. A tool that fails is left out from then
on, with a warning, and never ends the training.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from prunecast.simulations.kinds import choice
from prunecast.simulations.runner import SimulationError

__all__ = ["LOGGERS", "Logger", "LoggerMissing", "Told", "loggers_of"]

_PROJECT = "prunecast"
_SAME = ("sparsity", "bytes_up", "bytes_down", "seconds")  # of an event, as they are


class LoggerMissing(SimulationError):
    """A tool was asked for that is not installed; the message says how to install it."""


class Logger(ABC):
    """One tool: each arm is a run of its own there, one after the other.

    Raises:
        LoggerMissing: the tool is not installed.
    """

    package = ""
    """What is imported, and installed."""

    def __init__(self) -> None:
        try:
            self.module: Any = import_module(self.package)
        except ImportError as error:
            raise LoggerMissing(f"{self.package} is missing: pip install {self.package}") from error

    @abstractmethod
    def begin(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        """Begin a run.

        Args:
            folder: of the run, or of the comparison.
            name: of the arm, and its seed.
            settings: what was chosen, as text and numbers.
        """

    @abstractmethod
    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Tell what a round reached, and what was spent so far."""

    @abstractmethod
    def end(self, failed: bool) -> None:
        """End the run; called once for each that began."""


class TensorBoard(Logger):
    """Event files under ``tensorboard/`` of the folder, written without TensorFlow."""

    package = "tensorboardX"

    def begin(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        """Open the file of a run."""
        self._writer = self.module.SummaryWriter(logdir=str(folder / "tensorboard" / name))
        text = "\n".join(f"    {key} = {value}" for key, value in settings.items())
        self._writer.add_text("settings", text)

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Write scalars, so that they can be seen at once."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, number)
        self._writer.flush()

    def end(self, failed: bool) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases(Logger):
    """Runs of the project ``prunecast``, in a group that is the folder's name."""

    package = "wandb"

    def begin(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        """Begin a run; its files lie in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        self._run = self.module.init(
            project=_PROJECT,
            group=folder.name,
            name=name,
            config=dict(settings),
            dir=str(folder),
        )

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Log a step."""
        self._run.log(dict(values), step=number)

    def end(self, failed: bool) -> None:
        """Finish the run."""
        self._run.finish(exit_code=int(failed))


class MLflow(Logger):
    """Runs of the experiment ``prunecast``, where MLflow's own settings say."""

    package = "mlflow"

    def begin(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        """Begin a run."""
        self.module.set_experiment(_PROJECT)
        self.module.start_run(run_name=f"{folder.name}/{name}")
        self.module.log_params({key: str(value)[:500] for key, value in settings.items()})

    def tell(self, number: int, values: Mapping[str, float]) -> None:
        """Log metrics of a step."""
        self.module.log_metrics(dict(values), step=number)

    def end(self, failed: bool) -> None:
        """End the run."""
        self.module.end_run("FAILED" if failed else "FINISHED")


LOGGERS: Mapping[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}
"""By the name that ``--log`` takes."""


class Told:
    """A listener that passes events on to loggers.

    As a context manager it ends what it began.

    Args:
        loggers: the tools.
        folder: of the run, or of the comparison.
    """

    def __init__(self, loggers: Sequence[Logger], folder: Path) -> None:
        self._loggers, self._folder = list(loggers), folder
        self._open = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Take in an event; those that tell nothing here are passed over."""
        kind = event["event"]
        if kind == "run-started":
            self.close()
            self._open = True
            settings = {key: event.get(key) for key in ("name", "seed", "rounds", "strategy")}
            policy = {f"policy.{k}": v for k, v in (event.get("policy") or {}).items()}
            name = f"{event['name'] or 'run'}-seed-{event['seed']}"
            self._each("begin", self._folder, name, {**settings, **policy})
        elif kind == "round-finished" and self._open:
            self._each("tell", event["round"], _values(event))
        elif kind in ("run-finished", "run-failed") and self._open:
            self._open = False
            self._each("end", kind == "run-failed")

    def close(self) -> None:
        """End what is still open, as failed."""
        if self._open:
            self._open = False
            self._each("end", True)

    def _each(self, method: str, *arguments: Any) -> None:
        for logger in list(self._loggers):
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # of somebody else's code: the training goes on
                self._loggers.remove(logger)
                logging.getLogger("prunecast").warning(
                    "%s is told no more: %s: %s", logger.package, type(error).__name__, error
                )


def _values(event: Mapping[str, Any]) -> dict[str, float]:
    """What is told of a round: metrics, and what was spent."""
    measured = {**(event.get("client_metrics") or {}).get("evaluate", {}), **event["metrics"]}
    found = {**measured, **{key: event[key] for key in _SAME}}
    numbers = {n: v for n, v in found.items() if isinstance(v, int | float)}
    return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}


def loggers_of(names: Sequence[str]) -> list[Logger]:
    """The named tools, ready to begin.

    Raises:
        ScenarioError: there is no such tool.
        LoggerMissing: one is not installed.
    """
    for name in names:
        choice("--log", name, LOGGERS)
    return [LOGGERS[name]() for name in dict.fromkeys(names)]

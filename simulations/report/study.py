"""What a report shows of runs: arms over seeds, with what their ledgers and events say.

What a folder does not hold stays None or empty, and the report says that it was not recorded.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.common.files import StorageError
from prunecast.simulations.comparison import last_rounds
from prunecast.simulations.network_profiles.results import SIMULATED, entries_of

if TYPE_CHECKING:
    from prunecast.server.federation import Tally
    from prunecast.server.federation.reporting.ledger import Entry

__all__ = ["EVENTS", "ArmRun", "Curve", "Spread", "Study", "StudyArm"]

EVENTS = "events.jsonl"


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: its mean and sample standard deviation, None of a single seed."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread | None:
        """The spread of values; None where one is unknown, or there is none."""
        found = list(values)
        known = [value for value in found if value is not None]
        if not known or len(known) < len(found):
            return None
        deviation = statistics.stdev(known) if len(known) > 1 else None
        return cls(statistics.fmean(known), deviation, len(known))


@dataclass(frozen=True)
class ArmRun:
    """One arm of one run.

    Attributes:
        seed: of the run.
        folder: of the run; None where only the result is at hand.
        figures: the arm's part of ``result.json``.
        trained: name of the arm whose messages were measured; its own where it trains.
    """

    seed: int
    folder: Path | None
    figures: Mapping[str, Any]
    name: str
    trained: str

    @property
    def rounds(self) -> list[Mapping[str, Any]]:
        """Rows of ``result.json``; round 0 is before training."""
        return list(self.figures["rounds"])

    @cached_property
    def entries(self) -> list[Entry]:
        """Messages of its ledger; none where there is no ledger any more."""
        path = self.folder / self.figures["ledger"] if self.folder is not None else None
        if path is None or not path.is_file():
            return []
        return list(entries_of(path, None if self.figures["trained"] else self.name))

    @cached_property
    def tally(self) -> Tally | None:
        """Sums of its ledger."""
        from prunecast.server.federation import Tally

        return Tally(self.entries) if self.entries else None

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """Events of its rounds and of its end; none for an arm that measures those of another."""
        from prunecast.server.federation.reporting.events import read_events

        path = self.folder / EVENTS if self.folder is not None else None
        if path is None or not path.is_file() or not self.figures["trained"]:
            return []
        try:
            found = read_events(path, self.figures.get("run_id") or self.name)
            return [e for e in found if e["event"] in ("round-finished", "run-finished")]
        except StorageError:
            return []

    @property
    def ended(self) -> Mapping[str, Any]:
        """Its last event, if it was recorded."""
        return next((e for e in self.events if e["event"] == "run-finished"), {})


@dataclass(frozen=True)
class Curve:
    """Means over seeds, round by round."""

    rounds: tuple[int, ...]
    scores: tuple[Spread, ...]
    spent: tuple[float, ...]
    seconds: tuple[float, ...] | None


@dataclass
class StudyArm:
    """An arm over all its seeds."""

    name: str
    label: str
    text: str
    runs: list[ArmRun] = field(default_factory=list)

    @property
    def first(self) -> Mapping[str, Any]:
        """The figures of the first seed, for what all have in common."""
        return self.runs[0].figures

    @property
    def baseline(self) -> bool:
        """Whether it is plain Flower."""
        return bool(self.first["baseline"])

    @property
    def seeds(self) -> list[int]:
        """Seeds that it was run with."""
        return [run.seed for run in self.runs]

    def spread(self, key: str) -> Spread | None:
        """A number of its figures over seeds; None where a run lacks it."""
        return Spread.of(run.figures.get(key) for run in self.runs)

    def pruning(self, *keys: str) -> Spread | None:
        """A number of what pruning did, by its path in ``pruning``; None where a run lacks it."""
        found: list[Any] = []
        for run in self.runs:
            value: Any = run.figures.get("pruning")
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            found.append(value)
        return Spread.of(found)

    def total(self) -> Spread:
        """Bytes of both directions."""
        found = Spread.of(run.figures["bytes_up"] + run.figures["bytes_down"] for run in self.runs)
        assert found is not None
        return found

    def simulated(self, key: str) -> Spread | None:
        """A simulated figure over seeds; None where a run lacks it."""
        return Spread.of((run.figures.get("simulated") or {}).get(key) for run in self.runs)

    def reached(self, metric: str) -> Spread:
        """The metric, averaged over the last rounds, see `last_rounds`."""
        found = Spread.of(
            statistics.fmean(row[metric] for row in run.rounds[-self.last_rounds :])
            for run in self.runs
        )
        assert found is not None
        return found

    @property
    def last_rounds(self) -> int:
        """How many rounds at the end are averaged."""
        return last_rounds(max(1, min(len(run.rounds) for run in self.runs) - 1))

    def curve(self, metric: str) -> Curve:
        """Round by round, as far as all seeds go."""
        columns = list(zip(*(run.rounds for run in self.runs), strict=False))
        simulated = all(SIMULATED in row for rows in columns for row in rows)
        scores = [Spread.of(row[metric] for row in rows) for rows in columns]
        return Curve(
            tuple(rows[0]["round"] for rows in columns),
            tuple(score for score in scores if score is not None),
            tuple(
                statistics.fmean(row["bytes_up"] + row["bytes_down"] for row in rows)
                for rows in columns
            ),
            tuple(statistics.fmean(row[SIMULATED] for row in rows) for rows in columns)
            if simulated
            else None,
        )


@dataclass
class Study:
    """Runs that differ in seeds and arms alone.

    Attributes:
        result: of one of its runs, for what they have in common.
        arms: by a key that tells arms of one name and other settings apart.
        releases: by seed and arm, the ``release`` of results that have one.
        command: that runs it again; empty where that is not known.
        published: what others measured in this setting, by name.
        notes: what a reader should know of how it was put together.
    """

    result: Mapping[str, Any]
    arms: dict[str, StudyArm] = field(default_factory=dict)
    releases: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    command: str = ""
    published: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def scenario(self) -> Mapping[str, Any]:
        """As it was run, seed and arms of one run."""
        return self.result["scenario"]  # type: ignore[no-any-return]

    @property
    def metric(self) -> str:
        """Name of the task's metric."""
        return str(self.result["task"]["metric"])

    @property
    def lower_is_better(self) -> bool:
        """Whether it is an error."""
        return bool(self.result["task"]["lower_is_better"])

    @property
    def seeds(self) -> list[int]:
        """All seeds, ascending."""
        return sorted({seed for arm in self.arms.values() for seed in arm.seeds})

    @property
    def baseline(self) -> StudyArm | None:
        """The first arm that is plain Flower."""
        return next((arm for arm in self.arms.values() if arm.baseline), None)

    def trained(self) -> list[tuple[StudyArm, ArmRun]]:
        """The arms that trained, each with its first run."""
        return [(arm, arm.runs[0]) for arm in self.arms.values() if arm.first["trained"]]

    def ratio(self, arm: StudyArm) -> float | None:
        """Bytes of the baseline over those of an arm."""
        if self.baseline is not None:
            return self.baseline.total().mean / arm.total().mean if arm.total().mean else None
        found = arm.spread("reduction")
        return found.mean if found else None

    def text(self, value: float) -> str:
        """A value of the metric."""
        from prunecast.simulations.report.charts import score_text

        return score_text(self.result, value)

    def front(self) -> list[str]:
        """Keys of the arms that no other arm equals or beats in bytes and metric both."""
        sign = -1.0 if self.lower_is_better else 1.0
        points = {
            key: (arm.total().mean, -sign * arm.reached(self.metric).mean)
            for key, arm in self.arms.items()
        }
        return [
            key
            for key, mine in points.items()
            if not any(
                other != mine and other[0] <= mine[0] and other[1] <= mine[1]
                for other in points.values()
            )
        ]

    def add(self, folder: Path | None, result: Mapping[str, Any], only: Iterable[str] = ()) -> None:
        """Take in the arms of a run, all or some."""
        seed = int(result["scenario"]["seed"])
        wanted = set(only)
        for name, figures in result["arms"].items():
            if wanted and name not in wanted:
                continue
            key = self._key(name, figures)
            arm = self.arms.setdefault(key, StudyArm(key, figures["label"], figures["text"]))
            if len(key) > len(name):
                arm.label = f"{figures['label']} ({key[len(name) + 1 :]})"
            run = ArmRun(seed, folder, figures, name, figures.get("of") or name)
            same = [i for i, known in enumerate(arm.runs) if known.seed == seed]
            if same:
                arm.runs[same[0]] = run
                self.notes.append(f"{name} was run twice with seed {seed}: the later run is shown.")
            else:
                arm.runs.append(run)
        if result.get("release"):
            self.releases.append((seed, result["release"]))

    def _key(self, name: str, figures: Mapping[str, Any]) -> str:
        """The arm's name, numbered where there is one of that name with other settings."""
        number, key = 1, name
        while key in self.arms and _settings(self.arms[key].first) != _settings(figures):
            number += 1
            key = f"{name}-{number}"
        return key


_SETTINGS = ("kind", "text", "of", "codec", "level", "scheme", "options", "preset", "policy")


def _settings(figures: Mapping[str, Any]) -> list[Any]:
    return [figures.get(key) for key in _SETTINGS]

"""From run folders to what a report shows: arms over seeds, with what their ledgers and events say.

What a folder does not hold stays None or empty, and the report says that it was not recorded.
"""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.common.files import StorageError
from prunecast.simulations.comparison import DOCUMENT, last_rounds
from prunecast.simulations.network_profiles.results import SIMULATED, add_simulated_time, entries_of
from prunecast.simulations.runner import ResultError
from prunecast.simulations.runner.run import SCENARIO, read_result
from prunecast.simulations.scenarios import ScenarioError, scenario_from_mapping

if TYPE_CHECKING:
    from prunecast.server.federation import Tally
    from prunecast.server.federation.ledger import Entry
    from prunecast.simulations.network_profiles import NetworkSpec

__all__ = ["ArmRun", "Curve", "Spread", "Study", "StudyArm", "gather", "study_of"]

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
        from prunecast.server.federation.events import read_events

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

    def spent(self, row: Mapping[str, Any]) -> int:
        """Bytes of both directions until the end of a round."""
        return int(row["bytes_up"]) + int(row["bytes_down"])


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


# -- folders --------------------------------------------------------------------------------------


def gather(folders: Sequence[Path], network: NetworkSpec | None = None) -> list[Study]:
    """What lies in folders of runs, comparisons and ServerApps' runs, put together.

    Args:
        folders: each of a run, of a comparison, or of several of these.
        network: to simulate time over, instead of what the runs were told.

    Raises:
        ResultError: a folder holds no finished run, or one that cannot be read.
        ScenarioError: the network cannot be used.
        StorageError: a ledger cannot be read.
    """
    studies: dict[str, Study] = {}
    for folder in folders:
        for path, result, only, command, published in _runs(Path(folder)):
            if network is not None and path is not None and result["scenario"].get("clients"):
                add_simulated_time(result, path, network)
            key = json.dumps(_in_common(result), sort_keys=True)
            study = studies.setdefault(key, Study(result))
            study.add(path, result, only)
            study.command = study.command or command
            study.published |= published
    return list(studies.values())


def study_of(result: Mapping[str, Any], folder: Path | None = None) -> Study:
    """A single run."""
    published = dict(result["scenario"].get("published") or {})
    study = Study(result, command=_command(folder), published=published)
    study.add(folder, result)
    return study


def _in_common(result: Mapping[str, Any]) -> dict[str, Any]:
    scenario = result["scenario"]
    with suppress(ScenarioError, ValueError, TypeError):  # keys that came since have their defaults
        scenario = scenario_from_mapping(scenario).to_mapping()
    apart = ("seed", "arms", "output", "release", "network", "description", "published")
    return {key: value for key, value in scenario.items() if key not in apart}


def _command(folder: Path | None) -> str:
    if folder is None or not (folder / SCENARIO).is_file():
        return ""
    return f"prunecast simulate {shlex.quote(str(folder / SCENARIO))}"


_Found = tuple[Path, dict[str, Any], Sequence[str], str, Mapping[str, Any]]


def _runs(folder: Path) -> Iterable[_Found]:
    """Every run of a folder: place, result, the arms wanted of it, command, published figures."""
    if (folder / DOCUMENT).is_file():
        return list(_compared(folder))
    if (folder / "result.json").is_file() or not folder.is_dir():
        result = read_result(folder)
        return [(folder, result, (), _command(folder), result["scenario"].get("published") or {})]
    if (folder / EVENTS).is_file():
        from prunecast.simulations.report.serverapp import result_of_events

        return [(folder, result_of_events(folder), (), "", {})]
    below = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    known = [p for p in below if any((p / n).is_file() for n in (DOCUMENT, "result.json", EVENTS))]
    if not known:
        raise ResultError(
            f"cannot read {folder / 'result.json'} (there is none): give the folder of a finished "
            "run or comparison"
        )
    return [found for path in known for found in _runs(path)]


def _compared(folder: Path) -> Iterable[_Found]:
    from prunecast.simulations.kinds import build
    from prunecast.simulations.network_profiles import NetworkSpec

    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        names, seeds, table = list(document["arms"]), document["seeds"], document["network"]
        trained = [name for name, arm in document["arms"].items() if arm["kind"] != "recoded"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ResultError(f"{path} is damaged ({error}): run the comparison again") from error
    network = build(NetworkSpec, table, "network") if table else None
    command = ""
    if (folder / SCENARIO).is_file():
        told = f"--arms {','.join(names)} --seeds {','.join(map(str, seeds))}"
        over = f" --network {network.profile}" if network else ""
        command = f"prunecast compare {shlex.quote(str(folder / SCENARIO))} {told}{over}"
    for seed in seeds:
        for name in trained:
            run = folder / f"seed-{seed}" / name
            result = read_result(run)
            if network is not None:
                add_simulated_time(result, run, network)
            yield run, result, names, command, document.get("published") or {}

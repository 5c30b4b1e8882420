"""A scenario's data, model and seeds under many arms: the peers, and one document of figures.

Every seed and trained arm is a run of `prunecast.simulations.runner` with a folder of its own, so a
comparison that was interrupted, or is asked for more arms, goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunecast.common.files import write_atomically
from prunecast.simulations.arms import ARMS, Arm
from prunecast.simulations.kinds import ScenarioError, choice, written
from prunecast.simulations.network_profiles import NetworkSpec
from prunecast.simulations.network_profiles.results import add_simulated_time
from prunecast.simulations.runner import EngineFailed, ResultError, SimulationError
from prunecast.simulations.scenarios import PublishedSpec, Scenario, save_scenario

__all__ = ["DOCUMENT", "Comparison", "compared_rows", "last_rounds", "peers", "published_lines"]

SCHEMA = 1
DOCUMENT = "comparison.json"
_LAST = 3

OnEvent = Callable[[Mapping[str, Any]], None]


def peers() -> dict[str, Arm]:
    """The arms that are compared unless others are named, in the order of the table."""
    tables = tomllib.loads((files(__name__) / "peers.toml").read_text(encoding="utf-8"))
    return {name: ARMS.read(table, f"arms.{name}") for name, table in tables.items()}


def last_rounds(rounds: int) -> int:
    """How many rounds at the end are averaged for what an arm reached: a single one is noisy.

    >>> last_rounds(3), last_rounds(10), last_rounds(50)
    (1, 2, 3)
    """
    return max(1, min(_LAST, rounds // 5))


@dataclass(frozen=True)
class Comparison:
    """What is compared, and where its runs are kept.

    Attributes:
        scenario: data, partition, model, training and strategy; its own arms can be named.
        arms: by name, those of `peers` and of the scenario.
        seeds: each trains every arm once.
        folder: gets a folder for each seed and trained arm, and the document.
        left_out: peers that are not among the arms, and why.
        named: whether somebody named the arms; of others, those that prune what cannot be pruned
            are left out.
        network: over which time is simulated; None for none.
        published: what others measured in this setting, see `PublishedSpec`.
    """

    scenario: Scenario
    arms: Mapping[str, Arm]
    seeds: Sequence[int]
    folder: Path
    left_out: Mapping[str, str]
    named: bool = False
    network: NetworkSpec | None = None
    published: Mapping[str, PublishedSpec] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        *,
        names: Sequence[str] = (),
        seeds: Sequence[int] = (),
        rounds: int | None = None,
        folder: Path | None = None,
        network: str = "",
    ) -> Comparison:
        """Choose the arms of a comparison; those of `peers` where none are named.

        Args:
            scenario: as it was read.
            names: of arms, those of `peers` or the scenario's own, which go before.
            seeds: instead of the scenario's.
            rounds: instead of the scenario's.
            network: profile or CSV trace to simulate time over, instead of the scenario's.
            folder: of the comparison; by default ``compare-<name>`` where its runs go.

        Raises:
            ScenarioError: there is no such arm, or an arm cannot be without another.
        """
        known = {**peers(), **(scenario.arms if names else {})}
        for name in names:
            choice("arms", name, known)
        if repeated := [seed for seed in seeds if seeds.count(seed) > 1]:
            raise ScenarioError("seeds", f"{repeated[0]} is there twice", "name each once")
        left_out: dict[str, str] = {}
        if not names:
            left_out = {name: arm.missing() for name, arm in known.items() if arm.missing()}
        arms = {name: known[name] for name in names or known if name not in left_out}
        if not any(arm.trains for arm in arms.values()):
            raise ScenarioError("arms", "nothing is trained", "name an arm such as dense or small")
        for name, arm in arms.items():
            arm.check(f"arms.{name}", arms)
            if arm.missing():
                raise ScenarioError(f"arms.{name}", "is not installed", arm.missing())
        spec = NetworkSpec(network) if network else scenario.network
        if spec is not None:
            spec.links()
        # time is simulated from the ledgers afterwards: other networks need no other runs
        changes: dict[str, Any] = {
            "rounds": rounds or scenario.rounds,
            "release": None,
            "network": None,
            "published": {},
        }
        return cls(
            dataclasses.replace(scenario, arms=arms, **changes),
            arms,
            tuple(seeds) or (scenario.seed,),
            folder or Path(scenario.output) / f"compare-{scenario.name}",
            left_out,
            bool(names),
            spec,
            scenario.published,
        )

    def runs(self) -> Iterable[tuple[Scenario, Path]]:
        """One scenario for each seed and trained arm, with the folder that its run has."""
        for seed in self.seeds:
            for name in self.scenario.trained_arms():
                arms = {name: self.arms[name], **self.scenario.recodings_of(name)}
                folder = self.folder / f"seed-{seed}" / name
                output = str(folder.parent)
                yield (
                    dataclasses.replace(self.scenario, seed=seed, arms=arms, output=output),
                    folder,
                )

    def run(self, on_event: OnEvent = lambda event: None) -> dict[str, Any]:
        """Do what is not done yet, one run after the other, and write the document.

        An arm that fails where others were trained, as one that diverges does, is left out of the
        document, which says why.

        Args:
            on_event: told what `run_scenario` tells, and of ``kept`` (``text``) where a run was
                finished before; of ``failed`` (``text``) where an arm is left out.

        Returns:
            The document, see docs/compare.md.

        Raises:
            DataError, FederationError, ScenarioError, SimulationError: as of `run_scenario`, but
                for an arm that is left out; what was finished before is kept.
        """
        from prunecast.simulations.runner.run import SCENARIO, run_scenario

        results: dict[int, dict[str, dict[str, Any]]] = {seed: {} for seed in self.seeds}
        checked = False
        task: dict[str, Any] = {}
        failed: dict[str, str] = {}
        for scenario, folder in self.runs():
            name = next(iter(scenario.arms))
            if name in failed:
                continue
            result = finished(scenario, folder)
            if result is not None:
                on_event({"event": "kept", "text": f"seed {scenario.seed}, {name}: kept"})
            else:
                if not checked:  # all arms, before the first of them takes its time
                    for arm, why in self._unprunable().items():
                        on_event({"event": "failed", "text": f"{arm} is left out: {why}"})
                        failed |= dict.fromkeys((arm, *self.scenario.recodings_of(arm)), why)
                    checked = True
                    if name in failed:
                        continue
                on_event({"event": "step", "text": f"seed {scenario.seed}, {name}"})
                shutil.rmtree(folder, ignore_errors=True)
                _make(folder)
                try:
                    result = run_scenario(scenario, folder, on_event=on_event)
                except EngineFailed as error:
                    if not task or self.arms[name].baseline:
                        raise  # nothing to compare with, or no telling whose fault it is
                    why = f"seed {scenario.seed}: {error}"
                    on_event({"event": "failed", "text": f"{name} is left out: {why}"})
                    failed |= dict.fromkeys(scenario.arms, why)
                    continue
            if self.network is not None:
                add_simulated_time(result, folder, self.network)
            results[scenario.seed].update(result["arms"])
            task = result["task"]
        save_scenario(self.scenario, self.folder / SCENARIO)
        text = json.dumps(self._document(results, task, failed), indent=2) + "\n"
        write_atomically(self.folder / DOCUMENT, text.encode())
        return json.loads(text)  # type: ignore[no-any-return]

    def _unprunable(self) -> Mapping[str, str]:
        """Check the scenario; the arms that nobody named and that prune what cannot be."""
        from prunecast.simulations.runner.checks import UnprunableArms
        from prunecast.simulations.runner.run import check_scenario

        try:
            check_scenario(self.scenario)
        except UnprunableArms as error:  # what is checked last
            if self.named:
                raise
            return error.refused
        return {}

    def _document(
        self,
        results: Mapping[int, Mapping[str, Mapping[str, Any]]],
        task: Mapping[str, Any],
        failed: Mapping[str, str],
    ) -> dict[str, Any]:
        scenario = self.scenario
        arms = {
            name: {
                "kind": arm.kind(),
                "text": arm.text(),
                **_figures([results[seed][name] for seed in self.seeds], task),
            }
            for name, arm in self.arms.items()
            if name not in failed
        }
        base = next((n for n, arm in self.arms.items() if arm.baseline), None)
        for figures in arms.values():
            spent = figures["bytes_down"] + figures["bytes_up"]
            dense = arms[base]["bytes_down"] + arms[base]["bytes_up"] if base else None
            figures["ratio"] = round(dense / spent, 3) if dense and spent else None
        return {
            "schema": SCHEMA,
            "scenario": {**scenario.to_mapping(), "output": ""},
            "seeds": list(self.seeds),
            "rounds": scenario.rounds,
            "last_rounds": last_rounds(scenario.rounds),
            "task": dict(task),
            "arms": arms,
            "left_out": {**self.left_out, **failed},
            "network": self.network and written(self.network),
            "published": {name: written(figure) for name, figure in self.published.items()},
        }


def finished(scenario: Scenario, folder: Path) -> dict[str, Any] | None:
    """The result of a run that was finished before, of this scenario and its arms at least."""
    from prunecast.simulations.runner.run import read_result

    try:
        result = read_result(folder)
    except ResultError:
        return None
    found = {**result["scenario"], "output": ""}
    wanted = json.loads(json.dumps({**scenario.to_mapping(), "output": ""}))
    found["arms"] = {name: arm for name, arm in found["arms"].items() if name in wanted["arms"]}
    return result if wanted == found else None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise SimulationError(
            f"cannot make {folder} ({error.strerror or error}): choose another folder with --out"
        ) from error


def _figures(runs: Sequence[Mapping[str, Any]], task: Mapping[str, Any]) -> dict[str, Any]:
    """An arm over all seeds: means, and the standard deviation of what it reached."""
    metric, better = task["metric"], min if task["lower_is_better"] else max
    last = last_rounds(len(runs[0]["rounds"]) - 1)
    reached = [statistics.fmean(row[metric] for row in run["rounds"][-last:]) for run in runs]
    best = [better(row[metric] for row in run["rounds"][1:]) for run in runs]
    seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
    return {
        "bytes_down": round(statistics.fmean(run["bytes_down"] for run in runs)),
        "bytes_up": round(statistics.fmean(run["bytes_up"] for run in runs)),
        "wire": _wire([run.get("wire") for run in runs]),
        metric: statistics.fmean(reached),
        "spread": statistics.stdev(reached) if len(reached) > 1 else None,
        "by_seed": reached,
        "best": statistics.fmean(best),
        "best_spread": statistics.stdev(best) if len(best) > 1 else None,
        "seconds": round(statistics.fmean(seconds), 3) if seconds else None,
        **({"simulated": _simulated(runs)} if "simulated" in runs[0] else {}),
    }


def _wire(runs: Sequence[Mapping[str, int] | None]) -> dict[str, int] | None:
    """Means over seeds of what the wire takes by estimate; None where a run does not know."""
    known = [run for run in runs if run]
    if len(known) < len(runs):
        return None
    return {key: round(statistics.fmean(run[key] for run in known)) for key in known[0]}


def _simulated(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Means over seeds; the time to the target only where every seed reached it."""
    found: dict[str, float | None] = {}
    for key in dict.fromkeys(key for run in runs for key in run["simulated"] if key != "network"):
        values = [run["simulated"].get(key) for run in runs]
        known = [value for value in values if value is not None]
        found[key] = statistics.fmean(known) if len(known) == len(values) else None
    return found


def compared_rows(document: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of a comparison."""
    from prunecast.common.text import duration_text, ratio_text
    from prunecast.simulations.report import score_text

    metric = document["task"]["metric"]
    header = ["arm", "MB down", "MB up", "ratio", metric, "seconds"]
    wires = [arm.get("wire") for arm in document["arms"].values()]
    if estimated := any(wires):
        header += ["≈ MB by HTTP", "by TLS"]
    simulated = document.get("network") is not None
    if simulated:
        header.append("simulated")
    target = (document.get("network") or {}).get("target") is not None
    if target:
        header.append("to target")
    rows = []
    for name, arm in document["arms"].items():
        score = score_text(document, arm[metric])
        if arm["spread"] is not None:
            spread = score_text(document, arm["spread"])
            score = f"{score.removesuffix(' %')} ± {spread}"
        rows.append(
            [
                name,
                f"{arm['bytes_down'] / 1e6:.3f}",
                f"{arm['bytes_up'] / 1e6:.3f}",
                ratio_text(arm["ratio"]),
                score,
                "–" if arm["seconds"] is None else f"{arm['seconds']:.0f}",
                *(_wire_cells(arm.get("wire")) if estimated else []),
                *([duration_text(arm["simulated"]["seconds"])] if simulated else []),
                *([duration_text(arm["simulated"]["seconds_to_target"])] if target else []),
            ]
        )
    return header, rows


def _wire_cells(wire: Mapping[str, int] | None) -> list[str]:
    """Megabytes on the wire, both ways together, without and with TLS."""
    if not wire:
        return ["–", "–"]
    return [f"{(wire[f'{kind}_up'] + wire[f'{kind}_down']) / 1e6:.3f}" for kind in ("http", "tls")]


def published_lines(document: Mapping[str, Any]) -> list[str]:
    """Theirs beside ours, a line for each published figure; none where none is known."""

    def text(value: float, spread: float | None) -> str:
        numbers = [value] if spread is None else [value, spread]
        if document["task"]["percent"]:  # figures of papers have two decimals
            return " ± ".join(f"{100 * number:.2f}" for number in numbers) + " %"
        return " ± ".join(f"{number:.4g}" for number in numbers)

    metric, lines = document["task"]["metric"], []
    for name, figure in document.get("published", {}).items():
        told = f"{name}, published: {metric} {text(figure['value'], figure.get('spread'))}"
        told += " in its best round" if figure["measured"] == "best" else ""
        told += f" for {figure['bytes'] / 1e6:,.1f} MB" if figure["bytes"] else ""
        arm = document["arms"].get(figure["arm"])
        if arm is not None:
            which = ("best", "best_spread") if figure["measured"] == "best" else (metric, "spread")
            told += f"; {figure['arm']}, here: {text(*(arm[key] for key in which))}"
        lines.append(f"{told} ({figure['source']})")
    return lines

"""From folders of runs, comparisons and ServerApps' runs to what a report shows."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunecast.simulations.comparison import DOCUMENT
from prunecast.simulations.network_profiles.results import add_simulated_time
from prunecast.simulations.report.study import EVENTS, Study
from prunecast.simulations.runner import ResultError
from prunecast.simulations.runner.run import SCENARIO, read_result
from prunecast.simulations.scenarios import ScenarioError, scenario_from_mapping

if TYPE_CHECKING:
    from prunecast.simulations.network_profiles import NetworkSpec

__all__ = ["gather", "study_of"]


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

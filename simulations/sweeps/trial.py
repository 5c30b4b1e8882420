"""One point of a sweep in a process of its own: trained once for each seed, told in one line.

Started as ``python -m prunecast.simulations.sweeps.trial FOLDER``; standard output carries events
alone, one JSON object per line, as that of the engine does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from prunecast.common.files import write_atomically
from prunecast.common.text import first_line
from prunecast.simulations.runner.engine import end_process, start_process
from prunecast.simulations.scenarios import Scenario, scenario_from_mapping

__all__ = ["RunningTrial", "main", "start_trial"]

LOG = "trial.log"
_FILE = "trial.json"


class RunningTrial:
    """A trial whose process runs; its events are read as they come, without waiting.

    Attributes:
        number: of the trial; -1 for the baseline.
        outcome: figures, or ``reason``; empty while it runs.
    """

    def __init__(self, number: int, process: subprocess.Popen[bytes]) -> None:
        self.number, self._process = number, process
        self._rest = b""
        self.outcome: dict[str, Any] = {}

    def fileno(self) -> int:
        """Of what it prints, for a selector."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def events(self) -> list[dict[str, Any]] | None:
        """What it told since the last time, if a selector found something; None at its end.

        Its outcome, ``reason`` in it where it failed, is then in `outcome`.
        """
        data = os.read(self.fileno(), 1 << 16)
        if not data:
            code = self._process.wait()
            self.outcome = self.outcome or {"reason": f"its process ended with code {code}"}
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        found = [json.loads(line) for line in lines]
        for event in found:
            if event["event"] == "outcome":
                self.outcome = event
        return [event for event in found if event["event"] != "outcome"]

    def end(self) -> None:
        """End it, and the engine that it started."""
        end_process(self._process)
        if self._process.stdout is not None:
            self._process.stdout.close()


def start_trial(
    number: int, scenario: Scenario, arm: str, repeats: int, folder: Path
) -> RunningTrial:
    """Start the process of one point.

    Args:
        number: of the trial.
        scenario: with the values of the point; `arm` is its only one.
        arm: to train.
        repeats: with the scenario's seed and those after it.
        folder: of the trial; runs that are finished there are kept.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {"scenario": scenario.to_mapping(), "arm": arm, "repeats": repeats}
    write_atomically(folder / _FILE, json.dumps(document).encode())
    return RunningTrial(number, start_process(__name__, folder, folder / LOG))


def _train(folder: Path, emit: Any) -> dict[str, Any]:
    from prunecast.simulations.comparison import Comparison

    document = json.loads((folder / _FILE).read_text(encoding="utf-8"))
    scenario, arm = scenario_from_mapping(document["scenario"]), document["arm"]
    seeds = [scenario.seed + number for number in range(document["repeats"])]
    compared = Comparison.of(scenario, names=[arm], seeds=seeds, folder=folder).run(emit)
    figures, metric = compared["arms"][arm], compared["task"]["metric"]
    kept = ("bytes_down", "bytes_up", "spread", "seconds")
    return {**{key: figures[key] for key in kept}, "reached": figures[metric]}


def main(arguments: list[str]) -> int:
    """Entry point of the process; 0 when the point was trained."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # so that the engine is ended, too

    signal.signal(signal.SIGTERM, end)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as events:
        os.dup2(2, 1)  # whatever else is printed is for the log

        def emit(event: Mapping[str, Any]) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        try:
            emit({"event": "outcome", **_train(Path(arguments[0]), emit)})
        except BrokenPipeError:  # the sweep was killed, and runs this point again when it goes on
            return 1
        except Exception as error:  # a point that cannot be trained is a result as well
            emit({"event": "outcome", "reason": f"{type(error).__name__}: {first_line(error)}"})
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

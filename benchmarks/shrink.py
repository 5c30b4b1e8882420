"""What it is worth to remove channels while a federation trains: accuracy, bytes, latency.

    python benchmarks/shrink.py [--folder RUN] [--repeat N] [--json FILE]

Runs the packaged scenario ``shrink`` in this process (or takes ``--folder`` of a run of it): plain
Flower, the preset ``small`` (single weights), half of the channels after round 2, and channels,
then weights. Then a release of the whole network and the narrow one, as devices hold them, are
measured by onnxruntime with one thread, by turns, an image at a time, after 50 runs that do not
count: the median of 400 runs, ``--repeat`` times. Takes some minutes an arm on one idle core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(0, str(Path(__file__).parent.parent))

_WARM, _RUNS = 50, 400


def latencies(files: dict[str, Path], repeat: int) -> dict[str, Any]:
    """Milliseconds of one image by model, and the narrow ones as a part of the whole one.

    Args:
        files: ``.onnx`` files with their weights, by name; the first is what others compare with.
        repeat: measurements, each of new sessions.
    """
    import numpy as np

    from benchmarks.variants import session as open_session

    found: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(repeat):
        sessions = {name: open_session(file, False) for name, file in files.items()}
        image = np.full((1, 1, 28, 28), 0.5, np.float32)
        times: dict[str, list[float]] = {name: [] for name in files}
        for number in range(_WARM + _RUNS):
            for name, session in sessions.items():  # by turns: what disturbs one disturbs all
                began = time.perf_counter()
                session.run(None, {session.get_inputs()[0].name: image})
                if number >= _WARM:
                    times[name].append(1e3 * (time.perf_counter() - began))
        for name, taken in times.items():
            found[name].append(statistics.median(taken))
    whole = next(iter(files))
    ratios = {n: [a / b for a, b in zip(found[n], found[whole], strict=True)] for n in files}
    return {"median_ms": found, "of_whole": {n: r for n, r in ratios.items() if n != whole}}


def models(run: Path, scratch: Path) -> dict[str, Path]:
    """The whole network and the narrow one, both as a device holds them that was sent a release."""
    import numpy as np

    from prunecast.client.edge import Agent, AgentConfig
    from prunecast.server.repository import KeyRing, Repository
    from prunecast.server.repository.authoring import ReleaseRecipe
    from prunecast.server.repository.authoring.sources import from_arrays
    from prunecast.server.repository.serving import ReleaseServer
    from prunecast.simulations.scenarios import load_scenario

    factory = load_scenario("shrink").model.network()
    weights = {name: tensor.numpy() for name, tensor in factory().state_dict().items()}
    images = np.zeros((2, 1, 28, 28), np.float32)
    recipe = ReleaseRecipe(module=factory, selftest=images, cache=scratch / "graphs")
    repository = Repository.create(scratch / "repository", KeyRing.create(scratch / "keys"))
    recipe.release(repository, "whole", from_arrays(weights, bits=8))
    with ReleaseServer(repository.path) as server:
        root = repository.trusted_root()
        with Agent(AgentConfig(scratch / "device", server.url, "whole", root)) as agent:
            agent.update_once()
    return {"whole": _held(scratch / "device"), "narrow": _held(run / "device")}


def _held(device: Path) -> Path:
    from prunecast.client.edge.state import read_status

    return device / "slots" / str(read_status(device)["active"]["slot"]) / "model.onnx"


def train(folder: Path) -> None:
    """Run the packaged scenario in this process, and keep its scratch files."""
    from prunecast.simulations.runner.run import run_scenario
    from prunecast.simulations.scenarios import load_scenario

    scenario = load_scenario("shrink")
    scenario = replace(scenario, engine=replace(scenario.engine, backend="inline"))
    run_scenario(scenario, folder, on_event=_tell)


def _tell(event: Any) -> None:
    if event["event"] in ("round-finished", "step", "channels-removed"):
        kept = {k: event[k] for k in ("round", "score", "text", "weights") if k in event}
        print(event["event"], kept, flush=True)


def main() -> None:
    """Train unless a run is given, measure, print, and write what was found."""
    from benchmarks.harness.report import machine
    from prunecast.common.files import write_atomically
    from prunecast.simulations.runner.run import read_result

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run = arguments.folder or Path(scratch) / "run"
        if not run.is_dir():
            train(run)
        result = read_result(run)
        found = {
            "scenario": result["scenario"]["name"],
            "seed": result["scenario"]["seed"],
            "machine": machine(),
            "arms": {name: _figures(arm) for name, arm in result["arms"].items()},
            "gains": result["release"]["gains"],
            "latency": latencies(models(run, Path(scratch)), arguments.repeat),
        }
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if arguments.json is not None:
        write_atomically(arguments.json, text.encode())


def _figures(arm: dict[str, Any]) -> dict[str, Any]:
    rounds = arm["rounds"]
    figures = {name: arm[name] for name in ("bytes_down", "bytes_up")}
    accuracy = [row["accuracy"] for row in rounds]
    return {**figures, "parameters": rounds[-1]["parameters"], "accuracy_by_round": accuracy}


if __name__ == "__main__":
    sys.exit(main())

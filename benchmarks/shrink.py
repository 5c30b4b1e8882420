"""What it is worth to remove channels, heads and layers: accuracy, bytes, latency.

    python benchmarks/shrink.py [--folder RUN] [--repeat N] [--json FILE]

Runs the packaged scenario ``shrink`` in this process (or takes ``--folder`` of a run of it): plain
Flower, the preset ``small`` (single weights), half of the channels after round 2, and channels,
then weights. Takes some minutes an arm on one idle core.

Then four networks of drawn weights on 8 bits are released, whole and without half of their
channels, half of their heads, or a third of their layers, and fetched by devices: what these
downloaded, and what onnxruntime takes with one thread. All are measured by turns, an image at a
time, after 50 runs that do not count: the least and the median of 400 runs, ``--repeat`` times.
Ratios are of the least of all, which other work on the machine disturbs the least.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(0, str(Path(__file__).parent.parent))

_WARM, _RUNS = 50, 400


@dataclass(frozen=True)
class Structure:
    """A network and what goes of it.

    Attributes:
        factory: makes the network, ``package.module:function``.
        options: of the factory.
        left: share that remains of its channels, heads or layers, by kind.
    """

    factory: str
    left: dict[str, float]
    options: dict[str, Any] = field(default_factory=dict)


_NETWORKS = "prunecast.simulations.networks"
STRUCTURES = {
    "channels": Structure(
        f"{_NETWORKS}.residual:small_resnet_batch", {"channels": 0.5}, {"width": 32}
    ),
    "channels, GroupNorm": Structure(
        f"{_NETWORKS}.residual:small_resnet_group", {"channels": 0.5}, {"width": 32}
    ),
    "heads": Structure(f"{_NETWORKS}.attention:Transformer", {"heads": 0.5}),
    "layers": Structure(f"{_NETWORKS}.attention:Transformer", {"layers": 2 / 3}),
}


def measured(scratch: Path, repeat: int) -> dict[str, Any]:
    """Bytes and milliseconds of every structure, and what remains as a part of the whole.

    Args:
        scratch: a folder for repositories and devices.
        repeat: measurements, each of new sessions.
    """
    files: dict[str, tuple[Path, Path]] = {}
    found: dict[str, Any] = {}
    for name, structure in STRUCTURES.items():
        folder = scratch / name
        released = {part: _released(structure, part, folder) for part in ("whole", "narrow")}
        files[name] = (released["whole"].pop("file"), released["narrow"].pop("file"))
        found[name] = {"left": structure.left, **released}
    for name, times in _latencies(files, repeat).items():
        whole, narrow = times
        for part, of in (("whole", whole), ("narrow", narrow)):
            found[name][part] |= {
                "least_ms": [round(min(run), 4) for run in of],
                "median_ms": [round(statistics.median(run), 4) for run in of],
            }
        least = [min(map(min, of)) for of in times]
        found[name]["of_whole"] = {
            "milliseconds": round(least[1] / least[0], 3),
            **{
                key: round(found[name]["narrow"][key] / found[name]["whole"][key], 3)
                for key in ("keyframe_bytes", "parameters", "macs")
            },
        }
    return found


def _released(structure: Structure, part: str, folder: Path) -> dict[str, Any]:
    """A release of a network of drawn weights, as a device holds it that was sent it."""
    import numpy as np
    import torch

    from prunecast.client.edge import Agent, AgentConfig
    from prunecast.client.edge.state import read_status
    from prunecast.common.references import load_callable
    from prunecast.compression.onnx.counting import count_graph
    from prunecast.server.repository import KeyRing, Repository
    from prunecast.server.repository.authoring import ReleaseRecipe
    from prunecast.server.repository.authoring.sources import from_arrays
    from prunecast.server.repository.serving import ReleaseServer

    make = load_callable(structure.factory)

    def factory() -> Any:
        torch.manual_seed(0)
        return make(**structure.options)

    rng = np.random.default_rng(0)
    images = rng.random((8, 1, 28, 28), np.float32)
    arrays = {name: tensor.numpy() for name, tensor in factory().state_dict().items()}
    for name, array in arrays.items():  # torch's encoders begin with copies of one layer
        if array.ndim > 1:
            arrays[name] = array + rng.normal(0, array.std(), array.shape).astype(np.float32)
    recipe = ReleaseRecipe(
        module=factory,
        selftest=images,
        bits=8,
        cache=folder / "graphs",
        **(structure.left if part == "narrow" else {}),
    )
    repository = Repository.create(folder / f"{part}-repository", KeyRing.create(folder / part))
    made = recipe.make(from_arrays(arrays))
    published = repository.publish("network", made)
    device = folder / f"{part}-device"
    with ReleaseServer(repository.path) as server:
        root = repository.trusted_root()
        with Agent(AgentConfig(device, server.url, "network", root)) as agent:
            agent.update_once()
    counted = count_graph(made.graph, made.model, {"input": images[:1]})
    return {
        "file": device / "slots" / str(read_status(device)["active"]["slot"]) / "model.onnx",
        "keyframe_bytes": published.manifest.keyframe.length,
        "parameters": sum(int(np.prod(spec.shape)) for spec in made.graph.parameters.values()),
        "macs": counted.macs,
    }


def _latencies(
    files: dict[str, tuple[Path, Path]], repeat: int
) -> dict[str, tuple[list[list[float]], list[list[float]]]]:
    """Milliseconds of single images by structure: of the whole and of what remains, by repeat."""
    import numpy as np

    from benchmarks.variants import session as open_session

    image = np.full((1, 1, 28, 28), 0.5, np.float32)
    found: dict[str, tuple[list[list[float]], list[list[float]]]] = {n: ([], []) for n in files}
    for _ in range(repeat):
        for name, pair in files.items():
            sessions = [open_session(file, False) for file in pair]
            taken: tuple[list[float], list[float]] = ([], [])
            for number in range(_WARM + _RUNS):
                for session, times in zip(sessions, taken, strict=True):  # by turns
                    began = time.perf_counter()
                    session.run(None, {session.get_inputs()[0].name: image})
                    if number >= _WARM:
                        times.append(1e3 * (time.perf_counter() - began))
            for times, all_of_them in zip(taken, found[name], strict=True):
                all_of_them.append(times)
    return found


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
            "structures": measured(Path(scratch), arguments.repeat),
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

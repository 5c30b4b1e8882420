"""An edge device in a process of its own: follow a release, run examples through it, report.

Started as ``python -m prunecast.simulations.runner.device FOLDER URL NAME``, with the folder of the
run, which gets its state. It updates itself, answers all held-out examples and prints a line of
JSON. Imports what a device has, and says what.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from prunecast.client.edge import Agent, AgentConfig
from prunecast.simulations.data import Examples

__all__ = ["FOREIGN", "main"]

FOREIGN = ("torch", "flwr", "onnx", "ray")
"""Modules that a device does not have."""


def main(arguments: list[str]) -> int:
    """Entry point of the process."""
    folder, (url, name) = Path(arguments[0]), arguments[1:]
    examples = Examples.load(folder / "work" / "held-out.npz")
    root = (folder / "root.json").read_bytes()
    config = AgentConfig(folder / "device", url, name, root, threads=1)
    with Agent(config) as agent:
        update = agent.update_once()
        agent.confirm()
        names = [signature.name for signature in agent.model.manifest.inputs]
        parts = []
        for chosen in np.array_split(np.arange(len(examples)), -(-len(examples) // 250)):
            batch = examples.take(chosen).inputs.values()
            [outputs] = agent.model.run(dict(zip(names, batch, strict=True))).values()
            parts.append(outputs)
    np.savez(folder / "work" / f"device-{update.version}.npz", outputs=np.concatenate(parts))
    report = {**asdict(update), "imported": [name for name in FOREIGN if name in sys.modules]}
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

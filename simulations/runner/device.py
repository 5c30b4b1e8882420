"""An edge device in a process of its own: follow a release, run examples through it, report.

Started as ``python -m prunecast.simulations.runner.device SETTINGS``, JSON with ``state``, ``url``,
``name``, ``root``, ``examples`` (a file of `Examples`) and ``output`` (a folder). It updates
itself, runs all examples and prints a line of JSON. Imports what a device has, and says what.
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
    settings = json.loads(arguments[0])
    examples = Examples.load(Path(settings["examples"]))
    config = AgentConfig(
        state=Path(settings["state"]),
        url=settings["url"],
        name=settings["name"],
        root=Path(settings["root"]).read_bytes(),
        threads=1,
    )
    with Agent(config) as agent:
        update = agent.update_once()
        agent.confirm()
        names = [signature.name for signature in agent.model.manifest.inputs]
        parts = []
        for chosen in np.array_split(np.arange(len(examples)), -(-len(examples) // 250)):
            batch = examples.take(chosen).inputs.values()
            [outputs] = agent.model.run(dict(zip(names, batch, strict=True))).values()
            parts.append(outputs)
    answers = Path(settings["output"]) / f"device-{update.version}.npz"
    np.savez(answers, outputs=np.concatenate(parts))
    report = {**asdict(update), "imported": [name for name in FOREIGN if name in sys.modules]}
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

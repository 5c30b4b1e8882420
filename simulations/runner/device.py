"""An edge device in a process of its own: follow a release, run images through it, report.

Started as ``python -m prunecast.simulations.runner.device SETTINGS``, a JSON file with ``state``,
``url``, ``name``, ``root``, ``inputs`` (an ``.npz`` whose ``x`` are the examples) and ``output``
(a folder). For every line on standard input it checks for an update, runs all examples and prints
one JSON line. Imports what a device has, and says what it has imported.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from prunecast.client.edge import Agent, AgentConfig

__all__ = ["FOREIGN", "main"]

FOREIGN = ("torch", "flwr", "onnx", "ray")
"""Modules that a device does not have."""


def main(arguments: list[str]) -> int:
    """Entry point of the process."""
    settings = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    with np.load(settings["inputs"]) as file:
        examples = file["x"]
    output = Path(settings["output"])
    config = AgentConfig(
        state=Path(settings["state"]),
        url=settings["url"],
        name=settings["name"],
        root=Path(settings["root"]).read_bytes(),
        threads=1,
    )
    with Agent(config) as agent:
        for _ in sys.stdin:
            update = agent.update_once()
            agent.confirm()
            [signature] = agent.model.manifest.inputs
            parts = []
            for batch in np.array_split(examples, max(1, len(examples) // 250)):
                [logits] = agent.model.run({signature.name: batch}).values()
                parts.append(logits.argmax(1))
            np.savez(output / f"device-{update.version}.npz", predictions=np.concatenate(parts))
            report = {
                **asdict(update),
                "imported": [name for name in FOREIGN if name in sys.modules],
            }
            sys.stdout.write(json.dumps(report) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

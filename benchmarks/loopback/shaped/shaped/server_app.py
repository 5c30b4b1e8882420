"""What the server does: rounds until the accuracy is reached, each noted in `<arm>.jsonl`."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from prunecast.server.federation import CompressedGrid
from shaped.task import ZSTD, accuracy, examples, initial, packed, unpacked

app = ServerApp()

_TIMEOUT = 900.0


def crossed(nodes: int) -> dict[str, int]:
    """Bytes that have crossed the nodes' interfaces, as their other ends count them.

    Those of a network namespace; 0 where there are none. From and to nodes: ``up`` and ``down``.
    """
    found = {"up": 0, "down": 0}
    for line in Path("/proc/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        if name.strip() in {f"link{node}" for node in range(nodes)}:
            columns = numbers.split()
            found["up"] += int(columns[0])
            found["down"] += int(columns[8])
    return found


@app.main()
def main(grid: Grid, context: Context) -> None:
    """See `federate`."""
    federate(grid, context.run_config)


def federate(grid: Grid, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Train an arm until the target, and note after every round what it took."""
    folder, arm, nodes = Path(config["folder"]), config["arm"], config["nodes"]
    preset = "dense" if arm == ZSTD else arm
    compressed = CompressedGrid(grid, preset, ledger=folder / f"{arm}-ledger.jsonl")
    compressed.expect_rounds(config["rounds"])
    drawn = {name: Array(array) for name, array in initial(config["seed"]).items()}
    # every arm begins with the weights that a seed of a few bytes can say
    sends = compressed if preset != "dense" else CompressedGrid(grid, "balanced")
    arrays = sends.draw_initial(ArrayRecord(drawn), config["seed"])
    x, y = examples(folder / "held-out.npz")
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=nodes)
    while len(list(grid.get_node_ids())) < nodes:  # starting them is no link's fault
        time.sleep(0.5)
    began, before = time.monotonic(), crossed(nodes)
    noted: list[dict[str, Any]] = []
    for number in range(1, config["rounds"] + 1):
        messages = list(strategy.configure_train(number, arrays, ConfigRecord(), compressed))
        if arm == ZSTD:
            content = messages[0].content
            through = RecordDict({**content, "arrays": packed(content["arrays"])})
            for message in messages:
                message.content = through
        replies = list(compressed.send_and_receive(messages, timeout=_TIMEOUT))
        for reply in replies:
            if arm == ZSTD and reply.has_content():
                reply.content["arrays"] = unpacked(reply.content["arrays"])
        arrays, _ = strategy.aggregate_train(number, replies)
        if arrays is None:
            raise RuntimeError(f"round {number}: no node answered")
        seconds, now = time.monotonic() - began, crossed(nodes)
        weights = arrays if preset == "dense" else compressed.published(arrays).arrays()
        found = {n: a.numpy() if isinstance(a, Array) else a for n, a in weights.items()}
        totals = compressed.ledger.totals()
        noted.append(
            {
                "round": number,
                "seconds": seconds,
                "accuracy": accuracy(found, x, y),
                **{way: now[way] - before[way] for way in now},
                "messages_up": totals.bytes_up,
                "messages_down": totals.bytes_down,
                "wire": totals.wire(),
            }
        )
        with (folder / f"{arm}.jsonl").open("a") as file:
            file.write(json.dumps(noted[-1]) + "\n")
        if noted[-1]["accuracy"] >= config["target"]:
            break
    compressed.ledger.close()
    return noted

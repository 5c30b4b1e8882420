"""What the server does. Leaves `ledger.jsonl` and `rounds.json` in `output`."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from faulty.task import (
    BACK,
    BARE,
    JOINS,
    KILLED,
    LAST,
    PATIENCE,
    SLOW,
    TROUBLED,
    fingerprint,
    initial,
    wait_for,
)
from prunecast.server import CompressedGrid, Deadlines, Policy
from prunecast.server.federation.exchange.deadlines import gather

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    folder = Path(context.run_config["output"])
    policy = Policy.from_run_config(context.run_config)
    grid = CompressedGrid(grid, policy, ledger=folder / "ledger.jsonl")
    arrays = ArrayRecord({name: Array(array) for name, array in initial().items()})
    told, nodes = [], {}
    gather(grid, Deadlines(min_nodes=3, wait=PATIENCE))
    for number in range(1, LAST + 1):
        prepare(number, folder, grid)
        # in these rounds one of three is not waited for
        grid.use_deadlines(Deadlines(replies=2 if number in (SLOW, KILLED) else 0))
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({"round": number})})
        messages = [Message(content, node, "train") for node in sorted(grid.get_node_ids())]
        replies = list(grid.send_and_receive(messages, timeout=PATIENCE))
        good = [reply for reply in replies if not reply.has_error()]
        nodes.update({m["partition"]: r.metadata.src_node_id for r in good for m in metrics(r)})
        told.append(
            {
                "published": fingerprint(grid.published(arrays).arrays()),
                "received": {m["partition"]: m["received"] for r in good for m in metrics(r)},
                "asked": len(messages),
                "errors": [str(r.error.reason) for r in replies if r.has_error()],
            }
        )
        arrays = mean([reply.content["arrays"] for reply in good])
        (folder / f"ended-{number}").touch()
        if number == SLOW:  # a node answers one message after the other
            query = Message(RecordDict(), nodes[TROUBLED[SLOW]], "query")
            list(grid.send_and_receive([query], timeout=PATIENCE))
    grid.ledger.close()
    (folder / "rounds.json").write_text(json.dumps({"rounds": told, "nodes": nodes}))


def prepare(number: int, folder: Path, grid: CompressedGrid) -> None:
    """What has to be before a round."""
    if number == BACK:
        wait_for(folder / "restarted")
    if number == JOINS:
        (folder / "join").touch()
        gather(grid, Deadlines(min_nodes=4, wait=PATIENCE))
    if number == BARE:
        (folder / "bare").touch()
    if number == LAST:
        (folder / "bare").unlink()


def metrics(reply: Message):
    return reply.content.metric_records.values()


def mean(records: list[ArrayRecord]) -> ArrayRecord:
    arrays = {n: np.mean([r[n].numpy() for r in records], axis=0) for n in records[0]}
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})

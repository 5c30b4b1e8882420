"""What a round costs a server: CPU time and memory, with Prunecast and in plain Flower.

    python benchmarks/round_cost.py [--clients N ...] [--rounds N] [--strategy NAME] [--seed N]
                                    [--quick] [--json FILE] [--chart FILE]
    python benchmarks/round_cost.py --load FILE --chart FILE

A model of ResNet-18's shapes (11.7 million parameters in 62 tensors and BatchNorm's statistics),
drawn, is sent by a strategy to clients in this process and their replies are aggregated: with
plain Flower, and through `CompressedGrid` with the preset `small` at 90 % sparsity. Replies are
prepared before, by the real mod, and their cost is not counted. What Flower's own grid does around
its sockets is: it takes messages apart into hashed objects, and builds the replies from theirs
(`wire s`). Every configuration runs in a fresh process with one thread: a round to warm up, then
the counted ones, each through a grid of its own, so that publishing and encoding the version
count, too. Stated are medians of CPU time (user and system) and the peak of resident memory,
plain Flower's replies included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SPARSITY = 0.9
_CLIENTS = 10, 50, 100, 200
DISTINCT = 8  # replies that differ; the others are copies of them, each in memory of its own
_STAGES = (("layer1", 64, 1), ("layer2", 128, 2), ("layer3", 256, 2), ("layer4", 512, 2))


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of ResNet-18's parameters and buffers (He et al. 2016), 1000 classes."""

    def norm(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        for part in ("weight", "bias", "running_mean", "running_var"):
            yield f"{name}.{part}", (width,)
        yield f"{name}.num_batches_tracked", ()

    yield "conv1.weight", (64, 3, 7, 7)
    yield from norm("bn1", 64)
    came = 64
    for stage, width, stride in _STAGES:
        for block in range(2):
            for layer, before in ((1, came), (2, width)):
                yield f"{stage}.{block}.conv{layer}.weight", (width, before, 3, 3)
                yield from norm(f"{stage}.{block}.bn{layer}", width)
            if not block and stride > 1:
                yield f"{stage}.{block}.downsample.0.weight", (width, came, 1, 1)
                yield from norm(f"{stage}.{block}.downsample.1", width)
            came = width
    yield "fc.weight", (1000, 512)
    yield "fc.bias", (1000,)


def drawn_model(seed: int, quick: bool) -> dict[str, np.ndarray]:
    """The global model: He's initialisation, heavier in its tails, as after some training."""
    rng = np.random.default_rng(seed)
    model: dict[str, np.ndarray] = {}
    for name, shape in shapes():
        if quick and "layer4" in name:
            continue
        if not shape:
            model[name] = np.array(100, np.int64)
        elif len(shape) == 1:
            model[name] = rng.normal(0.5, 0.1, shape).astype(np.float32)
        else:
            scale = (2 / np.prod(shape[1:])) ** 0.5
            model[name] = (rng.laplace(0, 0.7, shape) * scale).astype(np.float32)
    return model


def trained(arrays: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """What stands for local training: a few weights of every tensor move much, most a little."""
    rng = np.random.default_rng(seed)
    return {
        name: array
        if array.dtype.kind != "f"
        else array
        + (0.01 * rng.laplace(0, 1, array.shape) * (0.05 + abs(array))).astype(np.float32)
        for name, array in arrays.items()
    }


def policy() -> Any:
    """The preset `small`, at its final sparsity from the first version on."""
    from prunecast.server.federation import Policy

    return Policy.preset("small", sparsity=SPARSITY, pruning_begin=0, pruning_end=1)


def prepare(folder: Path, seed: int, quick: bool) -> None:
    """Have the real mod answer the first version, and keep the replies' objects as files."""
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Message,
        MetricRecord,
        RecordDict,
    )
    from flwr.clientapp import ClientApp
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    from prunecast.client.training import compression_mod
    from prunecast.server.federation import CompressedGrid
    from prunecast.simulations.runner.inprocess import InProcessGrid

    app = ClientApp(mods=[compression_mod(folder / "store")])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        arrays = {name: array.numpy() for name, array in message.content["arrays"].items()}
        new = {n: Array(a) for n, a in trained(arrays, seed + context.node_id).items()}
        metrics = MetricRecord({"num-examples": 100 + context.node_id})
        return Message(
            RecordDict({"arrays": ArrayRecord(new), "metrics": metrics}), reply_to=message
        )

    def keep(reply: Message) -> None:
        assert not reply.has_error(), reply.error
        objects = get_all_nested_objects(reply.content)
        target = folder / "replies" / str(reply.metadata.src_node_id)
        target.mkdir(parents=True)
        for object_id, item in objects.items():
            (target / object_id).write_bytes(item.deflate())
        (target / "content").write_text(reply.content.object_id)

    inner = InProcessGrid(app, DISTINCT)
    inner.on_reply = keep  # type: ignore[assignment]
    record = ArrayRecord({name: Array(a) for name, a in drawn_model(seed, quick).items()})
    content = RecordDict({"arrays": record, "config": ConfigRecord({"server-round": 1})})
    messages = [Message(content, node, "train") for node in inner.get_node_ids()]
    list(CompressedGrid(inner, policy()).push_messages(messages))


def prepared_reply(folder: Path, n: int) -> tuple[str, dict[str, bytes]]:
    """The objects of a prepared reply's content, and the id of the content."""
    source = folder / "replies" / str(1 + n % DISTINCT)
    objects = {path.name: path.read_bytes() for path in source.iterdir()}
    return objects.pop("content").decode(), objects


def plain_reply(model: dict[str, np.ndarray], n: int) -> tuple[str, dict[str, bytes]]:
    """The objects of a reply of plain Flower's, and the id of the content."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    arrays = ArrayRecord()
    for name, array in model.items():
        factor = array.dtype.type(1 + (n % DISTINCT) / 128)
        arrays[name] = Array(np.asarray(array * factor, array.dtype))
    metrics = MetricRecord({"num-examples": 101 + n % DISTINCT})
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    objects = get_all_nested_objects(content)
    return content.object_id, {key: item.deflate() for key, item in objects.items()}


def measure(folder: Path, kind: str, clients: int, options: argparse.Namespace) -> dict[str, Any]:
    """The rounds of one configuration, in this process."""
    from flwr.app import Array, ArrayRecord, ConfigRecord, Message
    from flwr.serverapp import strategy as strategies
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    from prunecast.compression.flower.internals import set_message_id
    from prunecast.server.federation import CompressedGrid
    from prunecast.simulations.runner.inprocess import InProcessGrid

    clock = time.process_time
    plain = kind == "plain"
    model = drawn_model(options.seed, options.quick)

    class Answering(InProcessGrid):
        """Does what Flower's grid does but for its sockets, and has every reply at hand."""

        def __init__(self) -> None:
            super().__init__({}, clients)
            self.pushed = self.wire = self.preparing = 0.0
            self.waiting: dict[str, Message] = {}

        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            """Take the messages apart."""
            begun = clock()
            sent: dict[str, int] = {}
            with no_object_id_recompute():
                for message in messages:
                    set_message_id(message, f"message-{len(self.waiting):06d}")
                    self.waiting[message.metadata.message_id] = message
                    for key, item in get_all_nested_objects(message).items():
                        if key not in sent:
                            sent[key] = len(item.deflate())
            self.pushed = clock()
            self.wire += self.pushed - begun
            return list(self.waiting)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            """Build the replies from their objects."""
            replies = []
            for n, message_id in enumerate(message_ids):
                begun = clock()
                key, objects = plain_reply(model, n) if plain else prepared_reply(folder, n)
                ready = clock()
                content = inflate_object_from_contents(key, objects)
                del objects
                replies.append(Message(content, reply_to=self.waiting.pop(message_id)))
                self.preparing += ready - begun
                self.wire += clock() - ready
            return replies

        def send_and_receive(self, messages: Iterable[Message], **_: Any) -> Iterable[Message]:
            """Send and receive."""
            return self.pull_messages(list(self.push_messages(messages)))

    arrays = ArrayRecord({name: Array(array) for name, array in model.items()})
    if not plain:
        model.clear()
    rounds = []
    for _ in range(options.rounds + 1):
        inner = Answering()
        grid = inner if plain else CompressedGrid(inner, policy())
        chosen = getattr(strategies, options.strategy)(min_available_nodes=clients)
        begun = clock()
        messages = chosen.configure_train(1, arrays, ConfigRecord(), grid)
        replies = list(grid.send_and_receive(messages))
        received = clock()
        result, _ = chosen.aggregate_train(1, replies)
        done = clock()
        assert result is not None
        assert not any(reply.has_error() for reply in replies)
        rounds.append(
            {
                "wire_s": inner.wire,
                "send_s": inner.pushed - begun,
                "receive_s": received - inner.pushed - inner.preparing,
                "aggregate_s": done - received,
                "cpu_s": done - begun - inner.preparing,
            }
        )
        del messages, replies, result, inner, grid, chosen
    counted = rounds[1:]
    middle = {key: statistics.median(r[key] for r in counted) for key in counted[0]}
    return {
        "kind": kind,
        "clients": clients,
        **{key: round(value, 4) for key, value in middle.items()},
        "cpu_per_client_s": round(middle["cpu_s"] / clients, 5),
        "cpu_runs_s": [round(r["cpu_s"], 4) for r in counted],
        "peak_mb": round(_status("VmHWM") / 1e6, 1),
    }


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(row.split()[1]) * 1024 for row in file if row.startswith(key + ":"))


HEAD = (
    f"  {'':10}{'clients':>8}{'wire s':>9}{'send s':>9}{'receive s':>11}{'aggregate s':>13}"
    f"{'CPU s/client':>14}{'peak MB':>10}"
)


def line(row: dict[str, Any]) -> str:
    """One configuration as a line of the table."""
    return (
        f"  {row['kind']:10}{row['clients']:8}{row['wire_s']:9.2f}{row['send_s']:9.2f}"
        f"{row['receive_s']:11.2f}"
        f"{row['aggregate_s']:13.2f}{row['cpu_per_client_s']:14.4f}{row['peak_mb']:10.0f}"
    )


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against plain Flower's at the same number of clients."""
    found = {(row["kind"], row["clients"]): row for row in rows}
    return [
        {
            "clients": n,
            "cpu": round(ours["cpu_s"] / found["plain", n]["cpu_s"], 3),
            "peak": round(ours["peak_mb"] / found["plain", n]["peak_mb"], 3),
        }
        for (kind, n), ours in found.items()
        if kind == "prunecast" and ("plain", n) in found
    ]


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure every configuration in a process of its own, and print as it goes."""
    from harness.report import machine

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    common = ["--seed", str(options.seed), "--rounds", str(options.rounds)]
    common += ["--strategy", options.strategy, *(["--quick"] if options.quick else [])]

    def start(*arguments: object) -> str:
        command = [sys.executable, __file__, *map(str, arguments), *common]
        child = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
        return child.stdout.splitlines()[-1] if child.stdout else ""

    start("--prepare", folder)
    rows = []
    print(HEAD)
    for clients in options.clients:
        for kind in ("plain", "prunecast"):
            rows.append(json.loads(start("--measure", folder, kind, clients)))
            print(line(rows[-1]), flush=True)
    model = drawn_model(options.seed, options.quick)
    return {
        "machine": machine(),
        "parameters": sum(a.size for n, a in model.items() if "running" not in n and a.shape),
        "sparsity": SPARSITY,
        "strategy": options.strategy,
        "rounds": options.rounds,
        "rows": rows,
        "ratios": ratios(rows),
    }


def draw(report: dict[str, Any], path: Path) -> None:
    """CPU time and peak memory of a round over the number of clients."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for kind, colour, style in (("plain", "#555555", "--"), ("prunecast", "#c1272d", "-")):
        rows = [row for row in report["rows"] if row["kind"] == kind]
        label = "plain Flower" if kind == "plain" else kind
        for axis, key, factor in zip(axes, ("cpu_s", "peak_mb"), (1, 1e-3), strict=True):
            values = [factor * row[key] for row in rows]
            axis.plot(
                [row["clients"] for row in rows], values, style, marker=".", color=colour,
                label=label,
            )  # fmt: skip
    for axis, title in zip(axes, ("CPU seconds of a round", "peak memory, GB"), strict=True):
        axis.set_title(title, fontsize=10, loc="left")
        axis.set_xlabel("clients")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Measure, or do one part in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=list(_CLIENTS), help=f"(default: {_CLIENTS})")
    add("--rounds", type=int, default=3, help="counted rounds of each (default: 3)")
    add("--strategy", default="FedAvg", help="a class of flwr.serverapp.strategy (default: FedAvg)")
    add("--seed", type=int, default=0, help="of weights and training (default: 0)")
    add("--quick", action="store_true", help="a smaller model: does it work?")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add("--chart", type=Path, metavar="FILE", help="draw it, as a PNG; needs matplotlib")
    add("--load", type=Path, metavar="FILE", help="what --json wrote, instead of measuring")
    add("--prepare", metavar="DIR", help=argparse.SUPPRESS)
    add("--measure", nargs=3, metavar=("DIR", "KIND", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.prepare:
        prepare(Path(options.prepare), options.seed, options.quick)
        return
    if options.measure:
        folder, kind, clients = options.measure
        print(json.dumps(measure(Path(folder), kind, int(clients), options)))
        return
    if options.load:
        report = json.loads(options.load.read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = run(options, Path(folder))
    for row in report["ratios"]:
        print(f"{row['clients']} clients: {row['cpu']:.2f} x the CPU, {row['peak']:.2f} x the peak")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.chart:
        draw(report, options.chart)


if __name__ == "__main__":
    main()

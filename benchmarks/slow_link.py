"""Time to an accuracy on slow links: plain Flower, zstd and Prunecast on a real deployment.

    python benchmarks/slow_link.py [--profiles NAME ...] [--arms NAME ...] [--target X] [--rounds N]
                                   [--loss X] [--plain-http] [--smoke] [--out FOLDER]

A SuperLink, and two SuperNodes in network namespaces of their own. The kernel shapes the rates of
each node's link (token buckets, `tc`); a relay in the node's namespace delays every byte by half a
round trip, and may lose segments (`benchmarks/loopback/delay.py` says what that is not). Each arm
trains a perceptron of 407,050 weights on MNIST's digits, uneven between the nodes, until the
published model is as accurate as asked for. Stated are the seconds from the first message to the
end of the round that got there, ClientApps' starts and training included, and what the links'
interfaces counted by then: every packet with all its headers, polling and signs of life too.

Writes slow_link.json, slow_link.md and slow_link.png into docs/results: a quarter of an hour.
``--smoke`` runs two rounds of two arms on one profile, into runs/slow-link-smoke. Where network
namespaces are not allowed it says so and does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if not __package__:  # started by its path: the repository's folder is not where Python looks
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.harness.comparisons import write_page
from benchmarks.loopback.certificates import loopback_certificate
from benchmarks.loopback.engine import Engine, engine_in, unused_port
from benchmarks.loopback.namespaces import enter, inside, linked, not_allowed

__all__ = ["PROFILES", "page", "reached"]

NODES = 2
# name: bits per second to a node and from it, round trip in seconds, and where that stands
PROFILES: dict[str, tuple[float, float, float, str]] = {
    "slow-4g": (1.6e6, 0.75e6, 0.150, "Lighthouse's mobile preset, “Slow 4G”"),
    "3g": (1.6e6, 0.768e6, 0.300, "WebPageTest, connectivity.ini, “3G”"),
    "us-mobile": (
        *(111e6, 9.7e6, 0.031),
        "median of US mobile, Ookla, 2024, as it was given to us; the round trip is that of 2023's "
        "third quarter (97/9 Mbit/s, 31 ms)",
    ),
}
ARMS = ("dense", "dense-zstd", "fine", "balanced", "small")
_ROOT = Path(__file__).parent.parent
_APP = _ROOT / "benchmarks" / "loopback" / "shaped"
_SECONDS = 1500
_COLOURS = {"dense": "#555555", "dense-zstd": "#9a9a9a", "fine": "#31a354", "balanced": "#2166ac"}
_COLOURS |= {"small": "#c1272d", "tiny": "#e6850e"}


def write_data(folder: Path, seed: int) -> None:
    """The digits of each node, and those held out, as the app reads them."""
    import numpy as np

    from benchmarks.harness.federation import scenario
    from prunecast.simulations.runner.prepared import partition_data
    from prunecast.simulations.scenarios import scenario_from_mapping

    document = {**scenario("cnn", 1, seed, {"kind": "dense"}), "clients": {"count": NODES}}
    training, held_out, clients = partition_data(scenario_from_mapping(document))
    parts = {f"node{n}": training.take(chosen) for n, chosen in enumerate(clients)}
    for name, part in {**parts, "held-out": held_out}.items():
        np.savez(folder / f"{name}.npz", x=part.inputs["x"], y=part.targets)


@contextmanager
def deployed(folder: Path, profile: str, *, tls: bool, loss: float, seed: int) -> Iterator[Engine]:
    """A SuperLink here, and SuperNodes behind links of a profile."""
    down, up, round_trip, _ = PROFILES[profile]
    port = unused_port()
    served, trusted, connection = ["--insecure"], ["--insecure"], "insecure = true"
    if tls:
        certificate, key = loopback_certificate(folder)
        served = ["--ssl-ca-certfile", str(certificate), "--ssl-certfile", str(certificate)]
        served += ["--ssl-keyfile", str(key)]
        trusted = ["--root-certificates", str(certificate)]
        connection = f'root-certificates = "{certificate}"'
    environment = {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with linked(NODES, up=up, down=down) as ends, engine_in(folder, **environment) as engine:
        engine.start(
            "superlink",
            *("flower-superlink", *served, "--host", "0.0.0.0", "--port", str(port)),
            port=port,
        )
        (folder / "flower").mkdir(exist_ok=True)
        (folder / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "ours"\n\n[superlink.ours]\naddress = "127.0.0.1:{port}"\n'
            f"{connection}\n"
        )
        for node, end in enumerate(ends):
            engine.start(
                f"delay{node}",
                *(*end.enter, sys.executable, str(_ROOT / "benchmarks" / "loopback" / "delay.py")),
                *(str(port), f"{end.server}:{port}", str(round_trip / 2), str(loss), str(seed)),
                port=None,
            )
            engine.start(
                f"supernode{node}",
                *(*end.enter, "flower-supernode", *trusted, "--superlink", f"127.0.0.1:{port}"),
                *("--host", "127.0.0.1", "--port", str(port + 1)),
                "--node-config",
                f'partition-id={node} num-partitions={NODES} prunecast-store="{folder}/s{node}"',
                port=None,
            )
        yield engine


def reached(noted: Sequence[Mapping[str, Any]], target: float) -> Mapping[str, Any] | None:
    """The first round that was as accurate; None where none was."""
    return next((row for row in noted if row["accuracy"] >= target), None)


def measure(profile: str, chosen: argparse.Namespace, data: Path) -> list[dict[str, Any]]:
    """The rounds of every arm on links of a profile."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for path in data.iterdir():
            shutil.copy(path, folder)
        options = {"tls": not chosen.plain_http, "loss": chosen.loss, "seed": chosen.seed}
        with deployed(folder, profile, **options) as engine:
            for arm in chosen.arms:
                config = {"folder": temporary, "arm": arm, "nodes": NODES, "seed": chosen.seed}
                config |= {"rounds": chosen.rounds, "target": chosen.target}
                told = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
                engine.run(_APP, "--run-config", told, seconds=_SECONDS)
                lines = (folder / f"{arm}.jsonl").read_text().splitlines()
                noted = [json.loads(line) for line in lines]
                rows.append({"profile": profile, "arm": arm, "rounds": noted})
                last = noted[-1]
                print(
                    f"{profile} {arm}: {last['accuracy']:.1%} after {last['round']} rounds and "
                    f"{last['seconds']:.0f} s, {last['down']:,} bytes down, {last['up']:,} up",
                    flush=True,
                )
    return rows


def page(document: Mapping[str, Any]) -> Iterator[str]:
    """Lines of Markdown, without the picture."""
    about, target = document["machine"], document["target"]
    low, high = sorted(document["load"])
    yield "# Time to an accuracy on slow links"
    yield ""
    yield f"`{document['command']}`; {about['cpu']}, {about['cores']} cores, load {low:.0f} to"
    yield f"{high:.0f} (above the number of cores ClientApps take longer to start, for every arm"
    yield f"alike); {about['date']}, prunecast {about['prunecast']}."
    yield ""
    yield f"{NODES} SuperNodes, {'TLS' if document['tls'] else 'HTTP'}, each behind a link of its"
    yield "own; a perceptron of 407,050 weights on digits of MNIST, uneven between nodes, until the"
    yield f"published model tells {target:.0%} of 1,000 held-out digits right. Bytes are those"
    yield "of the links' interfaces, all headers, polling and signs of life included, both nodes;"
    yield "seconds begin with the first message. `dense-zstd` is plain Flower, its arrays through"
    yield "zstd, level 3. *Of them on the link* is what a node's bytes take at the link's rates;"
    yield "the rest are ClientApps that start, training, and nodes that ask every three seconds."
    yield ""
    yield (
        "| link | arm | rounds | seconds | of them on the link | against dense | MB down | MB up "
        "| fewer bytes | of messages |"
    )
    yield "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    dense: dict[str, tuple[float, int]] = {}
    for row in document["rows"]:
        at = reached(row["rounds"], target)
        name, arm = row["profile"], row["arm"]
        if at is None:
            best = max(noted["accuracy"] for noted in row["rounds"])
            last = row["rounds"][-1]
            sizes = f"{last['down'] / 1e6:.2f} | {last['up'] / 1e6:.2f}"
            told = f"not reached ({best:.1%} in {last['seconds']:.0f} s)"
            yield f"| {name} | {arm} | {last['round']} | {told} | | | {sizes} | | |"
            continue
        spent = at["down"] + at["up"]
        messages = at["messages_down"] + at["messages_up"]
        dense.setdefault(name, (at["seconds"], spent))
        seconds, plain = dense[name]
        yield (
            f"| {name} | {arm} | {at['round']} | {at['seconds']:.0f} | {_carried(name, at):.1f} "
            f"| {seconds / at['seconds']:.1f}× | {at['down'] / 1e6:.2f} | {at['up'] / 1e6:.2f} "
            f"| {plain / spent:.1f}× | {messages / 1e6:.2f} MB |"
        )
    yield ""
    for name in dict.fromkeys(row["profile"] for row in document["rows"]):
        down, up, round_trip, source = PROFILES[name]
        rates = f"{down / 1e6:g} Mbit/s down, {up / 1e6:g} up"
        yield f"- `{name}`: {rates}, {1e3 * round_trip:.0f} ms round trip: {source}."
    yield "- Rates are shaped by the kernel (token bucket); the delay is that of a relay in user"
    yield "  space that delays every byte and limits nothing else, so TCP opens its window faster"
    yield f"  than over a link that is long. {document['loss']:.1%} of segments are lost."


def _carried(profile: str, spent: Mapping[str, Any]) -> float:
    """Seconds that a node's link is busy with bytes, the mean over nodes."""
    down, up, *_ = PROFILES[profile]
    return 8 / NODES * (float(spent["down"]) / down + float(spent["up"]) / up)


def draw(rows: Sequence[Mapping[str, Any]], target: float, path: Path) -> None:
    """Accuracy over seconds, a chart for each link."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    profiles = list(dict.fromkeys(row["profile"] for row in rows))
    figure, axes = pyplot.subplots(
        1, len(profiles), figsize=(5 * len(profiles), 3.4), squeeze=False, layout="constrained"
    )
    for axis, profile in zip(axes[0], profiles, strict=True):
        for row in rows:
            if row["profile"] == profile:
                noted = row["rounds"]
                axis.plot(
                    [one["seconds"] for one in noted],
                    [100 * one["accuracy"] for one in noted],
                    *("--" if row["arm"].startswith("dense") else "-",),
                    marker=".",
                    color=_COLOURS.get(row["arm"], "black"),
                    label=row["arm"],
                )
        down, up, round_trip, _ = PROFILES[profile]
        title = f"{profile}: {down / 1e6:g}/{up / 1e6:g} Mbit/s, {1e3 * round_trip:.0f} ms"
        axis.set_title(title, fontsize=10, loc="left")
        axis.axhline(100 * target, color="#bbbbbb", linewidth=0.8)
        axis.set_xlabel("seconds")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("accuracy, %")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--profiles", nargs="+", choices=list(PROFILES), help="(default: all)")
    add("--arms", nargs="+", metavar="NAME", help="presets, dense, dense-zstd; dense comes first")
    add("--target", type=float, default=0.85, metavar="X", help="accuracy (default: 0.85)")
    add("--rounds", type=int, metavar="N", help="at most (default: 12)")
    add("--loss", type=float, default=0.0, metavar="X", help="fraction of segments (default: 0)")
    add("--seed", type=int, default=1, metavar="N", help="(default: 1)")
    add("--plain-http", action="store_true", help="without TLS")
    add("--smoke", action="store_true", help="two rounds of two arms on one link")
    add("--out", type=Path, metavar="FOLDER", help="(default: docs/results)")
    chosen = parser.parse_args(given)
    smoke = chosen.smoke
    chosen.profiles = chosen.profiles or (["us-mobile"] if smoke else list(PROFILES))
    chosen.arms = chosen.arms or list(("dense", "small") if smoke else ARMS)
    chosen.rounds = chosen.rounds or (2 if smoke else 12)
    default = Path("runs/slow-link-smoke") if smoke else _ROOT / "docs" / "results"
    chosen.out = chosen.out or default
    return chosen


def main(given: list[str] | None = None) -> int:
    """Entry point."""
    given = sys.argv[1:] if given is None else given
    chosen = _arguments(given)
    if not inside():
        if reason := not_allowed():
            print(f"slow_link.py: skipped, network namespaces are not allowed here: {reason}")
            return 0
        enter([sys.executable, str(Path(__file__).resolve()), *given])
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as data:
        write_data(Path(data), chosen.seed)
        for profile in chosen.profiles:
            rows += measure(profile, chosen, Path(data))
    command = " ".join(["python benchmarks/slow_link.py", *given])
    from benchmarks.harness.report import machine

    facts = {
        "load": [load, os.getloadavg()[0]],
        "target": chosen.target,
        "tls": not chosen.plain_http,
        "loss": chosen.loss,
        "profiles": {name: PROFILES[name] for name in chosen.profiles},
        "rows": rows,
    }
    text = list(page({"machine": machine(), "command": command, **facts}))
    text += ["", "![Accuracy over time on each link](slow_link.png)"]
    write_page(
        *(chosen.out, "slow_link", text, command, facts),
        lambda path: draw(rows, chosen.target, path),
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What ours costs beside dense FedAvg and beside the best peer: the rule, the tables, the picture.

The rule, over the means of all seeds. *Ours* is the cheapest preset that is no more than the
tolerance worse than dense training; where none is, the one that is least worse. The *best peer* is
the cheapest other scheme that is no more than the tolerance worse than ours; where none is, there
is none, and the one that comes nearest is named. The tolerance is in the metric's own unit where
that is a fraction (0.005 is half a point), and relative to what dense training reached otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunecast.common.text import ratio_text
from prunecast.simulations.comparison import published_lines

__all__ = ["PEER_TARGET", "draw", "report_lines", "spent", "target_of", "verdict"]

Document = Mapping[str, Any]

PEER_TARGET = 3.0
"""How many times fewer bytes than the best peer are aimed at."""
_LARGE, _LARGE_TARGET, _LENET_TARGET = 300_000, 300.0, 100.0
_OURS = "prunecast"
_COLUMNS = 3
_COLOURS = {"dense": "#555555", "peer": "#0072b2", "ours": "#d55e00"}


def spent(arm: Mapping[str, Any]) -> int:
    """Bytes of all messages of an arm, both directions."""
    return int(arm["bytes_down"] + arm["bytes_up"])


def target_of(document: Document) -> float | None:
    """How many times fewer bytes than dense are aimed at; None where nothing is."""
    if document["parameters"] > _LARGE:
        return _LARGE_TARGET
    return _LENET_TARGET if document["scenario"]["model"]["factory"].endswith(":lenet") else None


def _worse(document: Document, name: str, than: str) -> float:
    """By how much an arm's metric is worse than another's; below 0 where it is better."""
    metric = document["task"]["metric"]
    gap = float(document["arms"][than][metric] - document["arms"][name][metric])
    return -gap if document["task"]["lower_is_better"] else gap


def _dense(document: Document) -> str:
    return next(name for name, arm in document["arms"].items() if arm["kind"] == "dense")


def verdict(document: Document, tolerance: float) -> dict[str, Any]:
    """Which preset stands for ours, and what it costs beside dense and the best peer.

    Args:
        document: of a comparison, with at least a dense arm and one of ours.
        tolerance: see above.

    Returns:
        ``dense``, ``ours``, ``peer`` (None: no peer is as good) and ``nearest`` (peer; None where
        one is, or there are no peers) by name; ``ratio`` to dense, ``peer_ratio``, ``below``: how
        much worse than dense ours is, in the metric's unit; ``target`` and ``reached`` (None
        without a target), ``peer_reached``.
    """
    arms, dense = document["arms"], _dense(document)
    slack = tolerance
    if not document["task"]["percent"]:
        slack *= abs(arms[dense][document["task"]["metric"]])
    mine = [name for name, arm in arms.items() if arm["kind"] == _OURS]
    good = [name for name in mine if _worse(document, name, dense) <= slack]
    if good:
        ours = min(good, key=lambda name: spent(arms[name]))
    else:
        ours = min(mine, key=lambda name: _worse(document, name, dense))
    peers = [name for name in arms if name not in mine and name != dense]
    equal = [name for name in peers if _worse(document, name, ours) <= slack]
    peer = min(equal, key=lambda name: spent(arms[name]), default=None)
    nearest = min(peers, key=lambda name: _worse(document, name, ours), default=None)
    cost, target = spent(arms[ours]), target_of(document)
    ratio = spent(arms[dense]) / cost
    peer_ratio = None if peer is None else spent(arms[peer]) / cost
    return {
        "dense": dense,
        "ours": ours,
        "within": bool(good),
        "below": _worse(document, ours, dense),
        "ratio": round(ratio, 2),
        "peer": peer,
        "nearest": nearest if peer is None else None,
        "peer_ratio": None if peer_ratio is None else round(peer_ratio, 2),
        "target": target,
        "reached": None if target is None else bool(good) and ratio >= target,
        "peer_reached": None if peer_ratio is None else peer_ratio >= PEER_TARGET,
    }


def reproduced(document: Document, name: str) -> bool | None:
    """Whether a published figure was met within its spread and ours; None where no arm does it."""
    figure = document["published"][name]
    arm = document["arms"].get(figure["arm"])
    if arm is None:
        return None
    best = figure["measured"] == "best"
    ours = arm["best" if best else document["task"]["metric"]]
    spread = arm["best_spread" if best else "spread"] or 0.0
    return bool(abs(ours - figure["value"]) <= figure.get("spread", 0.0) + spread)


# -- tables ---------------------------------------------------------------------------------------


def _score(document: Document, value: float, spread: float | None = None) -> str:
    numbers = [value] if spread is None else [value, spread]
    if document["task"]["percent"]:
        return " ± ".join(f"{100 * number:.2f}" for number in numbers)
    return " ± ".join(f"{number:.4g}" for number in numbers)


def _metric(document: Document) -> str:
    task = document["task"]
    return f"{task['metric']}{', %' if task['percent'] else ''}"


def _below(document: Document, value: float) -> str:
    """How much worse than dense, for people."""
    unit, size = (" points", 100 * abs(value)) if document["task"]["percent"] else ("", abs(value))
    return f"{size:.3g}{unit} {'worse' if value > 0 else 'better'}"


def _megabytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 1e6:,.3f}"


def report_lines(documents: Sequence[Document], tolerance: float, command: str) -> Iterator[str]:
    """The page, in Markdown: an overview, and a table for each scenario.

    Args:
        documents: of comparisons, each with its ``parameters``, ``family`` and ``verdict``.
        tolerance: of the verdicts.
        command: that made them.
    """
    yield "# Headline figures"
    yield ""
    yield f"Written by `{command}`; [what is compared with what](../figures.md)."
    yield ""
    yield (
        "| scenario | family | weights | dense MB | ours | MB | fewer than dense | dense | ours "
        "| best peer as good | fewer than it |"
    )
    yield "|---|---|---:|---:|---|---:|---:|---:|---:|---|---:|"
    for document in documents:
        found, arms = document["verdict"], document["arms"]
        dense, ours = arms[found["dense"]], arms[found["ours"]]
        metric = document["task"]["metric"]
        cells = [
            f"`{document['scenario']['name']}`",
            document["family"],
            f"{document['parameters']:,}",
            _megabytes(spent(dense)),
            f"`{found['ours']}`",
            _megabytes(spent(ours)),
            ratio_text(found["ratio"]),
            _score(document, dense[metric]),
            f"{_score(document, ours[metric])} ({_metric(document)})",
            f"`{found['peer']}`" if found["peer"] else "none",
            ratio_text(found["peer_ratio"]) if found["peer"] else "–",
        ]
        yield f"| {' | '.join(cells)} |"
    for document in documents:
        yield ""
        yield from _scenario_lines(document, tolerance)


def _scenario_lines(document: Document, tolerance: float) -> Iterator[str]:
    scenario, found = document["scenario"], document["verdict"]
    seeds = ", ".join(map(str, document["seeds"]))
    yield f"## {scenario['name']}"
    yield ""
    yield f"{scenario['description']}. {document['rounds']} rounds, seeds {seeds}."
    yield ""
    yield f"| arm | MB down | MB up | MB | {_metric(document)} | seconds | MB on the wire |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for name, arm in document["arms"].items():
        cells = [
            f"`{name}`",
            _megabytes(arm["bytes_down"]),
            _megabytes(arm["bytes_up"]),
            _megabytes(spent(arm)),
            _score(document, arm[document["task"]["metric"]], arm["spread"]),
            "–" if arm["seconds"] is None else f"{arm['seconds']:.0f}",
            _megabytes(arm.get("wire")),
        ]
        yield f"| {' | '.join(cells)} |"
    yield ""
    told = f"- `{found['ours']}`: {ratio_text(found['ratio'])} fewer bytes than dense, "
    told += f"{_below(document, found['below'])}"
    told += "." if found["within"] else ": no preset comes within the tolerance of dense."
    yield told + _target(found)
    yield _peer_line(document)
    for name, why in document["left_out"].items():
        yield f"- `{name}` was left out: {why}."
    for name, line in zip(document["published"], published_lines(document), strict=True):
        met = reproduced(document, name)
        end = "" if met is None else ": reproduced" if met else ": NOT reproduced within the spread"
        yield f"- {line}{end}."


def _target(found: Mapping[str, Any]) -> str:
    if found["target"] is None:
        return ""
    if found["reached"]:
        return f" Target {found['target']:.0f}× reached."
    if found["ratio"] >= found["target"]:
        return f" Target {found['target']:.0f}× missed for that alone."
    return f" Target {found['target']:.0f}× missed: {found['ratio'] / found['target']:.0%} of it."


def _peer_line(document: Document) -> str:
    found, arms = document["verdict"], document["arms"]
    if found["peer"]:
        told = (
            f"- Best peer as good: `{found['peer']}`, {ratio_text(found['peer_ratio'])} the bytes."
        )
        return told + ("" if found["peer_reached"] else f" Target {PEER_TARGET:.0f}× missed.")
    if found["nearest"] is None:
        return "- No peers."
    name, cost = found["nearest"], spent(arms[found["nearest"]]) / spent(arms[found["ours"]])
    gap = _below(document, _worse(document, name, found["ours"]))
    return (
        f"- No peer is as good; the nearest, `{name}`, is {gap} for {ratio_text(cost)} the bytes."
    )


# -- picture --------------------------------------------------------------------------------------


def draw(documents: Sequence[Document], target: Path) -> None:
    """Write a PNG: for each scenario, what every arm reached against all its bytes.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    columns = min(_COLUMNS, len(documents))
    rows = -(-len(documents) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(4.2 * columns, 3.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in grid.flat[len(documents) :]:
        axis.set_visible(False)
    for axis, document in zip(grid.flat, documents, strict=False):
        scale = 100 if document["task"]["percent"] else 1
        by_cost = sorted(document["arms"].items(), key=lambda entry: spent(entry[1]))
        for number, (name, arm) in enumerate(by_cost):
            role = {"dense": "dense", _OURS: "ours"}.get(arm["kind"], "peer")
            place = spent(arm) / 1e6, scale * arm[document["task"]["metric"]]
            spread = scale * (arm["spread"] or 0.0)
            axis.errorbar(*place, yerr=spread, fmt="o", markersize=4, color=_COLOURS[role])
            offset = (3, 3 if number % 2 else -9)  # of neighbours one above and one below
            axis.annotate(name, place, offset, textcoords="offset points", fontsize=6)
        axis.set_xscale("log")
        axis.margins(x=0.13)  # for the names at the right
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(document["scenario"]["name"], fontsize=10, loc="left")
        axis.set_xlabel("MB, all messages", fontsize=8)
        axis.set_ylabel(_metric(document), fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)

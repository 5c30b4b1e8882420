"""Accuracy against sparsity: tasks, ways of pruning, what is known to hold, tables and pictures.

A *way* is what a policy says of pruning apart from the sparsity: criterion, allocation, schedule.
The loss of accuracy is told in points, against the same policy that prunes nothing; plain Flower
stands beside it. All of it is of the mean of the last rounds (`last_rounds`) and over seeds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "AUTOMATIC",
    "DENSE",
    "FIXED",
    "LIMITS",
    "SPARSITIES",
    "TOLERANCE",
    "UNPRUNED",
    "WAYS",
    "Way",
    "arms_of",
    "automatic_arms",
    "compare_automatic",
    "compare_orderings",
    "draw",
    "report_lines",
    "rows_of",
    "way_named",
    "within_limits",
]

DENSE, UNPRUNED, AUTOMATIC = "dense", "unpruned", "automatic"
FIXED = "global"
"""The way that differs from the automatic one in nothing but that its sparsity is given."""
TOLERANCE = 0.005
"""What the automatic way may cost, of an accuracy between 0 and 1."""
_POINTS = 100 * TOLERANCE + 1e-9  # sums of differences of floats
_SPARED = 0.02  # how much less than the best fixed sparsity the automatic one may reach
_LONGER = 1.3  # times the rounds that a sweep has, in which the automatic way finds its sparsity
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
LIMITS = {0.9: 0.5, 0.95: 1.5, 0.98: 4.0}
"""Points of accuracy that a sparsity may cost at most."""
_QUARTER = 0.1  # of the step of `balanced`: what other criteria than magnitude have by themselves
_BEGIN, _END = 2, 0.5  # last dense round of gradual pruning; part of the rounds by which it is over
_COLUMNS = ("way", "sparsity", "accuracy", "points lost", "by seed", "zeros", "MB", "seconds")


@dataclass(frozen=True)
class Way:
    """How is pruned, whatever the sparsity.

    Attributes:
        criterion, allocation, schedule: names of the registries of `compression/pruning`.
        knobs: others of the policy.
        late: begin no sooner than gradual ways end.
        end: part of the rounds by which pruning is over; the others are for recovery.
    """

    criterion: str
    allocation: str
    schedule: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    late: bool = False
    end: float = _END

    def policy(self, sparsity: float, rounds: int) -> dict[str, Any]:
        """The knobs of its policy at a sparsity."""
        found = {
            "sparsity": sparsity,
            "pruning_criterion": self.criterion,
            "pruning_scope": self.allocation,
            "pruning_schedule": self.schedule,
            "pruning_begin": _BEGIN,
            "pruning_end": max(_BEGIN + 1, round(self.end * rounds)),
            **self.knobs,
        }
        if self.late:
            found["pruning_begin"] = found["pruning_end"] - 1
        return found

    def text(self) -> str:
        """For people."""
        told = f"{self.criterion}, {self.allocation}, {self.schedule}"
        told += "".join(f", {name} = {value}" for name, value in self.knobs.items())
        return told if self.end == _END else f"{told}, over by {100 * self.end:g} % of the rounds"


WAYS: dict[str, Way] = {
    "uniform": Way("magnitude", "layer", "cubic"),
    "erk": Way("magnitude", "erk", "cubic"),
    "global": Way("magnitude", "global", "cubic"),
    "taylor": Way("taylor", "erk", "cubic"),
    "erk-fine": Way("magnitude", "erk", "cubic", {"down_step": _QUARTER}),
    "random": Way("random", "erk", "cubic"),
    "one-shot": Way("magnitude", "erk", "one-shot", late=True),
    "one-shot-fine": Way("magnitude", "erk", "one-shot", {"down_step": _QUARTER}, late=True),
    "static": Way("magnitude", "erk", "static", {"pruning_masks": "held"}),
    "dynamic": Way("magnitude", "erk", "static", {"pruning_masks": "dpf"}),
    "growing": Way("magnitude", "erk", "static", {"pruning_masks": "feddst"}),
    "short": Way("magnitude", "erk", "cubic", end=0.8),
    "short-one-shot": Way("magnitude", "erk", "one-shot", late=True, end=0.8),
}
"""Those that are measured unless others are named.

The one-shot way prunes when the gradual ones are over, so that all have as many rounds to recover;
the two short ones leave few of them. Lattices are four times finer where masks do not follow from
sizes (Taylor, random), which costs bytes and is good for accuracy: so `erk-fine` has that without
another criterion. Static, dynamic and growing ways are sparse from the first version on, and differ
in that masks stay, follow the master, or drop and grow by clients' votes.
"""

ORDERINGS = (
    ("ERK above uniform", "erk", "uniform"),
    ("Taylor above magnitude on the same lattice", "taylor", "erk-fine"),
    ("dynamic above static", "dynamic", "static"),
    ("drop and grow above static", "growing", "static"),
    ("gradual above one-shot", "erk", "one-shot"),
    ("gradual above one-shot on a fine lattice", "erk-fine", "one-shot-fine"),
    ("gradual above one-shot, little recovery", "short", "short-one-shot"),
)
"""What is known to hold: its name, the better way and the worse one."""


def way_named(name: str) -> Way:
    """One of `WAYS`, or ``criterion:allocation:schedule``.

    Raises:
        ValueError: it is neither.
    """
    if name in WAYS:
        return WAYS[name]
    parts = name.split(":")
    if len(parts) != 3 or not all(parts):
        raise ValueError(
            f"{name!r} is no way of pruning: name one of {', '.join(WAYS)}, or "
            "criterion:allocation:schedule"
        )
    return Way(*parts)


def _arm(name: str, sparsity: float) -> str:
    return f"{name.replace(':', '-')}-{100 * sparsity:g}"


def arms_of(ways: Sequence[str], sparsities: Sequence[float], rounds: int) -> dict[str, Any]:
    """The arms of a scenario: plain Flower, the policy that prunes nothing, and every way."""
    arms: dict[str, Any] = {
        DENSE: {"kind": "dense"},
        UNPRUNED: {"kind": "prunecast", "preset": "balanced"},
    }
    for name in ways:
        for sparsity in sparsities:
            policy = way_named(name).policy(sparsity, rounds)
            arm = {"kind": "prunecast", "preset": "balanced", "policy": policy}
            arms[_arm(name, sparsity)] = arm
    return arms


def automatic_arms(rounds: int) -> tuple[int, dict[str, Any]]:
    """The automatic way beside the policy that prunes nothing, and the rounds that both have.

    Args:
        rounds: that the sweep has, with which the automatic way is compared.
    """
    policy = {
        "pruning_criterion": WAYS[FIXED].criterion,
        "pruning_scope": WAYS[FIXED].allocation,
        "pruning_schedule": AUTOMATIC,
        "pruning_begin": _BEGIN,
        "pruning_tolerance": TOLERANCE,
    }
    return math.floor(_LONGER * rounds), {
        UNPRUNED: {"kind": "prunecast", "preset": "balanced"},
        AUTOMATIC: {"kind": "prunecast", "preset": "balanced", "policy": policy},
    }


# -- what was measured ----------------------------------------------------------------------------


def _lost(without: Sequence[float], arm: Mapping[str, Any]) -> list[float]:
    """Points by which an arm is below what was reached without pruning, by seed."""
    return [100 * (a - b) for a, b in zip(without, arm["by_seed"], strict=True)]


def rows_of(
    document: Mapping[str, Any],
    ways: Sequence[str],
    sparsities: Sequence[float],
    zeros: Mapping[str, float],
) -> list[dict[str, Any]]:
    """A row for each way and sparsity, from a comparison's document.

    Args:
        document: of the comparison of a task, its metric a fraction.
        ways: names.
        sparsities: that were asked for.
        zeros: by arm, the sparsity that was reached, mean over seeds.
    """
    metric, arms = document["task"]["metric"], document["arms"]
    without = arms[UNPRUNED]["by_seed"]
    rows = []
    for name in ways:
        for sparsity in sparsities:
            if _arm(name, sparsity) in document["left_out"]:
                continue
            arm = arms[_arm(name, sparsity)]
            lost = _lost(without, arm)
            rows.append(
                {
                    "way": name,
                    "text": way_named(name).text(),
                    "sparsity": sparsity,
                    "zeros": zeros[_arm(name, sparsity)],
                    "accuracy": arm[metric],
                    "spread": arm["spread"],
                    "by_seed": arm["by_seed"],
                    "lost": statistics.fmean(lost),
                    "lost_by_seed": lost,
                    "bytes": arm["bytes_down"] + arm["bytes_up"],
                    "seconds": arm["seconds"],
                }
            )
    return rows


def compare_orderings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How far each known ordering holds, at every sparsity that both ways were measured at.

    Returns:
        ``name``, ``better``, ``worse``, ``sparsity``; ``points`` by which the better way is ahead,
        mean over seeds, and ``error``, its standard error (None for one seed); ``met``.
    """
    by_way = {(row["way"], row["sparsity"]): row for row in rows}
    found = []
    for name, better, worse in ORDERINGS:
        for sparsity in sorted({row["sparsity"] for row in rows}):
            if (better, sparsity) not in by_way or (worse, sparsity) not in by_way:
                continue
            pair = (by_way[way, sparsity]["by_seed"] for way in (better, worse))
            ahead = [100 * (a - b) for a, b in zip(*pair, strict=True)]
            error = statistics.stdev(ahead) / math.sqrt(len(ahead)) if len(ahead) > 1 else None
            points = statistics.fmean(ahead)
            found.append(
                {
                    "name": name,
                    "better": better,
                    "worse": worse,
                    "sparsity": sparsity,
                    "points": points,
                    "error": error,
                    "met": points > 0,
                }
            )
    return found


def within_limits(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of every way, what each of `LIMITS` allows, what was lost, and whether it is ``met``."""
    return [
        {
            "way": row["way"],
            "sparsity": row["sparsity"],
            "limit": LIMITS[row["sparsity"]],
            "lost": row["lost"],
            "met": row["lost"] <= LIMITS[row["sparsity"]],
        }
        for row in rows
        if row["sparsity"] in LIMITS
    ]


def compare_automatic(
    document: Mapping[str, Any],
    rounds: int,
    without: Sequence[float],
    rows: Sequence[Mapping[str, Any]],
    zeros: Mapping[str, float],
) -> dict[str, Any] | None:
    """The automatic way beside the sweep of fixed sparsities that differs in nothing else.

    Args:
        document, zeros: as of `rows_of`, of `automatic_arms`.
        rounds: that these had.
        without: what the policy that prunes nothing reached in the sweep, by seed: what the fixed
            sparsities are held against, too.
        rows: of all ways.

    Returns:
        ``rounds``; ``accuracy``, ``spread``; ``lost`` and ``lost_by_seed`` in points against
        `without`, and ``lost_in_as_many`` against no pruning in as many rounds; ``zeros``,
        ``bytes``; ``fixed``, the highest sparsity of the sweep that lost no more than the
        tolerance, 0.0 where none did; ``tolerated``, whether the automatic one lost no more, and
        ``as_sparse``, whether it reached as much, less two points. None where it failed.
    """
    if AUTOMATIC not in document["arms"] or UNPRUNED not in document["arms"]:
        return None
    arm = document["arms"][AUTOMATIC]
    lost = _lost(without, arm)
    sweep = [row for row in rows if row["way"] == FIXED]
    held = [row["sparsity"] for row in sweep if row["lost"] <= _POINTS]
    fixed = max(held, default=0.0)
    return {
        "rounds": rounds,
        "accuracy": arm[document["task"]["metric"]],
        "spread": arm["spread"],
        "lost": statistics.fmean(lost),
        "lost_by_seed": lost,
        "lost_in_as_many": statistics.fmean(_lost(document["arms"][UNPRUNED]["by_seed"], arm)),
        "zeros": zeros[AUTOMATIC],
        "bytes": arm["bytes_down"] + arm["bytes_up"],
        "fixed": fixed,
        "tolerated": statistics.fmean(lost) <= _POINTS,
        "as_sparse": zeros[AUTOMATIC] >= fixed - _SPARED,
    }


# -- for people -----------------------------------------------------------------------------------


def report_lines(tasks: Sequence[Mapping[str, Any]], command: str) -> Iterator[str]:
    """A page of Markdown."""
    yield "# Accuracy against sparsity"
    yield ""
    yield f"Written by `{command}`."
    for task in tasks:
        yield ""
        yield f"## {task['name']}"
        yield ""
        yield (
            f"{task['description']}. {task['rounds']} rounds, seeds "
            f"{', '.join(map(str, task['seeds']))}. Plain Flower reaches "
            f"{_percent(task['dense'])}, the same policy without pruning "
            f"{_percent(task['unpruned'])}."
        )
        yield ""
        yield f"| {' | '.join(_COLUMNS)} |"
        yield "|---|" + "---:|" * (len(_COLUMNS) - 1)
        for row in task["rows"]:
            yield f"| {' | '.join(_cells(row))} |"
        yield ""
        yield from _verdicts(task)
        if task["automatic"] is not None:
            yield _automatic_line(task["automatic"])
        for name, why in task["left_out"].items():
            yield f"- `{name}` was left out: {why}."


def _percent(figures: Mapping[str, Any]) -> str:
    spread = figures["spread"]
    mean = f"{100 * figures['accuracy']:.2f}"
    return f"{mean} %" if spread is None else f"{mean} ± {100 * spread:.2f} %"


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        f"`{row['way']}`",
        f"{100 * row['sparsity']:g} %",
        _percent(row),
        f"{row['lost']:+.2f}",
        ", ".join(f"{lost:+.2f}" for lost in row["lost_by_seed"]),
        f"{100 * row['zeros']:.1f} %",
        f"{row['bytes'] / 1e6:.2f}",
        "–" if row["seconds"] is None else f"{row['seconds']:.0f}",
    ]


def _verdicts(task: Mapping[str, Any]) -> Iterator[str]:
    yield "Known to hold:"
    yield ""
    for entry in task["orderings"]:
        error = "" if entry["error"] is None else f" ± {entry['error']:.2f}"
        yield (
            f"- {entry['name']} at {100 * entry['sparsity']:g} % (`{entry['better']}`, "
            f"`{entry['worse']}`): {'met' if entry['met'] else 'MISSED'}, {entry['points']:+.2f}"
            f"{error} points"
        )
    for sparsity, limit in LIMITS.items():
        entries = [entry for entry in task["limits"] if entry["sparsity"] == sparsity]
        if not entries:
            continue
        best = min(entries, key=lambda entry: float(entry["lost"]))
        good = ", ".join(f"`{entry['way']}`" for entry in entries if entry["met"]) or "none"
        yield (
            f"- no more than {limit:g} points lost at {100 * sparsity:g} %: "
            f"{'met' if best['met'] else 'MISSED'}, `{best['way']}` loses {best['lost']:+.2f}; "
            f"within: {good}"
        )


def _automatic_line(found: Mapping[str, Any]) -> str:
    told = ", ".join(f"{lost:+.2f}" for lost in found["lost_by_seed"])
    tolerated = "within" if found["tolerated"] else "MISSED"
    as_sparse = "met" if found["as_sparse"] else "MISSED"
    return (
        f"- automatic, {found['rounds']} rounds: {100 * found['zeros']:.1f} % of zeros in "
        f"{found['bytes'] / 1e6:.2f} MB, {found['lost']:+.2f} points lost ({told}), its tolerance "
        f"{100 * TOLERANCE:g}: {tolerated}; the highest of the fixed sparsities of `{FIXED}` that "
        f"lost no more is {100 * found['fixed']:g} %, no more than 2 points above: {as_sparse}. "
        f"Against no pruning in as many rounds it lost {found['lost_in_as_many']:+.2f}"
    )


def draw(tasks: Sequence[Mapping[str, Any]], target: Path) -> None:
    """A PNG: for each task accuracy against the weights that are kept, on a scale of logarithms."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(tasks), figsize=(6.0 * len(tasks), 4.6), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(row["way"] for task in tasks for row in task["rows"]))
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for axis, task in zip(axes[0], tasks, strict=True):
        ticks = sorted({row["sparsity"] for row in task["rows"]})
        for number, name in enumerate(names):
            rows = [row for row in task["rows"] if row["way"] == name]
            places = [1.0, *(1 - row["sparsity"] for row in rows)]
            values = [100 * task["unpruned"]["accuracy"], *(100 * row["accuracy"] for row in rows)]
            spreads = [
                100 * (task["unpruned"]["spread"] or 0.0),
                *(100 * (row["spread"] or 0.0) for row in rows),
            ]
            axis.errorbar(
                [place * (1 + 0.012 * (number - len(names) / 2)) for place in places],
                values,
                yerr=spreads,
                label=name,
                marker="osD^v<>PX*"[number % 10],
                markersize=4,
                linewidth=1.2,
                elinewidth=0.7,
                color=colours[number % len(colours)],
                linestyle="-" if number < len(colours) else "--",
            )
        if task["automatic"] is not None:
            found = task["automatic"]
            place = (1 - found["zeros"], 100 * found["accuracy"])
            axis.plot(*place, "*", markersize=11, color="#000000", label=AUTOMATIC)
        axis.axhline(100 * task["dense"]["accuracy"], color="#555555", linewidth=0.8, dashes=(4, 3))
        axis.annotate(
            "plain Flower",
            (1.0, 100 * task["dense"]["accuracy"]),
            (0, 3),
            textcoords="offset points",
            fontsize=7,
            color="#555555",
        )
        axis.set_xscale("log")
        axis.invert_xaxis()
        axis.set_xticks(
            [1.0, *(1 - tick for tick in ticks)], ["0", *(f"{100 * t:g}" for t in ticks)]
        )
        axis.minorticks_off()
        axis.set_xlabel("sparsity of the pruned tensors, %", fontsize=8)
        axis.set_ylabel("accuracy on held-out examples, %", fontsize=8)
        axis.set_title(task["name"], fontsize=10, loc="left")
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[0][0].legend(fontsize=7, loc="lower left", frameon=False)
    figure.savefig(target, dpi=110)
    pyplot.close(figure)

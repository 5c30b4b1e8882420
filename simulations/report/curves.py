"""Curves of a report: the metric against bytes and time, the front, rounds, bytes to a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prunecast.common.text import bytes_text, duration_text
from prunecast.simulations.network_profiles.results import SIMULATED
from prunecast.simulations.report.charts import Axis, Chart, Line, byte_tick, line_chart, looks
from prunecast.simulations.report.parts import MISSING, Section, Table, seconds_of, spread_text
from prunecast.simulations.report.study import Spread, Study, StudyArm

__all__ = [
    "against_bytes",
    "against_time",
    "bytes_in_rounds",
    "bytes_to_targets",
    "cost_to",
    "first_reaching",
    "pareto_front",
    "targets_of",
]

_POINTS = 0.005  # below the baseline: the target where none is given


def _metric_axis(study: Study) -> Axis:
    is_percent = study.result["task"]["percent"]
    # as many digits as ticks need that lie close together
    text = (lambda v: f"{100 * v:.4g} %") if is_percent else "{:.4g}".format
    return Axis(f"{study.metric} on held-out examples", text)


def against_bytes(study: Study) -> Section:
    """The metric against bytes."""
    return Section(
        f"{study.metric.capitalize()} against bytes",
        note=_band(study),
        charts=_curves(study, "bytes sent so far, both directions, all clients", bytes_of=True),
    )


def against_time(study: Study) -> Section:
    """The metric against simulated time."""
    return Section(
        f"{study.metric.capitalize()} against simulated time",
        "simulated",
        "Seconds that the messages of the ledgers would take over the network, not measured ones.",
        charts=_curves(study, "simulated time since the beginning", bytes_of=False),
    )


def _band(study: Study) -> str:
    if len(study.seeds) < 2:
        return "One seed: there is no spread to show."
    return "Lines are means over seeds, bands one standard deviation to either side."


def _curves(study: Study, label: str, *, bytes_of: bool) -> list[tuple[str, Chart]]:
    chosen, lines = looks(study), []
    for key, arm in study.arms.items():
        curve = arm.curve(study.metric)
        xs = curve.spent if bytes_of else curve.seconds
        if xs is None:
            continue
        points = [(x, s.mean, s.deviation) for x, s in zip(xs, curve.scores, strict=True)]
        lines.append(Line(arm.label, chosen[key], points))
    text = byte_tick if bytes_of else duration_text
    x = Axis(label, text, log=True)
    chart = line_chart(lines, x, _metric_axis(study), f"{study.metric} against {label}")
    return [("", chart)] if chart else []


def pareto_front(study: Study) -> Section:
    """Arms by bytes and metric, and which no other beats."""
    if len(study.arms) < 2:
        return Section("Pareto front")
    chosen, front = looks(study), study.front()
    lines = []
    for key, arm in study.arms.items():
        score = arm.reached(study.metric)
        point = (arm.total().mean, score.mean, score.deviation)
        lines.append(Line(arm.label, chosen[key], [point], line=False))
    best = sorted(
        (study.arms[k].total().mean, study.arms[k].reached(study.metric).mean) for k in front
    )
    x = Axis("bytes of the whole run, both directions, all clients", byte_tick, log=True)
    chart = line_chart(lines, x, _metric_axis(study), "arms by bytes and metric", front=best)
    names = ", ".join(study.arms[key].label for key in front)
    return Section(
        "Pareto front",
        note=f"On the front, the grey line: {names}. Every other arm is beaten in bytes and in "
        f"{study.metric} by one of these.",
        charts=[("", chart)] if chart else [],
    )


def targets_of(study: Study, given: Sequence[float] = ()) -> list[tuple[float, str]]:
    """Targets of the metric, and where each is from.

    Those given; else the network's, and what the baseline reached less half a point (of a metric
    that is no percentage, less half a percent of it).
    """
    if given:
        return [(value, "given") for value in given]
    found = []
    stated = (study.scenario.get("network") or {}).get("target")
    if stated is not None:
        found.append((float(stated), "of the scenario's [network]"))
    if study.baseline is not None:
        reached = study.baseline.reached(study.metric).mean
        less = _POINTS if study.result["task"]["percent"] else _POINTS * abs(reached)
        value = reached + less if study.lower_is_better else reached - less
        how = "half a point" if study.result["task"]["percent"] else "0.5 %"
        found.append((value, f"{study.baseline.label} at its end, less {how}"))
    return found


def first_reaching(study: Study, arm: StudyArm, target: float) -> list[Mapping[str, Any] | None]:
    """Of every seed, the first round that is as good as a target; None where none is."""
    found: list[Mapping[str, Any] | None] = []
    for run in arm.runs:
        good = (
            row
            for row in run.rounds
            if row["round"]
            and (
                row[study.metric] <= target
                if study.lower_is_better
                else row[study.metric] >= target
            )
        )
        found.append(next(good, None))
    return found


def bytes_to_targets(study: Study, targets: Sequence[tuple[float, str]]) -> Section:
    """What each arm had sent when it was as good as each target."""
    section = Section(
        "Bytes to a target",
        note="Until the end of the first round that reaches it, mean over the seeds that do.",
    )
    simulated = any(arm.simulated("seconds") for arm in study.arms.values())
    if simulated:
        section.basis = "measured, simulated"
    for target, source in targets:
        rows = []
        for arm in study.arms.values():
            found = first_reaching(study, arm, target)
            rows.append([arm.label, *_target_cells(arm, found, simulated)])
        header = ["arm", "bytes", "rounds", *(["simulated time"] if simulated else []), "seeds"]
        caption = f"{study.metric} {study.text(target)} ({source})"
        section.tables.append(Table(header, rows, caption=caption))
    return section


def cost_to(
    found: Sequence[Mapping[str, Any] | None],
) -> tuple[list[Mapping[str, Any]], Spread | None, Spread | None]:
    """Of what `first_reaching` gave: the rounds that there are, bytes and simulated seconds."""
    known = [row for row in found if row is not None]
    spent = Spread.of(row["bytes_up"] + row["bytes_down"] for row in known)
    return known, spent, Spread.of(row.get(SIMULATED) for row in known)


def _target_cells(
    arm: StudyArm, found: Sequence[Mapping[str, Any] | None], simulated: bool
) -> list[str]:
    known, spent, times = cost_to(found)
    seeds = f"{len(known)} of {len(found)}"
    if not known:
        return ["not reached", "–", *(["–"] if simulated else []), seeds]
    rounds = Spread.of(row["round"] for row in known)
    return [
        spread_text(spent, bytes_text),
        f"{rounds.mean:.3g}" if rounds else MISSING,
        *([seconds_of(times)] if simulated else []),
        seeds,
    ]


def bytes_in_rounds(study: Study) -> Section:
    """Bytes of every round."""
    chosen, lines = looks(study), []
    for key, arm in study.arms.items():
        curve = arm.curve(study.metric)
        spent = [b - a for a, b in zip(curve.spent, curve.spent[1:], strict=False)]
        points = [(float(n), s, None) for n, s in zip(curve.rounds[1:], spent, strict=True)]
        lines.append(Line(arm.label, chosen[key], points))
    x = Axis("round", "{:.0f}".format)
    y = Axis("bytes in a round, all clients", byte_tick, log=True)
    chart = line_chart(lines, x, y, "bytes of every round")
    return Section(
        "Bytes in every round",
        note="Both directions; mean over seeds. “Where the bytes went” below has them by kind.",
        charts=[("", chart)] if chart else [],
    )

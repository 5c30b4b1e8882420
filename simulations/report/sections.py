"""What a report says of a study: sections of tables and charts, for the page and for Markdown.

Every section says what its numbers are: measured, estimated or simulated. What was not recorded is
said to be missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prunecast.common.text import bytes_text, duration_text, percent, ratio_text
from prunecast.simulations.report.charts import Axis, Chart, Line, byte_tick, line_chart, looks
from prunecast.simulations.report.gathering import Spread, Study, StudyArm
from prunecast.simulations.report.messages import caught_up, codec_seconds, joining, wire_bytes

__all__ = ["MISSING", "Section", "Table", "arm_numbers", "sections_of", "targets_of"]

MISSING = "not recorded"
_SEEN = 0.001  # part of a mean below which its deviation is not told
_POINTS = 0.005  # below the baseline: the target where none is given


@dataclass
class Table:
    """A table: the first column names rows, the others hold numbers as text.

    Attributes:
        bars: by number of a column, the fraction that a bar in each of its cells shows.
        strong: numbers of rows that stand out.
        caption: what it is of, where a section has several.
    """

    header: list[str]
    rows: list[list[str]]
    bars: dict[int, list[float]] = field(default_factory=dict)
    strong: set[int] = field(default_factory=set)
    caption: str = ""


@dataclass
class Section:
    """A part of the report.

    Attributes:
        title: heading.
        basis: what its numbers are: "measured", "estimated", "simulated", or several of these.
        note: sentences below it.
        charts: with a caption each; Markdown has their tables alone.
        tables: below the charts.
        folded: whether it is opened by the reader.
    """

    title: str
    basis: str = "measured"
    note: str = ""
    charts: list[tuple[str, Chart]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        return not self.tables and not self.charts


def sections_of(study: Study, targets: Sequence[float] = ()) -> list[Section]:
    """All of them, in the order of the page, without those that have nothing to say.

    Args:
        study: what was run.
        targets: of the metric, the bytes to which are told; see `targets_of`.
    """
    from prunecast.simulations.report.details import detail_sections

    found = [
        _arms(study),
        _against_bytes(study),
        _against_time(study),
        _front(study),
        _targets(study, targets_of(study, targets)),
        _published(study),
        _rounds(study),
        _wire(study),
        _joining(study),
        _codec(study),
        _release(study),
        *detail_sections(study),
    ]
    return [section for section in found if not section.empty]


# -- numbers as text ------------------------------------------------------------------------------


def spread_text(spread: Spread | None, text: Callable[[float], str]) -> str:
    """Mean ± deviation; the unit once, and no deviation that would not show in the mean."""
    if spread is None:
        return MISSING
    mean = text(spread.mean)
    if spread.deviation is None or spread.deviation < _SEEN * abs(spread.mean):
        return mean
    unit = mean.partition(" ")[2]
    deviation = text(spread.deviation)
    if unit and deviation.partition(" ")[2] == unit:
        return f"{mean.partition(' ')[0]} ± {deviation}"
    return f"{mean} ± {deviation}"


def arm_numbers(study: Study, arm: StudyArm) -> dict[str, Spread | float | None]:
    """What the report says of an arm as a whole, in numbers: bytes, fractions and seconds."""
    wire = wire_bytes(arm)
    times = codec_seconds(arm)
    return {
        study.metric: arm.reached(study.metric),
        "sparsity": arm.spread("sparsity"),
        "bytes_up": arm.spread("bytes_up"),
        "bytes_down": arm.spread("bytes_down"),
        "bytes": arm.total(),
        "reduction": study.ratio(arm),
        "wire_bytes_up": wire["up"],
        "wire_bytes_down": wire["down"],
        "simulated_seconds": arm.simulated("seconds"),
        "seconds": arm.spread("seconds"),
        **{f"codec_seconds_{key}": value for key, value in times.items()},
    }


# -- sections -------------------------------------------------------------------------------------


def _arms(study: Study) -> Section:
    metric, front = study.metric, study.front()
    header = ["arm", metric, "bytes", "times fewer", "up", "down", "zeros"]
    simulated = any(arm.simulated("seconds") for arm in study.arms.values())
    if simulated:
        header.append("simulated time")
    header += ["run time", "seeds"]
    rows = []
    for arm in study.arms.values():
        zeros = arm.spread("sparsity")
        rows.append(
            [
                arm.label,
                spread_text(arm.reached(metric), study.text),
                spread_text(arm.total(), bytes_text),
                ratio_text(study.ratio(arm)),
                bytes_text(_mean(arm.spread("bytes_up"))),
                bytes_text(_mean(arm.spread("bytes_down"))),
                percent(zeros.mean, 0) if zeros and zeros.mean else "–",
                *([_seconds(arm.simulated("seconds"))] if simulated else []),
                _seconds(arm.spread("seconds")) if arm.first["trained"] else "–",
                str(len(arm.runs)),
            ]
        )
    strong = {i for i, key in enumerate(study.arms) if key in front}
    last = max(arm.last_rounds for arm in study.arms.values())
    note = (
        "Bytes are those of Flower's serialised messages, both directions, all clients, all "
        "rounds: measured. "
        + (
            f"“{metric}” is the mean of the last {last} rounds"
            if last > 1
            else f"“{metric}” is that of the last round"
        )
        + (", then over seeds, ± one standard deviation. " if len(study.seeds) > 1 else ". ")
        + _held_out(study)
    )
    if not simulated:
        note += " No time was simulated: --network names a network to do so."
    if simulated:
        network = next(
            arm.first["simulated"]["network"]
            for arm in study.arms.values()
            if "simulated" in arm.first
        )
        note += (
            f" Simulated time is what these bytes would take over the network “{network}”, and "
            "training on clients of that speed; it was not measured."
        )
    basis = "measured, simulated" if simulated else "measured"
    if len(study.arms) > 1:
        note += " In bold: arms that no other beats in bytes and in what they reach (Pareto front)."
    return Section("Arms", basis, note, tables=[Table(header, rows, strong=strong)])


def _held_out(study: Study) -> str:
    data = study.result.get("data")
    if not data:
        return ""
    return (
        f"It is measured on {data['held_out']:,} examples that no client holds; of an arm that "
        "publishes versions, on the published model that clients and devices run. Arms of a seed "
        "share data, partition, initial weights and the seeds of local training."
    )


def _bytes(spread: Spread | None) -> str:
    return MISSING if spread is None else bytes_text(spread.mean)


def _mean(spread: Spread | None) -> float | None:
    return None if spread is None else spread.mean


def _seconds(spread: Spread | None) -> str:
    return MISSING if spread is None else duration_text(spread.mean)


def _metric_axis(study: Study) -> Axis:
    is_percent = study.result["task"]["percent"]
    # as many digits as ticks need that lie close together
    text = (lambda v: f"{100 * v:.4g} %") if is_percent else "{:.4g}".format
    return Axis(f"{study.metric} on held-out examples", text)


def _against_bytes(study: Study) -> Section:
    return Section(
        f"{study.metric.capitalize()} against bytes",
        note=_band(study),
        charts=_curves(study, "bytes sent so far, both directions, all clients", bytes_of=True),
    )


def _against_time(study: Study) -> Section:
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


def _front(study: Study) -> Section:
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


def _targets(study: Study, targets: Sequence[tuple[float, str]]) -> Section:
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


def _target_cells(
    arm: StudyArm, found: Sequence[Mapping[str, Any] | None], simulated: bool
) -> list[str]:
    known = [row for row in found if row is not None]
    seeds = f"{len(known)} of {len(found)}"
    if not known:
        return ["not reached", "–", *(["–"] if simulated else []), seeds]
    spent = Spread.of(row["bytes_up"] + row["bytes_down"] for row in known)
    rounds = Spread.of(row["round"] for row in known)
    times = Spread.of(row.get("simulated_seconds") for row in known)
    return [
        spread_text(spent, bytes_text),
        f"{rounds.mean:.3g}" if rounds else MISSING,
        *([_seconds(times)] if simulated else []),
        seeds,
    ]


def _published(study: Study) -> Section:
    section = Section("Published figures beside these", note="Theirs as their sources state them.")
    rows = []
    for name, figure in study.published.items():
        value, spread = figure["value"], figure.get("spread")
        arm = study.arms.get(figure.get("arm", ""))
        ours = arm and arm.reached(study.metric)
        size = figure.get("bytes")
        rows.append(
            [
                name,
                spread_text(Spread(value, spread, 1), study.text),
                bytes_text(size) if size else "–",
                spread_text(ours, study.text) if ours else "–",
                bytes_text(arm.total().mean) if arm else "–",
                figure["source"],
            ]
        )
    header = ["published", study.metric, "bytes", "ours", "our bytes", "source"]
    section.tables += [Table(header, rows)] if rows else []
    return section


def _rounds(study: Study) -> Section:
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


def _wire(study: Study) -> Section:
    rows = []
    for arm in study.arms.values():
        wire = wire_bytes(arm)
        up, down = arm.spread("bytes_up"), arm.spread("bytes_down")
        ratio = None
        if wire["up"] and wire["down"]:
            ratio = (wire["up"].mean + wire["down"].mean) / (arm.total().mean or 1)
        rows.append(
            [
                arm.label,
                bytes_text(_mean(up)),
                _bytes(wire["up"]),
                bytes_text(_mean(down)),
                _bytes(wire["down"]),
                f"{ratio:.2f}×" if ratio else MISSING,
            ]
        )
    header = ["arm", "messages up", "≈ wire up", "messages down", "≈ wire down", "ratio"]
    return Section(
        "Message bytes and wire bytes",
        "measured, estimated",
        "Messages are measured, as Flower serialises them. Wire bytes (≈) are estimated from their "
        "number of objects: what HTTP between SuperNodes and a SuperLink adds to each, as a relay "
        "counted it, without TLS. No wire was there in a simulation.",
        tables=[Table(header, rows)],
    )


def _joining(study: Study) -> Section:
    header = [
        "arm",
        "first join",
        "joins at the end",
        "back after absence",
        "missed 1",
        "missed more",
    ]
    rows = []
    for arm in study.arms.values():
        joins, ends = joining(arm), caught_up(arm)
        away = MISSING if joins.first is None else "nobody was away"
        if joins.back is not None:
            away = f"{bytes_text(joins.back.mean)} ({joins.returned:,} times)"
        rows.append(
            [
                arm.label,
                _bytes(joins.first),
                _bytes(ends.get("whole")),
                away,
                bytes_text(ends["1"].mean) if "1" in ends else "as a join" if ends else MISSING,
                _missed(ends),
            ]
        )
    return Section(
        "Joining and coming back",
        note="“First join” is the first message down to a client, the mean over clients; “back "
        "after absence” the mean message down to a client that the round before had left out. "
        "The other columns encode, after the last round, what a client would be sent that joins "
        "then, or missed so many versions: measured, not sent; the record without its message. "
        "A model that is drawn from a seed costs its first clients a seed alone.",
        tables=[Table(header, rows)],
    )


def _missed(ends: Mapping[str, Spread]) -> str:
    more = [key for key in ends if key not in ("whole", "1")]
    if not ends:
        return MISSING
    if not more:
        return "as a join" if "1" not in ends else "–"
    return ", ".join(f"{key}: {bytes_text(ends[key].mean)}" for key in more)


def _codec(study: Study) -> Section:
    header = [
        "arm",
        "server encodes",
        "clients encode",
        "server decodes",
        "per message",
        "of run time",
    ]
    rows = []
    for arm in study.arms.values():
        if not arm.first["trained"]:
            continue
        times = codec_seconds(arm)
        cells = [MISSING] * 5
        if times and (arm.baseline or any(spread.mean for spread in times.values())):
            whole = sum(spread.mean for spread in times.values())
            ran, messages = arm.spread("seconds"), arm.spread("messages")
            cells = [_seconds(times[key]) if times[key].mean else "0" for key in times]
            cells += [duration_text(whole / messages.mean) if messages and whole else "0"]
            cells += [percent(whole / ran.mean) if ran and ran.mean else MISSING]
        rows.append([arm.label, *cells])
    return Section(
        "Codec seconds",
        note="Processor time is not separated: seconds that passed while messages were coded, over "
        "all messages. What clients take to decode is not recorded. Plain Flower codes nothing; "
        "what it serialises is not counted for any arm.",
        tables=[Table(header, rows)] if rows else [],
    )


def _release(study: Study) -> Section:
    from prunecast.simulations.report import release_rows

    section = Section("To the edge")
    for seed, release in study.releases:
        header, rows = release_rows({"release": release})
        caption = f"arm {release['arm']}, seed {seed}"
        section.tables.append(Table(header, rows, caption=caption))
        verb = study.result["task"]["verb"]
        device, server = (
            study.text(release[f"{w}_{study.metric}"]) for w in ("device", "published")
        )
        told = (
            f"The device runs onnxruntime without torch and Flower. It {verb} "
            f"{release['identical_examples']} of {release['examples']} held-out examples exactly "
            f"as the server did: {study.metric} {device} on the device, {server} on the server."
        )
        if told not in section.note:
            section.note = told
    return section

"""A report as Markdown, and its numbers as CSV: one number in a line, with unit and basis."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from prunecast.simulations.network_profiles.results import SIMULATED
from prunecast.simulations.report.curves import cost_to, first_reaching, targets_of
from prunecast.simulations.report.messages import bytes_by_kind, caught_up, joining
from prunecast.simulations.report.parts import Section, Table
from prunecast.simulations.report.sections import arm_numbers, sections_of
from prunecast.simulations.report.study import ArmRun, Spread, Study, StudyArm

__all__ = ["COLUMNS", "csv_of", "markdown_of", "unit_of"]

COLUMNS = (
    *("scenario", "arm", "seed", "round", "direction", "kind", "tensor", "quantity"),
    *("value", "deviation", "unit", "basis"),
)
"""Of the CSV; ``seed`` is empty for means over all, ``basis`` measured, estimated or simulated."""

Row = dict[str, Any]


# -- Markdown -------------------------------------------------------------------------------------


def markdown_of(studies: Sequence[Study], targets: Sequence[float] = ()) -> str:
    """The tables of the page, with what the page says of them."""
    parts = []
    for study in studies:
        scenario = study.scenario
        parts += [f"# {_plain(scenario['name'])}", _plain(scenario.get("description", ""))]
        for section in sections_of(study, targets):
            parts += _section(section)
        parts += [f"Seeds: {', '.join(map(str, study.seeds))}."]
        parts += [f"Run again: `{study.command}`"] if study.command else []
        parts += study.notes
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(section: Section) -> list[str]:
    parts = [f"## {section.title} ({section.basis})"]
    for table in section.tables:
        parts += [f"**{_plain(table.caption)}**"] if table.caption else []
        parts.append(_table(table))
    if not section.tables:
        parts.append("A chart of the page; its numbers are in the CSV.")
    return [*parts, _plain(section.note)]


def _table(table: Table) -> str:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)]]
    for number, row in enumerate(table.rows):
        first = f"**{_plain(row[0])}**" if number in table.strong else _plain(row[0])
        lines.append([first, *map(_plain, row[1:])])
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text without what Markdown or HTML would take for markup."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\|*`":
        escaped = escaped.replace(sign, "\\" + sign)
    return " ".join(escaped.split())


# -- CSV ------------------------------------------------------------------------------------------


def csv_of(studies: Sequence[Study], targets: Sequence[float] = ()) -> str:
    """All numbers, one in a line, under `COLUMNS`; what was not recorded has no line."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for study in studies:
        name = study.scenario["name"]
        for key, arm in study.arms.items():
            for row in (*_whole(study, arm, targets), *_by_seed(study, arm)):
                writer.writerow({"scenario": name, "arm": key, **row})
    return buffer.getvalue()


_BASES = {"wire": "estimated", "estimated": "estimated", "simulated": "simulated"}
_PLAIN = (
    *("reduction", "loss", "rounds", "macs", "effective_macs", "parameters", "nonzero"),
    *("compression_ratio", "recovery_ratio"),
)


def unit_of(quantity: str, study: Study) -> str:
    """The unit of a number of the CSV; "" for none."""
    if "bytes" in quantity:
        return "B"
    if "seconds" in quantity:
        return "s"
    metric = study.metric
    scores = (metric, f"{metric}_before_pruning", "pruning_loss")
    if quantity in scores and not study.result["task"]["percent"]:
        return ""
    if "joules" in quantity:
        return "J"
    return "" if quantity in _PLAIN else "fraction"


def _number(
    study: Study, quantity: str, value: Spread | float | None, **more: Any
) -> Iterator[Row]:
    if value is None:
        return
    spread = value if isinstance(value, Spread) else Spread(value, None, 1)
    basis = _BASES.get(quantity.partition("_")[0], "measured")
    row = {"quantity": quantity, "value": f"{spread.mean:.10g}", "unit": unit_of(quantity, study)}
    if spread.deviation is not None:
        row["deviation"] = f"{spread.deviation:.10g}"
    yield {**row, "basis": basis, **more}


def _whole(study: Study, arm: StudyArm, targets: Sequence[float]) -> Iterator[Row]:
    """Of an arm over all seeds."""
    for quantity, value in arm_numbers(study, arm).items():
        yield from _number(study, quantity, value)
    for target, _ in targets_of(study, targets):
        kind = f"{study.metric} {target:.6g}"
        known, spent, times = cost_to(first_reaching(study, arm, target))
        reached = len(known) / len(arm.runs)
        yield from _number(study, "reached_target", reached, kind=kind)
        yield from _number(study, "bytes_to_target", spent, kind=kind)
        yield from _number(study, "simulated_seconds_to_target", times, kind=kind)
    joins = joining(arm)
    yield from _number(study, "first_join_bytes", joins.first, direction="down")
    yield from _number(study, "coming_back_bytes", joins.back, direction="down")
    for back, size in caught_up(arm).items():
        kind = "holds nothing" if back == "whole" else f"missed {back}"
        yield from _number(study, "catching_up_bytes", size, direction="down", kind=kind)


def _by_seed(study: Study, arm: StudyArm) -> Iterator[Row]:
    for run in arm.runs:
        for row in (*_rounds(study, run), *_kinds(study, run), *_tensors(study, run)):
            yield {"seed": run.seed, **row}


def _rounds(study: Study, run: ArmRun) -> Iterator[Row]:
    names = (study.metric, "loss", "sparsity", "bytes_up", "bytes_down", "seconds", SIMULATED)
    for found in run.rounds:
        for name in names:
            yield from _number(study, name, found.get(name), round=found["round"])


def _kinds(study: Study, run: ArmRun) -> Iterator[Row]:
    for (way, kind), rounds in bytes_by_kind(run).items():
        for number, (messages, size) in rounds.items():
            place = {"round": number, "direction": way, "kind": kind}
            yield from _number(study, "bytes", size, **place)
            yield from _number(study, "messages", messages, unit="", **place)


def _tensors(study: Study, run: ArmRun) -> Iterator[Row]:
    for event in run.events:
        number = event.get("round")
        for name, (size, zeros) in (event.get("layers") or {}).get("tensors", {}).items():
            if size:
                yield from _number(study, "zeros", zeros / size, round=number, tensor=name)
        for sample in event.get("sampled") or []:
            place = {"round": number, "direction": sample["direction"], "kind": sample["kind"]}
            basis = "estimated" if sample["estimated"] else "measured"
            for name, size in sample["tensors"].items():
                yield from _number(
                    study, "bytes_of_one_message", size, tensor=name, **{**place, "basis": basis}
                )
        for name in ("kept", "grown", "removed"):
            if (event.get("masks") or {}).get(name) is not None:
                value = event["masks"][name]
                yield from _number(study, f"weights_{name}", value, round=number, unit="")

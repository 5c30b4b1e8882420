"""What a report says of each arm: bytes by direction, kind and tensor, zeros, masks, rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prunecast.common.text import bytes_text, duration_text, percent
from prunecast.simulations.network_profiles.results import SIMULATED
from prunecast.simulations.report.charts import COLOURS, Chart, stacked_bars
from prunecast.simulations.report.messages import bytes_by_kind, layer_bytes, sparsity_by_layer
from prunecast.simulations.report.parts import MISSING, Section, Table
from prunecast.simulations.report.pruned import (
    LAYERS,
    layers_left,
    mask_changes,
    thinned,
    zeros_by_round,
)
from prunecast.simulations.report.study import ArmRun, Study, StudyArm

__all__ = ["detail_sections"]


def detail_sections(study: Study) -> list[Section]:
    """A section for each subject, and in it what there is of each arm, of its first seed."""
    found = [
        *(_kinds(study), _layers(study), layers_left(study), zeros_by_round(study)),
        *(mask_changes(study), _every_round(study)),
    ]
    if len(study.seeds) > 1:
        for section in found:
            section.note = f"{section.note} Of the first seed of each arm.".strip()
    return found


def _kinds(study: Study) -> Section:
    section = Section(
        "Where the bytes went",
        note="By direction and kind of message: “keyframe” holds a model alone, “delta” its "
        "difference to what the client holds, “reuse” nothing, “update” what a client changed; the "
        "others are codings by name.",
        folded=True,
    )
    for arm, run in study.trained():
        by_kind = arm.first["by_kind"] or _sums(run)
        rows, shares = [], []
        total = sum(s["bytes"] for kinds in by_kind.values() for s in kinds.values()) or 1
        found = [(way, kind, s) for way, kinds in by_kind.items() for kind, s in kinds.items()]
        for way, kind, sums in sorted(found, key=lambda item: -int(item[2]["bytes"])):
            each = sums["bytes"] / (sums["messages"] or 1)
            share = sums["bytes"] / total
            cells = [f"{sums['messages']:,}", bytes_text(sums["bytes"]), bytes_text(each)]
            rows.append([f"{way}, {kind}", *cells, percent(share, 0)])
            shares.append(share)
        header = [arm.label, "messages", "bytes", "a message", "share"]
        if rows:
            section.tables.append(Table(header, rows, bars={4: shares}))
        chart = _stacked(arm, run)
        if chart is not None:
            section.charts.append((arm.label, chart))
    return section


def _sums(run: ArmRun) -> dict[str, dict[str, dict[str, int]]]:
    found: dict[str, dict[str, dict[str, int]]] = {"down": {}, "up": {}}
    for (way, kind), rounds in bytes_by_kind(run).items():
        messages, size = (sum(column) for column in zip(*rounds.values(), strict=True))
        found[way][kind] = {"messages": messages, "bytes": size}
    return found


def _stacked(arm: StudyArm, run: ArmRun) -> Chart | None:
    by_kind = bytes_by_kind(run)
    rounds = sorted({number for found in by_kind.values() for number in found if number})
    if not rounds:
        return None
    parts, colours = {}, {}
    shades = {"down": COLOURS[1:3] + COLOURS[5:7], "up": (COLOURS[0], COLOURS[4], COLOURS[3])}
    for way in ("down", "up"):
        for index, (key, found) in enumerate((k, f) for k, f in by_kind.items() if k[0] == way):
            name = f"{way}, {key[1]}"
            parts[name] = [float(found.get(number, (0, 0))[1]) for number in rounds]
            colours[name] = shades[way][index % len(shades[way])]
    return stacked_bars(rounds, parts, colours, f"{arm.label}: bytes of every round by kind")


def _layers(study: Study) -> Section:
    section = Section("Layer by layer", "measured, estimated", folded=True)
    unknown = []
    told = []
    for arm, run in study.trained():
        costs, zeros = layer_bytes(run), sparsity_by_layer(run)
        if costs is None and not zeros:
            unknown.append(arm.label)
            continue
        section.tables.append(_layer_table(arm, costs, zeros))
        if costs is not None:
            told.append(f"{arm.label}: {costs.messages} messages")
    section.note = (
        "Bytes of each tensor over the whole run, all clients: estimated (≈) from single messages "
        "of each direction and kind that were looked into while it ran"
        + (f" ({'; '.join(told)})" if told else "")
        + ". Where a coding mixes tensors, their bytes are split by entropy. Zeros are measured, "
        "in the model that clients get after the last round."
    )
    if unknown:
        rows = [[label, MISSING, MISSING] for label in unknown]
        section.tables.append(Table(["arm", "bytes by tensor", "zeros by tensor"], rows))
    return section


def _layer_table(arm: StudyArm, costs: Any, zeros: Mapping[str, Mapping[int, Any]]) -> Table:
    last = {name: rounds[max(rounds)] for name, rounds in zeros.items() if rounds}
    down, up = (costs.down, costs.up) if costs is not None else ({}, {})
    names = [*last, *(n for n in {**down, **up} if n and n not in last)]
    whole = sum(down.values()) + sum(up.values()) or 1.0
    spent = {name: down.get(name, 0.0) + up.get(name, 0.0) for name in names}
    chosen = names
    if len(names) > LAYERS:
        kept = set(sorted(names, key=lambda n: -spent[n])[: LAYERS - 1])
        chosen = [name for name in names if name in kept]
    rows, shares = [], []
    for name in chosen:
        size, zero = last.get(name, (None, None))
        rows.append(
            [
                name,
                f"{size:,}" if size is not None else "–",
                percent(zero / size, 1) if size else "–",
                _estimate(costs, down.get(name, 0.0)),
                _estimate(costs, up.get(name, 0.0)),
                percent(spent[name] / whole) if costs is not None else MISSING,
            ]
        )
        shares.append(spent[name] / whole)
    rest = [name for name in names if name not in chosen]
    if rest:
        size, zero = (sum(last.get(n, (0, 0))[i] for n in rest) for i in (0, 1))
        parts = [sum(way.get(n, 0.0) for n in rest) for way in (down, up)]
        share = sum(parts) / whole
        zeros_text = percent(zero / size, 1) if size else "–"
        cells = [f"{size:,}", zeros_text, *(_estimate(costs, p) for p in parts), percent(share)]
        rows.append([f"{len(rest)} smaller tensors", *cells])
        shares.append(share)
    if costs is not None:
        parts = [way.get("", 0.0) for way in (down, up)]
        cells = ["–", "–", *(bytes_text(p) for p in parts), percent(sum(parts) / whole)]
        rows.append(["around the tensors", *cells])
        shares.append(sum(parts) / whole)
    header = [arm.label, "entries", "zeros", "≈ bytes down", "≈ bytes up", "share"]
    return Table(header, rows, bars={5: shares} if costs is not None else {})


def _estimate(costs: Any, value: float) -> str:
    return MISSING if costs is None else bytes_text(value)


def _every_round(study: Study) -> Section:
    section = Section("Every round", note="Bytes are those since the beginning.", folded=True)
    metric = study.metric
    for arm, run in study.trained():
        simulated = SIMULATED in run.rounds[-1]
        rows = []
        for row in thinned(run.rounds):
            loss = row.get("loss")
            rows.append(
                [
                    f"round {row['round']}",
                    study.text(row[metric]),
                    f"{loss:.3f}" if loss is not None else MISSING,
                    percent(row["sparsity"]) if row["sparsity"] else "–",
                    bytes_text(row["bytes_up"]),
                    bytes_text(row["bytes_down"]),
                    *([duration_text(row[SIMULATED])] if simulated else []),
                ]
            )
        header = [arm.label, metric, "loss", "zeros", "bytes up", "bytes down"]
        section.tables.append(Table([*header, *(["simulated time"] if simulated else [])], rows))
    return section

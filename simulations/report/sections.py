"""What a report says of a study: sections of tables and charts, for the page and for Markdown.

Every section says what its numbers are: measured, estimated or simulated. What was not recorded is
said to be missing.
"""

from __future__ import annotations

from collections.abc import Sequence

from prunecast.common.text import bytes_text, percent, ratio_text
from prunecast.simulations.report.budgets import byte_budgets
from prunecast.simulations.report.classes import capability_classes
from prunecast.simulations.report.curves import (
    against_bytes,
    against_time,
    bytes_in_rounds,
    bytes_to_targets,
    pareto_front,
    targets_of,
)
from prunecast.simulations.report.details import detail_sections
from prunecast.simulations.report.messages import codec_seconds, wire_bytes
from prunecast.simulations.report.parts import Section, Table, mean_of, seconds_of, spread_text
from prunecast.simulations.report.pruned import pruning_numbers, what_pruning_did
from prunecast.simulations.report.study import Spread, Study, StudyArm
from prunecast.simulations.report.traffic import joining_section, seconds_section, wire_section
from prunecast.simulations.report.widths import width_classes

__all__ = ["arm_numbers", "sections_of"]


def sections_of(study: Study, targets: Sequence[float] = ()) -> list[Section]:
    """All of them, in the order of the page, without those that have nothing to say.

    Args:
        study: what was run.
        targets: of the metric, the bytes to which are told; see `targets_of`.
    """
    found = [
        _arms(study),
        against_bytes(study),
        against_time(study),
        pareto_front(study),
        bytes_to_targets(study, targets_of(study, targets)),
        _published(study),
        bytes_in_rounds(study),
        wire_section(study),
        joining_section(study),
        seconds_section(study),
        what_pruning_did(study),
        width_classes(study),
        capability_classes(study),
        byte_budgets(study),
        _release(study),
        *detail_sections(study),
    ]
    return [section for section in found if not section.empty]


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
        "wire_bytes_tls_up": wire["tls_up"],
        "wire_bytes_tls_down": wire["tls_down"],
        "simulated_seconds": arm.simulated("seconds"),
        "seconds": arm.spread("seconds"),
        **{f"codec_seconds_{key}": value for key, value in times.items()},
        **pruning_numbers(study, arm),
    }


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
                bytes_text(mean_of(arm.spread("bytes_up"))),
                bytes_text(mean_of(arm.spread("bytes_down"))),
                percent(zeros.mean, 0) if zeros and zeros.mean else "–",
                *([seconds_of(arm.simulated("seconds"))] if simulated else []),
                seconds_of(arm.spread("seconds")) if arm.first["trained"] else "–",
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
        if release.get("gains"):
            from prunecast.server.repository.authoring.gains import gain_notes, gain_rows

            first = str(release["downloads"][0]["version"])
            patches = {first: release["patch_bytes"]}
            header, rows = gain_rows(release["gains"], release["keyframe_bytes"], patches)
            section.tables.append(Table(header, rows, caption="beside the model before pruning"))
            section.basis = "measured, estimated"
            for note in gain_notes(release["gains"]):
                section.note += f" {note[:1].upper()}{note[1:]}."
    return section

"""What a report says of pruning: what it removed, what that cost, zeros and masks by round."""

from __future__ import annotations

from typing import Any

from prunecast.common.text import bytes_text, duration_text, percent, ratio_text
from prunecast.simulations.report.charts import heat_map
from prunecast.simulations.report.messages import sparsity_by_layer
from prunecast.simulations.report.parts import MISSING, Section, Table, mean_of, spread_text
from prunecast.simulations.report.study import Spread, Study, StudyArm

__all__ = [
    "layers_left",
    "mask_changes",
    "pruning_numbers",
    "thinned",
    "what_pruning_did",
    "zeros_by_round",
]

LAYERS = 40  # rows of a table or chart of tensors, the largest
_ROWS = 40  # of a table of rounds


def pruning_numbers(study: Study, arm: StudyArm) -> dict[str, Spread | None]:
    """What pruning did to an arm's model, in numbers; None for what was not recorded."""
    inference = arm.pruning("inference", "ms")
    return {
        "parameters": arm.pruning("parameters", "stored"),
        "nonzero": arm.pruning("parameters", "nonzero"),
        "compression_ratio": arm.pruning("compression_ratio"),
        "pruning_efficiency": arm.pruning("efficiency"),
        "macs": arm.pruning("macs"),
        "effective_macs": arm.pruning("effective_macs"),
        f"{study.metric}_before_pruning": arm.pruning("before", study.metric),
        "pruning_loss": arm.pruning("pruning_loss"),
        "recovery_ratio": arm.pruning("recovery_ratio"),
        "mask_seconds": arm.pruning("cost", "seconds"),
        "mask_peak_bytes": arm.pruning("cost", "peak_bytes"),
        "inference_seconds": inference and _times(inference, 1e-3),
        "inference_joules": arm.pruning("inference", "joules"),
        "estimated_bytes_inference": arm.pruning("inference", "estimated_bytes"),
        "estimated_joules_fp32": arm.pruning("inference", "estimated_joules", "fp32"),
        "estimated_joules_int8": arm.pruning("inference", "estimated_joules", "int8"),
    }


def _times(spread: Spread, factor: float) -> Spread:
    deviation = None if spread.deviation is None else factor * spread.deviation
    return Spread(factor * spread.mean, deviation, spread.count)


def what_pruning_did(study: Study) -> Section:
    """Size, operations, loss, recovery, cost and inference of every arm that trained."""
    section = Section(
        "What pruning did",
        "measured, estimated",
        "Of the model after the last round. “Kept” are parameters that are not zero; the "
        "compression ratio is the original number over these, the efficiency the share that is "
        "gone. "
        "Operations (MACs) are those of one example; zeros among other weights are multiplied like "
        "them, so that they save bytes and no time: the operations without zeros are what kernels "
        "that skip them would do. Times are of one example with torch on one thread. Memory and "
        "joules (≈) are estimated, the latter from operations and bytes by Horowitz 2014 (45 nm).",
    )
    arms = [arm for arm, run in study.trained() if run.figures.get("pruning")]
    if not any(arm.pruning("efficiency") for arm in arms):
        return section
    header = ["arm", "parameters", "kept", "compression", "efficiency", "MACs", "without zeros"]
    rows, shares = [], []
    for arm in arms:
        found = pruning_numbers(study, arm)
        efficiency = mean_of(found["pruning_efficiency"]) or 0.0
        rows.append(
            [
                arm.label,
                _count(found["parameters"]),
                _count(found["nonzero"]),
                ratio_text(mean_of(found["compression_ratio"])),
                percent(efficiency),
                _count(found["macs"]),
                _count(found["effective_macs"]),
            ]
        )
        shares.append(efficiency)
    section.tables.append(Table(header, rows, bars={4: shares}))
    section.tables += [_recovered(study, arms), _inference(study, arms)]
    section.tables += _nodes(study, arms)
    section.tables = [table for table in section.tables if table.rows]
    return section


def _count(spread: Spread | None) -> str:
    return MISSING if spread is None else f"{spread.mean:,.0f}"


def _recovered(study: Study, arms: list[StudyArm]) -> Table:
    metric = study.metric
    rows = []
    for arm in arms:
        found = pruning_numbers(study, arm)
        before, lost = found[f"{metric}_before_pruning"], found["pruning_loss"]
        seconds, peak = found["mask_seconds"], found["mask_peak_bytes"]
        if seconds is None and before is None:
            continue
        recovery = mean_of(found["recovery_ratio"])
        rows.append(
            [
                arm.label,
                spread_text(before, study.text) if before else "never dense",
                spread_text(arm.pruning("after", metric), study.text),
                study.text(lost.mean) if lost else "–",
                f"{recovery:.3g}" if recovery is not None else "–",
                duration_text(seconds.mean) if seconds else "–",
                bytes_text(mean_of(peak)) if peak else "–",
            ]
        )
    header = ["arm", f"{metric} before", "after", "pruning loss", "recovery ratio"]
    caption = (
        "before: the last model that was dense, while it still learned; recovery: loss before over "
        "loss after; masks: what making them took of the server"
    )
    return Table([*header, "masks, time", "masks, memory"], rows, caption=caption)


def _inference(study: Study, arms: list[StudyArm]) -> Table:
    rows = []
    for arm in arms:
        found = pruning_numbers(study, arm)
        seconds, measured = found["inference_seconds"], mean_of(found["inference_joules"])
        if seconds is None:
            continue
        rows.append(
            [
                arm.label,
                f"{1e3 * seconds.mean:.3g} ms",
                f"{1 / seconds.mean:,.0f}",
                bytes_text(mean_of(found["estimated_bytes_inference"])),
                *(_joules(found[f"estimated_joules_{kind}"]) for kind in ("fp32", "int8")),
                _joules(found["inference_joules"]) if measured else "not measured",
            ]
        )
    header = ["arm", "an inference", "in a second", "≈ memory", "≈ energy, fp32", "≈ energy, int8"]
    return Table([*header, "energy by RAPL"], rows, caption="inference of one example")


def _joules(spread: Spread | None) -> str:
    return MISSING if spread is None else f"{1e6 * spread.mean:.3g} µJ"


def _nodes(study: Study, arms: list[StudyArm]) -> list[Table]:
    """For each metric that nodes report, its mean and spread over them, before and after."""
    names: dict[str, None] = {}
    for arm in arms:
        after = (arm.first["pruning"]["after"] or {}).get("nodes") or {}
        names.update(dict.fromkeys(after))
    tables = []
    for name in names:
        rows = []
        for arm in arms:
            cells = []
            for when in ("before", "after"):
                found = ((arm.first["pruning"][when] or {}).get("nodes") or {}).get(name)
                cells.append(_over_nodes(found))
            rows.append([arm.label, *cells])
        caption = f"{name}, as nodes measured it: mean ± deviation over nodes (first seed)"
        tables.append(Table(["arm", "before", "after"], rows, caption=caption))
    return tables


def _over_nodes(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    deviation = "" if found["deviation"] is None else f" ± {found['deviation']:.3g}"
    return f"{found['mean']:.4g}{deviation} ({found['nodes']} nodes)"


def layers_left(study: Study) -> Section:
    """Of each arm the tensors of its last model: what is left of them, and of their operations."""
    section = Section(
        "What is left of every layer",
        note="Of the model after the last round; the longer the bar, the more of a tensor is zero. "
        "Biases and norms multiply nothing that counts.",
        folded=True,
    )
    for arm, run in study.trained():
        layers = (run.figures.get("pruning") or {}).get("layers") or {}
        if not arm.first["sparsity"]:
            continue
        largest = sorted(layers, key=lambda name: -layers[name]["parameters"])[:LAYERS]
        rows, shares = [], []
        for name in (n for n in layers if n in largest):
            layer = layers[name]
            zeros = 1 - layer["nonzero"] / (layer["parameters"] or 1)
            counts = (f"{layer[k]:,}" for k in ("parameters", "nonzero", "macs", "effective_macs"))
            size, left, macs, effective = counts
            rows.append([name, size, left, percent(zeros), macs, effective])
            shares.append(zeros)
        header = [arm.label, "parameters", "kept", "zeros", "MACs", "without zeros"]
        if rows:
            section.tables.append(Table(header, rows, bars={3: shares}))
    return section


def zeros_by_round(study: Study) -> Section:
    """A heat map for each arm: zeros of every tensor, round by round."""
    section = Section(
        "Zeros in every layer, round by round",
        note="Fraction of zeros in each tensor of the published model that has pruned weights; the "
        "fuller the colour, the more.",
        folded=True,
    )
    for arm, run in study.trained():
        found = sparsity_by_layer(run)
        columns = sorted({number for rounds in found.values() for number in rounds})
        shares = {
            name: [rounds[n][1] / rounds[n][0] if rounds.get(n, (0,))[0] else None for n in columns]
            for name, rounds in found.items()
        }
        if not any(event.get("masks") for event in run.events):
            continue
        pruned = {n: v for n, v in shares.items() if max((x or 0.0) for x in v) > 0.1}
        size = {name: max(pair[0] for pair in found[name].values()) for name in pruned}
        kept = sorted(pruned, key=lambda name: -size[name])[:LAYERS]
        rows = {name: pruned[name] for name in pruned if name in kept}
        chart = heat_map(rows, columns, f"{arm.label}: zeros by tensor and round")
        if chart is not None:
            section.charts.append((arm.label, chart))
    return section


def mask_changes(study: Study) -> Section:
    """Round by round, weights that are kept, that came back, and that went."""
    section = Section(
        "Pruning",
        note="Weights of the pruned tensors: how many are kept, how many came back since the round "
        "before, and how many went. A weight that comes back costs bytes again.",
        folded=True,
    )
    for arm, run in study.trained():
        told = [(e["round"], e["masks"]) for e in run.events if e.get("masks")]
        rows = [
            [
                f"round {number}",
                percent(1 - masks["kept"] / masks["of"]),
                f"{masks['kept']:,}",
                f"{masks['grown']:,}",
                f"{masks['removed']:,}",
            ]
            for number, masks in thinned(told)
        ]
        if arm.first["sparsity"] and not rows:
            rows = [["every round", *[MISSING] * 4]]
        if rows:
            header = [arm.label, "zeros", "kept", "came back", "went"]
            section.tables.append(Table(header, rows))
    return section


def thinned(rows: list[Any]) -> list[Any]:
    """At most some forty rows, the first and the last among them."""
    stride = max(1, -(-len(rows) // _ROWS))
    return (
        rows[::stride]
        if not rows or rows[::stride][-1] is rows[-1]
        else [*rows[::stride], rows[-1]]
    )

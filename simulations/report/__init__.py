"""The report of runs: one stand-alone page, Markdown and CSV, from what their folders hold."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from prunecast.common.files import write_atomically
from prunecast.common.text import bytes_text, duration_text, percent, ratio_text
from prunecast.simulations.report.charts import score_text
from prunecast.simulations.report.figure import accuracy_figure
from prunecast.simulations.report.gathering import gather, study_of
from prunecast.simulations.report.sections import sections_of
from prunecast.simulations.report.study import Study
from prunecast.simulations.report.tables import csv_of, markdown_of

__all__ = [
    "FIGURE",
    "MARKDOWN",
    "NUMBERS",
    "PAGE",
    "Study",
    "accuracy_figure",
    "arm_rows",
    "csv_of",
    "gather",
    "markdown_of",
    "release_rows",
    "render_page",
    "score_text",
    "sections_of",
    "study_of",
    "write_report",
    "write_studies",
]

FIGURE, PAGE, MARKDOWN, NUMBERS = "accuracy.png", "report.html", "report.md", "report.csv"


def arm_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of arms."""
    metric = result["task"]["metric"]
    header = ["arm", metric, "sparsity", "bytes up", "bytes down", "total", "reduction"]
    simulated = any("simulated" in arm for arm in result["arms"].values())
    if simulated:
        header.append("simulated time")
    rows = [
        [
            arm["label"],
            score_text(result, arm[metric]),
            percent(arm["sparsity"], 0) if arm["sparsity"] else "–",
            bytes_text(arm["bytes_up"]),
            bytes_text(arm["bytes_down"]),
            bytes_text(arm["bytes_up"] + arm["bytes_down"]),
            ratio_text(arm.get("reduction")),
            *([duration_text(arm["simulated"]["seconds"])] if simulated else []),
        ]
        for arm in result["arms"].values()
    ]
    return header, rows


def release_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of what a device downloads; empty without a release."""
    release = result.get("release")
    if not release:
        return [], []
    full = release["onnx_bytes"]
    first, second = (download["version"] for download in release["downloads"])
    sizes = {
        f"release {first}, keyframe (a new device)": release["first_keyframe_bytes"],
        f"release {second}, keyframe": release["keyframe_bytes"],
        f"release {second}, patch from release {first}": release["patch_bytes"],
        f"all the device received for release {second}": sum(
            release["downloads"][1]["bytes"].values()
        ),
    }
    if full:
        sizes = {"the model as one .onnx file": full, **sizes}
    rows = [
        [what, bytes_text(size), ratio_text(full / size) if full and size else "–"]
        for what, size in sizes.items()
    ]
    return ["what travels", "bytes", "reduction"], rows


def render_page(
    studies: Sequence[Study], figures: Sequence[bytes] = (), *, targets: Sequence[float] = ()
) -> str:
    """The page as HTML; everything it shows is inside it, and no script.

    Args:
        studies: what it shows, one after the other.
        figures: of each the PNG of `accuracy_figure`, to be saved from the page; none for none.
        targets: of the metric, the bytes to which are told.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = files(__name__)
    return environment.from_string((folder / "report.html").read_text()).render(
        style=(folder / "report.css").read_text(),
        title=", ".join(dict.fromkeys(study.scenario["name"] for study in studies)),
        studies=[
            {
                "study": study,
                "sections": sections_of(study, targets),
                "headline": _headline(study),
                "facts": _facts(study),
                "figure": base64.b64encode(figures[number]).decode() if figures else "",
            }
            for number, study in enumerate(studies)
        ],
    )


def _headline(study: Study) -> list[tuple[str, str]]:
    """Figures and what they are: the arm that publishes versions for the fewest bytes."""
    published = [arm for arm in study.arms.values() if arm.first["published"] and study.ratio(arm)]
    if not published:
        return []
    arm = max(published, key=lambda arm: study.ratio(arm) or 0.0)
    score, base = arm.reached(study.metric).mean, study.baseline
    dense = base.label if base is not None else "plain Flower"
    cards = [(ratio_text(study.ratio(arm)), f"fewer bytes than {dense} ({arm.label})")]
    if base is not None:
        gained = score - base.reached(study.metric).mean
        is_percent = study.result["task"]["percent"]
        told = f"{100 * gained:+.1f} points" if is_percent else f"{gained:+.3g}"
        cards += [
            (bytes_text(arm.total().mean), f"instead of {bytes_text(base.total().mean)}"),
            (
                study.text(score),
                f"{study.metric}, {told.replace('-', '−')} against {dense}",
            ),
        ]
    if study.releases:
        release = study.releases[0][1]
        told = f"patch to an edge device, for {bytes_text(release['onnx_bytes'])} of ONNX"
        cards.append((bytes_text(release["patch_bytes"]), told))
    return cards


def _facts(study: Study) -> list[tuple[str, str]]:
    """What was run, and where: names and texts."""
    result, scenario = study.result, study.scenario
    training, clients = scenario.get("training"), scenario.get("clients")
    facts = [("seeds", ", ".join(map(str, study.seeds))), ("rounds", str(scenario["rounds"]))]
    if clients:
        data = result["data"]
        least, most = min(data["per_client"]), max(data["per_client"])
        facts.append(
            (
                "clients",
                f"{clients['count']:,}, {percent(clients['fraction'], 0)} in a round, {least:,} to "
                f"{most:,} examples each ({data['partition']})",
            )
        )
        facts.append(("model", scenario["model"]["factory"]))
    if training:
        passes = "1 epoch" if training["epochs"] == 1 else f"{training['epochs']} epochs"
        facts.append(
            (
                "local training",
                f"{passes}, batches of {training['batch_size']}, SGD {training['learning_rate']}, "
                f"momentum {training['momentum']}",
            )
        )
    facts.append(("aggregation", scenario["strategy"]["name"]))
    facts += [(f"arm {arm.label}", arm.text) for arm in study.arms.values() if arm.text]
    facts.append(("started", f"{result['started']}, {duration_text(result['seconds'])} in all"))
    if "software" in result:
        told = ", ".join(f"{name} {number}" for name, number in result["software"].items())
        facts.append(("software", told))
    if "machine" in result:
        facts.append(
            ("machine", f"{result['machine']['cpus']} CPUs, {result['machine']['system']}")
        )
    return facts


def write_studies(
    folder: Path, studies: Sequence[Study], *, targets: Sequence[float] = ()
) -> dict[str, Path]:
    """Write page, Markdown, CSV and, for each study, the picture into a folder.

    Returns:
        Paths by "page", "markdown", "csv" and "figure", that of the first study.

    Raises:
        StorageError: a file cannot be written.
    """
    figures = [accuracy_figure(study) for study in studies]
    for number, figure in enumerate(figures, start=1):
        name = FIGURE if number == 1 else FIGURE.replace(".", f"-{number}.")
        write_atomically(folder / name, figure)
    written = {
        PAGE: render_page(studies, figures, targets=targets),
        MARKDOWN: markdown_of(studies, targets),
        NUMBERS: csv_of(studies, targets),
    }
    for name, text in written.items():
        write_atomically(folder / name, text.encode())
    names = {"page": PAGE, "markdown": MARKDOWN, "csv": NUMBERS, "figure": FIGURE}
    return {key: folder / name for key, name in names.items()}


def write_report(folder: Path, result: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write the report of one run into its folder; the paths of picture and page.

    Raises:
        StorageError: a file cannot be written.
    """
    written = write_studies(folder, [study_of(result, folder)])
    return written["figure"], written["page"]

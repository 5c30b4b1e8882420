"""`prunecast prune`: a checkpoint with zeros, its masks and a report."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import (
    AsJson,
    Column,
    Force,
    file_progress,
    make_console,
    print_table,
    refuse_to_overwrite,
    say,
    shape_text,
    short_dtype,
    show,
)
from prunecast.common.text import bytes_text, count_text, percent

if TYPE_CHECKING:
    from prunecast.compression.files.pruned import PruningResult
    from prunecast.compression.files.zeroing import Targets

__all__ = ["prune"]


def prune(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A .safetensors or .onnx file, or the .safetensors.index.json of several (or "
            "their folder)."
        ),
    ],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of the prunable weights that becomes zero, such as 0.9."),
    ] = None,
    criterion: Annotated[
        str, typer.Option(help="What goes first: magnitude, l2 (of whole rows) or random.")
    ] = "magnitude",
    allocation: Annotated[
        str,
        typer.Option(
            help="The same share of every tensor (layer), one ranking (global), less of tensors "
            "with few weights for their inputs and outputs (erk), or by a weight's share of its "
            "tensor (lamp, sensitivity)."
        ),
    ] = "layer",
    pattern: Annotated[
        str, typer.Option(help="N of every M along the input channels, such as 2:4.")
    ] = "",
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="Name pattern of tensors that stay whole; may be repeated."),
    ] = None,
    min_size: Annotated[
        int, typer.Option(min=1, help="Tensors with fewer elements stay whole.")
    ] = 1024,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="Prune low-rank factors (LoRA) too.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="The pruned file; of a checkpoint of several files, a folder. Default "
            "NAME.pruned.SUFFIX, or pruned/ beside it.",
        ),
    ] = None,
    memory: Annotated[
        int, typer.Option(min=1, help="Most bytes of memory to take; default 1 GiB.")
    ] = 1 << 30,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Work on all machines of a Ray cluster, HOST:PORT or auto; they see the files "
            "under the same paths."
        ),
    ] = None,
    coded: Annotated[
        bool,
        typer.Option(
            "--coded",
            help="Also measure what prunecast compress makes of it, before and after: as slow, and "
            "with as much memory, as compressing it twice.",
        ),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Set the least important weights of a checkpoint to zero, whatever its size.

    It is read in pieces, so memory does not grow with it; sparsity and ties are exact. Norms,
    biases, small tensors and adapters stay whole, tied weights are pruned once. Beside the pruned
    checkpoint lie its masks (for prunecast.client.hold_masks) and a report.
    """
    from prunecast.common.files import write_atomically
    from prunecast.compression.files.checkpoints import open_checkpoint
    from prunecast.compression.files.pruning import (
        Pruning,
        default_targets,
        prune_checkpoint,
    )
    from prunecast.compression.files.workers import one_after_the_other, ray_cluster
    from prunecast.compression.pruning.patterns import parse_pattern
    from prunecast.compression.pruning.plan import is_named

    if sparsity is None and pattern:
        try:
            sparsity = getattr(parse_pattern(pattern), "sparsity", None)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--pattern") from error
    if sparsity is None:
        raise typer.BadParameter("give --sparsity, such as 0.9, or --pattern, such as 2:4")
    if not 0 < sparsity < 1:
        raise typer.BadParameter(
            f"{sparsity:g} removes {'nothing' if sparsity <= 0 else 'all weights'}: give one above "
            "0 and below 1",
            param_hint="--sparsity",
        )
    settings = Pruning(
        sparsity,
        criterion,
        allocation,
        min_size,
        tuple(exclude or ()),
        adapters,
        pattern=pattern,
        memory=memory,
    )
    source = open_checkpoint(checkpoint)
    targets = default_targets(source, output)
    for path in targets.all:
        refuse_to_overwrite(path, force)
    names = [*(t.name for t in source.tensors), *source.left, *source.aliases]
    for wanted in settings.exclude:
        if not any(is_named(name, [wanted]) for name in names):
            typer.echo(f"note: --exclude {wanted!r} names no tensor of the checkpoint", err=True)
    with ExitStack() as opened:
        run = one_after_the_other if ray is None else opened.enter_context(ray_cluster(ray))
        progress = opened.enter_context(file_progress())
        result = prune_checkpoint(source, targets, settings, run=run, on_progress=progress)

    def write_report(document: dict[str, Any]) -> None:
        write_atomically(targets.report, (json.dumps(document, indent=1) + "\n").encode())

    report = {
        "checkpoint": str(source.path),
        "output": str(next(iter(targets.files.values()))),
        "masks": str(targets.masks),
        "criterion": criterion,
        "allocation": allocation,
        "pattern": pattern or None,
        "wanted_sparsity": sparsity,
        **result.document(),
        "pruned_file_bytes": sum(path.stat().st_size for path in targets.files.values()),
        "mask_bytes": targets.masks.stat().st_size,
        "peak_memory_bytes": _peak_memory(),
    }
    write_report(report)
    if coded:  # which may fail where pruning does not: it reads whole files
        report["coded_bytes"] = _coded(source.files.values())
        report["pruned_coded_bytes"] = _coded(targets.files.values())
        write_report(report)
    if as_json:
        show(report)
    else:
        _show(targets, result, report)


def _coded(paths: Iterable[Path]) -> int:
    """Bytes that `prunecast compress` makes of the files of a checkpoint."""
    from prunecast.compression.files.formats import open_tensors
    from prunecast.compression.files.inspection import inspect_tensors

    with file_progress() as progress:
        return sum(
            inspect_tensors(open_tensors(p), on_progress=progress).nbytes
            for p in _compressible(paths)
        )


def _compressible(paths: Iterable[Path]) -> list[Path]:
    """Those of a checkpoint's files that `prunecast compress` takes: no index, no external data."""
    return [path for path in paths if path.suffix.lower() in (".safetensors", ".onnx")]


def _peak_memory() -> int:
    """Most bytes that this process has held; where the system tells it, since it began."""
    try:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, LookupError, ValueError):
        import resource  # of POSIX alone

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _show(targets: Targets, result: PruningResult, report: dict[str, Any]) -> None:
    columns = [
        Column("tensor"),
        Column("shape"),
        Column("dtype", wide_only=True),
        Column("weights", wide_only=True),
        Column("zeros"),
        Column("sparsity"),
    ]
    pruned = {name: t for name, t in result.tensors.items() if t.prunable}
    rows = [
        [
            name + (f" (same as {t.same_as})" if t.same_as else ""),
            shape_text(t.shape),
            short_dtype(t.dtype),
            f"{t.size:,}",
            f"{t.removed:,}",
            percent(t.sparsity),
        ]
        for name, t in pruned.items()
    ]
    total = [
        count_text(len(rows), "tensor"), "", "", f"{result.prunable:,}", f"{result.removed:,}",
        percent(report["sparsity"]),
    ]  # fmt: skip
    print_table(make_console(), columns, rows, total=total)
    whole = len(result.tensors) - len(rows)
    first, *others = _compressible(targets.files.values())
    further = f", and of {count_text(len(others), 'other file')} likewise," if others else ""
    say(
        f"{report['output']}: {result.removed:,} of {result.parameters:,} weights are zero "
        f"({percent(report['sparsity_of_all'])}); {count_text(whole, 'tensor')} left whole.",
        f"{targets.masks}: {bytes_text(report['mask_bytes'])}. {targets.report}: every tensor.",
        f"It is as large as before ({bytes_text(report['pruned_file_bytes'])}): prunecast "
        f"compress {first}{further} makes the zeros pay"
        + (
            f", {bytes_text(report['pruned_coded_bytes'])} instead of "
            f"{bytes_text(report['coded_bytes'])}."
            if "coded_bytes" in report
            else "."
        ),
        f"Peak memory {bytes_text(report['peak_memory_bytes'])}, of at most "
        f"{bytes_text(result.memory)}.",
    )

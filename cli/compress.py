"""`prunecast compress` and `decompress`: a checkpoint as one small file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import (
    Column,
    file_progress,
    make_console,
    print_json,
    print_table,
    say,
    shape_text,
)
from prunecast.common.text import bits_text, bytes_text, count_text, ratio_text

if TYPE_CHECKING:
    from prunecast.compression.files.compressing import Lossy
    from prunecast.compression.files.inspection import Inspection
    from prunecast.compression.files.tensors import TensorFile

__all__ = ["AsJson", "compress", "decompress"]

Force = Annotated[bool, typer.Option("--force", "-f", help="Overwrite the output if it exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def compress(
    file: Annotated[Path, typer.Argument(help="A .safetensors, .npz or .onnx file.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Compressed file; default FILE with suffix .pcc."),
    ] = None,
    step: Annotated[
        float | None, typer.Option(help="Lossy: round floats to multiples of this step.")
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(help="Lossy: relative L2 error of every float tensor, 0.01 say."),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="Lossy: bits per parameter of the whole file, to 2 %.")
    ] = None,
    common: Annotated[
        bool,
        typer.Option("--common-step", help="With --error or --bits, one step for all tensors."),
    ] = False,
    dead_zone: Annotated[
        float, typer.Option(help="Part of a step below which a value becomes zero.")
    ] = 0.5,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Name pattern of tensors that stay exact; may be repeated."),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compress a checkpoint; `prunecast decompress` restores its tensors.

    Every bit is kept, unless `--step`, `--error` or `--bits` asks for quantised floats. Running
    means and variances of normalisation layers, and tensors of fewer than 16 elements, are kept
    exactly in any case. Of an .onnx file, the initialisers are compressed and not the graph.
    """
    from prunecast.compression.files.compressing import compress_file
    from prunecast.compression.files.formats import open_tensors

    lossy = _lossy(step, error, bits, common, dead_zone, keep or [])
    target = output or file.with_suffix(".pcc")
    source = open_tensors(file)
    _refuse_to_overwrite(target, force)
    with file_progress() as progress:
        result = compress_file(source, target, lossy=lossy, on_progress=progress)
    if as_json:
        print_json(_document(source, target, result))
    else:
        _show(source, target, result)


def decompress(
    file: Annotated[Path, typer.Argument(help="A file that `prunecast compress` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .safetensors or .npz file to write.")
    ],
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most bytes to restore; default 8 GiB, or 64 times FILE if that is more."
        ),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the tensors of a compressed file as .safetensors or .npz.

    Also of one that was an .onnx file, whose graph is not in it.
    """
    from prunecast.compression.files.archive import open_archive
    from prunecast.compression.files.compressing import restore_file
    from prunecast.compression.files.formats import writable_format

    suffix = writable_format(output)
    archive = open_archive(file, max_bytes=max_bytes)
    _refuse_to_overwrite(output, force)
    with file_progress() as progress:
        restore_file(archive, output, on_progress=progress)
    dropped = sorted(archive.metadata) if suffix == ".npz" else []
    if as_json:
        print_json(
            {
                "file": str(file),
                "output": str(output),
                "tensors": len(archive),
                "raw_bytes": archive.nbytes,
                "quantised": sorted(archive.steps),
                "metadata_left_out": dropped,
            }
        )
        return
    quantised = f", {len(archive.steps)} of them quantised" if archive.steps else ""
    say(f"{output}: {count_text(len(archive), 'tensor')}, {archive.nbytes:,} bytes{quantised}.")
    if dropped:
        say(f"Note: .npz has no place for the metadata {', '.join(dropped)}.")


def _refuse_to_overwrite(path: Path, force: bool) -> None:
    """A usage error where a file would be lost."""
    if path.exists() and not force:
        raise typer.BadParameter(f"{path} exists: give --force to overwrite it")


def _lossy(
    step: float | None,
    error: float | None,
    bits: float | None,
    common: bool,
    dead_zone: float,
    keep: list[str],
) -> Lossy | None:
    from prunecast.compression.files.compressing import Lossy

    named = {"--step": step, "--error": error, "--bits": bits}
    given = {name: value for name, value in named.items() if value is not None}
    if len(given) > 1:
        raise typer.BadParameter(f"{' and '.join(given)} exclude each other")
    if not given:
        if common or keep or dead_zone != 0.5:
            raise typer.BadParameter("these options need --step, --error or --bits")
        return None
    [(option, value)] = given.items()
    if not 0 < value < (1 if error is not None else float("inf")):
        top = " and below 1" if error is not None else ""
        raise typer.BadParameter(f"{value} is not above 0{top}", param_hint=option)
    if not 0 < dead_zone <= 1:
        raise typer.BadParameter(f"{dead_zone} is not in (0, 1]", param_hint="--dead-zone")
    return Lossy(step, error, bits, common, dead_zone, keep)


def _document(source: TensorFile, target: Path, result: Inspection) -> dict[str, Any]:
    return {
        "file": str(source.path),
        "output": str(target),
        "lossy": result.lossy,
        "raw_bytes": source.nbytes,
        "coded_bytes": result.nbytes,
        "parameters": source.size,
        "bits_per_parameter": 8 * result.nbytes / source.size if source.size else None,
        "common_bytes": result.common,
        "remarks": source.remarks,
        "tensors": [
            {
                "name": name,
                "dtype": tensor.spec.dtype,
                "shape": list(tensor.spec.shape),
                "raw_bytes": tensor.spec.nbytes,
                "coded_bytes": tensor.nbytes,
                "step": tensor.step,
                "relative_error": tensor.error,
            }
            for name, tensor in result.tensors.items()
        ],
    }


def _show(source: TensorFile, target: Path, result: Inspection) -> None:
    lossy = result.lossy
    columns = [
        Column("tensor"), Column("shape"), Column("dtype", wide_only=True),
        *([Column("step"), Column("error")] if lossy else []),
        Column("raw", wide_only=True), Column("coded"), Column("bits"),
    ]  # fmt: skip
    rows = []
    for name, tensor in result.tensors.items():
        spec = tensor.spec
        chosen = [
            "exact" if tensor.step is None else f"{tensor.step:.3g}",
            "0" if tensor.error is None else f"{tensor.error:.3g}",
        ]
        rows.append(
            [
                name, shape_text(spec.shape), spec.dtype, *(chosen if lossy else []),
                bytes_text(spec.nbytes), bytes_text(tensor.nbytes),
                bits_text(tensor.nbytes, spec.size),
            ]
        )  # fmt: skip
    count = count_text(len(rows), "tensor")
    bits = bits_text(result.nbytes, source.size)
    total = [
        count, f"{source.size:,}", "", *(["", ""] if lossy else []),
        bytes_text(source.nbytes), bytes_text(result.nbytes), bits,
    ]  # fmt: skip
    print_table(make_console(), columns, rows, total=total)
    say(
        f"{target}: {result.nbytes:,} bytes instead of {source.nbytes:,}, "
        f"{ratio_text(source.nbytes / result.nbytes)} smaller, {bits} bits per parameter."
    )
    if lossy:
        errors = {n: t.error for n, t in result.tensors.items() if t.error is not None}
        worst = max(errors, key=errors.__getitem__)
        say(
            f"Lossy: {len(errors)} of {count} quantised; largest relative error "
            f"{errors[worst]:.3g} ({worst})."
        )
    else:
        say("Lossless: every bit of every tensor is kept.")
    if source.kind == "onnx":
        say("It holds the initialisers, not the graph: keep the .onnx file for that.")
    say(*(f"Note: {remark}." for remark in source.remarks))

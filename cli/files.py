"""`prunecast compress`, `decompress` and `inspect`: checkpoints and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.console import (
    AsJson,
    Column,
    Force,
    MaxBytes,
    file_progress,
    make_console,
    print_table,
    refuse_to_overwrite,
    say,
    shape_text,
    short_dtype,
    show,
)
from prunecast.common.text import bits_text, bytes_text, count_text, percent, ratio_text

if TYPE_CHECKING:
    from prunecast.compression.codec import Outline
    from prunecast.compression.files.compressing import Lossy
    from prunecast.compression.files.inspection import InspectedTensor, Inspection
    from prunecast.compression.files.tensors import TensorFile

__all__ = ["compress", "decompress", "inspect"]


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
    max_bytes: MaxBytes = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compress a checkpoint; `prunecast decompress` restores its tensors.

    Every bit is kept, unless `--step`, `--error` or `--bits` asks for quantised floats. Running
    means and variances of normalisation layers, and tensors of fewer than 16 elements, are kept
    exactly in any case. Of an .onnx file, the graph is kept as well. What was written is decoded
    and compared before the file appears.
    """
    from prunecast.compression.files.compressing import compress_file
    from prunecast.compression.files.formats import open_tensors

    lossy = _lossy(step, error, bits, common, dead_zone, keep or [])
    target = output or file.with_suffix(".pcc")
    source = open_tensors(file, max_bytes=max_bytes)
    refuse_to_overwrite(target, force)
    with file_progress() as progress:
        result = compress_file(source, target, lossy=lossy, on_progress=progress)
    if as_json:
        show(_document(source, target, result))
    else:
        _show(source, target, result)


def decompress(
    file: Annotated[Path, typer.Argument(help="A file that `prunecast compress` wrote.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A .safetensors, .npz or .onnx file to write.")
    ],
    max_bytes: MaxBytes = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the tensors of a compressed file as .safetensors or .npz.

    One that was an .onnx file becomes that again with `--output` FILE.onnx, external data taken in.
    """
    from prunecast.compression.files.archive import open_archive
    from prunecast.compression.files.compressing import restore_file
    from prunecast.compression.files.formats import writable_format

    suffix = writable_format(output)
    archive = open_archive(file, max_bytes=max_bytes)
    refuse_to_overwrite(output, force)
    with file_progress() as progress:
        restore_file(archive, output, on_progress=progress)
    dropped = sorted(archive.metadata) if suffix == ".npz" else []
    without = archive.graph is not None and suffix != ".onnx"
    if as_json:
        show(
            {
                "file": str(file),
                "output": str(output),
                "tensors": len(archive),
                "raw_bytes": archive.nbytes,
                "quantised": sorted(archive.steps),
                "metadata_left_out": dropped,
                "graph_left_out": without,
            }
        )
        return
    quantised = f", {len(archive.steps)} of them quantised" if archive.steps else ""
    say(f"{output}: {count_text(len(archive), 'tensor')}, {archive.nbytes:,} bytes{quantised}.")
    if dropped:
        say(f"Note: .npz has no place for the metadata {', '.join(dropped)}.")
    if without:
        say("Note: the graph of the .onnx file is left out; --output FILE.onnx writes the model.")


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
        "graph_bytes": None if source.graph is None else len(source.graph),
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
    chosen: dict[Column, Callable[[InspectedTensor], str]] = {
        Column("step"): lambda t: "exact" if t.step is None else f"{t.step:.3g}",
        Column("error"): lambda t: "0" if t.error is None else f"{t.error:.3g}",
    }
    cells: dict[Column, Callable[[InspectedTensor], str]] = {
        Column("shape"): lambda t: shape_text(t.spec.shape),
        Column("dtype", wide_only=True): lambda t: t.spec.dtype,
        **(chosen if lossy else {}),
        Column("raw", wide_only=True): lambda t: bytes_text(t.spec.nbytes),
        Column("coded"): lambda t: bytes_text(t.nbytes),
        Column("bits"): lambda t: bits_text(t.nbytes, t.spec.size),
    }
    rows = [[name, *(cell(t) for cell in cells.values())] for name, t in result.tensors.items()]
    count = count_text(len(rows), "tensor")
    bits = bits_text(result.nbytes, source.size)
    total = [
        count, f"{source.size:,}", "", *(["", ""] if lossy else []),
        bytes_text(source.nbytes), bytes_text(result.nbytes), bits,
    ]  # fmt: skip
    print_table(make_console(), [Column("tensor"), *cells], rows, total=total)
    plain = source.nbytes + len(source.graph or b"")
    say(
        f"{target}: {result.nbytes:,} bytes instead of {plain:,}, "
        f"{ratio_text(plain / result.nbytes)} smaller, {bits} bits per parameter."
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
    if source.graph is not None:
        say(f"It holds the graph too: prunecast decompress {target} -o model.onnx")


# -- inspect --------------------------------------------------------------------------------------


def inspect(
    file: Annotated[
        Path, typer.Argument(help="A .safetensors, .npz or .onnx file, or a compressed .pcc.")
    ],
    max_bytes: MaxBytes = None,
    as_json: AsJson = False,
) -> None:
    """Show every tensor of a checkpoint, and what it costs when it is coded losslessly.

    Of a compressed file, show where its bytes are: by section of the format and by tensor.
    """
    from prunecast.compression.files.archive import describe_payloads, open_archive
    from prunecast.compression.files.formats import open_tensors
    from prunecast.compression.files.inspection import inspect_archive, inspect_tensors

    outlines: list[Outline] = []
    source: TensorFile
    if file.suffix.lower() in (".safetensors", ".npz", ".onnx"):
        source = open_tensors(file, max_bytes=max_bytes)
        with file_progress() as progress:
            found = inspect_tensors(source, on_progress=progress)
    else:
        outlines = describe_payloads(file)
        if any(o.needs for o in outlines):
            _show_outlines(file, outlines, as_json)
            return
        source = archive = open_archive(file, max_bytes=max_bytes)
        with file_progress() as progress:
            found = inspect_archive(archive, on_progress=progress)
    if as_json:
        show(_inspected(source, found, outlines))
    elif outlines:
        _show_archive(source, found, outlines)
    else:
        _show_tensors(source, found)


def _inspected(source: TensorFile, found: Inspection, outlines: list[Outline]) -> dict[str, Any]:
    return {
        "file": str(source.path),
        "kind": source.kind,
        "payloads": [_outline(o) for o in outlines],
        "raw_bytes": source.nbytes,
        "zlib_bytes": found.zlib,
        "coded_bytes": found.nbytes,
        "common_bytes": found.common,
        "elements": source.size,
        "sections": found.sections,
        "metadata": source.metadata,
        "graph_bytes": None if source.graph is None else len(source.graph),
        "tensors": [
            {
                "name": name,
                "dtype": t.spec.dtype,
                "shape": list(t.spec.shape),
                "raw_bytes": t.spec.nbytes,
                "zeros": t.zeros,
                "entropy_bits": t.entropy,
                "step": t.step,
                "coded_bytes": t.nbytes,
                "bits_per_element": 8 * t.nbytes / t.spec.size if t.spec.size else None,
                "shared": t.shared,
                "sections": dict(t.sections),
            }
            for name, t in found.tensors.items()
        ],
    }


def _outline(outline: Outline) -> dict[str, Any]:
    return {
        "version": ".".join(map(str, outline.version)),
        "needs": list(outline.needs),
        "context_tag": outline.context_tag.hex(),
        "bytes": outline.nbytes,
    }


def _show_outlines(file: Path, outlines: list[Outline], as_json: bool) -> None:
    if as_json:
        show({"file": str(file), "payloads": [_outline(o) for o in outlines]})
        return
    for o in outlines:
        say(
            f"{file}: a payload of {o.nbytes:,} bytes, format {'.'.join(map(str, o.version))}, "
            f"coded against {' and '.join(o.needs) or 'nothing'}"
            + (f" with the tag {o.context_tag.hex()}." if o.needs else ".")
        )
    say(
        "Its tensors can be read only with that context, which sender and receiver hold: "
        "prunecast.compression.codec.measure_costs(payload, context=...)."
    )


def _share(part: int, whole: int) -> str:
    return percent(part / max(whole, 1))


def _show_costs(
    found: Inspection,
    cells: Mapping[Column, Callable[[InspectedTensor], str]],
    total: Sequence[str] = (),
) -> None:
    """A table of all tensors, and of what they have in common, with the share of each."""
    cells = {
        Column("shape"): lambda t: shape_text(t.spec.shape),
        Column("dtype"): lambda t: short_dtype(t.spec.dtype),
        **cells,
        Column("bits"): lambda t: bits_text(t.nbytes, t.spec.size),
        Column("share"): lambda t: _share(t.nbytes, found.nbytes),
    }
    rows = [[name, *(cell(t) for cell in cells.values())] for name, t in found.tensors.items()]
    common = {"coded": bytes_text(found.common), "share": _share(found.common, found.nbytes)}
    rows.append(["in common", *(common.get(column.name, "") for column in cells)])
    print_table(make_console(), [Column("tensor"), *cells], rows, total=total)


def _show_tensors(source: TensorFile, found: Inspection) -> None:
    total = [
        count_text(len(found.tensors), "tensor"), f"{source.size:,}", "", "", "",
        bytes_text(source.nbytes), bytes_text(found.nbytes),
        bits_text(found.nbytes, source.size), "",
    ]  # fmt: skip
    cells: dict[Column, Callable[[InspectedTensor], str]] = {
        Column("zeros"): lambda t: percent(t.zeros or 0),
        Column("H0"): lambda t: f"{t.entropy or 0:.2f}",
        Column("raw", wide_only=True): lambda t: bytes_text(t.spec.nbytes),
        Column("coded"): lambda t: bytes_text(t.nbytes),
    }
    _show_costs(found, cells, total)
    plain = source.nbytes + len(source.graph or b"")
    sizes = {"plain": plain, "zlib -6": found.zlib or 0, "coded": found.nbytes}
    for label, size in sizes.items():
        ratio = ratio_text(plain / size) if size else "–"
        say(f"{label:8} {size:>15,} bytes {ratio:>7}")
    say(
        "",
        "H0: zeroth-order entropy in bits per element, of the values of integers and of the "
        "bytes of floats. bits: per element. Coded losslessly; "
        "prunecast compress --error 0.01 would quantise.",
    )


def _show_archive(source: TensorFile, found: Inspection, outlines: list[Outline]) -> None:
    version = ".".join(map(str, outlines[0].version))
    say(
        f"{source.path}: format {version}, {count_text(found.parts, 'part')}, no context needed; "
        f"{found.nbytes:,} bytes for {source.nbytes:,} "
        f"({ratio_text(source.nbytes / found.nbytes)}), "
        f"{bits_text(found.nbytes, source.size)} bits per element",
        "",
    )
    sections = [[n, f"{b:,}", _share(b, found.nbytes)] for n, b in found.sections.items() if b]
    columns = [Column("section"), Column("bytes"), Column("share")]
    print_table(make_console(), columns, sections)
    cells: dict[Column, Callable[[InspectedTensor], str]] = {
        Column("step"): lambda t: "exact" if t.step is None else f"{t.step:.3g}",
        Column("coded"): lambda t: ("~" if t.shared else "") + bytes_text(t.nbytes),
    }
    _show_costs(found, cells)
    if any(t.shared for t in found.tensors.values()):
        say("~: its share of a segment that several tensors have in common.")

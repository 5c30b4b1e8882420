"""`prunecast inspect`: what the tensors of a file are like, and what they cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunecast.cli.compress import AsJson
from prunecast.cli.console import (
    Column,
    file_progress,
    make_console,
    print_json,
    print_table,
    say,
    shape_text,
    short_dtype,
)
from prunecast.common.text import bits_text, bytes_text, count_text, percent, ratio_text

if TYPE_CHECKING:
    from prunecast.compression.codec import Outline
    from prunecast.compression.files.inspection import InspectedTensor, Inspection
    from prunecast.compression.files.tensors import TensorFile

__all__ = ["inspect"]


def inspect(
    file: Annotated[
        Path, typer.Argument(help="A .safetensors, .npz or .onnx file, or a compressed .pcc.")
    ],
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
        source = open_tensors(file)
        with file_progress() as progress:
            found = inspect_tensors(source, on_progress=progress)
    else:
        outlines = describe_payloads(file)
        if any(o.needs for o in outlines):
            _show_outlines(file, outlines, as_json)
            return
        source = archive = open_archive(file)
        with file_progress() as progress:
            found = inspect_archive(archive, on_progress=progress)
    if as_json:
        print_json(_document(source, found, outlines))
    elif outlines:
        _show_archive(source, found, outlines)
    else:
        _show_tensors(source, found)


def _document(source: TensorFile, found: Inspection, outlines: list[Outline]) -> dict[str, Any]:
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
        "remarks": source.remarks,
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
        print_json({"file": str(file), "payloads": [_outline(o) for o in outlines]})
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
    sizes = {"plain": source.nbytes, "zlib -6": found.zlib or 0, "coded": found.nbytes}
    for label, size in sizes.items():
        ratio = ratio_text(source.nbytes / size) if size else "–"
        say(f"{label:8} {size:>15,} bytes {ratio:>7}")
    say(
        "",
        "H0: zeroth-order entropy in bits per element, of the values of integers and of the "
        "bytes of floats. bits: per element. Coded losslessly; "
        "prunecast compress --error 0.01 would quantise.",
        *(f"Note: {remark}." for remark in source.remarks),
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

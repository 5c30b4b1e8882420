"""`prunecast decompress`: the tensors of a compressed file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prunecast.cli.compress import AsJson, Force, refuse_to_overwrite
from prunecast.cli.console import make_console
from prunecast.cli.tables import file_progress, say
from prunecast.common.text import count_text

__all__ = ["decompress"]


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
    refuse_to_overwrite(output, force)
    with file_progress(make_console(stderr=True)) as progress:
        restore_file(archive, output, on_progress=progress)
    dropped = sorted(archive.metadata) if suffix == ".npz" else []
    if as_json:
        result = {
            "file": str(file),
            "output": str(output),
            "tensors": len(archive),
            "raw_bytes": archive.nbytes,
            "quantised": sorted(archive.steps),
            "metadata_left_out": dropped,
        }
        typer.echo(json.dumps(result))
        return
    console = make_console()
    quantised = f", {len(archive.steps)} of them quantised" if archive.steps else ""
    say(
        console,
        f"{output}: {count_text(len(archive), 'tensor')}, {archive.nbytes:,} bytes{quantised}.",
    )
    if dropped:
        say(console, f"Note: .npz has no place for the metadata {', '.join(dropped)}.")
